"""Facts about the tensors of a call, and the memory of what follows from them.

Looking at hundreds of small tensors, attribute by attribute, takes longer than their update. `TensorGuards`, by which
torch.compile decides whether compiled code fits, compares type, dtype, device, layout, shape, strides, lazy bits and
`requires_grad` of a list of tensors with those of an earlier list in one call, and keeps none of them alive. It is
private; without it everything is looked at every time.
"""

import importlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from functional_adam.tensors.batch import Batch
from functional_adam.tensors.leaves import PLAIN, is_dtensor
from functional_adam.tensors.tracking import is_tracing, is_transformed


def _no_numbers() -> list[int]:
    return []


@dataclass(eq=False)
class Facts:
    """What is known of the tensors of a call; where it is not known, what takes longer and is never wrong."""

    devices: set[torch.device]  # of parameters
    are_plain: bool = False  # tensors and parameters, strided
    can_be_read: bool = False  # plain, in the host's memory, and none requires grad
    requires_grad: bool = False  # some tensor does
    is_inference: bool = False  # some tensor was made in inference mode
    is_bare: bool = False  # no tensor requires grad or is an nn.Parameter
    are_contiguous: bool = False
    is_ready: bool = False  # leaves are of one real dtype and device, contiguous and without lazy bits
    has_shards: bool = False  # some parameter is a DTensor
    largest: int | None = None  # bytes of the largest tensor, if they are plain
    nbytes: list[int] = field(default_factory=_no_numbers)  # of each tensor
    disjoint: list[int] = field(default_factory=_no_numbers)  # addresses at which they were found to share no memory


def find_facts(batch: Batch, tensors: Sequence[Tensor]) -> Facts:
    """The facts of `tensors`, which begin with the buffers of `batch` and the gradients that are not None."""
    devices = {x.device for x in batch.params}
    if is_tracing():  # what dynamo reads, it guards
        return Facts(devices)
    if not _are_plain(tensors):
        requires_grad = any(x.requires_grad for x in tensors)
        is_inference = any(x.is_inference() for x in tensors)
        has_shards = any(map(is_dtensor, batch.params))
        return Facts(devices, requires_grad=requires_grad, is_inference=is_inference, has_shards=has_shards)
    leaves = [*batch.buffers, *(x for x in batch.grads if x is not None)]  # pyright: ignore[reportUnnecessaryComparison]
    requires_grad = any(x.requires_grad for x in tensors)
    are_contiguous, nbytes = all(x.is_contiguous() for x in tensors), [x.nbytes for x in tensors]
    return Facts(
        devices,
        are_plain=True,
        can_be_read=not requires_grad and all(x.is_cpu for x in tensors),
        requires_grad=requires_grad,
        is_inference=any(x.is_inference() for x in tensors),
        is_bare=not requires_grad and torch.nn.Parameter not in {*map(type, tensors)},
        are_contiguous=are_contiguous,
        is_ready=are_contiguous
        and len(devices) == 1
        and len({x.dtype for x in leaves}) == 1
        and not leaves[0].is_complex()
        and not any(x.is_neg() for x in leaves),
        largest=max(nbytes, default=0),
        nbytes=nbytes,
    )


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    return (
        {*map(type, tensors)} <= PLAIN
        and not any(map(attrgetter("is_nested"), tensors))
        and {*map(attrgetter("layout"), tensors)} <= {torch.strided}
    )


Known = TypeVar("Known")


class Memory(Generic[Known]):
    """What was found out for a list of tensors, to be found again for tensors alike."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: tuple[tuple[Hashable, Callable[..., bool], Known], ...] = ()

    def recall(self, key: Hashable, tensors: Sequence[Tensor]) -> Known | None:
        """What was remembered under `key` for tensors that are, one by one, like these."""
        # In this order: what dynamo reads, it guards.
        if is_tracing() or is_transformed() or not self._known:
            return None
        key = _in_this_mode(key)
        try:
            # Nested tensors have no strides, and comparing them would end the process.
            if any(map(attrgetter("is_nested"), tensors)):
                return None
        except AttributeError:
            return None  # not a tensor
        return next((known for own, check, known in self._known if own == key and check(*tensors)), None)

    def remember(self, key: Hashable, tensors: Sequence[Tensor], known: Known) -> None:
        """Let `recall` find what holds for plain tensors that have passed every check."""
        if _guards is not None and not (is_tracing() or is_transformed()):
            check: Any = _guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
            if check(*tensors):  # which it is not where a tensor stands in two places
                self._known = ((_in_this_mode(key), check, known), *self._known[: self._size - 1])


def _in_this_mode(key: Hashable) -> Hashable:
    # In inference mode dispatch keys of ordinary tensors are those of inference tensors outside.
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), key


def _find_guards() -> Any:
    try:
        guards: Any = getattr(importlib.import_module("torch._C._dynamo.guards"), "TensorGuards", None)
        one, two = torch.zeros(1, device="cpu"), torch.zeros(2, device="cpu")
        check = guards(one, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return guards if check(one) and not check(two) and not check(one.to(torch.float16)) else None
    except (AttributeError, ImportError, TypeError):
        return None


_guards = _find_guards()
