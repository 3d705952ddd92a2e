"""The import graph is the one written here, importing is light and silent, and the public names are these."""

import ast
import importlib
import importlib.util
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_adam

ROOT = Path(functional_adam.__file__).parent
PUBLIC_NAMES = {
    *(
        "AdamHparams",
        "AdamState",
        "GrowingGraphWarning",
        "_FunctionalAdam",
        "_FunctionalAdamW",
        "adam_init",
        "adam_update",
        "explain",
    ),
    *("from_torch_state_dict", "state_from_dict", "state_to_dict", "to_torch_state_dict"),
    "transformation",
}

# Private torch names by the one file that may use them.
PRIVATE_TORCH = {
    "tensors.tracking": ('torch, "_C"', "_current_level", "_len_torch_dispatch_stack", "get_interpreter_stack"),
    "autodiff.batching": ("_unwrap_batched", "_add_batch_dim", "pyfunctorch"),
    "call.facts": ("torch._C._dynamo",),
    "adam.kernels": ("_fused_adam", "_foreach_add"),
    "tensors.recycling": ("_foreach_clone",),
    "interop.adapter": ("_opt_called",),
}

# Far from where it is used: the page of the documentation is made by the same reading of the source.
READER = Path(__file__).parent.parent / "docs" / "modules.py"
spec = importlib.util.spec_from_file_location("modules", READER)
assert spec is not None
assert spec.loader is not None
reader: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)
MODULES: dict[str, Any] = reader.modules(ROOT)


def source_of(module: str) -> str:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_imports_are_a_staircase_of_at_most_eight_levels():
    level = reader.levels(MODULES)  # raises where imports go in a circle
    assert max(level[name] for name in MODULES if not name.endswith("__init__")) <= 8


def test_a_circle_of_imports_is_found():
    circle = {
        name: reader.Module(name, "", frozenset({other}), {}) for name, other in (("a", "b"), ("b", "c"), ("c", "a"))
    }
    with pytest.raises(ValueError, match=r"^a cycle of imports: a -> b -> c -> a$"):
        reader.levels(circle)


@pytest.mark.parametrize("name", MODULES)
def test_folders_are_floors(name: str):
    floors = [*reader.FLOORS, ""]
    here = floors.index(MODULES[name].folder)
    above = {other for other in MODULES[name].imports if floors.index(MODULES[other].folder) > here}
    assert not above, f"{name} is on a lower floor than what it imports"


@pytest.mark.parametrize("name", MODULES)
def test_functions_fit_on_a_screen(name: str):
    assert {function: lines for function, lines in MODULES[name].functions.items() if lines > 40} == {}


@pytest.mark.parametrize("name", MODULES)
def test_each_module_says_what_it_is_for(name: str):
    assert MODULES[name].what.endswith((".", "?"))


def test_the_table_of_modules_shows_each_of_them_once():
    lines = reader.table(MODULES).splitlines()[2:]
    shown = [line.split(" | ")[1].strip("`") for line in lines]
    assert sorted(shown) == sorted(name for name, x in MODULES.items() if x.folder and not name.endswith("__init__"))


@pytest.mark.parametrize(("owner", "names"), PRIVATE_TORCH.items())
def test_private_torch_names_stand_in_one_file(owner: str, names: tuple[str, ...]):
    for module in MODULES:
        text = source_of(module)
        for name in names:
            assert (name in text) == (module == owner), f"{name} in {module}"


def test_public_names_are_the_written_ones():
    assert set(functional_adam.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(functional_adam, name).__doc__


def test_dir_shows_the_public_names_alone():
    submodules = {"distributed", "recycling", "transformation"}
    shown = dir(functional_adam)
    assert {name for name in shown if not name.startswith("__")} == PUBLIC_NAMES | submodules
    assert {"__version__", "__doc__", "__all__", "__path__"} <= {*shown}
    assert all(hasattr(functional_adam, name) for name in shown)
    with pytest.raises(AttributeError, match=r"^module 'functional_adam' has no attribute 'sgd'$"):
        functional_adam.sgd  # noqa: B018


def test_distributed_is_imported_when_it_is_asked_for():
    out = run_python(
        "import sys, functional_adam; name = 'functional_adam.distributed'; print(name in sys.modules);"
        "print(functional_adam.distributed is sys.modules[name], functional_adam.distributed.register.__name__)"
    )
    assert out.split() == ["False", "True", "register"]


@pytest.mark.parametrize("package", ["functional_adam", "functional_adam.distributed"])
def test_import_is_light_and_silent(package: str):
    out = run_python(
        f"import sys, torch; before = set(sys.modules); import {package};"
        "new = set(sys.modules) - before;"
        "print(sorted(n for n in new if n.startswith(('torch.distributed', 'numpy'))))"
    )
    assert out.strip() == "[]"


def test_import_registers_only_its_own_classes():
    out = run_python(
        "import torch, optree, torch.utils._pytree as p; before = set(p.SUPPORTED_NODES);"
        "known = lambda name: set(optree.register_pytree_node.get(namespace=name)); optree_before = known('');"
        "safe_before = torch.serialization.get_safe_globals();"
        "import functional_adam;"
        "print([c.__name__ for c in set(p.SUPPORTED_NODES) - before],"
        "[c.__name__ for c in known('') - optree_before], [*(known('functional_adam') - known(''))]);"
        "new = {*torch.serialization.get_safe_globals()} - {*safe_before};"
        "print(sorted({(c[0] if isinstance(c, tuple) else c).__name__ for c in new}))"
    )
    assert out.splitlines() == ["['AdamHparams'] ['AdamHparams'] []", "['AdamHparams', 'AdamState']"]


def test_trees_alone_takes_trees_apart():
    calls = {
        name
        for name in MODULES
        for node in ast.walk(ast.parse(source_of(name)))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("optree.tree_")
    }
    assert calls == {"tensors.trees"}


@pytest.mark.parametrize(
    ("old", "name"), [("functional_adam.hparams", "AdamHparams"), ("functional_adam.state", "AdamState")]
)
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_file_that_names_an_old_module_is_read(old: str, name: str, weights_only: bool):
    hparams = functional_adam.AdamHparams(lr=0.5)
    given = {"AdamHparams": hparams, "AdamState": functional_adam.adam_init(torch.ones(2), hparams)}[name]
    file = io.BytesIO()
    torch.save(given, file)
    new = f"{type(given).__module__}\n{name}".encode()
    assert file.getvalue().count(new) == 1
    # A zip checks the length and the sum of what it holds: the pickle is packed anew.
    with zipfile.ZipFile(file) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    earlier = io.BytesIO()
    with zipfile.ZipFile(earlier, "w", zipfile.ZIP_STORED) as archive:
        for part, content in parts.items():
            archive.writestr(part, content.replace(new, f"{old}\n{name}".encode()))
    earlier.seek(0)
    assert repr(torch.load(earlier, weights_only=weights_only)) == repr(given)
