"""What the tensors of an update have in common, found out once for all updates on tensors alike.

Looking at hundreds of small tensors, attribute by attribute, takes longer than their update. `TensorGuards`, by which
torch.compile decides whether compiled code fits, compares type, dtype, device, layout, shape, strides, lazy bits and
`requires_grad` of a list of tensors with those of an earlier list in one call, and keeps none of them alive. It is
private; without it everything is looked at every time.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_adam.tensors.leaves import DTYPES, Buffers
from functional_adam.tensors.recycling import LARGE
from functional_adam.tensors.tracking import is_tracing, is_transformed


class Listed(NamedTuple):
    """The tensors of an update, or what stands in their places."""

    structure: tuple[int, ...]  # how many of each kind there are, and which gradients are None
    tensors: list[Any]  # buffers, gradients that are not None, steps, others
    leaves: list[Any]  # the first two
    has_all_grads: bool  # no gradient is None


@dataclass(eq=False)
class Traits:
    """Of plain tensors on one device, whose leaves are of one dtype and of the shapes of their parameters."""

    device: torch.device
    is_ready: bool  # every leaf is real, contiguous and without lazy bits: any kernel takes it as it is
    requires_grad: bool  # some tensor does
    is_bare: bool  # none does, and none is an nn.Parameter
    is_inference: bool  # some tensor was made in inference mode
    are_small: bool  # each has less than `LARGE` bytes
    nbytes: list[int]  # of each tensor
    disjoint: list[int] | None = None  # addresses at which they were last found to share no memory


_LISTS = 8  # so many are remembered
_known: tuple[tuple[tuple[int, ...], Callable[..., bool], Traits], ...] = ()


def list_tensors(buffers: Buffers, grads: Sequence[Any], steps: Sequence[Any], others: Sequence[Tensor]) -> Listed:
    """All tensors of an update in one list."""
    absent: list[int] = []
    if type(None) in {*map(type, grads)}:
        absent = [i for i, grad in enumerate(grads) if grad is None]
        grads = [grad for grad in grads if grad is not None]
    leaves = [*buffers.flat, *grads]
    structure = (len(buffers.params), len(leaves), len(steps), len(others), *absent)
    return Listed(structure, [*leaves, *steps, *others], leaves, not absent)


def recall(listed: Listed) -> Traits | None:
    """The traits of tensors that are, one by one, like those of an earlier `remember`."""
    # In this order: what dynamo reads, it guards.
    if is_tracing() or is_transformed() or not _known:
        return None
    structure, tensors, _, _ = listed
    # In inference mode dispatch keys of ordinary tensors are those of inference tensors outside.
    mode = torch.is_inference_mode_enabled()
    try:
        # Nested tensors have no strides, and comparing them would end the process.
        if any(map(attrgetter("is_nested"), tensors)):
            return None
    except AttributeError:
        return None  # not a tensor
    return next((traits for known, check, traits in _known if known == (mode, *structure) and check(*tensors)), None)


def find_traits(listed: Listed, buffers: Buffers, grads: Sequence[Any]) -> Traits | None:
    """The traits of tensors that nobody has checked yet; None if they have none in common."""
    structure, tensors, leaves, _ = listed
    if is_tracing() or not leaves or not _are_plain(tensors) or not _are_of_equal_shapes(buffers, grads):
        return None
    dtypes, devices = {x.dtype for x in leaves}, {x.device for x in tensors[: sum(structure[1:3])]}
    if len(dtypes) != 1 or not dtypes <= DTYPES or len(devices) != 1:
        return None
    return Traits(
        device=devices.pop(),
        is_ready=not (leaves[0].is_complex() or any(x.is_neg() for x in leaves))
        and all(x.is_contiguous() for x in tensors),
        requires_grad=any(x.requires_grad for x in tensors),
        is_bare=not any(x.requires_grad or isinstance(x, torch.nn.Parameter) for x in tensors),
        is_inference=any(x.is_inference() for x in tensors),
        are_small=all(x.nbytes < LARGE for x in tensors),
        nbytes=[x.nbytes for x in tensors],
    )


def remember(listed: Listed, traits: Traits) -> None:
    """Let `recall` find the traits of tensors that have passed every check."""
    global _known
    if _guards is not None and not is_transformed():
        check: Any = _guards(*listed.tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        if check(*listed.tensors):  # which it is not where a tensor stands in two places
            _known = (((torch.is_inference_mode_enabled(), *listed.structure), check, traits), *_known[: _LISTS - 1])


def _are_plain(tensors: list[Any]) -> bool:
    return (
        {*map(type, tensors)} <= {Tensor, torch.nn.Parameter}
        and not any(map(attrgetter("is_nested"), tensors))
        and {*map(attrgetter("layout"), tensors)} == {torch.strided}
    )


def _are_of_equal_shapes(buffers: Buffers, grads: Sequence[Any]) -> bool:
    """Whether all plain leaves have the shapes of their parameters."""
    shapes = [*map(attrgetter("shape"), buffers.params)]
    return all([*map(attrgetter("shape"), column)] == shapes for column in buffers[1:] if column) and all(
        grad is None or grad.shape == shape for grad, shape in zip(grads, shapes, strict=True)
    )


def _find_guards() -> Any:
    try:
        guards: Any = getattr(importlib.import_module("torch._C._dynamo.guards"), "TensorGuards", None)
        one, two = torch.zeros(1, device="cpu"), torch.zeros(2, device="cpu")
        check = guards(one, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return guards if check(one) and not check(two) and not check(one.to(torch.float16)) else None
    except (AttributeError, ImportError, TypeError):
        return None


_guards = _find_guards()
