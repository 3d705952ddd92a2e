"""What makes a donation safe: memory that nobody else in the call uses, and states that notice a second use."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from optree import PyTreeSpec
from torch import Tensor

from functional_adam.leaves import BUFFER_NAMES, Buffers, local_shard
from functional_adam.tracking import is_fake
from functional_adam.traits import Traits
from functional_adam.trees import path_of


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
    # In order of address, none begins before the one before it ends.
    starts = [*map(Tensor.data_ptr, tensors)]
    if starts == traits.disjoint:
        return True
    ends = [*map(operator.add, starts, traits.nbytes)]
    if not all(map(operator.le, sorted(ends), sorted(starts)[1:])):
        return False
    traits.disjoint = starts
    return True


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
    """The memory from the first to the last element of a tensor, in bytes. Sorts by address."""

    start: int
    end: int
    is_read: bool
    place: int
    tensor: Tensor


@torch.no_grad()
def find_overlap(written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[int, int] | None:
    """Indices of two tensors that share an element, the first of them written; equal if it overlaps itself.

    The second index counts through `written` and then `read`. Tensors without memory of their own (empty ones,
    FakeTensors) overlap nothing.
    """
    spans: list[_Span] = []
    for index, tensor in enumerate((*written, *read)):
        is_read = index >= len(written)
        local = _local(tensor)
        if local is None:
            continue
        length = local.numel()
        if not local.is_contiguous():
            if not is_read and _overlaps_itself(local):
                return index, index
            length = 1 + sum(s * (n - 1) for s, n in zip(local.stride(), local.shape, strict=True))
        start = local.data_ptr()
        spans.append(_Span(start, start + length * local.element_size(), is_read, index, local))
    spans.sort(key=_start)

    # Spans in order of address; a run of spans that reach into each other is looked at element by element.
    run: list[_Span] = []
    end = 0
    for span in spans:
        if span.start >= end:
            found = _shared_element(run)
            if found:
                return found
            run = []
        run.append(span)
        end = max(end, span.end)
    return _shared_element(run)


def _start(span: _Span) -> int:
    return span.start


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


def _shared_element(run: list[_Span]) -> tuple[int, int] | None:
    if len(run) < 2 or all(span.is_read for span in run):
        return None
    first = run[0].start
    unit = math.gcd(*(span.start - first for span in run), *(span.tensor.element_size() for span in run))
    owner = torch.zeros((max(span.end for span in run) - first) // unit, dtype=torch.int32, device="cpu")
    for span in sorted(run, key=_place):
        tensor, parts = span.tensor, span.tensor.element_size() // unit
        elements = owner.as_strided(
            (*tensor.shape, parts), (*(parts * s for s in tensor.stride()), 1), (span.start - first) // unit
        )
        other = int(elements.max())
        if other:
            return other - 1, span.place
        if not span.is_read:
            elements.fill_(span.place + 1)
    return None


def _place(span: _Span) -> int:
    return span.place
