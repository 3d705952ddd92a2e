"""Adam as computed by others: `torch.optim`, and the formula in float64 NumPy. Imports nothing of the package."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

TORCH_FLAGS: dict[str, dict[str, bool]] = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
KERNELS = tuple(TORCH_FLAGS)


class LeafUpdate(NamedTuple):
    """One leaf after a step."""

    param: np.ndarray
    exp_avg: np.ndarray
    exp_avg_sq: np.ndarray
    max_exp_avg_sq: np.ndarray | None
    step: float


def numpy_adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    step: float = 0.0,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    grad_scale: float | None = None,
    found_inf: float | None = None,
) -> LeafUpdate:
    """One step on one leaf in float64; `step` counts the updates before this one, `grad_scale` counts in float32."""
    is_complex = param.is_complex()
    p, g, m, v = (_parts(x, is_complex) for x in (param, grad, exp_avg, exp_avg_sq))
    u = None if max_exp_avg_sq is None else _parts(max_exp_avg_sq, is_complex)
    skipped = found_inf is not None and found_inf != 0  # NaN != 0 holds
    if not skipped:
        step = step + 1
        if grad_scale is not None:
            g = g / float(np.float32(grad_scale))
        if maximize:
            g = -g
        if decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        if amsgrad:
            assert u is not None
            u = np.maximum(u, v)
        m_hat = m / (1 - betas[0] ** step)
        v_hat = (v if u is None else u) / (1 - betas[1] ** step)
        p = p - lr * m_hat / (np.sqrt(v_hat) + eps)
    joined = (None if x is None else _join(x, is_complex) for x in (p, m, v, u))
    return LeafUpdate(*joined, step=step)


def _parts(x: Tensor, is_complex: bool) -> np.ndarray:
    """A float64 copy, with real and imaginary parts along a last axis if `is_complex`."""
    array = x.detach().to("cpu", torch.complex128 if is_complex else torch.float64).numpy(force=True)
    return np.stack([array.real, array.imag], axis=-1) if is_complex else array.copy()


def _join(x: np.ndarray, is_complex: bool) -> np.ndarray:
    return np.asarray(x[..., 0] + 1j * x[..., 1] if is_complex else x)


class TorchRun(NamedTuple):
    """What `torch.optim` has after some steps, leaf by leaf; None for what it did not make."""

    params: list[Tensor]
    exp_avg: list[Tensor | None]
    exp_avg_sq: list[Tensor | None]
    max_exp_avg_sq: list[Tensor | None]
    step: list[Tensor | None]


def torch_adam(
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    options: Mapping[str, Any],
    kernel: str,
    *,
    optimizer_class: type[torch.optim.Adam] = torch.optim.Adam,
    capturable: bool = False,
    grad_scale: Tensor | None = None,
) -> TorchRun:
    """Step copies of `params` by each of the lists `gradients`, with the flags of `kernel`."""
    leaves = [param.detach().clone().requires_grad_() for param in params]
    optimizer = optimizer_class(leaves, **options, **TORCH_FLAGS[kernel], capturable=capturable)
    if grad_scale is not None:
        optimizer.grad_scale = grad_scale
    for grads in gradients:
        for leaf, grad in zip(leaves, grads, strict=True):
            # A copy: with grad_scale the fused kernel writes into it.
            leaf.grad = None if grad is None else grad.clone()
        optimizer.step()
    columns = (
        [optimizer.state[leaf].get(name) for leaf in leaves]
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
    )
    return TorchRun([leaf.detach() for leaf in leaves], *columns)
