"""One torch.autograd.Function around a kernel call: its derivatives and its batching rule, by hand.

The forward pass runs the kernel. Hyperparameters and steps that are differentiated reach the leaves as coefficients,
which are computed outside of the Function by plain operations; its derivatives answer for the coefficients alone. They
are plain differentiable operations, so that they can be differentiated and mapped again: `torch.func` inside them
would break saved-tensor hooks and nested forward mode.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from functional_adam.adam.derivatives import leaf_jvp, leaf_vjp, plain_leaf_vjp, point_at
from functional_adam.adam.equations import (
    EQUATIONS,
    Coefficients,
    LeafHparams,
    coefficients,
    compute_dtype,
    is_number,
    update_leaves,
)
from functional_adam.autodiff.batching import Apply, Flat, Spec, call_under_vmap, run, run_batched
from functional_adam.tensors.batch import Batch
from functional_adam.tensors.layouts import as_leaf, as_real, with_layout_of
from functional_adam.tensors.recycling import empty_like
from functional_adam.tensors.staging import Columns, Piece, Rows, cut_into_pieces, flattened, join, put_together, split
from functional_adam.tensors.tracking import (
    is_batched_by_engine,
    is_constant,
    is_host_value,
    is_transformed,
    may_be_differentiated,
)


class GrowingGraphWarning(UserWarning):
    """A hundred updates in a row were recorded by autograd, which is rarely meant.

    Parameters that require grad, such as those of `dict(model.named_parameters())`, make each update part of the graph
    of the next. The graph keeps gradients and moments of all of them. Detach the parameters, or update under
    `torch.no_grad()`. Code that does differentiate through so many updates filters the warning.

    Example:
        >>> import functional_adam, warnings
        >>> warnings.filterwarnings("ignore", category=functional_adam.GrowingGraphWarning)
    """


Context: TypeAlias = Any  # torch gives it no type

_MANY = 100  # updates in a row
# Derivatives are computed in pieces of so many elements, so that intermediate values stay in the cache.
_PIECE = 2**17


def differentiable_update(
    kernel: str, batch: Batch, h: LeafHparams, grad_scale: float | Tensor | None, *, is_ready: bool
) -> Batch:
    """`batch` after one update by `kernel`, for leaves of one device and dtype; its steps do not count this update yet.

    `is_ready`: all leaves are known to be contiguous, without lazy bits, and of one real dtype.
    """
    if kernel == EQUATIONS:
        each = [coefficients(h, step + 1) for step in batch.steps]
        return update_leaves(batch, each, maximize=h.maximize, grad_scale=grad_scale)
    dtype = compute_dtype(*next(batch.rows()))
    is_real = is_ready or (not dtype.is_complex and all(x.dtype is dtype for x in (*batch.buffers, *batch.grads)))
    ready = batch if is_real else batch.map(lambda x: as_real(x.to(dtype)))
    grads = batch.grads if is_real else [as_real(grad.to(dtype)) for grad in batch.grads]
    if grad_scale is not None:
        wide = torch.promote_types(dtype.to_real(), torch.float32)
        scale = torch.as_tensor(grad_scale).to(grads[0].device)
        grads = [(grad.to(wide) / scale.expand(grad.shape)).to(grad.dtype) for grad in grads]
    numbers, flags, steps = h[:5], h[5:], batch.steps
    given: list[float | Tensor] = []
    if any(isinstance(x, Tensor) and may_be_differentiated(x) for x in (*numbers, *steps)):
        each = [coefficients(h, _value(step) + 1) for step in steps]
        given = [*each[0][:5], *(c.step_size for c in each), *(c.root_correction for c in each)]
    spec = Spec(kernel, len(grads), len(steps), *flags, is_ready=is_ready)
    new = _apply(spec, *ready.buffers, *grads, *numbers, *steps, *given)
    if new[0].grad_fn is not None and not is_transformed():
        _count_updates(new[0].grad_fn, ready)
    if not is_real:
        new = [as_leaf(x, old) for x, old in zip(new, batch.buffers, strict=True)]
    return batch.with_buffers(new)


def advance(step: Tensor, kernel: str) -> Tensor:
    """`step + 1`, one number in memory where it is one, so that members are still seen to be at the same step."""
    return _advance(step) if kernel != EQUATIONS and is_transformed() else step + 1


def rounded(master: Tensor, param: Tensor) -> Tensor:
    """`master` in the dtype and layout of `param`."""
    return with_layout_of(master.to(param.dtype), param)


def _count_updates(node: Context, given: Batch) -> None:
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
    def setup_context(ctx: Context, inputs: Flat, output: tuple[Tensor, ...]) -> None:
        spec, flat = inputs[0], inputs[1:]
        ctx.spec = spec
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in flat]
        # Backward reads parameters only through a weight decay.
        weight_decay = spec.numbers(flat)[4]
        is_coupled = not spec.decoupled_weight_decay and not is_number(weight_decay, 0)
        reads_params = is_coupled or "decay" in _wanted(ctx)
        tensors = [x if isinstance(x, Tensor) else None for x in flat]
        ctx.save_for_forward(*tensors)
        ctx.save_for_backward(*(x if i >= spec.count or reads_params else None for i, x in enumerate(tensors)))

    @staticmethod
    def backward(ctx: Context, *cotangents: Tensor) -> Flat:
        spec: Spec = ctx.spec
        flat = _saved(ctx)
        batch, each, wanted = spec.batch(flat), _coefficients(spec, flat), _wanted(ctx)
        columns, incoming = flattened(batch[:5]), flattened(spec.buffers(cotangents)[:4])
        # Numbers and steps are answered for by the coefficients.
        others: list[Any] = [None] * (len(flat) - spec.leaf_count)
        is_last = not (torch.is_grad_enabled() or is_transformed() or any(map(is_batched_by_engine, cotangents)))
        if is_last and not (spec.amsgrad or wanted or any(isinstance(x, Tensor) for x in each[0])):
            outgoing = _plain_vjp(columns, incoming, each, maximize=spec.maximize)
            return (None, *put_together(outgoing, batch.grads), *others)

        outgoing: Columns = [[[] for _ in batch.grads] for _ in range(5)]
        of_each = [dict[str, Tensor]() for _ in each]
        for piece, k in _pieces(batch):
            point = point_at(join(piece, columns), each[k], maximize=spec.maximize)
            of_leaf, scalars = leaf_vjp(point, join(piece, incoming), wanted)
            for column, value in zip(outgoing, of_leaf, strict=True):
                split(piece, value, column)
            for name, value in scalars.items():
                own = of_each[k if name in _PER_STEP else 0]
                own[name] = own[name] + value if name in own else value
        if wanted:
            n = len(batch.steps)
            of_given = [of_each[0].get(name) for name in Coefficients._fields[:5]]
            of_given += [of.get(name) for name in _PER_STEP for of in of_each]
            given = flat[spec.leaf_count + 5 + n :]
            others[5 + n :] = [_like(x, coefficient) for x, coefficient in zip(of_given, given, strict=True)]
        if not spec.amsgrad:
            del outgoing[3]
        return (None, *put_together(outgoing, batch.grads), *others)

    @staticmethod
    def jvp(ctx: Context, _: None, *tangents: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        spec: Spec = ctx.spec
        flat = _saved(ctx)
        batch, each = spec.batch(flat), _coefficients(spec, flat)
        moving = spec.coefficients(tangents) or [[None] * len(Coefficients._fields)] * len(each)
        columns, direction = flattened(batch[:5]), flattened(spec.batch(tangents)[:5])
        new: Columns = [[[] for _ in batch.grads] for _ in range(4)]
        for piece, k in _pieces(batch):
            point = point_at(join(piece, columns), each[k], maximize=spec.maximize)
            row = leaf_jvp(point, join(piece, direction), cast("Any", moving[k]))
            for column, value in zip(new, row, strict=True):
                split(piece, value, column)
        return tuple(put_together(new if spec.amsgrad else new[:3], batch.grads))

    @staticmethod
    def vmap(info: Context, in_dims: Flat, spec: Spec, *flat: Any) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
        return run_batched(_apply, info.batch_size, in_dims[1:], spec, flat)


# torch binds arguments by the signature, and would find it out anew in every call.
_Update.forward.__signature__ = inspect.signature(_Update.forward)


def _apply(spec: Spec, *flat: Any) -> Sequence[Tensor]:
    def rule(size: int, dims: Sequence[int | None], flat: Flat) -> object:
        return run_batched(_apply, size, dims, spec, flat)

    apply: Apply = getattr(_Update, "apply")  # noqa: B009 (torch gives it no type)
    return call_under_vmap(rule, flat) or apply(spec, *flat)


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(step: Tensor) -> Tensor:
        return step + 1

    @staticmethod
    def setup_context(ctx: Context, inputs: Flat, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Context, cotangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cotangent

    @staticmethod
    def jvp(ctx: Context, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tangent

    @staticmethod
    def vmap(info: Context, in_dims: Flat, step: Tensor) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _advance_members(info.batch_size, in_dims[0], step)


def _advance_members(size: int, dim: int, step: Tensor) -> tuple[Tensor, int]:
    if not size or step.stride(dim) != 0 or not is_constant(step):
        return advance(step, ""), dim
    one = advance(step.select(dim, 0), "")
    return one.expand(size, *one.shape), 0


def _advance(step: Tensor) -> Tensor:
    def rule(size: int, dims: tuple[int], steps: tuple[Tensor]) -> object:
        return tuple(zip(_advance_members(size, dims[0], steps[0]), strict=True))

    apply: Callable[[Tensor], Tensor] = getattr(_Advance, "apply")  # noqa: B009
    mapped = call_under_vmap(rule, (step,))
    return mapped[0] if mapped else apply(step)


_PER_STEP = ("step_size", "root_correction")


def _wanted(ctx: Context) -> set[str]:
    """Which coefficients need a cotangent."""
    spec: Spec = ctx.spec
    needs = spec.coefficients(ctx.needs_input_grad[1:])
    return {
        name for of_step in needs for name, is_needed in zip(Coefficients._fields, of_step, strict=True) if is_needed
    }


def _saved(ctx: Context) -> Flat:
    return [number if x is None else x for x, number in zip(ctx.saved_tensors, ctx.numbers, strict=True)]


def _coefficients(spec: Spec, flat: Flat) -> list[Coefficients]:
    """Those given for each step, or else, where nobody differentiates with respect to them, those that follow."""
    h = spec.hparams(spec.numbers(flat))
    return spec.coefficients(flat) or [coefficients(h, _value(step) + 1) for step in spec.batch(flat).steps]


def _value(step: Tensor) -> float | Tensor:
    """A number where it can be read, so that coefficients cost nothing."""
    return step.item() if is_host_value(step) and is_constant(step) else step


def _pieces(batch: Batch) -> list[tuple[Piece, int]]:
    """Pieces of all leaves, each with the place of its step."""
    is_shared = len(batch.steps) == 1
    pieces = cut_into_pieces(batch.grads, _PIECE, is_joined=is_shared)
    return [(piece, 0 if is_shared else piece[0][0]) for piece in pieces]


def _plain_vjp(columns: Rows, incoming: Rows, each: list[Coefficients], *, maximize: bool) -> Columns:
    """The cotangents of (p, m, v, g) where `plain_leaf_vjp` can give them."""
    grads = columns[-1]
    outgoing: Columns = [[[] for _ in grads] for _ in range(4)]
    is_decayed = each[0].decay != 1 or each[0].weight_decay != 0
    if not is_decayed:
        outgoing[0] = [[cotangent] for cotangent in incoming[0]]
    for piece in cut_into_pieces(grads, _PIECE, is_joined=len(each) == 1):
        index, start, stop = piece[0]
        is_cut = stop - start < grads[index].numel()
        if is_cut and start == 0:
            # What a large leaf is cut into is written to its place at once.
            wide = torch.promote_types(grads[index].dtype, torch.float32)
            for column in outgoing if is_decayed else outgoing[1:]:
                column[index].append(empty_like(grads[index], wide))
        places = [column[index][0][start:stop] if is_cut else None for column in outgoing]
        c = each[0 if len(each) == 1 else index]
        values = plain_leaf_vjp(join(piece, columns), join(piece, incoming), c, places[1:], maximize=maximize)
        if is_cut and is_decayed:
            outgoing[0][index][0][start:stop] = values[0]
        elif not is_cut:
            for column, value in zip(outgoing if is_decayed else outgoing[1:], values[not is_decayed :], strict=True):
                split(piece, value, column)
    return outgoing


def _like(cotangent: Tensor | None, coefficient: object) -> Tensor | None:
    """`cotangent` as that of `coefficient`; None for a number."""
    if cotangent is None or not isinstance(coefficient, Tensor):
        return None
    return cotangent.to(device=coefficient.device, dtype=coefficient.dtype)
