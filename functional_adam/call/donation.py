"""What makes a donation safe: memory that nobody else in the call uses, and states that notice a second use."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_adam.call.facts import Facts
from functional_adam.tensors.leaves import local_shard
from functional_adam.tensors.overlap import are_apart_by_address, find_overlap


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


def are_surely_apart(tensors: Sequence[Tensor], facts: Facts) -> bool:
    """Whether all tensors of a call can be seen, at one look, to share no memory."""
    if not facts.are_contiguous:
        return False
    starts = [*map(Tensor.data_ptr, tensors)]
    if starts != facts.disjoint:
        if not are_apart_by_address(starts, facts.nbytes):
            return False
        facts.disjoint = starts
    return True


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


def checked_step(step: Tensor, written: Sequence[Tensor], read: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """`step`, as a value that a compiled graph has only where no memory overlaps, which is seen when it runs."""
    shards = [*map(local_shard, written)], [*map(local_shard, read)]
    operator: Any = torch.ops.functional_adam.checked_step
    return operator(step, *shards, "\n".join(names))


def _checked_step(step: Tensor, written: Sequence[Tensor], read: Sequence[Tensor], names: str) -> Tensor:
    check_apart(written, read, names.split("\n").__getitem__)
    return step.clone()


def _fake_step(step: Tensor, written: Sequence[Tensor], read: Sequence[Tensor], names: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(step)


# Compiled code may write into a tensor only after all operators that take it have run.
_library: Any = torch.library.Library("functional_adam", "FRAGMENT")
_library.define("checked_step(Tensor step, Tensor[] written, Tensor[] read, str names) -> Tensor")
_library.impl("checked_step", _checked_step, "CompositeExplicitAutograd")
_untyped: Any = torch.library
_untyped.register_fake("functional_adam::checked_step", _fake_step)
