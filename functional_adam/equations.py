"""Adam's equations for one leaf, out of place. Every kernel and every derivative is tested against this file."""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from functional_adam.hparams import Scalar


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


def update_leaf(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    grad: Tensor,
    step: Tensor,
    h: Scalars,
    *,
    grad_scale: Scalar | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The next `(param, exp_avg, exp_avg_sq, max_exp_avg_sq)`; `step` already counts this update."""
    buffers = (param, exp_avg, exp_avg_sq, max_exp_avg_sq)
    wide = compute_dtype(param, exp_avg, exp_avg_sq, max_exp_avg_sq)
    # Half types are computed in float32 and rounded once: in float16 eps=1e-8 is 0.
    real = torch.promote_types(wide.to_real(), torch.float32)
    p, m, v, u = (None if x is None else as_real(x).to(real) for x in buffers)
    assert p is not None and m is not None and v is not None
    g = as_real(grad.to(wide)).to(real)
    t = precise(step)
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
    if h.amsgrad:
        assert u is not None
        u = torch.maximum(u, v)
    step_size, root_correction = corrections(t, h.lr, b1, b2)
    denominator = sqrt(v if u is None else u) / scalar(root_correction) + scalar(h.eps)
    p = p - m / denominator * scalar(step_size)

    new = (p, m, v, u)
    return tuple(  # pyright: ignore[reportReturnType] (as long as buffers)
        None if x is None or old is None else _like(x, old) for x, old in zip(new, buffers, strict=True)
    )


def corrections(t: Scalar, lr: Scalar, b1: Scalar, b2: Scalar) -> tuple[Scalar, Scalar]:
    """`lr / (1 - b1^t)` and `sqrt(1 - b2^t)`: numbers if all are numbers, else precise 0-dim tensors."""
    return precise(lr) / (1 - b1**t), (1 - b2**t) ** 0.5


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
    return reduce(torch.promote_types, (buffer.dtype for buffer in buffers if buffer is not None))


def as_real(x: Tensor) -> Tensor:
    """Real and imaginary parts of a complex leaf are independent to Adam."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _like(real: Tensor, leaf: Tensor) -> Tensor:
    return (torch.view_as_complex(real) if leaf.is_complex() else real).to(leaf.dtype)
