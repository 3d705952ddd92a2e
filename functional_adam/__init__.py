"""A pure Adam for PyTorch: immutable state, one update function, torch's own kernels underneath."""

import importlib
from types import ModuleType

from functional_adam import recycling as recycling
from functional_adam import transformation
from functional_adam.adam.pytrees import AdamHparams, AdamState, adam_init
from functional_adam.autodiff.function import GrowingGraphWarning
from functional_adam.call.explanation import explain
from functional_adam.call.update import adam_update
from functional_adam.interop.adapter import _FunctionalAdam, _FunctionalAdamW
from functional_adam.interop.checkpoint import state_from_dict, state_to_dict
from functional_adam.interop.torch_state import from_torch_state_dict, to_torch_state_dict

__all__ = [
    "AdamHparams",
    "AdamState",
    "GrowingGraphWarning",
    "_FunctionalAdam",
    "_FunctionalAdamW",
    "adam_init",
    "adam_update",
    "explain",
    "from_torch_state_dict",
    "state_from_dict",
    "state_to_dict",
    "to_torch_state_dict",
    "transformation",
]
__version__ = "0.1.0"
_SUBMODULES = ("distributed", "recycling", "transformation")  # those that are public


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES, *(name for name in globals() if name[:2] == name[-2:] == "__")})


def _lazily(name: str) -> ModuleType:
    if name == "distributed":
        return importlib.import_module("functional_adam.distributed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Not by a `def`, which would let type checkers take any name for a module.
globals()["__getattr__"] = _lazily
