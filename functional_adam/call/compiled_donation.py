"""The check of a donation in a compiled graph. Memory is seen only when the graph runs, so the check is an operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functional_adam.call.arguments import Arguments
from functional_adam.call.donation import check_apart, name_of, owners_of
from functional_adam.tensors.leaves import local_shard


def checked_steps(given: Arguments) -> list[Tensor]:
    """The steps of a donated update that is traced, as values that the graph has only where no memory overlaps."""
    grads = [grad for grad in given.grads if grad is not None]
    written, read = [*given.buffers.flat, *given.steps, *given.narrow.values()], [*grads, *given.others]
    owners = owners_of(given.buffers, given.steps, given.grads, given.others, given.narrow)
    names = "\n".join(name_of(owner, given.treespec) for owner in owners)
    check: Any = torch.ops.functional_adam.checked_step
    shards = [*map(local_shard, written)], [*map(local_shard, read)]
    return [*(check(step, *shards, names) for step in given.steps[:1]), *given.steps[1:]]


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
