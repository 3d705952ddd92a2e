"""Every example in docstrings, the README and docs/ runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import functional_adam

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(module.name for module in pkgutil.walk_packages(functional_adam.__path__, "functional_adam."))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs=dict(vars(functional_adam), torch=torch)).failed == 0


@pytest.mark.parametrize("name", functional_adam.__all__)
def test_public_docstrings_have_an_example(name: str):
    finder = doctest.DocTestFinder(recurse=False)
    public = getattr(functional_adam, name)
    assert any(test.examples for test in finder.find(public, name)), f"{name} has no example"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def test_readme_has_its_example():
    text = (ROOT / "README.md").read_text()
    first = re.search(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert first
    assert 8 <= len(first.group(1).strip().splitlines()) <= 16
