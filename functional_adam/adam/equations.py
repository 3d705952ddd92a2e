"""Adam's equations for one leaf, out of place. Every kernel and every derivative is tested against this file."""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_adam.adam.hparams import Scalar
from functional_adam.tensors.layouts import with_layout_of


class Scalars(NamedTuple):
    """The hyperparameters of one leaf: numbers, or 0-dim tensors that may be traced, mapped or differentiated."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    eps: Scalar
    weight_decay: Scalar
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool

    def map(self, function: Callable[[Tensor], Scalar]) -> "Scalars":
        """`function` of each number that is a tensor."""
        lr, beta1, beta2, eps, weight_decay = (function(x) if isinstance(x, Tensor) else x for x in self[:5])
        return Scalars(lr, beta1, beta2, eps, weight_decay, *self[5:])


Row: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""(param, exp_avg, exp_avg_sq, max_exp_avg_sq or None): what an update replaces in one leaf."""


def update_leaf(row: Row, grad: Tensor, step: Tensor, h: Scalars, grad_scale: Scalar | None = None) -> Row:
    """The next `row`; `step` already counts this update."""
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = row
    wide = compute_dtype(*row)
    # Half types are computed in float32 and rounded once: in float16 eps=1e-8 is 0.
    real = torch.promote_types(as_real(param.to(wide)).dtype, torch.float32)
    p, m, v, g = (as_real(x.to(wide)).to(real) for x in (param, exp_avg, exp_avg_sq, grad))
    u = None if max_exp_avg_sq is None else as_real(max_exp_avg_sq.to(wide)).to(real)
    b1, b2 = precise(h.beta1), precise(h.beta2)

    def scalar(x: Scalar) -> Scalar:
        return x.to(device=param.device, dtype=real) if isinstance(x, Tensor) else x

    if grad_scale is not None:
        g = g / scalar(grad_scale)
    if h.maximize:
        g = -g
    if h.decoupled_weight_decay:
        p = p * scalar(1 - precise(h.lr) * precise(h.weight_decay))
    elif isinstance(h.weight_decay, Tensor) or h.weight_decay != 0:
        g = g + p * scalar(h.weight_decay)
    m = torch.lerp(m, g, scalar(1 - b1))
    v = v * scalar(b2) + g * g * scalar(1 - b2)
    if u is not None:
        u = torch.maximum(u, v)
    step_size, root_correction = corrections(step, h)
    denominator = sqrt(v if u is None else u) / scalar(root_correction) + scalar(h.eps)
    p = p - m / denominator * scalar(step_size)

    def leaf(x: Tensor, old: Tensor) -> Tensor:
        return with_layout_of(as_leaf(x, old), old)

    largest = None if u is None or max_exp_avg_sq is None else leaf(u, max_exp_avg_sq)
    return leaf(p, param), leaf(m, exp_avg), leaf(v, exp_avg_sq), largest


def corrections(step: Scalar, h: Scalars) -> tuple[Scalar, Scalar]:
    """`lr / (1 - beta1^step)` and `sqrt(1 - beta2^step)`: numbers if all are numbers, else precise 0-dim tensors."""
    t = precise(step)
    return precise(h.lr) / (1 - precise(h.beta1) ** t), (1 - precise(h.beta2) ** t) ** 0.5


def precise(x: Scalar) -> Scalar:
    """`x` in float64, where 1 - 0.999^t keeps its digits (in float32 it is off by 1e-5, relative)."""
    if not isinstance(x, Tensor):
        return float(x)
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # MPS has no float64


def sqrt(v: Tensor) -> Tensor:
    """`v.sqrt()`, with the derivative 0 at 0, where the true one is infinite."""
    zero = v == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, v).sqrt())


def compute_dtype(*buffers: Tensor | None) -> torch.dtype:
    """The widest dtype among a parameter and its moments, which gradients are cast to."""
    return reduce(torch.promote_types, {buffer.dtype for buffer in buffers if buffer is not None})


def as_real(x: Tensor) -> Tensor:
    """Real and imaginary parts of a complex leaf are independent to Adam."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def as_leaf(real: Tensor, leaf: Tensor) -> Tensor:
    """`real`, which `as_real` made of something like `leaf`, in the dtype of `leaf`."""
    return (torch.view_as_complex(real) if leaf.is_complex() else real).to(leaf.dtype)
