"""Do tensors share memory? Decided by addresses where that is enough, else byte by byte; also in a compiled graph."""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_adam.tensors.leaves import local_shard
from functional_adam.tensors.tracking import is_fake, is_tracing, is_transformed


def are_apart_by_address(starts: list[int], lengths: Iterable[int]) -> bool:
    """Whether in the order of address no interval begins before the one before it ends."""
    return all(map(operator.le, sorted(map(operator.add, starts, lengths)), sorted(starts)[1:]))


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
        if are_apart_by_address([*starts], lengths):
            return None
    spans: list[_Span] = []
    for index, local in enumerate(map(local_shard, everything)):
        is_read = index >= len(written)
        if is_fake(local) or not local.data_ptr() or not local.numel():
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


def _groups(intervals: Iterable[tuple[int, int, _Span]]) -> list[list[_Span]]:
    """Spans whose intervals reach into each other, where some of them are written."""
    groups: list[list[_Span]] = []
    end = 0
    for start, stop, span in sorted(intervals, key=itemgetter(0)):
        if start >= end:
            groups.append([])
        groups[-1].append(span)
        end = max(end, stop)
    return [group for group in groups if len(group) > 1 and not all(span.is_read for span in group)]


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
    for span in sorted(group, key=attrgetter("place")):
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


def check_apart(
    written: Sequence[Tensor],
    read: Sequence[Tensor],
    name: Callable[[int], str],
    *,
    verb: str = "donate",
    option: str = "donate",
) -> None:
    """Raise RuntimeError if writing would change another tensor; traced and mapped tensors have no memory to look at.

    `name` says what the tensors are, in this order. `option` is how users ask for what `verb` says.
    """
    found = None if is_tracing() or is_transformed() else find_overlap(written, read)
    if found is None:
        return
    first, second = map(name, found)
    what = "overlaps itself" if first == second else f"shares memory with {second}"
    raise RuntimeError(
        f"Cannot {verb} {first}: it {what}, so that writing one would change the other. "
        f"Clone one of them, or update without {option}."
    )


def checked_step(step: Tensor, written: Sequence[Tensor], read: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """`step`, as a value that a compiled graph has only where no memory overlaps, which is seen when it runs."""
    shards = [*map(local_shard, written)], [*map(local_shard, read)]
    return torch.ops.functional_adam.checked_step(step, *shards, "\n".join(names))


def _checked_step(step: Tensor, written: Sequence[Tensor], read: Sequence[Tensor], names: str) -> Tensor:
    check_apart(written, read, names.split("\n").__getitem__)
    return step.clone()


def _fake_step(step: Tensor, written: Sequence[Tensor], read: Sequence[Tensor], names: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(step)


_torch_library: Any = torch.library
# Compiled code may write into a tensor only after all operators that take it have run.
_library = _torch_library.Library("functional_adam", "FRAGMENT")
_library.define("checked_step(Tensor step, Tensor[] written, Tensor[] read, str names) -> Tensor")
_library.impl("checked_step", _checked_step, "CompositeExplicitAutograd")
_torch_library.register_fake("functional_adam::checked_step", _fake_step)
