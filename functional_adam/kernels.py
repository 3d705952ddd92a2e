"""torch's three Adam kernels: in place, on lists of leaves that each of them can take as they are.

The private torch names `_fused_adam_`, `_fused_adamw_` and `_foreach_*` stand only here.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from functional_adam.equations import Scalars, corrections, precise, update_leaf
from functional_adam.hparams import Scalar
from functional_adam.leaves import Buffers
from functional_adam.tracking import is_intercepted

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


def run_single(batch: Batch) -> None:
    """`torch.optim.Adam(foreach=False)`; the equations where a scalar cannot be read."""
    h = batch.scalars
    for row, g, t in zip(batch.buffers.rows(), batch.grads, batch.steps, strict=True):
        p, m, v, u = row
        numbers = _numbers(h, t)
        if numbers is None:
            for buffer, value in zip(row, update_leaf(row, g, t, h), strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
            continue
        # Operation for operation: torch's rounding is the contract.
        lr, b1, b2, eps, weight_decay, step_size, root_correction = numbers
        if h.maximize:
            g = -g
        if weight_decay != 0:
            if h.decoupled_weight_decay:
                p.mul_(1 - lr * weight_decay)
            else:
                g = g.add(p, alpha=_saturated(weight_decay, p.dtype))
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        if u is not None:
            torch.maximum(u, v, out=u)
        denominator = ((v if u is None else u).sqrt() / root_correction).add_(eps)
        p.addcdiv_(m, denominator, value=_saturated(-step_size, _scalar_dtype(p.dtype)))


def run_foreach(batch: Batch) -> None:
    """`torch.optim.Adam(foreach=True)`, operation for operation where the scalars are numbers.

    A scalar of shape (members,) belongs to leaves whose first dimension counts members.
    """
    ops: Any = torch
    h = batch.scalars
    p, m, v, u = batch.buffers
    g = batch.grads
    dtype = p[0].dtype
    wide = _scalar_dtype(dtype)
    written: list[Tensor] = []

    def scalar(x: Scalar) -> Any:
        if not isinstance(x, Tensor):
            return x
        return [_beside(x, leaf, dtype) for leaf in p] if x.dim() else x.to(dtype)

    if h.maximize:
        g = ops._foreach_neg(g)
    if isinstance(h.weight_decay, Tensor) or h.weight_decay != 0:
        if h.decoupled_weight_decay:
            ops._foreach_mul_(p, scalar(1 - precise(h.lr) * precise(h.weight_decay)))
        elif isinstance(h.weight_decay, Tensor):
            g = ops._foreach_add(g, ops._foreach_mul(p, scalar(h.weight_decay)))
        else:
            g = ops._foreach_add(g, p, alpha=_saturated(h.weight_decay, dtype))
    if isinstance(h.beta1, Tensor):
        change = ops._foreach_sub(g, m)
        ops._foreach_mul_(change, scalar(1 - precise(h.beta1)))
        ops._foreach_add_(m, change)
        written += change
    else:
        ops._foreach_lerp_(m, g, 1 - h.beta1)
    ops._foreach_mul_(v, scalar(h.beta2))
    if isinstance(h.beta2, Tensor):
        ops._foreach_addcmul_(v, ops._foreach_mul(g, scalar(1 - precise(h.beta2))), g)
    else:
        ops._foreach_addcmul_(v, g, g, 1 - h.beta2)
    if u:
        ops._foreach_maximum_(u, v)
    denominator = ops._foreach_sqrt(u or v)
    written += denominator

    step_sizes, root_corrections = _corrections(batch)
    ops._foreach_div_(denominator, [_beside(x, leaf, dtype) for x, leaf in zip(root_corrections, p, strict=True)])
    # With one tensor for all, _foreach_add_ would read its value.
    ops._foreach_add_(denominator, [_beside(h.eps, x, dtype) for x in p] if isinstance(h.eps, Tensor) else h.eps)
    if isinstance(step_sizes[0], Tensor):
        change = ops._foreach_div(m, denominator)
        ops._foreach_mul_(change, [_beside(x, leaf, wide) for x, leaf in zip(step_sizes, p, strict=True)])
        ops._foreach_sub_(p, change)
        written += change
    else:
        ops._foreach_addcdiv_(p, m, denominator, [_saturated(-cast("float", x), wide) for x in step_sizes])
    _note_writing(batch, written)


def run_fused(batch: Batch, grad_scale: Scalar | None, found_inf: Tensor | None) -> None:
    """`torch.optim.Adam(fused=True)`: writes unscaled gradients back, and leaves version counters alone."""
    h = batch.scalars
    # It reads `step` but does not advance it, and skips on a found_inf of exactly 1.0.
    kernel = _fused_adamw_ if h.decoupled_weight_decay else _fused_adam_
    if isinstance(grad_scale, (int, float)):
        # Filled on the device: a copy from the host's memory would wait for it, and cannot be captured in a CUDA graph.
        grad_scale = torch.full((), grad_scale, dtype=torch.float32, device=batch.grads[0].device)
    kernel(
        batch.buffers.params,
        batch.grads,
        batch.buffers.exp_avgs,
        batch.buffers.exp_avg_sqs,
        batch.buffers.max_exp_avg_sqs,
        batch.steps,
        lr=h.lr.to(torch.float32) if isinstance(h.lr, Tensor) else h.lr,
        beta1=h.beta1,
        beta2=h.beta2,
        weight_decay=h.weight_decay,
        eps=h.eps,
        amsgrad=h.amsgrad,
        maximize=h.maximize,
        grad_scale=grad_scale,
        found_inf=None if found_inf is None else found_inf.to(torch.float32),
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
