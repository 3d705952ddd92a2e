"""The derivatives of `equations.py` for one real leaf, by hand: finite, and differentiable again.

With s = sqrt(v' or u') and D = s / root_correction + eps, the equations read, in `Coefficients`::

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

from functional_adam.adam.equations import Coefficients, is_number

Leaf: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]
"""(p, m, v, u or None, g), or their tangents or cotangents."""
PartialLeaf: TypeAlias = tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor]
"""A leaf that may lack p if no weight decay needs it."""


class Point(NamedTuple):
    """Where a derivative is taken, and what the equations make of it."""

    p: Tensor | None
    m: Tensor
    v: Tensor
    g: Tensor  # G: with sign and weight decay
    new_m: Tensor
    root: Tensor  # s
    half: Tensor  # ds/dv' = 1 / (2 s), taken as 0 at s = 0
    inverse: Tensor  # 1 / D
    share: Tensor | None  # amsgrad: how much of max(u, v') is v': 1, 0, or at a tie 0.5
    is_maximized: bool
    c: Coefficients  # in the dtype of the leaf


def point_at(leaf: PartialLeaf, c: Coefficients, *, maximize: bool) -> Point:
    """Evaluate the equations."""
    p, m, v, u, g = leaf
    c = Coefficients(*(_cast(x, m) for x in c))
    g = -g if maximize else g
    if p is not None and not is_number(c.weight_decay, 0):
        g = g + c.weight_decay * p
    new_m = torch.lerp(m, g, 1 - c.beta1)
    new_v = torch.addcmul(v * c.beta2, g * (1 - c.beta2), g)
    share = None
    if u is not None:
        share = torch.where(new_v > u, 1.0, torch.where(new_v == u, 0.5, 0.0)).to(m.dtype)
        new_v = torch.maximum(u, new_v)
    zero = new_v == 0
    nonzero_root = new_v.masked_fill(zero, 1.0).sqrt()
    root = nonzero_root.masked_fill(zero, 0.0)
    half = (0.5 / nonzero_root).masked_fill(zero, 0.0)
    inverse = 1 / (root / c.root_correction + c.eps)
    return Point(p, m, v, g, new_m, root, half, inverse, share, maximize, c)


def leaf_vjp(at: Point, cotangents: Leaf, wanted: Collection[str]) -> tuple[Leaf, dict[str, Tensor]]:
    """Cotangents of the leaf and of the `wanted` coefficients, from those of (p', m', v', u'); the last is not used."""
    p, m, v, u, _ = cotangents
    c = at.c
    scaled = p * at.inverse
    m = m - scaled * c.step_size
    denominator = at.new_m * at.inverse * scaled * c.step_size
    largest = denominator * at.half * (1 / c.root_correction)
    if at.share is None or u is None:
        v = v + largest
    else:
        largest = largest + u
        v = v + at.share * largest
        u = (1 - at.share) * largest
    g = torch.addcmul(m * (1 - c.beta1), v * (2 * (1 - c.beta2)), at.g)
    terms: dict[str, Callable[[], Tensor]] = {
        "decay": lambda: p * cast("Tensor", at.p),
        "weight_decay": lambda: g * cast("Tensor", at.p),
        "beta1": lambda: m * (at.m - at.g),
        "beta2": lambda: v * (at.v - at.g * at.g),
        "eps": lambda: denominator,
        "step_size": lambda: -at.new_m * scaled,
        "root_correction": lambda: -denominator * at.root / (c.root_correction * c.root_correction),
    }
    # Summed in float64, like the coefficients.
    wide = torch.float32 if at.m.device.type == "mps" else torch.float64
    scalars = {name: terms[name]().sum(dtype=wide) for name in terms if name in wanted}
    new_p = p if is_number(c.decay, 1) else p * c.decay
    new_p = new_p if is_number(c.weight_decay, 0) else new_p + g * c.weight_decay
    return (new_p, m * c.beta1, v * c.beta2, u, -g if at.is_maximized else g), scalars


def plain_leaf_vjp(
    leaf: PartialLeaf, cotangents: Leaf, c: Coefficients, out: Sequence[Tensor | None], *, maximize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`leaf_vjp` for the usual case, in half its operations: numbers only, no amsgrad, and nobody differentiates on.

    For speed alone: a meta-gradient takes 0.6 to 0.9 of its time (docs/transforms.md). The cotangents are those of
    (p, m, v, g); the last three are written to `out` where it has tensors.
    """
    p_in, m_in, v_in, _, g = leaf
    p, m, v, _, _ = cotangents
    decay, weight_decay, beta1, beta2, eps, step_size, root_correction = cast("tuple[float, ...]", c)
    if maximize:
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
    of_g = of_g.neg_() if maximize else of_g
    return p, torch.mul(m, beta1, out=out_m), torch.mul(v, beta2, out=out_v), of_g


def leaf_jvp(
    at: Point, tangents: Leaf, moving: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Tangents of (p', m', v', u') from those of the leaf and of the coefficients, where None stands for 0."""
    p, m, v, u, g = tangents
    c = at.c
    decay, weight_decay, beta1, beta2, eps, step_size, root_correction = (
        None if x is None else _cast(x, at.m) for x in moving
    )
    p_in = cast("Tensor", at.p)
    g = (-g if at.is_maximized else g) + c.weight_decay * p
    g = g if weight_decay is None else g + weight_decay * p_in
    p = c.decay * p
    p = p if decay is None else p + decay * p_in
    m = m * c.beta1 + g * (1 - c.beta1)
    m = m if beta1 is None else m + (at.m - at.g) * beta1
    v = v * c.beta2 + g * at.g * (2 * (1 - c.beta2))
    v = v if beta2 is None else v + (at.v - at.g * at.g) * beta2
    largest = v
    if at.share is not None and u is not None:
        largest = u = at.share * v + (1 - at.share) * u
    denominator = largest * at.half / c.root_correction
    if root_correction is not None:
        denominator = denominator - at.root * root_correction / (c.root_correction * c.root_correction)
    denominator = denominator if eps is None else denominator + eps
    p = p - c.step_size * at.inverse * (m - at.new_m * at.inverse * denominator)
    return p if step_size is None else p - step_size * at.new_m * at.inverse, m, v, u


def _cast(x: float | Tensor, like: Tensor) -> float | Tensor:
    return x.to(device=like.device, dtype=like.dtype) if isinstance(x, Tensor) else x
