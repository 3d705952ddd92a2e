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
    *("AdamHparams", "AdamState", "GrowingGraphWarning", "_FunctionalAdam", "_FunctionalAdamW", "adam_init"),
    *("adam_update", "explain", "from_torch_state_dict", "state_from_dict", "state_to_dict", "to_torch_state_dict"),
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
    circle = {name: reader.Module(name, "", frozenset({other}), {}) for name, other in ("ab", "bc", "ca")}
    with pytest.raises(ValueError, match=r"^a cycle of imports: a -> b -> c -> a$"):
        reader.levels(circle)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_for_stands_above_what_it_imports_and_has_functions_of_a_screen(name: str):
    floors, module = [*reader.FLOORS, ""], MODULES[name]
    above = {x for x in module.imports if floors.index(MODULES[x].folder) > floors.index(module.folder)}
    assert not above, f"{name} is on a lower floor than what it imports"
    assert {function: lines for function, lines in module.functions.items() if lines > 40} == {}
    assert module.what.endswith((".", "?"))


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


def test_public_names_are_the_written_ones_and_dir_shows_them_alone():
    assert set(functional_adam.__all__) == PUBLIC_NAMES
    assert all(getattr(functional_adam, name).__doc__ for name in PUBLIC_NAMES)
    submodules = {"distributed", "recycling", "transformation"}
    shown = dir(functional_adam)
    assert {name for name in shown if not name.startswith("__")} == PUBLIC_NAMES | submodules
    assert {"__version__", "__doc__", "__all__", "__path__"} <= {*shown}
    assert all(hasattr(functional_adam, name) for name in shown)
    with pytest.raises(AttributeError, match=r"^module 'functional_adam' has no attribute 'sgd'$"):
        functional_adam.sgd  # noqa: B018


IMPORTING = """
import sys, torch, optree, torch.utils._pytree as pytree

def loaded():
    return {name for name in sys.modules if name.startswith(("torch.distributed", "numpy"))}

def registered():
    globals_ = {(c[0] if isinstance(c, tuple) else c).__name__ for c in torch.serialization.get_safe_globals()}
    of_optree = [optree.register_pytree_node.get(namespace=name) for name in ("", "functional_adam")]
    return [{c.__name__ for c in pytree.SUPPORTED_NODES}, *({c.__name__ for c in x} for x in of_optree), globals_]

modules, classes = loaded(), registered()
import functional_adam
print(loaded() - modules, [sorted(new - old) for new, old in zip(registered(), classes)])
name = "functional_adam.distributed"
was_loaded = name in sys.modules
print(was_loaded, functional_adam.distributed is sys.modules[name], functional_adam.distributed.register.__name__)
print(loaded() - modules)
"""


def test_import_is_light_and_silent_and_registers_only_its_own_classes():
    own = ["AdamHparams"]
    assert run_python(IMPORTING).splitlines() == [
        f"set() {[own, own, own, ['AdamHparams', 'AdamState']]}",
        "False True register",  # distributed is imported when it is asked for
        "set()",
    ]


def test_trees_alone_takes_trees_apart():
    calls = {
        name
        for name in MODULES
        for node in ast.walk(ast.parse(source_of(name)))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("optree.tree_")
    }
    assert calls == {"tensors.trees"}


@pytest.mark.parametrize(("old", "name"), [("hparams", "AdamHparams"), ("state", "AdamState")])
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_file_that_names_an_old_module_is_read(old: str, name: str, weights_only: bool):
    hparams = functional_adam.AdamHparams(lr=0.5)
    given = {"AdamHparams": hparams, "AdamState": functional_adam.adam_init(torch.ones(2), hparams)}[name]
    file, earlier = io.BytesIO(), io.BytesIO()
    torch.save(given, file)
    new = f"{type(given).__module__}\n{name}".encode()
    assert file.getvalue().count(new) == 1
    # A zip checks the length and the sum of what it holds: the pickle is packed anew.
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(earlier, "w", zipfile.ZIP_STORED) as packed:
        for info in archive.infolist():
            packed.writestr(info.filename, archive.read(info).replace(new, f"functional_adam.{old}\n{name}".encode()))
    earlier.seek(0)
    assert repr(torch.load(earlier, weights_only=weights_only)) == repr(given)
