"""torch's three Adam kernels: in place, on lists of leaves that each of them can take as they are.

Each is a generator that pauses once, when all memory is there that it will need and nothing is written.

The private torch names `_fused_adam_`, `_fused_adamw_` and `_foreach_*` stand only here.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from functional_adam.adam.equations import Scalars, corrections, precise, update_leaf
from functional_adam.adam.hparams import Scalar
from functional_adam.tensors.layouts import strides_like
from functional_adam.tensors.leaves import Buffers
from functional_adam.tensors.tracking import is_intercepted

_fused_adam_: Any = getattr(torch, "_fused_adam_", None)
_fused_adamw_: Any = getattr(torch, "_fused_adamw_", None)


class Batch(NamedTuple):
    """Leaves of one device, real dtype and set of scalars; for fused one dense layout a leaf."""

    buffers: Buffers
    grads: list[Tensor]
    steps: list[Tensor]  # one a leaf, which already count this update
    scalars: Scalars


def missing_operation(kernel: str) -> str | None:
    """What `kernel` is made of and this torch does not have, or None."""
    if kernel == "foreach" and not hasattr(torch, "_foreach_addcdiv_"):
        return "torch._foreach_addcdiv_"
    if kernel == "fused" and (_fused_adam_ is None or _fused_adamw_ is None):
        return "torch._fused_adam_"
    return None


def run_single(batch: Batch) -> Iterator[None]:
    """`torch.optim.Adam(foreach=False)`; the equations where a scalar cannot be read."""
    h, rows = batch.scalars, [*batch.buffers.rows()]
    numbers = [_numbers(h, t) for t in batch.steps]
    if None in numbers:
        new = [update_leaf(*given, h) for given in zip(rows, batch.grads, batch.steps, strict=True)]
        yield
        for row, values in zip(rows, new, strict=True):
            for buffer, value in zip(row, values, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
        return
    is_coupled = h.weight_decay != 0 and not h.decoupled_weight_decay
    changed_grads: list[Any] = _scratch(batch.grads) if h.maximize or is_coupled else [None] * len(rows)
    denominators = _scratch(batch.buffers.exp_avg_sqs)
    yield
    # Operation for operation: torch's rounding is the contract.
    everything = zip(rows, batch.grads, changed_grads, denominators, numbers, strict=True)
    for (p, m, v, u), g, changed_grad, denominator, values in everything:
        lr, b1, b2, eps, weight_decay, step_size, root_correction = cast("tuple[float, ...]", values)
        if h.maximize:
            g = torch.neg(g, out=changed_grad)
        if is_coupled:
            g = torch.add(g, p, alpha=_saturated(weight_decay, p.dtype), out=changed_grad)
        elif weight_decay != 0:
            p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        if u is not None:
            torch.maximum(u, v, out=u)
        torch.sqrt(v if u is None else u, out=denominator).div_(root_correction).add_(eps)
        p.addcdiv_(m, denominator, value=_saturated(-step_size, _scalar_dtype(p.dtype)))


def _scratch(leaves: list[Tensor]) -> list[Tensor]:
    """`torch.empty_like` of each of `leaves`, which share dtype and device, on one memory: for one leaf at a time."""
    flat = leaves[0].new_empty(max(x.numel() for x in leaves))
    return [flat.as_strided(x.shape, strides_like(x)) for x in leaves]


class _ForeachTerms(NamedTuple):
    """All that `run_foreach` has memory for before it writes into the buffers."""

    grads: list[Tensor]  # with sign and coupled weight decay
    decay: Any  # of decoupled weight decay, or None
    change: list[Tensor]  # of exp_avg, where beta1 is a tensor
    scaled: list[Tensor]  # the gradients times 1 - beta2, where beta2 is a tensor
    denominator: list[Tensor]  # not yet filled, like `direction`
    direction: list[Tensor]  # where the step size is a tensor
    root_corrections: list[Scalar]
    step_sizes: list[Scalar]


def _foreach_terms(batch: Batch) -> _ForeachTerms:
    ops: Any = torch
    h, g = batch.scalars, batch.grads
    p, m, v, _ = batch.buffers
    dtype = p[0].dtype
    decay = None
    if h.maximize:
        g = ops._foreach_neg(g)
    if isinstance(h.weight_decay, Tensor) or h.weight_decay != 0:
        if h.decoupled_weight_decay:
            decay = _for_leaves(1 - precise(h.lr) * precise(h.weight_decay), p)
        elif isinstance(h.weight_decay, Tensor):
            g = ops._foreach_add(g, ops._foreach_mul(p, _for_leaves(h.weight_decay, p)))
        else:
            g = ops._foreach_add(g, p, alpha=_saturated(h.weight_decay, dtype))
    change: list[Tensor] = []
    if isinstance(h.beta1, Tensor):
        change = ops._foreach_sub(g, m)
        ops._foreach_mul_(change, _for_leaves(1 - precise(h.beta1), p))
    scaled: list[Tensor] = []
    if isinstance(h.beta2, Tensor):
        scaled = ops._foreach_mul(g, _for_leaves(1 - precise(h.beta2), p))
    step_sizes, root_corrections = _corrections(batch)
    return _ForeachTerms(
        g,
        decay,
        change,
        scaled,
        [*map(torch.empty_like, v)],
        [*map(torch.empty_like, m)] if isinstance(step_sizes[0], Tensor) else [],
        [_beside(x, leaf, dtype) for x, leaf in zip(root_corrections, p, strict=True)],
        [_beside(x, leaf, _scalar_dtype(dtype)) for x, leaf in zip(step_sizes, p, strict=True)],
    )


def run_foreach(batch: Batch) -> Iterator[None]:
    """`torch.optim.Adam(foreach=True)`, operation for operation where the scalars are numbers.

    A scalar of shape (members,) belongs to leaves whose first dimension counts members.
    """
    ops: Any = torch
    h = batch.scalars
    p, m, v, u = batch.buffers
    g, decay, change, scaled, denominator, direction, root_corrections, step_sizes = _foreach_terms(batch)
    beta2 = _for_leaves(h.beta2, p)
    # With one tensor for all, _foreach_add_ would read its value.
    eps = [_beside(h.eps, x, x.dtype) for x in p] if isinstance(h.eps, Tensor) else h.eps
    yield
    if decay is not None:
        ops._foreach_mul_(p, decay)
    if change:
        ops._foreach_add_(m, change)
    else:
        ops._foreach_lerp_(m, g, 1 - h.beta1)
    ops._foreach_mul_(v, beta2)
    if scaled:
        ops._foreach_addcmul_(v, scaled, g)
    else:
        ops._foreach_addcmul_(v, g, g, 1 - h.beta2)
    if u:
        ops._foreach_maximum_(u, v)
    ops._foreach_copy_(denominator, u or v)
    ops._foreach_sqrt_(denominator)
    ops._foreach_div_(denominator, root_corrections)
    ops._foreach_add_(denominator, eps)
    if direction:
        ops._foreach_copy_(direction, m)
        ops._foreach_div_(direction, denominator)
        ops._foreach_mul_(direction, step_sizes)
        ops._foreach_sub_(p, direction)
    else:
        wide = _scalar_dtype(p[0].dtype)
        ops._foreach_addcdiv_(p, m, denominator, [_saturated(-cast("float", x), wide) for x in step_sizes])
    _note_writing(batch, [*change, *denominator, *direction])


def _for_leaves(x: Scalar, leaves: list[Tensor]) -> Any:
    """`x` as an operation on a list of `leaves` takes it: a number, a 0-dim tensor, or a tensor for each leaf."""
    if not isinstance(x, Tensor):
        return x
    dtype = leaves[0].dtype
    return [_beside(x, leaf, dtype) for leaf in leaves] if x.dim() else x.to(dtype)


def run_fused(batch: Batch, grad_scale: Scalar | None, found_inf: Tensor | None) -> Iterator[None]:
    """`torch.optim.Adam(fused=True)`: writes unscaled gradients back, and leaves version counters alone."""
    h = batch.scalars
    # It reads `step` but does not advance it, and skips on a found_inf of exactly 1.0.
    kernel = _fused_adamw_ if h.decoupled_weight_decay else _fused_adam_
    if isinstance(grad_scale, (int, float)):
        # Filled on the device: a copy from the host's memory would wait for it, and cannot be captured in a CUDA graph.
        grad_scale = torch.full((), grad_scale, dtype=torch.float32, device=batch.grads[0].device)
    lr = h.lr.to(torch.float32) if isinstance(h.lr, Tensor) else h.lr
    found = None if found_inf is None else found_inf.to(torch.float32)
    yield
    kernel(
        batch.buffers.params,
        batch.grads,
        batch.buffers.exp_avgs,
        batch.buffers.exp_avg_sqs,
        batch.buffers.max_exp_avg_sqs,
        batch.steps,
        lr=lr,
        beta1=h.beta1,
        beta2=h.beta2,
        weight_decay=h.weight_decay,
        eps=h.eps,
        amsgrad=h.amsgrad,
        maximize=h.maximize,
        grad_scale=grad_scale,
        found_inf=found,
    )
    _note_writing(batch, batch.grads)


def _corrections(batch: Batch) -> tuple[Sequence[Scalar], Sequence[Scalar]]:
    """The step size and the correction of the root for each leaf, each distinct step corrected once."""
    corrected: dict[int, tuple[Scalar, Scalar]] = {}
    for t in batch.steps:
        if id(t) not in corrected:
            numbers = _numbers(batch.scalars, t)
            corrected[id(t)] = (numbers[5], numbers[6]) if numbers else corrections(t, batch.scalars)
    step_sizes, root_corrections = zip(*(corrected[id(t)] for t in batch.steps), strict=True)
    return step_sizes, root_corrections


def _note_writing(batch: Batch, others: list[Tensor]) -> None:
    """Move the version counters, which foreach and fused leave alone, if a mode may have kept the tensors.

    The mode of selective activation checkpointing then refuses to use what it has kept.
    """
    if is_intercepted():
        torch.autograd.graph.increment_version([*batch.buffers.flat, *others])


def _beside(x: Scalar, leaf: Tensor, dtype: torch.dtype) -> Scalar:
    """`x` in `dtype` if it is a tensor, and where it has one value a member, in a shape that meets `leaf`."""
    if not isinstance(x, Tensor):
        return x
    return x.to(dtype).view(-1, *[1] * (leaf.dim() - 1)) if x.dim() else x.to(dtype)


def _scalar_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch's operations on tensors of `dtype` take their scalars; `add(alpha=)` takes `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def _saturated(x: float, dtype: torch.dtype) -> float:
    """`x`, or infinity where `dtype` has nothing larger: torch refuses the number, tensors would become infinite."""
    return math.copysign(math.inf, x) if abs(x) > torch.finfo(dtype).max else x


def _numbers(h: Scalars, t: Tensor) -> tuple[float, ...] | None:
    """lr, beta1, beta2, eps, weight_decay and the corrections as Python numbers; None if one cannot be read here."""
    if t.device.type != "cpu" or type(t) is not Tensor or t.dim() or any(isinstance(x, Tensor) for x in h):
        return None
    return cast("tuple[float, ...]", (*h[:5], *corrections(t.item(), h)))
