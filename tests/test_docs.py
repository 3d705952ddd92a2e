"""Every example in docstrings, the README and docs/ runs, every command and link is right, every name has its entry."""

import doctest
import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

import functional_adam

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
MODULES = sorted(module.name for module in pkgutil.walk_packages(functional_adam.__path__, "functional_adam."))
SUBMODULES = [f"functional_adam.{name}" for name in ("distributed", "recycling", "transformation")]

EXTRAS = set(metadata.metadata("functional_adam").get_all("Provides-Extra", []))
RESULTS = [f"functional_adam.call.explanation.{name}" for name in ("Explanation", "LeafGroup", "NewMemory")]

COMMANDS = {"console", "bash", "indented"}
DIRECTIVES = {"{include}", "{toctree}", "{eval-rst}"}
TOOLS = {"basedpyright", "coverage", "mutmut", "mypy", "ruff"}
FOREIGN_MODULES = {"pip", "pytest", "sphinx"}


def each_page(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=[page.name for page in pages])


def tokens_of(text: str) -> list[Token]:
    """What a Markdown parser sees, inline text included."""
    blocks = MarkdownIt("commonmark").enable("table").parse(text)
    return [token for block in blocks for token in (block, *(block.children or ()))]


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each block of code."""
    return [
        ("indented" if token.type == "code_block" else token.info.partition(" ")[0], token.content)
        for token in tokens_of(page.read_text())
        if token.type in ("fence", "code_block")
    ]


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of each command, in blocks and within a line."""
    texts = [text for language, text in blocks_of(page) if language in COMMANDS]
    # What follows a prompt, if there is one; else everything.
    texts = ["\n".join(re.findall(r"^\$ ((?:.*\\\n)*.*)", x, flags=re.MULTILINE)) or x for x in texts]
    inline = [token.content for token in tokens_of(page.read_text()) if token.type == "code_inline"]
    texts += [text for text in inline if text.startswith("python ")]
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                yield words


def flags_of(script: Path) -> set[str]:
    """The options that `script` gives to argparse."""
    return {"--help", "-h", *re.findall(r'\.add_argument\(\s*"(-[\w-]+)"', script.read_text())}


def check_command(words: list[str]) -> None:
    """What is run exists, and accepts the options; extras to be installed exist."""
    program, *arguments = words
    if program != "python":
        assert program in TOOLS or (ROOT / program).is_file(), words
    elif arguments[0] == "-c":
        exec(arguments[1], {})
    elif arguments[0] == "-m" and arguments[1] in FOREIGN_MODULES:
        for extras in re.findall(r"\.\[(.*)\]", " ".join(arguments)):
            assert set(extras.split(",")) <= EXTRAS, words
    else:
        script = ROOT / arguments[0]
        if arguments[0] == "-m":
            path = ROOT / arguments[1].replace(".", "/")
            script = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert script.is_file(), words
        options = {word.partition("=")[0] for word in arguments if word.startswith("-") and word != "-m"}
        assert options <= flags_of(script), words


def anchors_of(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    tokens = tokens_of(page.read_text())
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links_of(text: str) -> list[str]:
    """Targets within the repository."""
    targets = [token.attrGet("href") or token.attrGet("src") for token in tokens_of(text)]
    return [str(target) for target in targets if target and not re.match(r"\w+:", str(target))]


def test_docstring_examples_run_and_every_public_name_has_one():
    for name in MODULES:
        module = importlib.import_module(name)
        assert doctest.testmod(module, extraglobs=dict(vars(functional_adam), torch=torch)).failed == 0, name
    finder = doctest.DocTestFinder(recurse=False)
    for name in functional_adam.__all__:
        found = finder.find(getattr(functional_adam, name), name)
        assert any(test.examples for test in found), f"{name} has no example"


@pytest.fixture
def torn_down() -> Iterator[None]:
    """No process group outlives a page that failed half-way."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@each_page(PAGES)
@pytest.mark.usefixtures("torn_down")
def test_python_blocks_run_and_print_what_follows(page: Path, capsys: pytest.CaptureFixture[str]):
    namespace: dict[str, object] = {}
    torch.manual_seed(0)
    printed = ""
    for language, text in blocks_of(page):
        if printed:
            assert (language, text) == ("text", printed)
            printed = ""
        elif language == "python":
            exec(compile(text, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
    assert not printed


@each_page(TEXTS)
def test_commands_can_be_run_and_links_lead_somewhere(page: Path):
    # No block escapes: text is what nothing of ours could run, code of another library or output.
    assert {language for language, _ in blocks_of(page)} <= {"python", "text"} | COMMANDS | DIRECTIVES
    for words in commands_of(page):
        check_command(words)
    for link in links_of(page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert target.resolve().is_relative_to(ROOT), link
        assert not anchor or anchor in anchors_of(target), link
    if page in PAGES:
        assert [x for x in page.read_text().splitlines() if len(x) > 120 and not x.startswith("| ")] == []


def test_readme_links_lead_somewhere_in_the_site():
    # The first page of the site is the README up to that heading, and takes only what lies under docs/.
    assert '{include} ../README.md\n:end-before: "## Documentation"\n' in (DOCS / "index.md").read_text()
    shown, _ = (ROOT / "README.md").read_text().split("\n## Documentation\n")
    assert [link for link in links_of(shown) if not link.startswith(("docs/", "#"))] == []


def public_names_of(module_name: str) -> set[str]:
    module = importlib.import_module(module_name)
    own = {name for name, x in vars(module).items() if getattr(x, "__module__", None) == module_name}
    return {f"{module_name}.{name}" for name in getattr(module, "__all__", own) if not name.startswith("_")}


def test_the_api_page_has_every_public_name_once():
    shown = re.findall(r"^\.\. auto\w+:: (\S+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    top = {f"functional_adam.{name}" for name in functional_adam.__all__}
    expected = top.union(RESULTS, SUBMODULES, *map(public_names_of, SUBMODULES))
    full = [name if name.startswith("functional_adam.") else f"functional_adam.{name}" for name in shown]
    assert sorted(full) == sorted(expected)
