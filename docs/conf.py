"""The documentation site: `python -m sphinx -W --keep-going -n -b html docs build/docs`. Needs no network."""

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import functional_adam

sys.path.insert(0, str(Path(__file__).parent))
import modules

project = "functional_adam"
version = release = functional_adam.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links such as gotchas.md#memory, as in the repository
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # those of signatures: see written_signature
napoleon_custom_sections = ["Source"]
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
nitpick_ignore_regex = [
    # What other libraries document: torch and the standard library, in signatures also without the module.
    ("py:.*", r"(torch|contextlib|collections)\..*|Tensor|ExitStack"),
    # Names for types, in signatures.
    ("py:class", "Params|Group|Value"),
]

highlight_language = "none"  # unless a block says otherwise

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"


def write_docstring(*event: Any) -> None:
    """Before napoleon: code in single backticks, as in Markdown, and no type in the text of an attribute."""
    _, what, _, _, _, lines = event
    lines[:] = [re.sub(r"(?<![`:\w])`([^`]+)`(?!`)", r"``\1``", line) for line in lines]
    if what == "attribute":
        lines[:0] = ["..", ""]  # a comment, or what stands before a colon is taken for a type


def written_signature(*event: Any) -> tuple[str | None, str | None] | None:
    """Types by the names that the source gives them: `TensorTree`, not `Any`."""
    _, _, _, obj, _, signature, _ = event
    if signature is None:
        return None
    node = ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    if isinstance(node, ast.ClassDef):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                return f"({arguments_of(item)})", None
        fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
        is_keyword_only = "kw_only" in "".join(map(ast.unparse, node.decorator_list))
        return f"({', '.join(['*'] * is_keyword_only + fields)})" if fields else "", None
    assert isinstance(node, ast.FunctionDef)
    return f"({arguments_of(node)})", node.returns and ast.unparse(node.returns)


def show_modules(_: Sphinx, page: str, source: list[str]) -> None:
    """The table of modules, read from the source."""
    if page == "architecture":
        mark = "<!-- The documentation shows the table of modules here. -->"
        assert mark in source[0]
        source[0] = source[0].replace(mark, modules.table(modules.modules()))


def arguments_of(node: ast.FunctionDef) -> str:
    """As in the source, without self."""
    return re.sub(r"^self(, )?", "", ast.unparse(node.args))


def show_inline_math(writer: Any, node: nodes.math) -> None:
    """A formula within a line."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def show_math(writer: Any, node: nodes.math_block) -> None:
    """A formula of its own, in a box that scrolls."""
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", show_modules)
    app.connect("autodoc-process-docstring", write_docstring, priority=400)  # napoleon has 500
    app.connect("autodoc-process-signature", written_signature)
    # MathML, which browsers show by themselves: no script, no font, no network.
    app.add_html_math_renderer("mathml", (show_inline_math, None), (show_math, None))
