"""One torch.autograd.Function around a kernel call: its derivatives and its batching rule, by hand.

The forward pass runs the kernel. The derivatives are plain differentiable operations, so that they can be
differentiated and mapped again: `torch.func` inside them would break saved-tensor hooks and nested forward mode.
"""

import inspect
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from functional_adam.adam.derivatives import leaf_jvp, leaf_vjp, plain_leaf_vjp, point_at
from functional_adam.adam.equations import Scalars, as_leaf, as_real, compute_dtype, precise
from functional_adam.adam.hparams import Scalar
from functional_adam.adam.scalars import Local, Numbers, local_scalars, numbers_jvp, numbers_vjp, reached_by
from functional_adam.autodiff.batching import run_batched
from functional_adam.autodiff.mapping import call_under_vmap
from functional_adam.autodiff.packing import Parts, Spec, run, unpack, unpack_buffers
from functional_adam.autodiff.pieces import Columns, cut_into_pieces, flattened, join, put_together, split
from functional_adam.tensors.leaves import Buffers
from functional_adam.tensors.recycling import empty_like
from functional_adam.tensors.tracking import is_batched_by_engine, is_constant, is_host_value, is_transformed


class GrowingGraphWarning(UserWarning):
    """A hundred updates in a row were recorded by autograd, which is rarely meant.

    Parameters that require grad, such as those of `dict(model.named_parameters())`, make each update part of the graph
    of the next. The graph keeps gradients and moments of all of them. Detach the parameters, or update under
    `torch.no_grad()`. Code that does differentiate through so many updates filters the warning.

    Example:
        >>> import functional_adam, warnings
        >>> warnings.filterwarnings("ignore", category=functional_adam.GrowingGraphWarning)
    """


_MANY = 100  # updates in a row


def differentiable_update(
    kernel: str,
    buffers: Buffers,
    grads: list[Tensor],
    steps: list[Tensor],
    scalars: Scalars,
    grad_scale: Tensor | None,
    *,
    is_ready: bool,
) -> Buffers:
    """The buffers after one update by `kernel`, for leaves of one device and dtype, `is_ready` as in `run_kernel`.

    There is one of `steps`, which do not count this update yet, or one a leaf.
    """
    dtype = compute_dtype(*next(buffers.rows()))
    is_real = is_ready or (not dtype.is_complex and all(x.dtype is dtype for x in (*buffers.flat, *grads)))
    ready = buffers if is_real else buffers.map(lambda x: as_real(x.to(dtype)))
    real_grads = grads if is_real else [as_real(grad.to(dtype)) for grad in grads]
    if grad_scale is not None:
        wide = torch.promote_types(dtype.to_real(), torch.float32)
        scale = grad_scale.to(grads[0].device)
        real_grads = [(grad.to(wide) / scale.expand(grad.shape)).to(grad.dtype) for grad in real_grads]
    flags = scalars.amsgrad, scalars.maximize, scalars.decoupled_weight_decay
    spec = Spec(kernel, len(grads), *flags, is_ready=is_ready)
    new = unpack_buffers(spec, _apply(spec, *ready.flat, *real_grads, *scalars[:5], *steps))
    if new.params[0].grad_fn is not None and not is_transformed():
        _count_updates(new.params[0].grad_fn, ready)
    if is_real:
        return new
    columns = zip(new, buffers, strict=True)
    return Buffers(*([as_leaf(x, old) for x, old in zip(*pair, strict=True)] for pair in columns))


def advance(step: Tensor) -> Tensor:
    """`step + 1`, one number in memory where it is one, so that members are still seen to be at the same step."""
    return _advance(step) if is_transformed() else step + 1


def _count_updates(node: Any, given: Buffers) -> None:
    """Let the `node` of an update know how many updates in a row it ends, and warn when they are many."""
    node.update_count = 1 + max(map(_updates_behind, (given.params[0], given.exp_avgs[0])))
    if node.update_count == _MANY:
        level = 1  # of the caller outside of this package
        while _module_of_caller(level + 1).startswith("functional_adam."):
            level += 1
        warnings.warn(
            f"{_MANY} updates in a row were recorded by autograd, because parameters or state require grad. The graph "
            "keeps the gradients and moments of each, so that memory grows with every step. If you do not "
            "differentiate through these updates, detach the parameters ({name: p.detach() for name, p in "
            "model.named_parameters()}), or update under torch.no_grad(). If you do, filter this GrowingGraphWarning.",
            GrowingGraphWarning,
            stacklevel=level + 1,
        )


def _module_of_caller(level: int) -> str:
    return str(sys._getframe(level).f_globals.get("__name__"))  # pyright: ignore[reportPrivateUsage]


def _updates_behind(x: Tensor) -> int:
    """The count of the update that `x` comes from, perhaps cast, chosen by found_inf, or changed a little."""
    count, nodes = 0, [x.grad_fn]
    for _ in range(4):
        count = max(count, *(getattr(node, "update_count", 0) for node in nodes), 0)
        nodes = [parent for node in nodes if node and not count for parent, _ in node.next_functions][:8]
    return count


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
        reads_params = is_coupled or "decay" in reached
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

        of_numbers: list[Any] = [None] * 5
        of_steps: list[Any] = [None] * len(steps)
        columns, incoming_columns = flattened((*buffers, grads)), flattened(incoming)
        if not (spec.amsgrad or wanted or torch.is_grad_enabled() or is_transformed()):
            local = [local_scalars(h, _value(step) + 1) for step in steps]
            if not any(isinstance(x, Tensor) for x in local[0]) and not any(map(is_batched_by_engine, cotangents)):
                outgoing = _plain_vjp(columns, incoming_columns, h, local)
                return (None, *put_together(outgoing, grads), *of_numbers, *of_steps)

        outgoing: Columns = [[[] for _ in grads] for _ in range(5)]
        for piece in cut_into_pieces(grads, is_step_shared=len(steps) == 1):
            k = 0 if len(steps) == 1 else piece[0][0]
            t = _value(steps[k]) + 1
            leaf = join(piece, columns)
            point = point_at(leaf, h, local_scalars(h, t))
            leaf_cotangents, scalar_cotangents = leaf_vjp(point, join(piece, incoming_columns), reached, leaf[0])
            for column, value in zip(outgoing, leaf_cotangents, strict=True):
                split(piece, value, column)
            if wanted:
                of_local = Local(*map(scalar_cotangents.get, Local._fields))
                *five, of_step = numbers_vjp(h, t, of_local, wanted)
                of_numbers = [_plus(x, y) for x, y in zip(of_numbers, five, strict=True)]
                of_steps[k] = _plus(of_steps[k], of_step)
        of_numbers = [_as(x, number) for x, number in zip(of_numbers, numbers, strict=True)]
        of_steps = [_as(x, step) for x, step in zip(of_steps, steps, strict=True)]
        if not spec.amsgrad:
            del outgoing[3]
        return (None, *put_together(outgoing, grads), *of_numbers, *of_steps)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        spec: Spec = ctx.spec
        buffers, grads, numbers, steps = _saved(ctx)
        h = spec.scalars(numbers)
        buffer_tangents, grad_tangents, number_tangents, step_tangents = unpack(spec, tangents)
        columns, direction = flattened((*buffers, grads)), flattened((*buffer_tangents, grad_tangents))
        new: Columns = [[[] for _ in grads] for _ in range(4)]
        for piece in cut_into_pieces(grads, is_step_shared=len(steps) == 1):
            k = 0 if len(steps) == 1 else piece[0][0]
            t = _value(steps[k]) + 1
            leaf = join(piece, columns)
            point = point_at(leaf, h, local_scalars(h, t))
            directions = Numbers(*(None if x is None else precise(x) for x in (*number_tangents, step_tangents[k])))
            local = numbers_jvp(h, t, directions)
            row = leaf_jvp(point, join(piece, direction), local, leaf[0])
            for column, value in zip(new, row, strict=True):
                split(piece, value, column)
        return tuple(put_together(new if spec.amsgrad else new[:3], grads))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: Spec, *flat: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return run_batched(_apply, info.batch_size, in_dims[1:], spec, flat)


# torch binds arguments by the signature, and would find it out anew in every call.
_Update.forward.__signature__ = inspect.signature(_Update.forward)


def _apply(spec: Spec, *flat: Any) -> tuple[Tensor, ...]:
    def rule(size: int, dims: tuple[int | None, ...], flat: tuple[Any, ...]) -> Any:
        return run_batched(_apply, size, dims, spec, flat)

    apply: Any = getattr(_Update, "apply")  # noqa: B009 (torch gives it no type)
    return call_under_vmap(rule, flat) or apply(spec, *flat)


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
        return _advance_members(info.batch_size, in_dims[0], step)


def _advance_members(size: int, dim: int, step: Tensor) -> tuple[Tensor, int]:
    if not size or step.stride(dim) != 0 or not is_constant(step):
        return advance(step), dim
    one = advance(step.select(dim, 0))
    return one.expand(size, *one.shape), 0


def _advance(step: Tensor) -> Tensor:
    def rule(size: int, dims: tuple[int], steps: tuple[Tensor]) -> Any:
        return tuple(zip(_advance_members(size, dims[0], steps[0]), strict=True))

    apply: Any = getattr(_Advance, "apply")  # noqa: B009
    mapped = call_under_vmap(rule, (step,))
    return mapped[0] if mapped else apply(step)


def _plain_vjp(columns: list[list[Any]], incoming: list[list[Any]], h: Scalars, local: list[Local]) -> Columns:
    """The cotangents of (p, m, v, g) where `plain_leaf_vjp` can give them."""
    grads = columns[-1]
    outgoing: Columns = [[[] for _ in grads] for _ in range(4)]
    is_decayed = local[0].decay != 1 or local[0].weight_decay != 0
    if not is_decayed:
        outgoing[0] = [[cotangent] for cotangent in incoming[0]]
    for piece in cut_into_pieces(grads, is_step_shared=len(local) == 1):
        index, start, stop = piece[0]
        is_cut = stop - start < grads[index].numel()
        if is_cut and start == 0:
            # What a large leaf is cut into is written to its place at once.
            wide = torch.promote_types(grads[index].dtype, torch.float32)
            for column in outgoing if is_decayed else outgoing[1:]:
                column[index].append(empty_like(grads[index], wide))
        places = [column[index][0][start:stop] if is_cut else None for column in outgoing]
        at_step = local[0 if len(local) == 1 else index]
        values = plain_leaf_vjp(join(piece, columns), join(piece, incoming), h, at_step, places[1:])
        if is_cut and is_decayed:
            outgoing[0][index][0][start:stop] = values[0]
        elif not is_cut:
            for column, value in zip(outgoing if is_decayed else outgoing[1:], values[not is_decayed :], strict=True):
                split(piece, value, column)
    return outgoing


def _wanted(ctx: Any) -> tuple[list[str], set[str]]:
    """Which numbers need a cotangent, and which scalars of a leaf they need it from."""
    spec: Spec = ctx.spec
    scalars = ctx.needs_input_grad[1 + spec.leaf_count :]
    wanted = [name for name, needed in zip(Numbers._fields, (*scalars[:5], any(scalars[5:])), strict=True) if needed]
    return wanted, {x for name in wanted for x in reached_by(name, decoupled=spec.decoupled_weight_decay)}


def _saved(ctx: Any) -> Parts:
    spec: Spec = ctx.spec
    flat = list(ctx.saved_tensors)
    for index, number in enumerate(ctx.numbers, spec.leaf_count):
        if number is not None:
            flat[index] = number
    return unpack(spec, flat)


def _value(step: Tensor) -> Scalar:
    """A number where it can be read, so that corrections cost nothing."""
    return step.item() if is_host_value(step) and is_constant(step) else step


def _plus(x: Any, y: Any) -> Any:
    return y if x is None else x + y


def _as(cotangent: Any, like: Any) -> Any:
    if cotangent is None or not isinstance(like, Tensor):
        return None
    return cotangent.to(device=like.device, dtype=like.dtype)
