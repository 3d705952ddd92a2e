"""The batching rule of an update: Adam is elementwise, so that members are just more leaves."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from functional_adam.adam.equations import Scalars, precise, update_leaf
from functional_adam.adam.hparams import Scalar
from functional_adam.adam.kernels import Batch, run_foreach
from functional_adam.adam.planning import run_kernel
from functional_adam.autodiff.packing import Spec, run, unpack
from functional_adam.tensors.leaves import Buffers
from functional_adam.tensors.tracking import is_constant, is_host_value, is_transformed, requires_grad

# Half types are rounded once by a kernel; a direction of theirs would be rounded before.
_PRECISE = (torch.float32, torch.float64)

# Members of fewer elements a leaf are not worth a place each in the list of a kernel.
SMALL_MEMBER = 2**13


def run_batched(
    apply: Callable[..., Any], size: int, dims: tuple[int | None, ...], spec: Spec, flat: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The results of `size` members and their batch dimensions. `apply` is the Function, for outer transforms."""
    spec = replace(spec, is_ready=False)  # stacks may lie in memory in any way
    pairs = list(zip(flat, dims, strict=True))
    stacked, rest = [_stack(x, dim, size) for x, dim in pairs[: spec.leaf_count]], pairs[spec.leaf_count :]
    is_batched = [dim is not None for _, dim in rest]
    out_dims = (0,) * spec.buffer_count
    is_tracked = is_transformed() or requires_grad(x for x in flat if isinstance(x, Tensor))
    shared = [_shared(x, dim) for x, dim in rest]
    if all(is_shared for is_shared, _ in shared):
        # One call on the stacked leaves is the batched update.
        arguments = (*stacked, *(x for _, x in shared))
        return (apply(spec, *arguments) if is_tracked else run(spec, arguments)), out_dims
    scalars = [x for x, _ in rest]  # a batch of scalars has one dimension
    if is_tracked or not all(is_host_value(x) for x in scalars if isinstance(x, Tensor)):
        return tuple(_run_broadcast(spec, size, stacked, scalars, is_batched).flat), out_dims
    if all(is_shared for is_shared, _ in (*shared[1:4], *shared[5:])) and all(x.dtype in _PRECISE for x in stacked):
        one = [x for _, x in shared]
        scalars = [scalars[0], *one[1:4], scalars[4], *one[5:]]
        return tuple(_run_directions(spec, stacked, scalars).flat), out_dims
    is_small = sum(x.numel() for x in stacked) < SMALL_MEMBER * size * len(stacked)
    # The other kernels round half types after each operation.
    if is_small and all(x.dtype in _PRECISE for x in stacked):
        return tuple(_run_stacked(spec, stacked, scalars, is_batched).flat), out_dims
    return tuple(_run_members(spec, size, stacked, scalars, is_batched).flat), out_dims


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


def _run_directions(spec: Spec, stacked: list[Tensor], scalars: list[Any]) -> Buffers:
    """Members that differ in lr and weight_decay only: one call gives all directions, and each goes its own length."""
    given = unpack(spec, [*stacked, *scalars])
    lr, beta1, beta2, eps, weight_decay = given.numbers
    lr, weight_decay = precise(lr), precise(weight_decay)
    beta1, beta2, eps = (x.item() if isinstance(x, Tensor) else x for x in (beta1, beta2, eps))

    def beside(x: Scalar, leaf: Tensor) -> Scalar:
        return x.to(leaf.dtype).reshape(-1, *[1] * (leaf.dim() - 1)) if isinstance(x, Tensor) else x

    params, grads = given.buffers.params, given.grads
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        if spec.decoupled_weight_decay:
            params = [p * beside(1 - lr * weight_decay, p) for p in params]
        else:
            pull = -weight_decay if spec.maximize else weight_decay
            grads = [g + p * beside(pull, p) for g, p in zip(grads, params, strict=True)]
    zeros = [torch.zeros_like(p) for p in params]
    new = given.buffers._replace(params=[]).map(torch.clone)._replace(params=zeros)
    steps = spec.per_leaf([step + 1 for step in given.steps])
    run_kernel(spec.kernel, new, grads, steps, [spec.scalars((1.0, beta1, beta2, eps, 0.0))] * spec.count)
    # The kernel has left each direction, negative, where it was given zeros for parameters.
    lengths = [torch.as_tensor(beside(lr, p), dtype=p.dtype, device=p.device) for p in params]
    return new._replace(params=[torch.addcmul(*terms) for terms in zip(params, zeros, lengths, strict=True)])


def _run_members(spec: Spec, size: int, stacked: list[Tensor], scalars: list[Any], is_batched: list[bool]) -> Buffers:
    """Kernels take lists with a step a tensor: members unbound into the list, those with equal numbers together."""
    given = unpack(spec, [*stacked, *scalars])
    new, new_steps = given.buffers.map(torch.clone), [step + 1 for step in given.steps]
    numbers: list[list[float]] = []
    for x, batched in zip(given.numbers, is_batched[:5], strict=True):
        value: Any = cast("Any", x).tolist() if isinstance(x, Tensor) else x
        numbers.append(value if batched else [value] * size)
    sets: dict[Scalars, Scalars] = {}
    of_members = [sets.setdefault(h, h) for h in map(spec.scalars, zip(*numbers, strict=True))]
    steps: list[list[Tensor]] = [
        list(step.unbind(0)) if batched else [step] * size
        for step, batched in zip(new_steps, is_batched[5:], strict=True)
    ]
    leaf_steps = [step for member in zip(*steps, strict=True) for step in spec.per_leaf(list(member))]
    buffers = Buffers(*(_unbind(column) for column in new))
    of_leaves = [h for h in of_members for _ in range(spec.count)]
    run_kernel(spec.kernel, buffers, _unbind(given.grads), leaf_steps, of_leaves)
    return new


def _run_stacked(spec: Spec, stacked: list[Tensor], scalars: list[Any], is_batched: list[bool]) -> Buffers:
    """The foreach kernel on stacked leaves, with the scalars of members beside them."""
    given = unpack(spec, [*stacked, *scalars])
    new, steps = given.buffers.map(torch.clone), spec.per_leaf([step + 1 for step in given.steps])
    numbers = (
        x if batched or not isinstance(x, Tensor) else x.item()
        for x, batched in zip(given.numbers, is_batched, strict=False)
    )
    deque(run_foreach(Batch(new, given.grads, steps, spec.scalars(numbers))), maxlen=0)
    return new


def _unbind(column: list[Tensor]) -> list[Tensor]:
    """Member by member, and within a member leaf by leaf."""
    return [x for member in zip(*(stack.unbind(0) for stack in column), strict=True) for x in member]


def _run_broadcast(spec: Spec, size: int, stacked: list[Tensor], scalars: list[Any], is_batched: list[bool]) -> Buffers:
    """The equations on stacked leaves, with the scalars of its members beside each: for outer transforms to see."""
    given = unpack(spec, [*stacked, *scalars])
    new = Buffers([], [], [], [])
    for index, (row, grad) in enumerate(zip(given.buffers.rows(), given.grads, strict=True)):
        shape = (size, *[1] * (grad.dim() - 1))
        beside = [x.reshape(shape) if batched else x for x, batched in zip(scalars, is_batched, strict=True)]
        step = beside[5] if len(given.steps) == 1 else beside[5 + index]
        for column, value in zip(new, update_leaf(row, grad, step + 1, spec.scalars(beside[:5])), strict=True):
            if value is not None:
                column.append(value)
    return new
