"""torch's table of functional optimizers: put the adapters in, and take them out again."""

import importlib
import warnings
from typing import Any

from functional_adam.interop.adapter import _FunctionalAdam, _FunctionalAdamW


def register() -> None:
    """Make the adapters known to torch as functional optimizers. Calling it again does nothing.

    `torch.distributed.optim.as_functional_optim`, DistributedDataParallel's fused optimizers and
    `ZeroRedundancyOptimizer(overlap_with_ddp=True)` then take `_FunctionalAdam` and `_FunctionalAdamW`. What torch has
    for its own classes, `torch.optim.Adam` among them, stays.

    While they are registered, `ZeroRedundancyOptimizer` without overlap refuses them, as it does every functional
    optimizer: construct it before, or after :func:`unregister`.

    Raises:
        RuntimeError: this torch has no such table.

    Example:
        >>> from functional_adam.distributed import register, unregister
        >>> register()
        >>> from torch.distributed.optim import as_functional_optim
        >>> as_functional_optim(_FunctionalAdam, lr=0.5).defaults["lr"]
        0.5
        >>> unregister()

    Source: `torch/distributed/optim/utils.py`.
    """
    # RPC on torch 2.13 scripts what a key is mapped to, unless that is the key itself.
    for adapter in _ADAPTERS:
        _table().setdefault(adapter, adapter)


def unregister() -> None:
    """Undo :func:`register`. Optimizers made in between work on.

    Example:
        >>> from functional_adam.distributed import unregister
        >>> unregister()
    """
    for adapter in _ADAPTERS:
        _table().pop(adapter, None)


_ADAPTERS = (_FunctionalAdam, _FunctionalAdamW)


def import_optim() -> Any:
    """`torch.distributed.optim`, imported when needed: it takes a second, and torch warns of its own TorchScript."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module("torch.distributed.optim")
    except ImportError as error:
        raise RuntimeError(
            f"This torch has no torch.distributed.optim ({error}). Use a build of torch with distributed support."
        ) from None


def _table() -> dict[Any, Any]:
    table = getattr(getattr(import_optim(), "utils", None), "functional_optim_map", None)
    if table is None:
        raise RuntimeError(
            "This torch has no torch.distributed.optim.utils.functional_optim_map to register with. "
            "Use step_in_ddp instead of DistributedDataParallel's fused optimizers."
        )
    return table
