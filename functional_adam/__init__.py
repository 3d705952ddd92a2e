"""A pure Adam for PyTorch: immutable state, one update function, torch's own kernels underneath."""

from functional_adam.adapter import _FunctionalAdam, _FunctionalAdamW
from functional_adam.hparams import AdamHparams
from functional_adam.state import AdamState, adam_init
from functional_adam.update import adam_update

__all__ = ["AdamHparams", "AdamState", "_FunctionalAdam", "_FunctionalAdamW", "adam_init", "adam_update"]
__version__ = "0.1.0"
