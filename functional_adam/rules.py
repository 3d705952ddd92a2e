"""One torch.autograd.Function around a kernel call: its derivatives and its batching rule, by hand.

The forward pass runs the kernel. The derivatives are plain differentiable operations, so that they can be
differentiated and mapped again: `torch.func` inside them would break saved-tensor hooks and nested forward mode.
"""

from typing import Any

import torch
from torch import Tensor

from functional_adam.batching import run_batched
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
from functional_adam.equations import Scalars, as_leaf, as_real, compute_dtype, precise
from functional_adam.hparams import Scalar
from functional_adam.leaves import Buffers
from functional_adam.packing import Parts, Spec, run, unpack, unpack_buffers
from functional_adam.tracking import is_constant, is_host_value, is_transformed

# Below this many elements the leaves of a derivative are joined into one: fewer operations weigh more than the copies.
_JOIN_BELOW = 2**18


def differentiable_update(
    kernel: str,
    buffers: Buffers,
    grads: list[Tensor],
    steps: list[Tensor],
    scalars: Scalars,
    grad_scale: Tensor | None,
) -> Buffers:
    """The buffers after one update by `kernel`, for leaves of one device and dtype.

    There is one of `steps`, which do not count this update yet, or one a leaf.
    """
    dtype = compute_dtype(*next(buffers.rows()))
    ready = buffers.map(lambda x: as_real(x.to(dtype)))
    real_grads = [as_real(grad.to(dtype)) for grad in grads]
    if grad_scale is not None:
        wide = torch.promote_types(dtype.to_real(), torch.float32)
        scale = grad_scale.to(device=grads[0].device, dtype=wide)
        real_grads = [(grad.to(wide) / scale).to(grad.dtype) for grad in real_grads]
    spec = Spec(kernel, len(grads), scalars.amsgrad, scalars.maximize, scalars.decoupled_weight_decay)
    new = unpack_buffers(spec, _apply(spec, *ready.flat, *real_grads, *scalars[:5], *steps))
    columns = zip(new, buffers, strict=True)
    return Buffers(*([as_leaf(x, old) for x, old in zip(*pair, strict=True)] for pair in columns))


def advance(step: Tensor) -> Tensor:
    """`step + 1`, one number in memory where it is one, so that members are still seen to be at the same step."""
    return _advance(step) if is_transformed() else step + 1


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(spec: Spec, *flat: Any) -> tuple[Tensor, ...]:
        return run(spec, flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, flat = inputs[0], inputs[1:]
        numbers = unpack(spec, flat).numbers
        ctx.spec = spec
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in numbers]
        # Backward reads parameters only through a weight decay.
        _, reached = _wanted(ctx)
        is_coupled = not spec.decoupled_weight_decay and (isinstance(numbers[4], Tensor) or numbers[4] != 0)
        reads_params = is_coupled or not reached.isdisjoint(("decay", "weight_decay"))
        tensors = [x if isinstance(x, Tensor) else None for x in flat]
        ctx.save_for_forward(*tensors)
        ctx.save_for_backward(*(x if i >= spec.count or reads_params else None for i, x in enumerate(tensors)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        spec: Spec = ctx.spec
        buffers, grads, numbers, steps = _saved(ctx)
        h = spec.scalars(numbers)
        wanted, reached = _wanted(ctx)
        incoming = unpack_buffers(spec, cotangents)

        outgoing: tuple[list[Any], ...] = tuple([None] * spec.count for _ in range(5))
        of_numbers: list[Any] = [None] * 5
        of_steps: list[Any] = [None] * len(steps)
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
            of_steps[k] = of_step
        of_numbers = [_as(x, number) for x, number in zip(of_numbers, numbers, strict=True)]
        of_steps = [_as(x, step) for x, step in zip(of_steps, steps, strict=True)]
        *of_buffers, of_grads = outgoing
        flat = [x for column in of_buffers[: 4 if spec.amsgrad else 3] for x in column]
        return (None, *flat, *of_grads, *of_numbers, *of_steps)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        spec: Spec = ctx.spec
        buffers, grads, numbers, steps = _saved(ctx)
        h = spec.scalars(numbers)
        buffer_tangents, grad_tangents, number_tangents, step_tangents = unpack(spec, tangents)
        new: tuple[list[Any], ...] = tuple([None] * spec.count for _ in range(4 if spec.amsgrad else 3))
        for piece in _pieces(spec, grads, steps):
            k = 0 if len(steps) == 1 else piece[0]
            t = _value(steps[k]) + 1
            leaf = _join(piece, *buffers, grads)
            point = point_at(leaf, h, local_scalars(h, t))
            directions = Numbers(*(None if x is None else precise(x) for x in (*number_tangents, step_tangents[k])))
            local = numbers_jvp(h, t, directions)
            row = leaf_jvp(point, _join(piece, *buffer_tangents, grad_tangents), local, leaf[0])
            for column, value in zip(new, row, strict=False):
                _split(value, piece, grads, column)
        return tuple(x for column in new for x in column)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: Spec, *flat: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return run_batched(_apply, info.batch_size, in_dims[1:], spec, flat)


_apply: Any = getattr(_Update, "apply")  # noqa: B009 (torch gives it no type)


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(step: Tensor) -> Tensor:
        return step + 1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any], step: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dim = in_dims[0]
        if step.stride(dim) != 0:
            return advance(step), dim
        return advance(step.select(dim, 0)).expand(info.batch_size), 0


_advance: Any = getattr(_Advance, "apply")  # noqa: B009


def _wanted(ctx: Any) -> tuple[list[str], set[str]]:
    """Which numbers need a cotangent, and which scalars of a leaf they need it from."""
    spec: Spec = ctx.spec
    _, _, numbers, steps = unpack(spec, ctx.needs_input_grad[1:])
    wanted = [name for name, needed in zip(Numbers._fields, (*numbers, any(steps)), strict=True) if needed]
    return wanted, {x for name in wanted for x in reached_by(name, decoupled=spec.decoupled_weight_decay)}


def _saved(ctx: Any) -> Parts:
    spec: Spec = ctx.spec
    flat = list(ctx.saved_tensors)
    start = spec.buffer_count + spec.count
    for index, number in enumerate(ctx.numbers):
        if number is not None:
            flat[start + index] = number
    return unpack(spec, flat)


def _value(step: Tensor) -> Scalar:
    """A number where it can be read, so that corrections cost nothing."""
    return step.item() if is_host_value(step) and is_constant(step) else step


def _pieces(spec: Spec, grads: list[Tensor], steps: list[Tensor]) -> list[list[int]]:
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
    sizes = [like[i].numel() for i in piece]
    parts = [value] if len(piece) == 1 else torch.split(value, sizes)
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
