"""Adam's equations in plain torch operations that autograd differentiates, and points to take derivatives at.

Imports nothing of the package.
"""

from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

DOUBLE = torch.float64


class Point(NamedTuple):
    """Everything that an update can be differentiated by, but for step and grad_scale: lists of leaves, and numbers."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    max_exp_avg_sq: list[Tensor]
    lr: Any
    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any


LEAVES, NUMBERS = Point._fields[:5], Point._fields[5:]


def make_point(*shapes: tuple[int, ...], dtype: torch.dtype = DOUBLE, amsgrad: bool = True, seed: int = 0) -> Point:
    """A point in the middle of training, with moments away from 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]

    def positive() -> list[Tensor]:
        parts = [0.5 + torch.rand(2, *shape, generator=generator, dtype=dtype.to_real()) for shape in shapes]
        return [torch.complex(*x) if dtype.is_complex else x[0] for x in parts]

    leaves = normal(), normal(), normal(), positive(), positive() if amsgrad else []
    return Point(*leaves, *(torch.tensor(x, dtype=DOUBLE) for x in (0.1, 0.8, 0.9, 0.01, 0.2)))


def reference(
    at: Point,
    *,
    step: Any = 3.0,
    grad_scale: Any = 1.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> list[Tensor]:
    """New parameters, moments and maxima; `step` is that before the update, or a list of one a leaf."""
    columns: list[list[Tensor]] = [[], [], [], []]
    for index, (p, g, m, v) in enumerate(zip(*at[:4], strict=True)):
        t = torch.as_tensor(step[index] if isinstance(step, list) else step, dtype=DOUBLE) + 1
        g = g / grad_scale
        g = -g if maximize else g
        if decoupled_weight_decay:
            p = p * (1 - at.lr * at.weight_decay)
        else:
            g = g + at.weight_decay * p
        m = at.beta1 * m + (1 - at.beta1) * g
        v = at.beta2 * v + (1 - at.beta2) * g * g
        u = torch.maximum(at.max_exp_avg_sq[index], v) if amsgrad else v
        # The derivative of the root is taken as 0 at 0, where the true one is infinite.
        root = torch.where(u == 0, 0.0, torch.where(u == 0, 1.0, u).sqrt())
        p = p - at.lr * (m / (1 - at.beta1**t)) / (root / (1 - at.beta2**t).sqrt() + at.eps)
        for column, value in zip(columns, (p, m, v, u), strict=True):
            column.append(value)
    return [x for column in columns[: 3 + amsgrad] for x in column]


def weighted(outputs: Any) -> Tensor:
    """One number that depends on every element of every output, each in its own way."""
    total = torch.zeros((), dtype=DOUBLE)
    for index, output in enumerate(outputs):
        weights = torch.linspace(0.5, 1.5, output.numel(), dtype=DOUBLE).view(output.shape)
        total = total + ((index + 1) * weights * output.double()).cos().sum()
    return total


def fixed(tree: Any, seed: int = 1) -> Any:
    """Random tensors like those of `tree`."""
    generator = torch.Generator().manual_seed(seed)
    return torch_pytree.tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), tree)


def stacked(trees: Any) -> Any:
    """Trees of one structure as one, with their leaves in a first dimension."""
    return torch_pytree.tree_map(lambda *xs: torch.stack(xs), *trees)
