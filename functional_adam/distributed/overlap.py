"""DistributedDataParallel with the update in its communication hook, bucket by bucket, while backward still runs."""

import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functional_adam.interop.adapter import _FunctionalAdam, check_adapter

CommHook: TypeAlias = Callable[..., "torch.futures.Future[Tensor]"]
"""`hook(state, bucket)`, for `DistributedDataParallel.register_comm_hook`."""


def hook_then_step(hook: CommHook, optimizer: _FunctionalAdam) -> CommHook:
    """A communication hook that runs `hook` and then updates the parameters of the bucket.

    Parameters that the optimizer does not have are left alone, unless it has none at all. Hooks see each parameter of
    a bucket, so one that no process used counts as one whose gradient is 0.

    Args:
        hook: reduces a bucket of gradients, such as torch's `allreduce_hook` or `fp16_compress_hook`.
        optimizer: updates the parameters.

    Returns:
        A hook of the same kind, for the same state.

    Raises:
        TypeError: `optimizer` is of another type.

    Example:
        >>> from functional_adam.distributed import hook_then_step
        >>> from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
        >>> hook = hook_then_step(fp16_compress_hook, _FunctionalAdam([torch.ones(2)]))

    Source: the contract of `torch.nn.parallel.DistributedDataParallel.register_comm_hook`.
    """
    check_adapter(optimizer)

    # DistributedDataParallel looks at these annotations.
    def reduce_and_step(
        state: object,
        bucket: torch.distributed.GradBucket,  # pyright: ignore[reportPrivateImportUsage] (as torch documents it)
    ) -> torch.futures.Future[Tensor]:
        def step(reduced: "torch.futures.Future[Any]") -> Tensor:
            buffer: Tensor = bucket.buffer()
            value = reduced.value()
            value = value if isinstance(value, Tensor) else value[0]
            if value is not buffer:
                buffer.copy_(value.view_as(buffer))
            own = {id(param) for group in optimizer.param_groups for param in group["params"]}
            pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
            params, grads = zip(*((p, g if not own or id(p) in own else None) for p, g in pairs), strict=True)
            optimizer.step_params(params, grads)
            return buffer

        return hook(state, bucket).then(step)

    # DistributedDataParallel logs the name of its hook.
    reduce_and_step.__qualname__ = f"{reduce_and_step.__name__}[{getattr(hook, '__qualname__', hook)}]"
    return reduce_and_step


def step_in_ddp(
    ddp: torch.nn.parallel.DistributedDataParallel,
    optimizer: _FunctionalAdam,
    *,
    hook: CommHook | None = None,
    state: object = None,
) -> None:
    """Let every `backward()` of `ddp` update the parameters too, as soon as the gradients of a bucket are reduced.

    The result is that of `backward()` and then `optimizer.step()`: call no step of your own. Gradients stay in `.grad`,
    so `zero_grad` is needed as ever. Under `ddp.no_sync()` gradients are summed, and nothing is updated.

    Args:
        ddp: the wrapped module, without a communication hook so far.
        optimizer: with the parameters of `ddp`, or with none, which means all of them.
        hook: reduces the gradients of a bucket; by default torch's `allreduce_hook`, the mean over processes.
        state: passed to `hook`; by default the process group of `ddp`.

    Raises:
        TypeError: `optimizer` is of another type.
        RuntimeError: `ddp` has a communication hook already.

    Example:
        >>> import torch.distributed as dist
        >>> from functional_adam.distributed import step_in_ddp
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
        >>> before = ddp.module.weight.item()
        >>> step_in_ddp(ddp, _FunctionalAdam(ddp.parameters(), lr=0.5))
        >>> ddp(torch.ones(1, 1)).sum().backward()
        >>> round(before - ddp.module.weight.item(), 4)
        0.5
        >>> dist.destroy_process_group()

    Source: the contract of `torch.nn.parallel.DistributedDataParallel.register_comm_hook`.
    """
    defaults = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"
    reduce = importlib.import_module(defaults).allreduce_hook if hook is None else hook
    untyped: Any = ddp
    untyped.register_comm_hook(untyped.process_group if state is None else state, hook_then_step(reduce, optimizer))
