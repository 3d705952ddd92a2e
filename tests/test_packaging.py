"""What is installed says the truth about itself: version, dependencies, licence, types."""

import re
from importlib import metadata, resources
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import functional_adam
from tests import typed_client

ROOT = Path(__file__).parent.parent
METADATA = metadata.metadata("functional_adam")
REQUIREMENTS = [Requirement(text) for text in METADATA.get_all("Requires-Dist", [])]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def only_match(pattern: str, name: str) -> str:
    (match,) = re.findall(pattern, read(name), flags=re.MULTILINE)
    return match


def test_the_version_stands_in_one_place():
    assert metadata.version("functional_adam") == functional_adam.__version__, "install the package again"
    assert 'dynamic = ["version"]' in read("pyproject.toml")
    assert not re.search(r"^version:", read("CITATION.cff"), flags=re.MULTILINE)


def test_the_changelog_begins_with_this_version_or_what_is_unreleased():
    headings = re.findall(r"^## (.*)", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0].split()[0].strip("[]") == functional_adam.__version__


def test_only_torch_and_optree_are_required():
    assert {requirement.name for requirement in REQUIREMENTS if requirement.marker is None} == {"torch", "optree"}


def test_the_lowest_python_is_one_number():
    lowest = only_match(r'^requires-python = ">=([\d.]+)"', "pyproject.toml")
    assert SpecifierSet(METADATA["Requires-Python"]) == SpecifierSet(f">={lowest}")
    assert only_match(r'^target-version = "py(\d+)"', "pyproject.toml") == lowest.replace(".", "")
    assert set(re.findall(r'^python_?[vV]ersion = "(.*)"', read("pyproject.toml"), flags=re.MULTILINE)) == {lowest}
    assert f"Python {lowest} or newer" in read("README.md")


def test_classifiers_name_pythons_that_are_allowed():
    pythons = [
        name.rpartition(" ")[2]
        for name in METADATA.get_all("Classifier", [])
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", name)
    ]
    assert pythons
    assert all(version in SpecifierSet(METADATA["Requires-Python"]) for version in pythons)


def test_the_licence_is_one():
    assert METADATA["License-Expression"] == "BSD-3-Clause"
    assert METADATA.get_all("License-File") == ["LICENSE"]
    (shipped,) = (file for file in metadata.files("functional_adam") or [] if file.name == "LICENSE")
    assert shipped.read_text() == read("LICENSE")
    assert read("LICENSE").startswith("BSD 3-Clause License")
    assert only_match(r"^license: (.*)", "CITATION.cff") == METADATA["License-Expression"]
    assert "Licence: BSD-3-Clause" in read("README.md")


def test_type_checkers_see_the_package_as_typed():
    assert "Typing :: Typed" in METADATA.get_all("Classifier", [])
    assert resources.files("functional_adam").joinpath("py.typed").is_file()


def test_the_typed_client_runs():
    typed_client.main()
