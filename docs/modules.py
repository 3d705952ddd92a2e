"""The modules of the package and what each imports of ours, read from the source: `python docs/modules.py`.

The documentation shows them as a table, and a test checks that the graph has no cycle, that folders are floors, and
how long functions are.
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parent.parent / "functional_adam"
FLOORS = ("tensors", "adam", "autodiff", "call", "interop", "distributed")
"""The folders. A folder imports only from itself and from those above it in this list; `""` is the face."""


class Module(NamedTuple):
    """A file of the package."""

    name: str  # such as "call.plan"
    what: str  # the first line of its docstring
    imports: frozenset[str]
    functions: Mapping[str, int]  # lines of each, without its docstring

    @property
    def folder(self) -> str:
        """The floor on which the module lives, or "" for the face."""
        return self.name.rpartition(".")[0]


def modules(package: Path = PACKAGE) -> dict[str, Module]:
    """All modules by their names, those of the lowest floor first."""
    files = sorted(package.rglob("*.py"))
    names = {path: ".".join(path.relative_to(package).with_suffix("").parts) for path in files}
    found = {name: _module(name, ast.parse(path.read_text()), {*names.values()}) for path, name in names.items()}
    order = [*FLOORS, ""]
    return dict(sorted(found.items(), key=lambda item: (order.index(item[1].folder), item[0])))


def levels(graph: Mapping[str, Module]) -> dict[str, int]:
    """On which level each module stands: 1 if it imports nothing of ours, else one above all that it imports."""
    found: dict[str, int] = {}

    def level(name: str, importers: tuple[str, ...]) -> int:
        if name in importers:
            raise ValueError(f"a cycle of imports: {' -> '.join((*importers, name))}")
        if name not in found:
            found[name] = 1 + max((level(other, (*importers, name)) for other in graph[name].imports), default=0)
        return found[name]

    for name in graph:
        level(name, ())
    return found


def table(graph: Mapping[str, Module]) -> str:
    """The modules as a table in Markdown, without those that only gather names."""
    level = levels(graph)
    rows = ["| level | module | what it is for | imports |", "|---|---|---|---|"]
    for name, module in graph.items():
        if not name.endswith("__init__") and module.folder:
            imported = ", ".join(f"`{other}`" for other in sorted(module.imports)) or "nothing of ours"
            rows.append(f"| {level[name]} | `{name}` | {module.what} | {imported} |")
    return "\n".join(rows)


def _module(name: str, tree: ast.Module, names: set[str]) -> Module:
    imported = {
        node.module.removeprefix("functional_adam.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("functional_adam.")
    }
    functions = {x.name: _length(x) for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
    what = (ast.get_docstring(tree) or "").split("\n")[0]
    return Module(name, what, frozenset(imported & names), functions)


def _length(function: ast.FunctionDef) -> int:
    has_docstring = ast.get_docstring(function) is not None and len(function.body) > 1
    return (function.end_lineno or 0) - function.body[has_docstring].lineno + 1


if __name__ == "__main__":
    print(table(modules()))
