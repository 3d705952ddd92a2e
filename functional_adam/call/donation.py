"""What makes a donation safe: memory that nobody else in the call uses, and states that notice a second use."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple, TypeAlias

import torch
from optree import PyTreeSpec
from torch import Tensor

from functional_adam.call.facts import Traits
from functional_adam.tensors.leaves import BUFFER_NAMES, Buffers, local_shard
from functional_adam.tensors.tracking import is_fake
from functional_adam.tensors.trees import path_of


def replace_steps_(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Fresh tensor objects with the values of `new` on the memory of `old`; the old objects are emptied.

    CUDA graphs replay on memory, so the memory stays. The next use of the donated state meets an empty step, and is
    noticed without reading a value.
    """
    fresh = [step.detach() for step in old]
    for step, value in zip(fresh, new, strict=True):
        step.copy_(value)
    for step in old:
        step.set_()  # pyright: ignore[reportCallIssue] (the overload without arguments has no stub)
    return fresh


def release(params: list[Tensor]) -> list[Tensor]:
    """`params` as results: plain tensors outside autograd, on the same memory."""
    return [x.detach() if x.requires_grad or isinstance(x, torch.nn.Parameter) else x for x in params]


def is_surely_safe(tensors: list[Tensor], traits: Traits | None) -> bool:
    """Whether all tensors of an update can be seen, at one look, to be writable and to share no memory."""
    if traits is None or not traits.is_ready or traits.is_inference:
        return False
    starts = [*map(Tensor.data_ptr, tensors)]
    if starts == traits.disjoint:
        return True
    if not _follow_each_other(starts, traits.nbytes):
        return False
    traits.disjoint = starts
    return True


def _follow_each_other(starts: list[int], lengths: Iterable[int]) -> bool:
    """Whether in the order of address no interval begins before the one before it ends."""
    return all(map(operator.le, sorted(map(operator.add, starts, lengths)), sorted(starts)[1:]))


def check_donation(
    buffers: Buffers,
    steps: list[Tensor],
    grads: list[Tensor | None],
    others: list[Tensor],
    narrow: dict[int, Tensor],
    treespec: PyTreeSpec,
) -> None:
    """Raise RuntimeError if a buffer cannot be written, or if writing it would change another tensor of the call."""
    written = [*buffers.flat, *steps, *narrow.values()]
    if not torch.is_inference_mode_enabled() and any(x.is_inference() for x in written):
        raise RuntimeError(
            "Cannot donate tensors made under torch.inference_mode() outside of it. "
            "Update them under inference_mode, or without donate."
        )
    owners = owners_of(buffers, steps, grads, others, narrow)

    def name(place: int) -> str:
        return name_of(owners[place], treespec)

    check_apart(written, [*(grad for grad in grads if grad is not None), *others], name)


Owner: TypeAlias = tuple[str, int]
"""What a tensor of the call belongs to: a tree and a leaf, or -1 for something that is no leaf."""


def owners_of(
    buffers: Buffers, steps: list[Tensor], grads: list[Tensor | None], others: list[Tensor], narrow: dict[int, Tensor]
) -> list[Owner]:
    """The owners of what a donation writes, and then of what it reads: gradients that are not None, and the others."""
    owners = [(root, i) for root, column in zip(BUFFER_NAMES, buffers, strict=True) for i in range(len(column))]
    # Among the buffers a master stands for its parameter.
    owners = [("state.master_params", i) if root == "params" and i in narrow else (root, i) for root, i in owners]
    step_leaves = range(len(steps)) if len(steps) == len(buffers.params) else ()
    owners += [("state.step", i) for i in step_leaves] or [("state.step", -1)]
    owners += [("params", i) for i in narrow]
    owners += [("grads", i) for i, grad in enumerate(grads) if grad is not None]
    return owners + [("a hyperparameter, grad_scale or found_inf", -1)] * len(others)


def name_of(owner: Owner, treespec: PyTreeSpec) -> str:
    """The path of `owner`, for an error."""
    root, index = owner
    return root if index < 0 else path_of(treespec, index, root)


def check_apart(written: Sequence[Tensor], read: Sequence[Tensor], name: Callable[[int], str]) -> None:
    """Raise RuntimeError if writing would change another tensor; `name` says what the tensors are, in this order."""
    found = find_overlap(written, read)
    if found is None:
        return
    first, second = map(name, found)
    what = "overlaps itself" if first == second else f"shares memory with {second}"
    raise RuntimeError(
        f"Cannot donate {first}: it {what}, so that writing one would change the other. "
        "Clone one of them, or update without donate."
    )


class _Span(NamedTuple):
    """The memory of a tensor, in bytes: a piece of `length` from `start` on, and its repetitions along `dims`."""

    start: int
    length: int
    dims: tuple[tuple[int, int], ...]  # stride and size
    place: int  # among all tensors
    is_read: bool

    @property
    def interval(self) -> tuple[int, int, "_Span"]:
        """From the first byte to the end of the last."""
        return self.start, self.start + self.length + sum(stride * (size - 1) for stride, size in self.dims), self


@torch.no_grad()
def find_overlap(written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[int, int] | None:
    """Indices of two tensors that share an element, the first of them written; equal if it overlaps itself.

    The second index counts through `written` and then `read`. Tensors without memory of their own (empty ones,
    FakeTensors) overlap nothing.
    """
    everything = [*written, *read]
    if {*map(type, everything)} <= {Tensor, torch.nn.Parameter} and all(map(Tensor.is_contiguous, everything)):
        starts, lengths = map(Tensor.data_ptr, everything), map(attrgetter("nbytes"), everything)
        if _follow_each_other([*starts], lengths):
            return None
    spans: list[_Span] = []
    for index, tensor in enumerate(everything):
        is_read = index >= len(written)
        local = _local(tensor)
        if local is None:
            continue
        if local.is_contiguous():
            length, dims = local.numel() * local.element_size(), ()
        elif not is_read and _overlaps_itself(local):
            return index, index
        else:
            length, dims = _pieces(local)
        spans.append(_Span(local.data_ptr(), length, dims, index, is_read))
    # Where arithmetic does not show that spans are apart, each byte is looked at.
    suspects = [group for group in _groups(span.interval for span in spans) if not _are_apart(group)]
    return next(filter(None, map(_shared_byte, suspects)), None)


def _pieces(tensor: Tensor) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The length of a piece without gaps, and the strides and sizes by which it is repeated, in bytes."""
    itemsize = length = tensor.element_size()
    dims: list[tuple[int, int]] = []
    for stride, size in sorted((s * itemsize, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == length and not dims:
            length *= size
        elif stride and size != 1:
            dims.append((stride, size))
    return length, tuple(dims)


def _groups(intervals: Iterable[tuple[int, int, _Span]]) -> Iterator[list[_Span]]:
    """Spans whose intervals reach into each other, where some of them are written."""
    group: list[_Span] = []
    end = 0
    for start, stop, span in sorted(intervals, key=_start):
        if start >= end:
            if _may_conflict(group):
                yield group
            group = []
        group.append(span)
        end = max(end, stop)
    if _may_conflict(group):
        yield group


def _start(interval: tuple[int, int, _Span]) -> int:
    return interval[0]


def _may_conflict(group: list[_Span]) -> bool:
    return len(group) > 1 and not all(span.is_read for span in group)


def _are_apart(group: list[_Span], levels: int = 8) -> bool:
    """Whether it is sure that spans share no byte, unless both are only read; at most `levels` strides are tried.

    Memory is cut into rows as long as the largest stride, as a matrix is whose slices the spans are. Where each span
    has one place in all of its rows, two spans are apart if they have no row in common, or are apart within a row.
    """
    row_length = max((stride for span in group for stride, _ in span.dims), default=0)
    if not row_length or not levels:
        return False
    first = min(span.start for span in group)
    rows: dict[int, tuple[int, int]] = {}
    parts: list[_Span] = []
    for span in group:
        row, start = divmod(span.start - first, row_length)
        rows[span.place] = row, row + 1 + sum(size - 1 for stride, size in span.dims if stride == row_length)
        dims = tuple(dim for dim in span.dims if dim[0] != row_length)
        parts.append(span._replace(start=start, dims=dims))
    return all(part.interval[1] <= row_length for part in parts) and all(
        _are_apart(within_rows, levels - 1)
        for columns in _groups(part.interval for part in parts)
        for in_equal_rows in _groups((*rows[part.place], part) for part in columns)
        for within_rows in _groups(part.interval for part in in_equal_rows)
    )


def _local(tensor: Tensor) -> Tensor | None:
    """The tensor that holds the memory: itself, the local shard of a DTensor, or nothing."""
    tensor = local_shard(tensor)
    return None if is_fake(tensor) or not tensor.data_ptr() or not tensor.numel() else tensor


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    # Strides that interleave may still miss each other: count the elements they reach.
    span = 1 + sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    owner = torch.zeros(span, dtype=torch.bool, device="cpu")
    owner.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(owner.sum()) != tensor.numel()


def _shared_byte(group: list[_Span]) -> tuple[int, int] | None:
    """The places of two spans that share a byte, the first of them written."""
    first = min(span.start for span in group)
    # Every span is made of whole units.
    unit = math.gcd(*(x for span in group for x in (span.start - first, span.length, *(dim[0] for dim in span.dims))))
    owner = torch.zeros((max(span.interval[1] for span in group) - first) // unit, dtype=torch.int32, device="cpu")
    for span in sorted(group, key=_place):
        units = owner.as_strided(
            (*(size for _, size in span.dims), span.length // unit),
            (*(stride // unit for stride, _ in span.dims), 1),
            (span.start - first) // unit,
        )
        other = int(units.max())
        if other:
            return other - 1, span.place
        if not span.is_read:
            units.fill_(span.place + 1)
    return None


def _place(span: _Span) -> int:
    return span.place
