"""Adam's equations for one leaf, out of place. Every kernel and every derivative is tested against this file."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_adam.tensors.batch import Batch
from functional_adam.tensors.layouts import as_leaf, as_real, with_layout_of
from functional_adam.tensors.tracking import may_be_differentiated


class LeafHparams(NamedTuple):
    """The hyperparameters of one leaf: numbers, or 0-dim tensors that may be traced, mapped or differentiated."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor
    weight_decay: float | Tensor
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool

    def map(self, function: Callable[[Tensor], float | Tensor]) -> "LeafHparams":
        """`function` of each number that is a tensor."""
        lr, beta1, beta2, eps, weight_decay = (function(x) if isinstance(x, Tensor) else x for x in self[:5])
        return LeafHparams(lr, beta1, beta2, eps, weight_decay, *self[5:])


class Coefficients(NamedTuple):
    """The scalars that a leaf really meets, in float64; numbers where all that they follow from are numbers."""

    decay: float | Tensor  # of the parameter: 1 unless weight decay is decoupled
    weight_decay: float | Tensor  # coupled, else 0
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor
    step_size: float | Tensor  # lr / (1 - beta1^t)
    root_correction: float | Tensor  # sqrt(1 - beta2^t)


EQUATIONS = "equations"
"""In the place of a kernel's name: plain operations, which can be differentiated, mapped and traced."""

Row: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""(param, exp_avg, exp_avg_sq, max_exp_avg_sq or None): what an update replaces in one leaf."""


def coefficients(h: LeafHparams, step: float | Tensor) -> Coefficients:
    """The scalars of update number `step`, by operations that can be differentiated to any order."""
    t, lr, weight_decay = precise(step), precise(h.lr), precise(h.weight_decay)
    beta1, beta2 = precise(h.beta1), precise(h.beta2)
    return Coefficients(
        1 - lr * weight_decay if h.decoupled_weight_decay and not is_number(weight_decay, 0) else 1.0,
        0.0 if h.decoupled_weight_decay else weight_decay,
        beta1,
        beta2,
        precise(h.eps),
        lr / (1 - _power(beta1, t)),
        (1 - _power(beta2, t)) ** 0.5,
    )


def update_leaf(
    row: Row, grad: Tensor, c: Coefficients, *, maximize: bool, grad_scale: float | Tensor | None = None
) -> Row:
    """The next `row`."""
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = row
    wide = compute_dtype(*row)
    # Half types are computed in float32 and rounded once: in float16 eps=1e-8 is 0.
    real = torch.promote_types(as_real(param.to(wide)).dtype, torch.float32)
    p, m, v, g = (as_real(x.to(wide)).to(real) for x in (param, exp_avg, exp_avg_sq, grad))
    u = None if max_exp_avg_sq is None else as_real(max_exp_avg_sq.to(wide)).to(real)

    def scalar(x: float | Tensor) -> float | Tensor:
        return x.to(device=param.device, dtype=real) if isinstance(x, Tensor) else x

    if grad_scale is not None:
        g = g / scalar(grad_scale)
    if maximize:
        g = -g
    if not is_number(c.decay, 1):
        p = p * scalar(c.decay)
    elif not is_number(c.weight_decay, 0):
        g = g + p * scalar(c.weight_decay)
    m = torch.lerp(m, g, scalar(1 - c.beta1))
    v = v * scalar(c.beta2) + g * g * scalar(1 - c.beta2)
    if u is not None:
        u = torch.maximum(u, v)
    denominator = sqrt(v if u is None else u) / scalar(c.root_correction) + scalar(c.eps)
    p = p - m / denominator * scalar(c.step_size)

    def leaf(x: Tensor, old: Tensor) -> Tensor:
        return with_layout_of(as_leaf(x, old), old)

    largest = None if u is None or max_exp_avg_sq is None else leaf(u, max_exp_avg_sq)
    return leaf(p, param), leaf(m, exp_avg), leaf(v, exp_avg_sq), largest


def update_leaves(
    batch: Batch, each: Sequence[Coefficients], *, maximize: bool, grad_scale: float | Tensor | None = None
) -> Batch:
    """`batch` after an update, with coefficients of its own for each of the steps."""
    each = [*each] * len(batch.params) if len(each) == 1 else each
    rows = [
        update_leaf(row, grad, Coefficients(*(beside(x, grad) for x in c)), maximize=maximize, grad_scale=grad_scale)
        for row, grad, c in zip(batch.rows(), batch.grads, each, strict=True)
    ]
    return batch.with_buffers([x for column in zip(*rows, strict=True) for x in column if x is not None])


def beside(x: float | Tensor, leaf: Tensor) -> float | Tensor:
    """`x`, with what it has for members along the first dimension of `leaf`."""
    return x.reshape(-1, *[1] * (leaf.dim() - 1)) if isinstance(x, Tensor) and x.dim() else x


def precise(x: float | Tensor) -> float | Tensor:
    """`x` in float64, where 1 - 0.999^t keeps its digits (in float32 it is off by 1e-5, relative)."""
    if not isinstance(x, Tensor):
        return float(x)
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # MPS has no float64


def is_number(x: float | Tensor, value: float) -> bool:
    """Whether `x` is known to be the number `value`; a tensor is not read."""
    return not isinstance(x, Tensor) and x == value


def _power(base: float | Tensor, t: float | Tensor) -> float | Tensor:
    """`base ** t`. Its derivative with respect to t is base^t log(base), which counts as 0 at base 0."""
    if not isinstance(t, Tensor) or not may_be_differentiated(t) or not (isinstance(base, Tensor) or base == 0):
        return base**t
    if not isinstance(base, Tensor):
        return t * 0.0  # as t is 1 or more
    zero = base == 0
    return torch.where(zero, base ** t.detach(), torch.where(zero, 1.0, base) ** t)


def sqrt(v: Tensor) -> Tensor:
    """`v.sqrt()`, with the derivative 0 at 0, where the true one is infinite."""
    zero = v == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, v).sqrt())


def compute_dtype(*buffers: Tensor | None) -> torch.dtype:
    """The widest dtype among a parameter and its moments, which gradients are cast to."""
    return reduce(torch.promote_types, {buffer.dtype for buffer in buffers if buffer is not None})
