"""torch.distributed.optim: its table of functional optimizers, and its DistributedOptimizer without TorchScript."""

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

from functional_adam.interop.adapter import _FunctionalAdam, _FunctionalAdamW


def register() -> None:
    """Make the adapters known to torch as functional optimizers. Calling it again does nothing.

    `torch.distributed.optim.as_functional_optim`, DistributedDataParallel's fused optimizers and
    `ZeroRedundancyOptimizer(overlap_with_ddp=True)` then take `_FunctionalAdam` and `_FunctionalAdamW`. Torch's entries
    for its own classes stay. `ZeroRedundancyOptimizer` without overlap refuses every registered optimizer: construct it
    before, or after :func:`unregister`.

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
    """Undo :func:`register`. Optimizers made in between continue to work.

    Example:
        >>> from functional_adam.distributed import unregister
        >>> unregister()
    """
    for adapter in _ADAPTERS:
        _table().pop(adapter, None)


def distributed_optimizer(optimizer_class: type, params_rref: Sequence[object], *args: object, **kwargs: object) -> Any:
    """`torch.distributed.optim.DistributedOptimizer`, which runs `optimizer_class` where the parameters live.

    On each owner torch sets `.grad` from the distributed autograd context and calls `step()`. A parameter that the
    context does not reach keeps its earlier gradient, as with any optimizer there.

    Args:
        optimizer_class: `_FunctionalAdam` or `_FunctionalAdamW`; each owner must be able to import it.
        params_rref: RRefs to local and remote parameters.
        *args: arguments of the adapter after its parameters.
        **kwargs: the same by name.

    Returns:
        The optimizer; its `step(context_id)` updates all parameters.

    Raises:
        RuntimeError: this torch was built without RPC, or no longer has a DistributedOptimizer.

    Example:
        >>> from functional_adam.distributed import distributed_optimizer
        >>> def make(rrefs):  # after torch.distributed.rpc.init_rpc
        ...     return distributed_optimizer(_FunctionalAdam, rrefs, lr=0.5)

    Source: `torch/distributed/optim/optimizer.py`.
    """
    torch_class = getattr(_import_optim(), "DistributedOptimizer", None)
    if torch_class is None:
        raise RuntimeError(
            "This torch has no torch.distributed.optim.DistributedOptimizer: it was built without RPC, or dropped it. "
            "Run the optimizer on the owner of the parameters, or use DistributedDataParallel with step_in_ddp."
        )
    return torch_class(optimizer_class, list(params_rref), *args, **kwargs)


_ADAPTERS = (_FunctionalAdam, _FunctionalAdamW)


def _import_optim() -> object:
    """`torch.distributed.optim`, imported when needed: it takes a second, and torch warns of its own TorchScript."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module("torch.distributed.optim")
    except ImportError as error:
        raise RuntimeError(
            f"This torch has no torch.distributed.optim ({error}). Use a build of torch with distributed support."
        ) from None


def _table() -> dict[type, type]:
    table = getattr(getattr(_import_optim(), "utils", None), "functional_optim_map", None)
    if table is None:
        raise RuntimeError(
            "This torch has no torch.distributed.optim.utils.functional_optim_map to register with. "
            "Use step_in_ddp instead of DistributedDataParallel's fused optimizers."
        )
    return table
