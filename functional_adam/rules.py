"""One torch.autograd.Function around a kernel call: its derivatives and its batching rule, by hand.

The forward pass runs the kernel. The derivatives are plain differentiable operations, so that they can be
differentiated and mapped again: `torch.func` inside them would break saved-tensor hooks and nested forward mode.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functional_adam.derivatives import (
    Local,
    Numbers,
    leaf_jvp,
    leaf_vjp,
    local_scalars,
    numbers_jvp,
    numbers_vjp,
    point_at,
    reached_by,
)
from functional_adam.equations import Scalars, as_leaf, as_real, compute_dtype, precise, update_leaf
from functional_adam.hparams import Scalar
from functional_adam.kernels import run_kernel
from functional_adam.leaves import Buffers
from functional_adam.tracking import is_constant, is_host_value, is_transformed, requires_grad

# Below this many elements the leaves of a derivative are joined into one: fewer operations weigh more than the copies.
_JOIN_BELOW = 2**18


def differentiable_update(
    kernel: str,
    buffers: Buffers,
    grads: list[Tensor],
    steps: list[Tensor],
    scalars: Scalars,
    grad_scale: Tensor | None,
) -> tuple[Buffers, list[Tensor]]:
    """The buffers and steps after one update by `kernel`, for leaves of one device and dtype.

    There is one of `steps`, which do not count this update yet, or one a leaf.
    """
    dtype = compute_dtype(*next(buffers.rows()))
    ready = buffers.map(lambda x: as_real(x.to(dtype)))
    real_grads = [as_real(grad.to(dtype)) for grad in grads]
    if grad_scale is not None:
        wide = torch.promote_types(dtype.to_real(), torch.float32)
        scale = grad_scale.to(device=grads[0].device, dtype=wide)
        real_grads = [(grad.to(wide) / scale).to(grad.dtype) for grad in real_grads]
    spec = _Spec(kernel, len(grads), scalars.amsgrad, scalars.maximize, scalars.decoupled_weight_decay)
    results: Any = _Update.apply(spec, *ready.flat, *real_grads, *scalars[:5], *steps)
    new, new_steps = _unpack_results(spec, results)
    columns = zip(new, buffers, strict=True)
    return Buffers(*([as_leaf(x, old) for x, old in zip(*pair, strict=True)] for pair in columns)), new_steps


@dataclass(frozen=True)
class _Spec:
    """How the flat arguments of the Function are made up. Not a pytree, so that torch.func takes it for a constant."""

    kernel: str
    count: int
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool

    @property
    def columns(self) -> int:
        """How many lists of buffers there are."""
        return 4 if self.amsgrad else 3

    def scalars(self, numbers: Iterable[Scalar]) -> Scalars:
        return Scalars(*numbers, self.amsgrad, self.maximize, self.decoupled_weight_decay)


_Unpacked: TypeAlias = tuple[Buffers, list[Tensor], list[Any], list[Tensor]]


def _unpack(spec: _Spec, flat: Sequence[Any]) -> _Unpacked:
    """(buffers, grads, the five numbers, steps) of the arguments, or of what stands in their places."""
    n, columns = spec.count, spec.columns
    lists = [list(flat[i * n : (i + 1) * n]) for i in range(columns + 1)]
    buffers = Buffers(*lists[:3], lists[3] if spec.amsgrad else [])
    rest = list(flat[(columns + 1) * n :])
    return buffers, lists[-1], rest[:5], rest[5:]


def _unpack_results(spec: _Spec, flat: Sequence[Tensor]) -> tuple[Buffers, list[Tensor]]:
    n = spec.count
    lists = [list(flat[i * n : (i + 1) * n]) for i in range(spec.columns)]
    return Buffers(*lists[:3], lists[3] if spec.amsgrad else []), list(flat[spec.columns * n :])


def _run(spec: _Spec, flat: Sequence[Any]) -> tuple[Tensor, ...]:
    """The kernel on copies: what the Function computes."""
    buffers, grads, numbers, steps = _unpack(spec, flat)
    new, new_steps = buffers.map(torch.clone), [step + 1 for step in steps]
    scalars = spec.scalars(x.item() if isinstance(x, Tensor) and is_host_value(x) else x for x in numbers)
    run_kernel(spec.kernel, new, grads, _per_leaf(spec, new_steps), [scalars] * spec.count)
    return (*new.flat, *new_steps)


def _per_leaf(spec: _Spec, steps: list[Any]) -> list[Any]:
    return steps * spec.count if len(steps) == 1 else steps


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(spec: _Spec, *flat: Any) -> tuple[Tensor, ...]:
        return _run(spec, flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, flat = inputs[0], inputs[1:]
        _, _, numbers, steps = _unpack(spec, flat)
        ctx.spec = spec
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in numbers]
        ctx.is_step_fixed = all(is_constant(step) for step in steps)
        if ctx.is_step_fixed:
            ctx.mark_non_differentiable(*output[-len(steps) :])
        # Backward reads parameters only through a weight decay.
        _, reached = _wanted(ctx)
        is_coupled = not spec.decoupled_weight_decay and (isinstance(numbers[4], Tensor) or numbers[4] != 0)
        reads_params = is_coupled or not reached.isdisjoint(("decay", "weight_decay"))
        tensors = [x if isinstance(x, Tensor) else None for x in flat]
        ctx.save_for_forward(*tensors)
        ctx.save_for_backward(*(x if i >= spec.count or reads_params else None for i, x in enumerate(tensors)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        spec: _Spec = ctx.spec
        buffers, grads, numbers, steps = _saved(ctx)
        h = spec.scalars(numbers)
        wanted, reached = _wanted(ctx)
        incoming, new_step_cotangents = _unpack_results(spec, cotangents)

        outgoing: tuple[list[Any], ...] = tuple([None] * spec.count for _ in range(5))
        of_numbers: list[Any] = [None] * 5
        of_steps: list[Any] = list(new_step_cotangents)
        for piece in _pieces(spec, grads, steps):
            k = 0 if len(steps) == 1 else piece[0]
            t = _value(steps[k]) + 1
            leaf = _join(piece, *buffers, grads)
            point = point_at(leaf, h, local_scalars(h, t))
            leaf_cotangents, scalar_cotangents = leaf_vjp(point, _join(piece, *incoming, []), reached, leaf[0])
            for column, value in zip(outgoing, leaf_cotangents, strict=True):
                _split(value, piece, grads, column)
            *five, of_step = numbers_vjp(h, t, Local(*map(scalar_cotangents.get, Local._fields)), wanted)
            of_numbers = [_plus(x, y) for x, y in zip(of_numbers, five, strict=True)]
            of_steps[k] = _plus(of_steps[k], of_step)
        of_numbers = [_as(x, number) for x, number in zip(of_numbers, numbers, strict=True)]
        of_steps = [_as(x, step) for x, step in zip(of_steps, steps, strict=True)]
        *of_buffers, of_grads = outgoing
        flat = [x for column in of_buffers[: spec.columns] for x in column]
        return (None, *flat, *of_grads, *of_numbers, *of_steps)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Tensor, ...]:
        spec: _Spec = ctx.spec
        buffers, grads, numbers, steps = _saved(ctx)
        h = spec.scalars(numbers)
        buffer_tangents, grad_tangents, number_tangents, step_tangents = _unpack(spec, tangents)
        new = Buffers(*([None] * spec.count for _ in range(spec.columns)), *[[]] * (4 - spec.columns))
        for piece in _pieces(spec, grads, steps):
            k = 0 if len(steps) == 1 else piece[0]
            t = _value(steps[k]) + 1
            leaf = _join(piece, *buffers, grads)
            point = point_at(leaf, h, local_scalars(h, t))
            directions = Numbers(*(None if x is None else precise(x) for x in (*number_tangents, step_tangents[k])))
            local = numbers_jvp(h, t, directions)
            row = leaf_jvp(point, _join(piece, *buffer_tangents, grad_tangents), local, leaf[0])
            for column, value in zip(new, row, strict=True):
                _split(value, piece, grads, column)
        return (*new.flat, *([None] * len(steps) if ctx.is_step_fixed else step_tangents))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: _Spec, *flat: Any) -> tuple[Any, Any]:
        size = info.batch_size
        leaf_count = spec.count * (spec.columns + 1)
        stacked = [_stack(x, dim, size) for x, dim in zip(flat[:leaf_count], in_dims[1:], strict=False)]
        is_tracked = is_transformed() or requires_grad(x for x in flat if isinstance(x, Tensor))
        rest = list(zip(flat[leaf_count:], in_dims[leaf_count + 1 :], strict=True))
        shared = [_shared(x, dim) for x, dim in rest]
        result_dims = (0,) * (spec.count * spec.columns)
        if all(is_shared for is_shared, _ in shared):
            # Adam is elementwise: the batched update is the update of the stacked leaves.
            arguments = (*stacked, *(x for _, x in shared))
            out = _Update.apply(spec, *arguments) if is_tracked else _run(spec, arguments)
            step_dims = [dim for _, dim in rest[5:]]
            # Equal steps stay one number in memory, so that the next update can see that they are.
            steps = [
                s if d is None else s.expand(size) for s, d in zip(out[len(result_dims) :], step_dims, strict=True)
            ]
            out_dims = (*result_dims, *(None if dim is None else 0 for dim in step_dims))
            return (*out[: len(result_dims)], *steps), out_dims
        fronted = [x if dim is None else x.movedim(dim, 0) for x, dim in rest]
        batched = [dim is not None for _, dim in rest]
        run = _run_broadcast if is_tracked or not all(_is_number(x) for x in fronted) else _run_members
        out_dims = (*result_dims, *(0 if is_batched else None for is_batched in batched[5:]))
        return run(spec, stacked, fronted, batched, size), out_dims


def _stack(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _shared(x: Any, dim: int | None) -> tuple[bool, Any]:
    """Whether all members have the same scalar, and it."""
    if dim is None:
        return True, x
    if is_constant(x) and (x.stride(dim) == 0 or (is_host_value(x) and len(set(x.tolist())) == 1)):
        return True, x.select(dim, 0)
    return False, x


def _is_number(x: Any) -> bool:
    return not isinstance(x, Tensor) or is_host_value(x)


def _run_members(
    spec: _Spec, stacked: list[Tensor], rest: list[Any], batched: list[bool], size: int
) -> tuple[Tensor, ...]:
    """Kernels take lists with a step a tensor: members unbound into the list are the batched update."""
    buffers, grads, _, _ = _unpack(spec, [*stacked, *rest])
    new, steps = buffers.map(torch.clone), [step + 1 for step in rest[5:]]
    values = [x.tolist() if isinstance(x, Tensor) else x for x in rest[:5]]
    numbers = [x if is_batched else [x] * size for x, is_batched in zip(values, batched, strict=False)]
    scalars = [h for h in map(spec.scalars, zip(*numbers, strict=True)) for _ in range(spec.count)]
    rows = [s.unbind(0) if is_batched else [s] * size for s, is_batched in zip(steps, batched[5:], strict=True)]
    members = [x for row in zip(*rows, strict=True) for x in _per_leaf(spec, list(row))]
    run_kernel(spec.kernel, Buffers(*map(_unbind, new)), _unbind(grads), members, scalars)
    return (*new.flat, *steps)


def _unbind(column: list[Tensor]) -> list[Tensor]:
    """Member by member, and within a member leaf by leaf."""
    return [x for member in zip(*(stack.unbind(0) for stack in column), strict=True) for x in member]


def _run_broadcast(
    spec: _Spec, stacked: list[Tensor], rest: list[Any], batched: list[bool], size: int
) -> tuple[Tensor, ...]:
    """The equations on stacked leaves, with the scalars of each member beside it: for outer transforms to see."""
    buffers, grads, _, _ = _unpack(spec, [*stacked, *rest])
    rows: list[Any] = []
    for index, (row, grad) in enumerate(zip(buffers.rows(), grads, strict=True)):
        shape = (size, *[1] * (grad.dim() - 1))
        beside = [x.reshape(shape) if is_batched else x for x, is_batched in zip(rest, batched, strict=True)]
        step = beside[5 if len(rest) == 6 else 5 + index]
        rows.append(update_leaf(row, grad, step + 1, spec.scalars(beside[:5])))
    columns = list(zip(*rows, strict=True))[: spec.columns]
    return (*(x for column in columns for x in column), *(step + 1 for step in rest[5:]))


def _wanted(ctx: Any) -> tuple[list[str], set[str]]:
    """Which numbers need a cotangent, and which scalars of a leaf they need it from."""
    spec: _Spec = ctx.spec
    _, _, numbers, steps = _unpack(spec, ctx.needs_input_grad[1:])
    wanted = [name for name, needed in zip(Numbers._fields, (*numbers, any(steps)), strict=True) if needed]
    return wanted, {x for name in wanted for x in reached_by(name, decoupled=spec.decoupled_weight_decay)}


def _saved(ctx: Any) -> _Unpacked:
    spec: _Spec = ctx.spec
    flat = list(ctx.saved_tensors)
    start = spec.count * (spec.columns + 1)
    for index, number in enumerate(ctx.numbers):
        if number is not None:
            flat[start + index] = number
    return _unpack(spec, flat)


def _value(step: Tensor) -> Scalar:
    """A number where it can be read, so that corrections cost nothing."""
    return step.item() if is_host_value(step) and is_constant(step) else step


def _pieces(spec: _Spec, grads: list[Tensor], steps: list[Tensor]) -> list[list[int]]:
    """Which leaves are treated together: all if they are small and share a step, else each by itself."""
    indices = list(range(spec.count))
    if len(steps) == 1 and sum(g.numel() for g in grads) < _JOIN_BELOW:
        return [indices]
    return [[i] for i in indices]


def _join(piece: list[int], *columns: list[Any]) -> tuple[Any, ...]:
    """For each column its leaves in `piece` as one tensor; None where it has none."""

    def joined(column: list[Any]) -> Any:
        if not column or column[piece[0]] is None:
            return None
        one = column[piece[0]] if len(piece) == 1 else torch.cat([column[i].reshape(-1) for i in piece])
        return one.to(torch.promote_types(one.dtype, torch.float32))

    return tuple(map(joined, columns))


def _split(value: Tensor | None, piece: list[int], like: list[Tensor], column: list[Any]) -> None:
    if value is None:
        return
    parts = [value] if len(piece) == 1 else value.split([like[i].numel() for i in piece])
    for i, part in zip(piece, parts, strict=True):
        column[i] = part.reshape(like[i].shape).to(like[i].dtype)


def _plus(x: Any, y: Any) -> Any:
    return y if x is None else x if y is None else x + y


def _as(cotangent: Any, like: Any) -> Any:
    return (
        None
        if cotangent is None or not isinstance(like, Tensor)
        else cotangent.to(device=like.device, dtype=like.dtype)
    )
