"""A pure Adam for PyTorch: immutable state, one update function, torch's own kernels underneath."""

from functional_adam.hparams import AdamHparams
from functional_adam.state import AdamState, adam_init
from functional_adam.update import adam_update

__all__ = ["AdamHparams", "AdamState", "adam_init", "adam_update"]
__version__ = "0.1.0"
