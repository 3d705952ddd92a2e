"""torch's three Adam kernels behind one signature: in place, on lists of leaves, in any layout.

The private torch names `_fused_adam_`, `_fused_adamw_` and `_foreach_*` stand only here.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from functional_adam.equations import Scalars, as_real, compute_dtype, corrections, update_leaf
from functional_adam.hparams import Scalar
from functional_adam.leaves import Leaves

KernelName: TypeAlias = Literal["auto", "single", "foreach", "fused"]
KERNELS: tuple[str, ...] = get_args(KernelName)

_fused_adam_: Any = getattr(torch, "_fused_adam_", None)
_fused_adamw_: Any = getattr(torch, "_fused_adamw_", None)
_FUSED_DEVICES = ("cpu", "cuda")  # where its meaning was checked


def obstacle(kernel: str, devices: set[torch.device], scalars: Scalars) -> str | None:
    """Why `kernel` cannot run on leaves on `devices` with `scalars`, or None if it can."""
    if kernel == "foreach" and not hasattr(torch, "_foreach_addcdiv_"):
        return "this torch has no torch._foreach_addcdiv_"
    if kernel == "fused":
        if _fused_adam_ is None or _fused_adamw_ is None:
            return "this torch has no torch._fused_adam_"
        for device in devices:
            if device.type not in _FUSED_DEVICES:
                return f"there are leaves on {device}, and it runs on {' and '.join(_FUSED_DEVICES)} only"
        for name in ("beta1", "beta2", "eps", "weight_decay"):
            if isinstance(getattr(scalars, name), Tensor):
                return f"{name} is a tensor on an accelerator, and it takes numbers only (lr may be a tensor)"
    return None


def check_kernel_name(kernel: str) -> None:
    """Raise ValueError unless there is such a kernel."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}. Expected one of {', '.join(map(repr, KERNELS))}.")


def select_kernel(kernel: str, devices: set[torch.device], scalars: Scalars) -> str:
    """The kernel that will run: the one asked for, or for "auto" the fastest that can."""
    if kernel == "auto":
        return next(k for k in ("fused", "foreach", "single") if obstacle(k, devices, scalars) is None)
    reason = obstacle(kernel, devices, scalars)
    if reason:
        raise RuntimeError(f"kernel={kernel!r} cannot run here: {reason}. Use kernel='auto'.")
    return kernel


class _Batch(NamedTuple):
    """Leaves of one device and dtype as a kernel wants them, and what to copy back where afterwards."""

    leaves: Leaves
    steps: list[Tensor]
    copies: list[tuple[Tensor, Tensor]]


def run_kernel(
    kernel: str,
    leaves: Leaves,
    steps: list[Tensor],
    scalars: Scalars,
    *,
    grad_scale: Scalar | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update the buffers of `leaves` in place; `steps` already count this update, gradients are only read.

    `found_inf` is a tensor only where its value cannot be read without waiting for an accelerator.
    """
    keep_old = found_inf is not None and kernel != "fused"
    scale_in_kernel = grad_scale is not None and kernel == "fused"
    # All temporary memory is there before the first write: running out of it changes nothing.
    batches = [
        _prepare(
            leaves.take(indices) if indices else leaves, _at(steps, indices), dtype, kernel, keep_old, scale_in_kernel
        )
        for dtype, indices in _groups(leaves)
    ]
    for batch in batches:
        device = batch.leaves.params[0].device
        here = Scalars(*(x.to(device) if isinstance(x, Tensor) else x for x in scalars))
        scale = grad_scale.to(device) if isinstance(grad_scale, Tensor) else grad_scale
        found = None if found_inf is None else (found_inf != 0).to(device)
        if kernel == "fused":
            _run_fused(batch.leaves, batch.steps, here, scale, found)
        else:
            if scale is not None:
                batch = batch._replace(leaves=batch.leaves._replace(grads=[g / scale for g in batch.leaves.grads]))
            if kernel == "single":
                _run_single(batch.leaves, batch.steps, here)
            else:
                _run_foreach(batch.leaves, batch.steps, here)
        for buffer, copy in batch.copies:
            buffer.copy_(torch.where(found, buffer, copy) if keep_old and found is not None else copy)


def _run_single(leaves: Leaves, steps: list[Tensor], h: Scalars) -> None:
    # torch.optim.adam._single_tensor_adam, operation for operation: its rounding is the contract.
    for p, m, v, u, g, t in _rows(leaves, steps):
        fixed = _fixed(t, h)
        if fixed is None:
            new = update_leaf(p, m, v, u, g, t, h)
            for buffer, value in zip((p, m, v, u), new, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
            continue
        step_size, root_correction = fixed
        lr, b1, b2, eps, weight_decay = _numbers(h)
        if h.maximize:
            g = -g
        if weight_decay != 0:
            if h.decoupled_weight_decay:
                p.mul_(1 - lr * weight_decay)
            else:
                g = g.add(p, alpha=weight_decay)
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        if u is not None:
            torch.maximum(u, v, out=u)
        denominator = ((v if u is None else u).sqrt() / root_correction).add_(eps)
        p.addcdiv_(m, denominator, value=-step_size)


def _run_foreach(leaves: Leaves, steps: list[Tensor], h: Scalars) -> None:
    # torch.optim.adam._multi_tensor_adam, operation for operation where its scalars are numbers.
    ops: Any = torch
    p, m, v, u, g = leaves
    dtype = p[0].dtype

    def scalar(x: Scalar) -> Scalar:
        return x.to(dtype) if isinstance(x, Tensor) else x

    if h.maximize:
        g = ops._foreach_neg(g)
    if isinstance(h.weight_decay, Tensor) or h.weight_decay != 0:
        if h.decoupled_weight_decay:
            ops._foreach_mul_(p, scalar(1 - h.lr * h.weight_decay))
        elif isinstance(h.weight_decay, Tensor):
            g = ops._foreach_add(g, ops._foreach_mul(p, scalar(h.weight_decay)))
        else:
            g = ops._foreach_add(g, p, alpha=h.weight_decay)
    if isinstance(h.beta1, Tensor):
        change = ops._foreach_sub(g, m)
        ops._foreach_mul_(change, scalar(1 - h.beta1))
        ops._foreach_add_(m, change)
    else:
        ops._foreach_lerp_(m, g, 1 - h.beta1)
    ops._foreach_mul_(v, scalar(h.beta2))
    if isinstance(h.beta2, Tensor):
        ops._foreach_addcmul_(v, ops._foreach_mul(g, scalar(1 - h.beta2)), g)
    else:
        ops._foreach_addcmul_(v, g, g, 1 - h.beta2)
    if u:
        ops._foreach_maximum_(u, v)
    denominator = ops._foreach_sqrt(u or v)

    # Leaves share a step or have their own: each distinct one is corrected once.
    seen: dict[int, tuple[Scalar, Scalar]] = {}
    for t in steps:
        if id(t) not in seen:
            seen[id(t)] = _fixed(t, h) or corrections(t.double(), h.lr, h.beta1, h.beta2)
    step_sizes, root_corrections = zip(*(seen[id(t)] for t in steps), strict=True)
    if isinstance(step_sizes[0], float):
        ops._foreach_div_(denominator, root_corrections)
        ops._foreach_add_(denominator, h.eps)
        ops._foreach_addcdiv_(p, m, denominator, [-x for x in step_sizes])
    else:
        ops._foreach_div_(denominator, [scalar(x) for x in root_corrections])
        ops._foreach_add_(denominator, scalar(h.eps))
        change = ops._foreach_div(m, denominator)
        ops._foreach_mul_(change, [scalar(x) for x in step_sizes])
        ops._foreach_sub_(p, change)


def _run_fused(
    leaves: Leaves, steps: list[Tensor], h: Scalars, grad_scale: Scalar | None, found_inf: Tensor | None
) -> None:
    # The kernel reads `step` but does not advance it, writes unscaled gradients back (so they are copies here), and
    # skips on exactly 1.0.
    device = leaves.params[0].device
    scale = None if grad_scale is None else torch.as_tensor(grad_scale, dtype=torch.float32, device=device)
    kernel = _fused_adamw_ if h.decoupled_weight_decay else _fused_adam_
    kernel(
        leaves.params,
        leaves.grads,
        leaves.exp_avgs,
        leaves.exp_avg_sqs,
        leaves.max_exp_avg_sqs,
        steps,
        lr=h.lr,
        beta1=h.beta1,
        beta2=h.beta2,
        weight_decay=h.weight_decay,
        eps=h.eps,
        amsgrad=h.amsgrad,
        maximize=h.maximize,
        grad_scale=scale,
        found_inf=None if found_inf is None else found_inf.to(torch.float32),
    )
    # It also leaves version counters alone, which hides the write from autograd.
    torch.autograd.graph.increment_version(leaves.buffers)


def _rows(leaves: Leaves, steps: list[Tensor]) -> Any:
    maxima = leaves.max_exp_avg_sqs or [None] * len(steps)
    return zip(leaves.params, leaves.exp_avgs, leaves.exp_avg_sqs, maxima, leaves.grads, steps, strict=True)


def _numbers(h: Scalars) -> tuple[float, float, float, float, float]:
    return h.lr, h.beta1, h.beta2, h.eps, h.weight_decay  # pyright: ignore[reportReturnType] (asked after _fixed)


def _fixed(t: Tensor, h: Scalars) -> tuple[float, float] | None:
    """The corrections as numbers, or None where step or hyperparameters cannot be read."""
    if any(isinstance(x, Tensor) for x in h) or t.device.type != "cpu" or type(t) is not Tensor:
        return None
    return corrections(t.item(), h.lr, h.beta1, h.beta2)  # pyright: ignore[reportReturnType]


def _groups(leaves: Leaves) -> list[tuple[torch.dtype, list[int]]]:
    """(compute dtype, indices) for each set of leaves that one call can take; no indices means all of them."""
    everything = [*leaves.buffers]
    dtypes = {x.dtype for x in everything}
    if len(dtypes) == 1 and len({x.device for x in leaves.params}) == 1:
        return [(dtypes.pop(), [])]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, (p, m, v, u, _, _) in enumerate(_rows(leaves, leaves.params)):
        groups.setdefault((p.device, compute_dtype(p, m, v, u)), []).append(index)
    return [(dtype, indices) for (_, dtype), indices in groups.items()]


def _at(steps: list[Tensor], indices: Sequence[int]) -> list[Tensor]:
    return [steps[i] for i in indices] if indices else steps


def _prepare(
    leaves: Leaves, steps: list[Tensor], dtype: torch.dtype, kernel: str, keep_old: bool, scale_in_kernel: bool
) -> _Batch:
    """Give the kernel what it can take: one real dtype, no lazy bits, and for fused one dense layout a leaf."""
    if (
        not (keep_old or scale_in_kernel or dtype.is_complex)
        and all(x.dtype is dtype for x in leaves.grads)
        and not any(x.is_neg() for column in leaves for x in column)
        and (kernel != "fused" or all(x.is_contiguous() for column in leaves for x in column))
    ):
        return _Batch(leaves, steps, [])
    ready = Leaves([], [], [], [], [])
    copies: list[tuple[Tensor, Tensor]] = []
    for row in zip(*(column or [None] * len(steps) for column in leaves), strict=True):
        model: Tensor | None = None  # the first of the row, the parameter: the layout that the others follow
        for index, x in enumerate(row):
            if x is None:
                continue
            is_grad = index == 4
            copy = x.to(dtype)
            if copy is x and (keep_old and not is_grad or scale_in_kernel and is_grad):
                copy = x.clone()
            copy = copy.resolve_conj().resolve_neg()
            if kernel == "fused":
                copy = _in_layout(copy, copy if model is None else model)
            if copy is not x and not is_grad:
                copies.append((x, copy))
            model = copy if model is None else model
            ready[index].append(as_real(copy))
    return _Batch(ready, steps, copies)


def _in_layout(x: Tensor, model: Tensor) -> Tensor:
    """`x`, or a copy of it, with elements in memory in the order of `model`, which may be `x` itself."""
    if x is model:
        return x if is_dense(x) else x.clone(memory_format=torch.preserve_format)
    same = all(a == b for a, b, n in zip(x.stride(), model.stride(), x.shape, strict=True) if n != 1)
    return x if same or x.numel() <= 1 else torch.empty_like(model).copy_(x)


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` fill a block of memory, in any order of dimensions, without gap or overlap."""
    if x.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != filled:
            return False
        filled *= size
    return True
