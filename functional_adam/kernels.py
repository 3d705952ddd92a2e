"""torch's three Adam kernels behind one signature: in place, on lists of leaves, in any layout.

The private torch names `_fused_adam_`, `_fused_adamw_` and `_foreach_*` stand only here.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor

from functional_adam.equations import Scalars, as_real, compute_dtype, corrections, precise, update_leaf
from functional_adam.hparams import Scalar
from functional_adam.layouts import is_dense, is_laid_out_like
from functional_adam.leaves import Buffers
from functional_adam.tracking import is_host_memory

KernelName: TypeAlias = Literal["auto", "single", "foreach", "fused"]
KERNELS: tuple[str, ...] = get_args(KernelName)

_fused_adam_: Any = getattr(torch, "_fused_adam_", None)
_fused_adamw_: Any = getattr(torch, "_fused_adamw_", None)
_FUSED_DEVICES = ("cpu", "cuda")  # where its meaning was checked


def obstacle(kernel: str, devices: set[torch.device], scalars: Sequence[Scalars]) -> str | None:
    """Why `kernel` cannot run on leaves on `devices` with sets of `scalars`, or None if it can."""
    if kernel == "foreach" and not hasattr(torch, "_foreach_addcdiv_"):
        return "this torch has no torch._foreach_addcdiv_"
    if kernel == "fused":
        if _fused_adam_ is None or _fused_adamw_ is None:
            return "this torch has no torch._fused_adam_"
        for device in devices:
            if device.type not in _FUSED_DEVICES:
                return f"there are leaves on {device}, and it runs on {' and '.join(_FUSED_DEVICES)} only"
        for name in ("beta1", "beta2", "eps", "weight_decay"):
            values = [getattr(h, name) for h in scalars]
            if any(isinstance(x, Tensor) and not is_host_memory(x) for x in values):
                return f"{name} is a tensor on an accelerator, and it takes numbers only (lr may be a tensor)"
    return None


def check_kernel_name(kernel: str) -> None:
    """Raise ValueError unless there is such a kernel."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}. Expected one of {', '.join(map(repr, KERNELS))}.")


def select_kernel(kernel: str, devices: set[torch.device], scalars: Sequence[Scalars]) -> str:
    """The kernel that will run: the one asked for, or for "auto" the fastest that can."""
    if kernel == "auto":
        return next(k for k in ("fused", "foreach", "single") if obstacle(k, devices, scalars) is None)
    reason = obstacle(kernel, devices, scalars)
    if reason:
        raise RuntimeError(f"kernel={kernel!r} cannot run here: {reason}. Use kernel='auto'.")
    return kernel


class _Batch(NamedTuple):
    """Leaves of one device, dtype and set of scalars as a kernel wants them, and what to copy back where afterwards."""

    buffers: Buffers
    grads: list[Tensor]
    steps: list[Tensor]
    scalars: Scalars
    copies: list[tuple[Tensor, Tensor]]


def run_kernel(
    kernel: str,
    buffers: Buffers,
    grads: list[Tensor],
    steps: list[Tensor],
    scalars: list[Scalars],
    *,
    grad_scale: Scalar | None = None,
    found_inf: Tensor | None = None,
    is_ready: bool = False,
) -> None:
    """Update `buffers` in place; there is one of `steps` a leaf, which already counts this update, and of `scalars`.

    `found_inf` is a bool tensor, given only where its value cannot be read without waiting for an accelerator.
    `is_ready`: all leaves are known to be contiguous, without lazy bits, of one real dtype, device and set of scalars.
    Version counters may stand still.
    """
    # All temporary memory is there before the first write: running out of it changes nothing.
    copy_buffers, copy_grads = found_inf is not None and kernel != "fused", grad_scale is not None and kernel == "fused"
    if is_ready and not (copy_buffers or copy_grads):
        batches = [_Batch(buffers, grads, steps, scalars[0], [])]
    else:
        batches = [
            _prepare(
                _Batch(
                    buffers.take(indices),
                    [grads[i] for i in indices],
                    [steps[i] for i in indices],
                    scalars[indices[0]],
                    [],
                ),
                dtype,
                kernel,
                copy_buffers=copy_buffers,
                copy_grads=copy_grads,
            )
            for dtype, indices in _groups(buffers, scalars)
        ]
    for batch in batches:
        device = batch.grads[0].device
        here = batch.scalars.map(lambda x, device=device: x.to(device))
        scale = grad_scale.to(device) if isinstance(grad_scale, Tensor) else grad_scale
        found = None if found_inf is None else found_inf.to(device)
        if kernel == "fused":
            _run_fused(batch, here, scale, found)
        else:
            if scale is not None:
                batch = batch._replace(grads=[(grad / scale).to(grad.dtype) for grad in batch.grads])
            (_run_single if kernel == "single" else _run_foreach)(batch, here)
        for buffer, copy in batch.copies:
            buffer.copy_(copy if found is None or kernel == "fused" else torch.where(found, buffer, copy))


def _run_single(batch: _Batch, h: Scalars) -> None:
    for row, g, t in zip(batch.buffers.rows(), batch.grads, batch.steps, strict=True):
        p, m, v, u = row
        numbers = _numbers(h, t)
        if numbers is None:
            for buffer, value in zip(row, update_leaf(row, g, t, h), strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
            continue
        # torch.optim.Adam(foreach=False), operation for operation: its rounding is the contract.
        lr, b1, b2, eps, weight_decay, step_size, root_correction = numbers
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


def _run_foreach(batch: _Batch, h: Scalars) -> None:
    # torch.optim.Adam(foreach=True), operation for operation where the scalars are numbers.
    ops: Any = torch
    p, m, v, u = batch.buffers
    g = batch.grads
    dtype = p[0].dtype

    def scalar(x: Scalar) -> Scalar:
        return x.to(dtype) if isinstance(x, Tensor) else x

    if h.maximize:
        g = ops._foreach_neg(g)
    if isinstance(h.weight_decay, Tensor) or h.weight_decay != 0:
        if h.decoupled_weight_decay:
            ops._foreach_mul_(p, scalar(1 - precise(h.lr) * precise(h.weight_decay)))
        elif isinstance(h.weight_decay, Tensor):
            g = ops._foreach_add(g, ops._foreach_mul(p, scalar(h.weight_decay)))
        else:
            g = ops._foreach_add(g, p, alpha=h.weight_decay)
    if isinstance(h.beta1, Tensor):
        change = ops._foreach_sub(g, m)
        ops._foreach_mul_(change, scalar(1 - precise(h.beta1)))
        ops._foreach_add_(m, change)
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

    # Leaves share a step or have their own: each distinct one is corrected once.
    corrected: dict[int, tuple[Scalar, Scalar]] = {}
    for t in batch.steps:
        if id(t) not in corrected:
            numbers = _numbers(h, t)
            corrected[id(t)] = (numbers[5], numbers[6]) if numbers else corrections(t, h)
    step_sizes, root_corrections = zip(*(corrected[id(t)] for t in batch.steps), strict=True)
    ops._foreach_div_(denominator, [scalar(x) for x in root_corrections])
    # With one tensor for all, _foreach_add_ would read its value.
    ops._foreach_add_(denominator, [scalar(h.eps)] * len(p) if isinstance(h.eps, Tensor) else h.eps)
    if isinstance(step_sizes[0], Tensor):
        change = ops._foreach_div(m, denominator)
        ops._foreach_mul_(change, [scalar(x) for x in step_sizes])
        ops._foreach_sub_(p, change)
    else:
        ops._foreach_addcdiv_(p, m, denominator, [-x for x in step_sizes])


def _run_fused(batch: _Batch, h: Scalars, grad_scale: Scalar | None, found_inf: Tensor | None) -> None:
    # The kernel reads `step` but does not advance it, writes unscaled gradients back (so they are copies here), skips
    # on exactly 1.0, and leaves version counters alone.
    kernel = _fused_adamw_ if h.decoupled_weight_decay else _fused_adam_
    if grad_scale is not None:
        grad_scale = torch.as_tensor(grad_scale, dtype=torch.float32, device=batch.grads[0].device)
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


def _numbers(h: Scalars, t: Tensor) -> tuple[float, ...] | None:
    """lr, beta1, beta2, eps, weight_decay and the corrections as Python numbers; None if one cannot be read here."""
    if t.device.type != "cpu" or type(t) is not Tensor or any(isinstance(x, Tensor) for x in h):
        return None
    return cast("tuple[float, ...]", (*h[:5], *corrections(t.item(), h)))


def _groups(buffers: Buffers, scalars: list[Scalars]) -> list[tuple[torch.dtype, Sequence[int]]]:
    """(compute dtype, indices) for each set of leaves that one call can take."""
    if not buffers.params:
        return []
    dtypes = {x.dtype for x in buffers.flat}
    if len(dtypes) == 1 and len({x.device for x in buffers.params}) == 1 and len({*map(id, scalars)}) == 1:
        return [(dtypes.pop(), range(len(buffers.params)))]
    groups: dict[tuple[torch.device, torch.dtype, Scalars], list[int]] = {}
    for index, row in enumerate(buffers.rows()):
        groups.setdefault((row[0].device, compute_dtype(*row), scalars[index]), []).append(index)
    return [(dtype, indices) for (_, dtype, _), indices in groups.items()]


def _prepare(batch: _Batch, dtype: torch.dtype, kernel: str, *, copy_buffers: bool, copy_grads: bool) -> _Batch:
    """Make `batch` what the kernel can take: of one real dtype, no lazy bits, and for fused one dense layout a leaf."""
    everything = batch.buffers.flat + batch.grads
    if (
        not (copy_buffers or copy_grads or dtype.is_complex)
        and all(x.dtype is dtype for x in everything)
        and not any(x.is_neg() for x in everything)
        and (kernel != "fused" or all(x.is_contiguous() for x in everything))
    ):
        return batch
    buffers = Buffers([], [], [], [])
    grads: list[Tensor] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for row, grad in zip(batch.buffers.rows(), batch.grads, strict=True):
        model: Tensor | None = None  # the parameter, whose layout the others follow
        for column, x in zip(buffers, row, strict=True):
            if x is not None:
                ready = _ready(x, dtype, model, copy=copy_buffers, dense=kernel == "fused")
                model = ready if model is None else model
                if ready is not x:
                    copies.append((x, ready))
                column.append(as_real(ready))
        grads.append(as_real(_ready(grad, dtype, model, copy=copy_grads, dense=kernel == "fused")))
    return _Batch(buffers, grads, batch.steps, batch.scalars, copies)


def _ready(x: Tensor, dtype: torch.dtype, model: Tensor | None, *, copy: bool, dense: bool) -> Tensor:
    """`x`, or a copy of it where it must be one: of `dtype`, without lazy bits, if `dense` laid out like `model`."""
    ready = x.to(dtype).resolve_conj().resolve_neg()
    if dense:
        if model is None:
            ready = ready if is_dense(ready) else ready.clone()
        elif not is_laid_out_like(ready, model):
            ready = torch.empty_like(model).copy_(ready)
    return ready.clone() if copy and ready is x else ready
