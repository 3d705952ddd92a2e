"""The derivatives of `equations.py` for one real leaf, by hand: finite, and differentiable again.

With s = sqrt(v' or u') and D = s / root_correction + eps, the equations read, in the scalars of `Local`::

    G = sign * g + weight_decay * p
    m' = beta1 * m + (1 - beta1) * G
    v' = beta2 * v + (1 - beta2) * G * G
    p' = decay * p - step_size * m' / D

Cotangents (reverse mode) are derivatives of the loss by that name,
tangents (forward mode) are derivatives of that name along the given direction.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from functional_adam.adam.equations import Scalars
from functional_adam.adam.hparams import Scalar
from functional_adam.adam.scalars import Local

Leaf: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]
"""(p, m, v, u or None, g), or their tangents or cotangents."""


class Point(NamedTuple):
    """Where a derivative is taken, and what the equations make of it."""

    m: Tensor
    v: Tensor
    g: Tensor  # G: with sign and weight decay
    new_m: Tensor
    root: Tensor  # s
    half: Tensor  # ds/dv' = 1 / (2 s), taken as 0 at s = 0
    inverse: Tensor  # 1 / D
    share: Tensor | None  # amsgrad: how much of max(u, v') is v': 1, 0, or at a tie 0.5
    is_maximized: bool
    decay: Scalar
    weight_decay: Scalar
    beta1: Scalar
    beta2: Scalar
    step_size: Scalar
    root_correction: Scalar


def point_at(leaf: tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor], h: Scalars, local: Local) -> Point:
    """Evaluate the equations; `leaf` may lack p if no weight decay needs it."""
    p, m, v, u, g = leaf
    decay, weight_decay, beta1, beta2, eps, step_size, root_correction = (_cast(x, m) for x in local)
    g = -g if h.maximize else g
    if p is not None and (isinstance(weight_decay, Tensor) or weight_decay != 0):
        g = g + weight_decay * p
    new_m = torch.lerp(m, g, 1 - beta1)
    new_v = torch.addcmul(v * beta2, g * (1 - beta2), g)
    share = None
    if u is not None:
        share = torch.where(new_v > u, 1.0, torch.where(new_v == u, 0.5, 0.0)).to(m.dtype)
        new_v = torch.maximum(u, new_v)
    zero = new_v == 0
    nonzero_root = new_v.masked_fill(zero, 1.0).sqrt()
    root = nonzero_root.masked_fill(zero, 0.0)
    half = (0.5 / nonzero_root).masked_fill(zero, 0.0)
    inverse = 1 / (root / root_correction + eps)
    return Point(
        m,
        v,
        g,
        new_m,
        root,
        half,
        inverse,
        share,
        h.maximize,
        decay,
        weight_decay,
        beta1,
        beta2,
        step_size,
        root_correction,
    )


def leaf_vjp(
    at: Point, cotangents: Leaf, wanted: Collection[str], p_in: Tensor | None
) -> tuple[Leaf, dict[str, Tensor]]:
    """Cotangents of the leaf and of the `wanted` scalars, from those of (p', m', v', u'); the last is not used."""
    p, m, v, u, _ = cotangents
    scaled = p * at.inverse
    m = m - scaled * at.step_size
    denominator = at.new_m * at.inverse * scaled * at.step_size
    largest = denominator * at.half * (1 / at.root_correction)
    if at.share is None or u is None:
        v = v + largest
    else:
        largest = largest + u
        v = v + at.share * largest
        u = (1 - at.share) * largest
    g = torch.addcmul(m * (1 - at.beta1), v * (2 * (1 - at.beta2)), at.g)
    terms: dict[str, Callable[[], Tensor]] = {
        "decay": lambda: p * cast("Tensor", p_in),
        "weight_decay": lambda: g * cast("Tensor", p_in),
        "beta1": lambda: m * (at.m - at.g),
        "beta2": lambda: v * (at.v - at.g * at.g),
        "eps": lambda: denominator,
        "step_size": lambda: -at.new_m * scaled,
        "root_correction": lambda: -denominator * at.root / (at.root_correction * at.root_correction),
    }
    # Summed in float64, like the scalars.
    wide = torch.float32 if at.m.device.type == "mps" else torch.float64
    scalars = {name: terms[name]().sum(dtype=wide) for name in terms if name in wanted}
    has_decay = isinstance(at.decay, Tensor) or at.decay != 1
    has_coupled = isinstance(at.weight_decay, Tensor) or at.weight_decay != 0
    new_p = p * at.decay if has_decay else p
    new_p = new_p + g * at.weight_decay if has_coupled else new_p
    return (new_p, m * at.beta1, v * at.beta2, u, -g if at.is_maximized else g), scalars


def plain_leaf_vjp(
    leaf: tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor],
    cotangents: Leaf,
    h: Scalars,
    local: Local,
    out: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`leaf_vjp` for the usual case, in half its operations: numbers only, no amsgrad, and nobody differentiates on.

    The cotangents are those of (p, m, v, g); the last three are written to `out` where it has tensors.
    """
    p_in, m_in, v_in, _, g = leaf
    p, m, v, _, _ = cotangents
    decay, weight_decay, beta1, beta2, eps, step_size, root_correction = cast("tuple[float, ...]", local)
    if h.maximize:
        g = -g
    if p_in is not None and weight_decay:
        g = g.add(p_in, alpha=weight_decay)
    new_m = torch.lerp(m_in, g, 1 - beta1)
    root = (v_in * beta2).addcmul_(g, g, value=1 - beta2).sqrt_()
    denominator = root + eps * root_correction  # D * root_correction
    scaled = p / denominator
    m = torch.sub(m, scaled, alpha=step_size * root_correction)
    root.masked_fill_(root == 0, math.inf)
    of_v = new_m.mul_(scaled).div_(denominator.mul_(root))
    v = torch.add(v, of_v, alpha=0.5 * step_size * root_correction)
    out_m, out_v, out_g = out
    of_g = torch.mul(m, 1 - beta1, out=out_g).addcmul_(v, g, value=2 * (1 - beta2))
    p = p if decay == 1 else p * decay
    p = p.add(of_g, alpha=weight_decay) if weight_decay else p
    of_g = of_g.neg_() if h.maximize else of_g
    return p, torch.mul(m, beta1, out=out_m), torch.mul(v, beta2, out=out_v), of_g


def leaf_jvp(at: Point, tangents: Leaf, local: Local, p_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Tangents of (p', m', v', u') from those of the leaf and of the scalars."""
    p, m, v, u, g = tangents
    t = Local(*(None if x is None else _cast(x, at.m) for x in local))
    # The step is a tensor, and torch gives a tensor that stands still a tangent of zeros.
    step_size, root_correction = _cast(local.step_size, at.m), _cast(local.root_correction, at.m)
    g = (-g if at.is_maximized else g) + at.weight_decay * p
    g = g if t.weight_decay is None else g + t.weight_decay * p_in
    p = at.decay * p
    p = p if t.decay is None else p + t.decay * p_in
    m = m * at.beta1 + g * (1 - at.beta1)
    m = m if t.beta1 is None else m + (at.m - at.g) * t.beta1
    v = v * at.beta2 + g * at.g * (2 * (1 - at.beta2))
    v = v if t.beta2 is None else v + (at.v - at.g * at.g) * t.beta2
    largest = v
    if at.share is not None and u is not None:
        largest = u = at.share * v + (1 - at.share) * u
    denominator = largest * at.half / at.root_correction
    denominator = denominator - at.root * root_correction / (at.root_correction * at.root_correction)
    if t.eps is not None:
        denominator = denominator + t.eps
    p = p - at.step_size * at.inverse * (m - at.new_m * at.inverse * denominator)
    return p - step_size * at.new_m * at.inverse, m, v, u


def _cast(x: Scalar | None, like: Tensor) -> Scalar:
    assert x is not None
    return x.to(device=like.device, dtype=like.dtype) if isinstance(x, Tensor) else x
