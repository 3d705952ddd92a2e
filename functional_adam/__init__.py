"""A pure Adam for PyTorch: immutable state, one update function, torch's own kernels underneath."""

from functional_adam import transformation
from functional_adam.adapter import _FunctionalAdam, _FunctionalAdamW
from functional_adam.checkpoint import state_from_dict, state_to_dict
from functional_adam.explanation import explain
from functional_adam.hparams import AdamHparams
from functional_adam.rules import GrowingGraphWarning
from functional_adam.state import AdamState, adam_init
from functional_adam.torch_state import from_torch_state_dict, to_torch_state_dict
from functional_adam.update import adam_update

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
