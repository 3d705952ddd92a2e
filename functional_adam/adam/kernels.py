"""torch's three Adam kernels: in place, on lists of leaves that each of them can take as they are.

Each kernel is a record in `KERNELS`. What runs it is a generator that pauses once, when all memory is there that it
will need and nothing is written.

The private torch names `_fused_adam_`, `_fused_adamw_` and `_foreach_*` stand only here.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor

from functional_adam.adam.equations import Coefficients, LeafHparams, beside, coefficients, is_number, update_leaf
from functional_adam.tensors.batch import Batch
from functional_adam.tensors.layouts import strides_like
from functional_adam.tensors.tracking import is_host_memory, is_intercepted

KernelName: TypeAlias = Literal["auto", "single", "foreach", "fused"]
Devices: TypeAlias = Collection[torch.device]

_ops: Any = torch
_fused_adam_: Any = getattr(torch, "_fused_adam_", None)
_fused_adamw_: Any = getattr(torch, "_fused_adamw_", None)
_FUSED_DEVICES = ("cpu", "cuda")  # where its meaning was checked


class Kernel(NamedTuple):
    """A way to compute an update of leaves of one device, real dtype and set of hyperparameters."""

    name: str
    run: Callable[[Batch, LeafHparams, float | Tensor | None, Tensor | None], Iterator[None]]
    """Update a batch, whose steps already count this update, given `grad_scale` and `found_inf`."""
    obstacle: Callable[[Devices, Sequence[LeafHparams]], str | None]
    """Why it cannot run on leaves on these devices, with these sets of hyperparameters; None if it can."""
    needs_one_layout: bool
    """Whether all tensors of a leaf must be dense and laid out alike."""
    takes_found_inf: bool
    """Whether it divides by `grad_scale` and skips by `found_inf` itself; it then writes to the gradients."""

    def on(
        self,
        device: torch.device,
        h: LeafHparams,
        grad_scale: float | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Callable[[Batch], Iterator[None]]:
        """What updates a batch on `device` with these scalars."""
        h = h.map(lambda x: x.to(device))
        return lambda batch: self.run(batch, h, grad_scale, found_inf)


def _run_single(batch: Batch, h: LeafHparams, *_: object) -> Iterator[None]:
    """`torch.optim.Adam(foreach=False)`; the equations where a scalar cannot be read."""
    rows, each = [*batch.rows()], _coefficients(batch, h)
    if any(isinstance(x, Tensor) for c in {id(c): c for c in each}.values() for x in c):
        new = [
            update_leaf(row, grad, c, maximize=h.maximize) for row, grad, c in zip(rows, batch.grads, each, strict=True)
        ]
        yield
        for row, values in zip(rows, new, strict=True):
            for buffer, value in zip(row, values, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
        return
    is_coupled = not is_number(each[0].weight_decay, 0)
    changed_grads: list[Any] = _scratch(batch.grads) if h.maximize or is_coupled else [None] * len(rows)
    denominators = _scratch(batch.exp_avg_sqs)
    yield
    # Operation for operation: torch's rounding is the contract.
    everything = zip(rows, batch.grads, changed_grads, denominators, each, strict=True)
    for (p, m, v, u), g, changed_grad, denominator, c in everything:
        decay, weight_decay, b1, b2, eps, step_size, root_correction = cast("tuple[float, ...]", c)
        if h.maximize:
            g = torch.neg(g, out=changed_grad)
        if is_coupled:
            g = torch.add(g, p, alpha=_saturated(weight_decay, p.dtype), out=changed_grad)
        elif decay != 1:
            p.mul_(decay)
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        if u is not None:
            torch.maximum(u, v, out=u)
        torch.sqrt(v if u is None else u, out=denominator).div_(root_correction).add_(eps)
        p.addcdiv_(m, denominator, value=_saturated(-step_size, _scalar_dtype(p.dtype)))


def _scratch(leaves: list[Tensor]) -> list[Tensor]:
    """`torch.empty_like` of each of `leaves`, which share dtype and device, on one memory: for one leaf at a time."""
    flat = leaves[0].new_empty(max(x.numel() for x in leaves))
    return [flat.as_strided(x.shape, strides_like(x)) for x in leaves]


def _run_foreach(batch: Batch, h: LeafHparams, *_: object) -> Iterator[None]:
    """`torch.optim.Adam(foreach=True)`, operation for operation where the scalars are numbers.

    A scalar of shape (members,) belongs to leaves whose first dimension counts members.
    """
    p, m, v, u = batch[:4]
    dtype, wide, each = p[0].dtype, _scalar_dtype(p[0].dtype), _coefficients(batch, h)
    c = each[0]
    g, change, scaled = _foreach_gradients(batch, c, maximize=h.maximize)
    decay, beta2 = _for_leaves(c.decay, p), _for_leaves(c.beta2, p)
    # With one tensor for all, _foreach_add_ would read its value.
    eps = [_beside(c.eps, x, dtype) for x in p] if isinstance(c.eps, Tensor) else c.eps
    root_corrections = [_beside(x.root_correction, leaf, dtype) for x, leaf in zip(each, p, strict=True)]
    step_sizes = [_beside(x.step_size, leaf, wide) for x, leaf in zip(each, p, strict=True)]
    denominator = [*map(torch.empty_like, v)]
    direction = [*map(torch.empty_like, m)] if isinstance(c.step_size, Tensor) else []
    yield
    if not is_number(c.decay, 1):
        _ops._foreach_mul_(p, decay)
    if change:
        _ops._foreach_add_(m, change)
    else:
        _ops._foreach_lerp_(m, g, 1 - c.beta1)
    _ops._foreach_mul_(v, beta2)
    if scaled:
        _ops._foreach_addcmul_(v, scaled, g)
    else:
        _ops._foreach_addcmul_(v, g, g, 1 - c.beta2)
    if u:
        _ops._foreach_maximum_(u, v)
    _ops._foreach_copy_(denominator, u or v)
    _ops._foreach_sqrt_(denominator)
    _ops._foreach_div_(denominator, root_corrections)
    _ops._foreach_add_(denominator, eps)
    if direction:
        _ops._foreach_copy_(direction, m)
        _ops._foreach_div_(direction, denominator)
        _ops._foreach_mul_(direction, step_sizes)
        _ops._foreach_sub_(p, direction)
    else:
        lengths = [_saturated(-cast("float", x), wide) for x in step_sizes]
        _ops._foreach_addcdiv_(p, m, denominator, lengths)
    _note_writing(batch, [*change, *denominator, *direction])


def _foreach_gradients(
    batch: Batch, c: Coefficients, *, maximize: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients with sign and coupled weight decay; where betas are tensors, the change of m, and (1 - beta2) g."""
    p, g = batch.params, batch.grads
    change: list[Tensor] = []
    scaled: list[Tensor] = []
    if maximize:
        g = _ops._foreach_neg(g)
    if isinstance(c.weight_decay, Tensor):
        g = _ops._foreach_add(g, _ops._foreach_mul(p, _for_leaves(c.weight_decay, p)))
    elif c.weight_decay != 0:
        g = _ops._foreach_add(g, p, alpha=_saturated(c.weight_decay, p[0].dtype))
    if isinstance(c.beta1, Tensor):
        change = _ops._foreach_sub(g, batch.exp_avgs)
        _ops._foreach_mul_(change, _for_leaves(1 - c.beta1, p))
    if isinstance(c.beta2, Tensor):
        scaled = _ops._foreach_mul(g, _for_leaves(1 - c.beta2, p))
    return g, change, scaled


def _for_leaves(x: float | Tensor, leaves: list[Tensor]) -> float | Tensor | list[float | Tensor]:
    """`x` as an operation on a list of `leaves` takes it: a number, a 0-dim tensor, or a tensor for each leaf."""
    if not isinstance(x, Tensor):
        return x
    dtype = leaves[0].dtype
    return [_beside(x, leaf, dtype) for leaf in leaves] if x.dim() else x.to(dtype)


def _run_fused(
    batch: Batch, h: LeafHparams, grad_scale: float | Tensor | None, found_inf: Tensor | None
) -> Iterator[None]:
    """`torch.optim.Adam(fused=True)`: writes unscaled gradients back, and leaves version counters alone."""
    # It reads `step` but does not advance it, and skips on a found_inf of exactly 1.0.
    kernel = _fused_adamw_ if h.decoupled_weight_decay else _fused_adam_
    if isinstance(grad_scale, (int, float)):
        # Filled on the device: a copy from the host's memory would wait for it, and cannot be captured in a CUDA graph.
        grad_scale = torch.full((), grad_scale, dtype=torch.float32, device=batch.grads[0].device)
    lr = h.lr.to(torch.float32) if isinstance(h.lr, Tensor) else h.lr
    found = None if found_inf is None else found_inf.to(torch.float32)
    yield
    kernel(
        batch.params,
        batch.grads,
        batch.exp_avgs,
        batch.exp_avg_sqs,
        batch.max_exp_avg_sqs,
        batch.leaf_steps,
        lr=lr,
        beta1=h.beta1,
        beta2=h.beta2,
        weight_decay=h.weight_decay,
        eps=h.eps,
        amsgrad=h.amsgrad,
        maximize=h.maximize,
        grad_scale=grad_scale,
        found_inf=found,
    )
    _note_writing(batch, batch.grads)


def _coefficients(batch: Batch, h: LeafHparams) -> list[Coefficients]:
    """The scalars of each leaf, those of a distinct step computed once, and as numbers where `step` can be read."""
    can_be_numbers = not any(isinstance(x, Tensor) for x in h[:5])

    def at(t: Tensor) -> Coefficients:
        return coefficients(h, t.item() if can_be_numbers and is_host_memory(t) and not t.dim() else t)

    if len(batch.steps) == 1:
        return [at(batch.steps[0])] * len(batch.params)
    distinct = {id(t): t for t in batch.steps}
    found = {key: at(t) for key, t in distinct.items()}
    return [found[id(t)] for t in batch.steps]


def _note_writing(batch: Batch, others: list[Tensor]) -> None:
    """Move the version counters, which foreach and fused leave alone, if a mode may have kept the tensors.

    The mode of selective activation checkpointing then refuses to use what it has kept.
    """
    if is_intercepted():
        torch.autograd.graph.increment_version([*batch.buffers, *others])


def _beside(x: float | Tensor, leaf: Tensor, dtype: torch.dtype) -> float | Tensor:
    """`x` in `dtype` if it is a tensor, and where it has one value a member, in a shape that meets `leaf`."""
    return beside(x.to(dtype), leaf) if isinstance(x, Tensor) else x


def _scalar_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch's operations on tensors of `dtype` take their scalars; `add(alpha=)` takes `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def _saturated(x: float, dtype: torch.dtype) -> float:
    """`x`, or infinity where `dtype` has nothing larger: torch refuses the number, tensors would become infinite."""
    return math.copysign(math.inf, x) if abs(x) > torch.finfo(dtype).max else x


def _no_single(devices: Devices, sets: Sequence[LeafHparams]) -> None:  # noqa: ARG001
    return None


def _no_foreach(devices: Devices, sets: Sequence[LeafHparams]) -> str | None:  # noqa: ARG001
    return None if hasattr(torch, "_foreach_addcdiv_") else "this torch has no torch._foreach_addcdiv_"


def _no_fused(devices: Devices, sets: Sequence[LeafHparams]) -> str | None:
    if _fused_adam_ is None or _fused_adamw_ is None:
        return "this torch has no torch._fused_adam_"
    for device in devices:
        if device.type not in _FUSED_DEVICES:
            return f"there are leaves on {device}, and it runs on {' and '.join(_FUSED_DEVICES)} only"
    for name in ("beta1", "beta2", "eps", "weight_decay"):
        values = [x for h in sets if isinstance(x := getattr(h, name), Tensor)]
        if not all(map(is_host_memory, values)):
            return f"{name} is a tensor outside the host's memory, and it takes numbers only (lr may be a tensor)"
    return None


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("fused", _run_fused, _no_fused, needs_one_layout=True, takes_found_inf=True),
        Kernel("foreach", _run_foreach, _no_foreach, needs_one_layout=False, takes_found_inf=False),
        Kernel("single", _run_single, _no_single, needs_one_layout=False, takes_found_inf=False),
    )
}
"""The fastest first."""
KERNEL_NAMES: tuple[str, ...] = get_args(KernelName)


def check_kernel_name(kernel: object) -> None:
    """Raise ValueError unless there is such a kernel."""
    if not isinstance(kernel, str) or kernel not in KERNEL_NAMES:
        raise ValueError(f"kernel is {kernel!r}. Expected one of {', '.join(map(repr, KERNEL_NAMES))}.")


def select_kernel(name: str, devices: Devices, sets: Sequence[LeafHparams]) -> Kernel:
    """The kernel that runs: the one asked for, or for "auto" the fastest that can."""
    if name == "auto":
        return next(kernel for kernel in KERNELS.values() if kernel.obstacle(devices, sets) is None)
    reason = KERNELS[name].obstacle(devices, sets)
    if reason:
        raise RuntimeError(f"kernel={name!r} cannot run here: {reason}. Use kernel='auto'.")
    return KERNELS[name]


def check_numbers(sets: Sequence[LeafHparams], steps: Sequence[Tensor]) -> None:
    """Raise ValueError for betas and steps that have no bias correction, where kernels fail half-way or give NaN.

    `steps` are those that can be read, and do not count this update yet.
    """
    for h in sets:
        for index, beta in enumerate((h.beta1, h.beta2)):
            if not isinstance(beta, Tensor) and not 0.0 <= beta < 1.0:
                raise ValueError(f"hparams.betas[{index}] is {beta}. Expected a number in [0, 1).")
    least = (steps[0] if len(steps) == 1 else torch.stack([*steps]).amin()).item() if steps else 0
    if not least >= 0:  # which NaN is not
        raise ValueError(f"state.step is {least:g}. Expected a number of updates >= 0.")
