"""The import graph is the one written here, importing is light and silent, and the public names are these."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import functional_adam

PACKAGE = Path(functional_adam.__file__).parent

# Each module and what it may import of ours: a directed graph without cycles, lowest first.
IMPORTS = {
    "layouts": set(),
    "tracking": set(),
    "trees": set(),
    "hparams": {"layouts", "tracking"},
    "equations": {"hparams", "layouts"},
    "scalars": {"equations", "hparams"},
    "derivatives": {"equations", "hparams", "scalars"},
    "leaves": {"equations", "layouts", "tracking", "trees"},
    "state": {"hparams", "leaves", "trees"},
    "recycling": {"layouts"},
    "traits": {"leaves", "recycling", "tracking"},
    "donation": {"leaves", "tracking", "traits", "trees"},
    "kernels": {"equations", "hparams", "leaves"},
    "planning": {"equations", "hparams", "kernels", "layouts", "leaves", "recycling", "tracking"},
    "arguments": {"donation", "equations", "hparams", "leaves", "state", "traits", "trees"},
    "packing": {"equations", "hparams", "leaves", "planning", "recycling", "tracking"},
    "batching": {"equations", "hparams", "leaves", "packing", "planning", "tracking"},
    "pieces": set(),
    "rules": {
        "batching",
        "derivatives",
        "equations",
        "hparams",
        "leaves",
        "packing",
        "pieces",
        "recycling",
        "scalars",
        "tracking",
    },
    "dispatch": {"arguments", "donation", "equations", "hparams", "leaves", "planning", "tracking"},
    "update": {
        *("arguments", "dispatch", "donation", "equations", "hparams", "leaves", "planning", "recycling", "rules"),
        "state",
    },
    "explanation": {"arguments", "dispatch", "equations", "hparams", "leaves", "planning", "state"},
    "transformation": {"donation", "hparams", "leaves", "planning", "state", "tracking", "trees", "update"},
    "checkpoint": {"donation", "hparams", "leaves", "state"},
    "torch_param_groups": {"checkpoint", "hparams"},
    "torch_state": {"arguments", "checkpoint", "hparams", "state", "torch_param_groups"},
    "param_groups": {"donation", "hparams", "planning", "state", "update"},
    "adapter": {"param_groups"},
    "distributed.registration": {"adapter"},
    "distributed.rpc": {"distributed.registration"},
    "distributed.overlap": {"adapter"},
    "distributed.backward": {"adapter"},
    "distributed.__init__": {
        "distributed.backward",
        "distributed.overlap",
        "distributed.registration",
        "distributed.rpc",
    },
    "__init__": {"adapter", "checkpoint", "explanation", "hparams", "state", "torch_state", "update"},
}
PACKAGES = [module for module in IMPORTS if module.endswith("__init__")]

PUBLIC_NAMES = {
    *("AdamHparams", "AdamState", "_FunctionalAdam", "_FunctionalAdamW", "adam_init", "adam_update", "explain"),
    *("from_torch_state_dict", "state_from_dict", "state_to_dict", "to_torch_state_dict"),
    "transformation",
}

# Private torch names by the one file that may use them.
PRIVATE_TORCH = {
    "tracking": ('torch, "_C"', "_current_level"),
    "traits": ("torch._C._dynamo",),
    "kernels": ("_fused_adam", "_foreach_add"),
    "recycling": ("_foreach_clone",),
    "adapter": ("_opt_called",),
}


def source_of(module: str) -> str:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text()


def imports_of(module: str) -> set[str]:
    tree = ast.parse(source_of(module))
    return {
        node.module.removeprefix("functional_adam.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("functional_adam.")
    }


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_import_graph_is_the_written_one():
    modules = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    assert {".".join(module.parts) for module in modules} == IMPORTS.keys()
    assert {module: imports_of(module) for module in IMPORTS} == IMPORTS


def test_import_graph_has_no_cycle():
    seen: set[str] = set()
    for module, imported in IMPORTS.items():
        assert imported <= seen, f"{module} imports a module that stands above it"
        seen.add(module)


@pytest.mark.parametrize("module", [name for name in IMPORTS if name not in PACKAGES])
def test_each_module_says_what_it_is_for(module: str):
    docstring = ast.get_docstring(ast.parse(source_of(module)))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", "?"))


@pytest.mark.parametrize(("owner", "names"), PRIVATE_TORCH.items())
def test_private_torch_names_stand_in_one_file(owner: str, names: tuple[str, ...]):
    for module in IMPORTS:
        text = source_of(module)
        for name in names:
            assert (name in text) == (module == owner), f"{name} in {module}"


def test_public_names_are_the_written_ones():
    assert set(functional_adam.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(functional_adam, name).__doc__


@pytest.mark.parametrize("package", ["functional_adam", "functional_adam.distributed"])
def test_import_is_light_and_silent(package: str):
    out = run_python(
        f"import sys, torch; before = set(sys.modules); import {package};"
        "new = set(sys.modules) - before;"
        "print(sorted(n for n in new if n.startswith(('torch.distributed', 'numpy'))))"
    )
    assert out.strip() == "[]"


def test_import_registers_only_its_own_pytree_node():
    out = run_python(
        "import torch, optree, torch.utils._pytree as p; before = set(p.SUPPORTED_NODES);"
        "optree_before = set(optree.register_pytree_node.get());"
        "import functional_adam;"
        "print([c.__name__ for c in set(p.SUPPORTED_NODES) - before],"
        "[c.__name__ for c in set(optree.register_pytree_node.get()) - optree_before])"
    )
    assert out.strip() == "['AdamHparams'] ['AdamHparams']"


def test_the_page_shows_the_import_graph():
    page = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
    shown: dict[str, set[str]] = {}
    for line in page.split("| module | imports |")[1].splitlines():
        if line.startswith("| `"):
            modules, imported = line.strip("| ").split(" | ")
            for module in modules.split(", "):
                shown[module.strip("`")] = {name.strip("`") for name in imported.split(", ") if name.startswith("`")}
    assert shown == {module: imported for module, imported in IMPORTS.items() if module not in PACKAGES}
