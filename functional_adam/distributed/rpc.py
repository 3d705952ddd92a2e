"""torch.distributed.optim.DistributedOptimizer around an adapter, without TorchScript."""

from collections.abc import Sequence
from typing import Any

from functional_adam.distributed.registration import import_optim


def distributed_optimizer(optimizer_class: type, params_rref: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """`torch.distributed.optim.DistributedOptimizer`, which runs `optimizer_class` where the parameters live.

    On each owner torch sets `.grad` from the distributed autograd context and calls `step()`. As with any optimizer
    there, a parameter that a context does not reach keeps the gradient of the one before.

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
    torch_class = getattr(import_optim(), "DistributedOptimizer", None)
    if torch_class is None:
        raise RuntimeError(
            "This torch has no torch.distributed.optim.DistributedOptimizer: it was built without RPC, or has removed "
            "it. Run the optimizer on the owner of the parameters, or use DistributedDataParallel with step_in_ddp."
        )
    return torch_class(optimizer_class, list(params_rref), *args, **kwargs)
