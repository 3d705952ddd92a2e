"""The batching rule of an update: Adam is elementwise, so that members are just more leaves.

Where a single vmap is all that watches, the rule is called at once. torch calls the rule of an autograd.Function too,
but looks through all arguments as pytrees several times on the way, which takes longer than the update of small leaves.
The private torch names that this takes stand here; without one of them torch calls the rule.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_adam.adam.equations import Coefficients, LeafHparams, beside, coefficients, precise, update_leaves
from functional_adam.adam.kernels import KERNELS, Kernel, check_numbers
from functional_adam.tensors.batch import Batch
from functional_adam.tensors.staging import Run, Stage, copied, finish
from functional_adam.tensors.tracking import (
    is_constant,
    is_host_value,
    is_single_vmap,
    is_transformed,
    readable,
    requires_grad,
)

Flat: TypeAlias = Sequence[Any]
"""The arguments of the Function, or what stands in their places: needs, tangents, dimensions."""
Apply: TypeAlias = Callable[..., Sequence[Tensor]]

# Half types are rounded once by a kernel; a direction of theirs would be rounded before.
_PRECISE = (torch.float32, torch.float64)

# Members of fewer elements a leaf are not worth a place each in the list of a kernel.
SMALL_MEMBER = 2**13


@dataclass(frozen=True)
class Spec:
    """How the flat list of an autograd.Function is made up. Not a pytree: torch.func takes it for a constant.

    The list holds the columns of a batch without its steps, five numbers, the steps before this update, and perhaps
    coefficients: five that all leaves share, then a step size and a root correction for each step.
    """

    kernel: str
    count: int  # leaves
    step_count: int
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    is_ready: bool  # nothing has to be staged

    @property
    def buffer_count(self) -> int:
        """How many buffers there are, which come first."""
        return self.count * (4 if self.amsgrad else 3)

    @property
    def leaf_count(self) -> int:
        """How many buffers and gradients there are."""
        return self.buffer_count + self.count

    def batch(self, flat: Flat) -> Batch:
        """The leaves and their steps."""
        first_step = self.leaf_count + 5
        grads, steps = flat[self.buffer_count : self.leaf_count], flat[first_step : first_step + self.step_count]
        return self.buffers(flat)._replace(grads=list(grads), steps=list(steps))

    def buffers(self, flat: Flat) -> Batch:
        """A batch of the buffers with which `flat` begins."""
        return Batch([None] * self.count, [], [], [], [], []).with_buffers(flat[: self.buffer_count])  # pyright: ignore[reportArgumentType]

    def hparams(self, numbers: Iterable[float | Tensor]) -> LeafHparams:
        """The five numbers and the flags."""
        lr, beta1, beta2, eps, weight_decay = numbers
        return LeafHparams(
            lr, beta1, beta2, eps, weight_decay, self.amsgrad, self.maximize, self.decoupled_weight_decay
        )

    def numbers(self, flat: Flat) -> Flat:
        """lr, beta1, beta2, eps, weight_decay."""
        return flat[self.leaf_count : self.leaf_count + 5]

    def coefficients(self, flat: Flat) -> list[Coefficients]:
        """Those given for each step, or what stands in their places; empty if none were given."""
        given, n = flat[self.leaf_count + 5 + self.step_count :], self.step_count
        rows = ((*given[:5], given[5 + k], given[5 + n + k]) for k in range(n if given else 0))
        return [*map(Coefficients._make, rows)]


def run(spec: Spec, flat: Flat) -> tuple[Tensor, ...]:
    """The kernel on copies: new buffers."""
    given = spec.batch(flat)
    h = spec.hparams(x.item() if isinstance(x, Tensor) and is_host_value(x) else x for x in spec.numbers(flat))
    check_numbers([h], readable(given.steps))
    new = copied(given)
    _run_in_place(KERNELS[spec.kernel], _advanced(new), h, is_ready=spec.is_ready)
    return tuple(new.buffers)


def _run_in_place(kernel: Kernel, batch: Batch, h: LeafHparams, *, is_ready: bool = False) -> None:
    """Update the buffers of `batch`, whose steps count this update."""
    first = batch.params[0]
    stage = Stage(first.dtype, kernel.needs_one_layout)
    run = Run(batch, batch, stage, {} if is_ready else stage.reasons(batch))
    finish(run.start(kernel.on(first.device, h), None, None))


def _advanced(batch: Batch) -> Batch:
    return batch._replace(steps=[step + 1 for step in batch.steps])


class _Members(NamedTuple):
    """Members with scalars of their own: leaves are stacked, and a scalar is one value or has one for each member."""

    spec: Spec
    size: int
    batch: Batch
    numbers: Sequence[float | Tensor]
    given: list[Coefficients]


def run_batched(
    apply: Apply, size: int, dims: Sequence[int | None], spec: Spec, flat: Flat
) -> tuple[Sequence[Tensor], tuple[int, ...]]:
    """The results of `size` members and their batch dimensions. `apply` is the Function, for outer transforms."""
    spec = replace(spec, is_ready=False)  # stacks may lie in memory in any way
    leaves, first = spec.leaf_count, spec.leaf_count + 5 + spec.step_count  # of the coefficients
    stacked = [_stack(x, dim, size) for x, dim in zip(flat[:leaves], dims, strict=False)]
    out_dims = (0,) * spec.buffer_count
    is_tracked = is_transformed() or requires_grad(x for x in flat if isinstance(x, Tensor))
    shared = [_shared(x, dim) for x, dim in zip(flat[leaves:first], dims[leaves:first], strict=True)]
    if all(is_shared for is_shared, _ in shared):
        # One call on the stacked leaves is the batched update. Coefficients follow from what is shared, so that those
        # of one member stand for all.
        one = [x if dim is None else x.select(dim, 0) for x, dim in zip(flat[first:], dims[first:], strict=True)]
        arguments = (*stacked, *(x for _, x in shared), *one)
        return (apply(spec, *arguments) if is_tracked else run(spec, arguments)), out_dims
    operands = [*stacked, *flat[leaves:]]  # a batch of scalars has one dimension
    batch, numbers = spec.batch(operands), spec.numbers(operands)
    if is_tracked or not all(is_host_value(x) for x in flat[leaves:] if isinstance(x, Tensor)):
        return tuple(
            _run_broadcast(_Members(spec, size, batch, numbers, spec.coefficients(operands))).buffers
        ), out_dims
    # From here on nobody looks, and a scalar that all members share is read.
    numbers = [_read(x) if is_shared else given for (is_shared, x), given in zip(shared, numbers, strict=False)]
    steps = [x if is_shared else given for (is_shared, x), given in zip(shared[5:], batch.steps, strict=True)]
    members = _Members(spec, size, _advanced(batch._replace(steps=steps)), numbers, [])
    is_precise = all(x.dtype in _PRECISE for x in stacked)
    if is_precise and all(is_shared for is_shared, _ in (*shared[1:4], *shared[5:])):
        new = _run_directions(members)
    # The other kernels round half types after each operation.
    elif is_precise and sum(x.numel() for x in stacked) < SMALL_MEMBER * size * len(stacked):
        new = _run_stacked(members)
    else:
        new = _run_members(members)
    return tuple(new.buffers), out_dims


def _stack(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _shared(x: Any, dim: int | None) -> tuple[bool, Any]:
    """Whether all members are known to have the same scalar, and it. Without members there is none to take."""
    if dim is None:
        return True, x
    if x.shape[dim] and is_constant(x) and (x.stride(dim) == 0 or (is_host_value(x) and _are_equal(x))):
        return True, x.select(dim, 0)
    return False, x


def _are_equal(x: Tensor) -> bool:
    # Where members differ, the first and the last mostly do.
    return x[0].item() == x[-1].item() and bool((x == x[0]).all())


def _read(x: float | Tensor) -> float:
    return x.item() if isinstance(x, Tensor) else x


def _run_directions(members: _Members) -> Batch:
    """Members that differ in lr and weight_decay only: one call gives all directions, and each goes its own length.

    For speed alone: 0.6 to 0.85 of the time of `_run_stacked` or `_run_members` (docs/transforms.md).
    """
    spec, _, batch, (lr, beta1, beta2, eps, weight_decay), _ = members
    lr, weight_decay = precise(lr), precise(weight_decay)
    params, grads = batch.params, batch.grads

    def cast(x: float | Tensor, leaf: Tensor) -> float | Tensor:
        return beside(x.to(leaf.dtype), leaf) if isinstance(x, Tensor) else x

    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        if spec.decoupled_weight_decay:
            params = [p * cast(1 - lr * weight_decay, p) for p in params]
        else:
            pull = -weight_decay if spec.maximize else weight_decay
            grads = [g + p * cast(pull, p) for g, p in zip(grads, params, strict=True)]
    zeros = [torch.zeros_like(p) for p in params]
    moments = [x.clone() for x in batch.buffers[spec.count :]]
    new = batch.with_buffers([*zeros, *moments])._replace(grads=grads)
    _run_in_place(KERNELS[spec.kernel], new, spec.hparams((1.0, beta1, beta2, eps, 0.0)))
    # The kernel has left each direction, negative, where it was given zeros for parameters.
    lengths = [torch.as_tensor(cast(lr, p), dtype=p.dtype, device=p.device) for p in params]
    return new._replace(params=[torch.addcmul(*terms) for terms in zip(params, zeros, lengths, strict=True)])


def _run_members(members: _Members) -> Batch:
    """Kernels take lists with a step a tensor: members unbound into the list, those with equal numbers together."""
    spec, size, batch, numbers, _ = members
    new = batch.map(torch.clone)
    # Member by member, and within a member leaf by leaf.
    columns = [[list(x.unbind(0)) for x in column] for column in new[:5]]
    steps = [list(x.unbind(0)) if x.dim() else [x] * size for x in new.leaf_steps]
    sets: dict[LeafHparams, list[int]] = {}
    values = [_values(x) if isinstance(x, Tensor) else [x] * size for x in numbers]
    for member, own in enumerate(zip(*values, strict=True)):
        sets.setdefault(spec.hparams(own), []).append(member)
    for h, own in sets.items():
        of_set = [[x[i] for i in own for x in column] for column in (*columns, steps)]
        _run_in_place(KERNELS[spec.kernel], Batch(*of_set), h)
    return new


def _run_stacked(members: _Members) -> Batch:
    """The foreach kernel on stacked leaves, with the scalars of members beside them."""
    new = members.batch.map(torch.clone)
    finish(KERNELS["foreach"].run(new, members.spec.hparams(members.numbers), None, None))
    return new


def _run_broadcast(members: _Members) -> Batch:
    """The equations on stacked leaves, with the scalars of its members beside each: for outer transforms to see."""
    spec, _, batch, numbers, given = members
    each = given or [coefficients(spec.hparams(numbers), step + 1) for step in batch.steps]
    return update_leaves(batch, each, maximize=spec.maximize)


def _values(x: Any) -> list[float]:
    return x.tolist()


class _Functorch(NamedTuple):
    unwrap: Callable[[Tensor, int], tuple[Tensor, int | None]]
    wrap: Callable[[Tensor, int, int], Tensor]
    current_transform: Callable[[], Any]


def _find_functorch() -> _Functorch | None:
    try:
        functorch: Any = importlib.import_module("torch._C._functorch")
        current: Any = importlib.import_module("torch._functorch.pyfunctorch").retrieve_current_functorch_interpreter
        return _Functorch(functorch._unwrap_batched, functorch._add_batch_dim, current)
    except (AttributeError, ImportError):
        return None


_functorch = _find_functorch()


def call_under_vmap(rule: Callable[..., Any], operands: Flat) -> tuple[Any, ...] | None:
    """The results of `rule(size, dims, operands)`, mapped, or None if this is for torch to do.

    `rule` takes the operands of all members, and gives results and their batch dimensions, as `Function.vmap` does.
    """
    if _functorch is None or not is_single_vmap():
        return None
    vmap = _functorch.current_transform()
    level = vmap.level()
    pairs = [_functorch.unwrap(x, level) if isinstance(x, Tensor) else (x, None) for x in operands]
    values, dims = zip(*pairs, strict=True)
    is_recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values)
    if is_recorded or all(dim is None for dim in dims):
        return None
    with vmap.lower():
        results, out_dims = rule(vmap.batch_size(), dims, values)
    return tuple(_functorch.wrap(x, dim, level) for x, dim in zip(results, out_dims, strict=True))
