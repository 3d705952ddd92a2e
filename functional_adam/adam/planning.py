"""Which kernel runs, on which leaves together, and on copies of what."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from functional_adam.adam.equations import Scalars, as_real, compute_dtype
from functional_adam.adam.hparams import Scalar
from functional_adam.adam.kernels import Batch, missing_operation, run_foreach, run_fused, run_single
from functional_adam.tensors.layouts import is_laid_out_like
from functional_adam.tensors.leaves import Buffers
from functional_adam.tensors.recycling import empty_like
from functional_adam.tensors.tracking import is_host_memory

KernelName: TypeAlias = Literal["auto", "single", "foreach", "fused"]
KERNELS: tuple[str, ...] = get_args(KernelName)
_Copies: TypeAlias = list[tuple[Tensor, Tensor]]
"""Buffers and the copies in their places, which are to be copied back."""
FASTEST_FIRST = ("fused", "foreach", "single")
_FUSED_DEVICES = ("cpu", "cuda")  # where its meaning was checked


def obstacle(kernel: str, devices: set[torch.device], scalars: Sequence[Scalars]) -> str | None:
    """Why `kernel` cannot run on leaves on `devices` with sets of `scalars`, or None if it can."""
    missing = missing_operation(kernel)
    if missing:
        return f"this torch has no {missing}"
    if kernel == "fused":
        for device in devices:
            if device.type not in _FUSED_DEVICES:
                return f"there are leaves on {device}, and it runs on {' and '.join(_FUSED_DEVICES)} only"
        for name in ("beta1", "beta2", "eps", "weight_decay"):
            values = [x for h in scalars if isinstance(x := getattr(h, name), Tensor)]
            if not all(map(is_host_memory, values)):
                return f"{name} is a tensor outside the host's memory, and it takes numbers only (lr may be a tensor)"
    return None


def check_kernel_name(kernel: str) -> None:
    """Raise ValueError unless there is such a kernel."""
    if not isinstance(kernel, str) or kernel not in KERNELS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"kernel is {kernel!r}. Expected one of {', '.join(map(repr, KERNELS))}.")


def select_kernel(kernel: str, devices: set[torch.device], scalars: Sequence[Scalars]) -> str:
    """The kernel that will run: the one asked for, or for "auto" the fastest that can."""
    if kernel == "auto":
        return next(k for k in FASTEST_FIRST if obstacle(k, devices, scalars) is None)
    reason = obstacle(kernel, devices, scalars)
    if reason:
        raise RuntimeError(f"kernel={kernel!r} cannot run here: {reason}. Use kernel='auto'.")
    return kernel


def check_numbers(scalars: Iterable[Scalars], steps: Sequence[Tensor]) -> None:
    """Raise ValueError for betas and steps that have no bias correction, where kernels fail half-way or give NaN.

    `steps` are those that can be read, and do not count this update yet.
    """
    for h in scalars:
        for index, beta in enumerate((h.beta1, h.beta2)):
            if not isinstance(beta, Tensor) and not 0.0 <= beta < 1.0:
                raise ValueError(f"hparams.betas[{index}] is {beta}. Expected a number in [0, 1).")
    least = (steps[0] if len(steps) == 1 else torch.stack([*steps]).amin()).item() if steps else 0
    if not least >= 0:  # which NaN is not
        raise ValueError(f"state.step is {least:g}. Expected a number of updates >= 0.")


class Group(NamedTuple):
    """Leaves that one call can take: of one device, computed in one dtype, with one set of scalars."""

    dtype: torch.dtype
    indices: Sequence[int]


def group_leaves(buffers: Buffers, scalars: Sequence[Scalars]) -> list[Group]:
    """All leaves in as few groups as possible; equal sets of `scalars` are one object."""
    if not buffers.params:
        return []
    dtypes = {x.dtype for x in buffers.flat}
    if len(dtypes) == 1 and len({x.device for x in buffers.params}) == 1 and len({*map(id, scalars)}) == 1:
        return [Group(dtypes.pop(), range(len(buffers.params)))]
    groups: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for index, row in enumerate(buffers.rows()):
        groups.setdefault((row[0].device, compute_dtype(*row), id(scalars[index])), []).append(index)
    return [Group(dtype, indices) for (_, dtype, _), indices in groups.items()]


class Plan(NamedTuple):
    """How a kernel runs on a group of leaves, and so what it needs copies of."""

    kernel: str
    dtype: torch.dtype
    has_grad_scale: bool  # there is a grad_scale
    has_found_inf: bool  # there is a found_inf, whose value cannot be read

    def why_copied(self, x: Tensor, param: Tensor, *, is_grad: bool) -> str | None:
        """Why the kernel gets a copy of `x`, which is `param` or belongs to it, or None if it gets `x`."""
        if x.dtype is not self.dtype:
            return f"is of {x.dtype} and computed in {self.dtype}"
        if x.is_conj() or x.is_neg():
            return "has a lazy conjugation or negation"
        if self.kernel == "fused" and not is_laid_out_like(x, param):
            return "is not dense" if x is param else "is not laid out like its parameter"
        if is_grad and self.has_grad_scale:
            return "is divided by grad_scale"
        if not is_grad and self.has_found_inf and self.kernel != "fused":
            return "is chosen by found_inf, whose value is not read"
        return None


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
    has_grad_scale, has_found_inf = grad_scale is not None, found_inf is not None
    # All memory is there before the first write: running out of it changes nothing.
    if is_ready and not (has_grad_scale or has_found_inf):
        batches: list[tuple[Batch, _Copies]] = [(Batch(buffers, grads, steps, scalars[0]), [])]
    else:
        batches = [
            _prepare(
                Plan(kernel, dtype, has_grad_scale, has_found_inf),
                Batch(
                    buffers.take(indices),
                    [grads[i] for i in indices],
                    [steps[i] for i in indices],
                    scalars[indices[0]],
                ),
            )
            for dtype, indices in group_leaves(buffers, scalars)
        ]
    runs = [_start(kernel, batch, grad_scale, found_inf) for batch, _ in batches]
    for run, (_, copies) in zip(runs, batches, strict=True):
        deque(run, maxlen=0)  # to its end
        for buffer, copy in copies:
            if found_inf is not None:
                torch.where(found_inf.to(copy.device), buffer, copy, out=copy)
            buffer.copy_(copy.to(buffer.dtype) if buffer.is_neg() else copy)  # as in `_prepare`


def _start(kernel: str, batch: Batch, grad_scale: Scalar | None, found_inf: Tensor | None) -> Iterator[None]:
    """A run of the kernel that has all its memory, and has written into none of the buffers."""
    device = batch.grads[0].device
    scale = grad_scale.to(device) if isinstance(grad_scale, Tensor) else grad_scale
    batch = batch._replace(scalars=batch.scalars.map(lambda x: x.to(device)))
    if kernel == "fused":
        run = run_fused(batch, scale, None if found_inf is None else found_inf.to(device))
    else:
        if scale is not None:
            for grad in batch.grads:
                grad.div_(scale)
        run = (run_single if kernel == "single" else run_foreach)(batch)
    next(run)
    return run


def _prepare(plan: Plan, batch: Batch) -> tuple[Batch, _Copies]:
    """`batch` with copies in the place of what the kernel cannot take, and the pairs of a buffer and its copy."""
    everything = batch.buffers.flat + batch.grads
    if (
        not (plan.has_grad_scale or plan.has_found_inf or plan.dtype.is_complex)
        and all(x.dtype is plan.dtype for x in everything)
        and not any(x.is_neg() for x in everything)
        and (plan.kernel != "fused" or all(x.is_contiguous() for x in everything))
    ):
        return batch, []
    copies: _Copies = []

    def ready(x: Tensor, param: Tensor, *, is_grad: bool = False) -> Tensor:
        if plan.why_copied(x, param, is_grad=is_grad) is None:
            return as_real(x)
        # Between float16 and float32, torch's copy_ ignores the negative bit.
        copy = empty_like(param, plan.dtype).copy_(x.resolve_neg())
        if not is_grad:
            copies.append((x, copy))
        return as_real(copy)

    params = batch.buffers.params
    columns = [[ready(x, param) for x, param in zip(column, params, strict=False)] for column in batch.buffers]
    grads = [ready(grad, param, is_grad=True) for grad, param in zip(batch.grads, params, strict=True)]
    return batch._replace(buffers=Buffers(*columns), grads=grads), copies
