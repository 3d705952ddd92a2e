"""Large results in memory that is warm: blocks whose last tensor is gone serve the next update.

Fresh memory is what makes a pure step slow on the CPU: the system hands it out page by page, with a fault each, and
glibc gives large blocks back at once. Here a block is a `bytearray`, lent to a tensor through a `memoryview`. The
tensor's storage keeps the view alive, and so does all that shares the storage: other tensors, exports to NumPy, saved
graphs. When the view dies, nothing can read the block any more, and it is kept for the next result of its size.

At most twice as much is kept as the largest update so far has written, unless :func:`set_cache_limit` says otherwise.
CUDA's caching allocator does the same for its device; nothing here touches it.
"""

import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from functional_adam.tensors.layouts import is_dense

__all__ = ["cached_bytes", "empty_cache", "set_cache_limit"]

# In bytes. Below, malloc keeps its memory, and a block would cost more time than it saves.
_LARGE = 2**17
_ALIGNMENT = 64  # bytes, as torch's own allocator has it

# A third faster than clone by clone, where torch has it.
_foreach_clone = getattr(torch, "_foreach_clone", None)


def empty_cache() -> None:
    """Give all memory that is kept for the next update back to the system, as `torch.cuda.empty_cache` does.

    Example:
        >>> empty_cache()
        >>> cached_bytes()
        0
    """
    _cache.clear()


def cached_bytes() -> int:
    """How many bytes are kept for the next update and belong to no tensor."""
    return _cache.kept


def set_cache_limit(limit: int | None) -> None:
    """Keep at most `limit` bytes, from now on; 0 turns recycling off, so that results are made by torch's allocator.

    Args:
        limit: in bytes, or None for what holds by default: twice what the largest update so far has written.

    Raises:
        TypeError: `limit` is no whole number.
        ValueError: `limit` is negative.

    Example:
        >>> set_cache_limit(2**30)
        >>> set_cache_limit(None)
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, Integral)):
        raise TypeError(f"limit is of type {type(limit).__name__}. Expected a number of bytes, or None.")
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}. Expected a number of bytes >= 0, or None for the default.")
    _cache.set_limit(limit)


def copies(tensors: Sequence[Tensor], *, largest: int | None = None) -> list[Tensor]:
    """`torch.clone` of each, in warm memory where that is possible.

    `largest`: the bytes of the largest, where all are known to be plain tensors.
    """
    if largest is not None and largest < _LARGE and _foreach_clone is not None and tensors:
        return list(_foreach_clone(tensors))
    if not any(map(_is_recyclable, tensors)):
        return [x.clone() for x in tensors]
    return [new.copy_(x) for new, x in zip(empties(tensors), tensors, strict=True)]


def empties(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`torch.empty_like` of each, for the results of one update, in warm memory where that is possible."""
    _cache.expect(sum(x.nbytes for x in tensors if _is_recyclable(x)))
    return [empty_like(x, x.dtype) for x in tensors]


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.empty_like(x, dtype=dtype)`, in warm memory where that is possible."""
    empty = torch.empty(0, dtype=dtype, device="cpu") if _is_recyclable(x) else None
    if type(empty) is not Tensor:  # if there is one, FakeTensorMode or its like is on
        return torch.empty_like(x, dtype=dtype)
    view, offset = _cache.lend(x.numel() * dtype.itemsize)
    flat = torch.frombuffer(view, dtype=dtype, count=x.numel(), offset=offset)
    # Not a view of `flat`, so that autograd treats it like any fresh tensor.
    return empty.set_(flat.untyped_storage(), 0, x.shape, x.stride())


def _is_recyclable(x: Tensor) -> bool:
    can_come_back = x.nbytes >= _LARGE and _cache.fixed != 0
    return can_come_back and type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and is_dense(x)


class _Cache:
    """Blocks that wait for a tensor.

    Blocks come back in whatever thread drops the last tensor, perhaps inside a garbage collection that began in the
    middle of the methods below, and a signal handler may run or raise between any two of their bytecodes. So there is
    no lock that could stay held. A block is taken and given back by one operation on a list, which the interpreter
    does not divide, and how much is kept is counted each time. Whatever comes between loses a block to the system.
    """

    def __init__(self) -> None:
        self._spare: OrderedDict[int, list[bytearray]] = OrderedDict()  # by size, that of the last use at the end
        self.fixed: int | None = None  # the bound, if set; 0: no block will ever come back
        self._automatic = 0
        # Not less than `kept`, so that a block that comes back counts the others only where the bound may be reached.
        # Threads that add at once may leave it too small, which the next update corrects.
        self._at_most = 0

    @property
    def kept(self) -> int:
        """How many bytes wait."""
        return sum(nbytes * len(blocks) for nbytes, blocks in self._spare.copy().items())

    @property
    def _limit(self) -> int:
        fixed = self.fixed  # once, since a signal handler or another thread may set it in between
        return self._automatic if fixed is None else fixed

    def expect(self, nbytes: int) -> None:
        """Bound what is kept by what updates write."""
        self._automatic = max(self._automatic, 2 * nbytes)
        self._at_most = self.kept

    def lend(self, nbytes: int) -> tuple[memoryview, int]:
        """A block in a view that brings it back when it dies, and the offset at which it is aligned."""
        try:
            self._spare.move_to_end(nbytes)
            block = self._spare[nbytes].pop()
        except (KeyError, IndexError):  # none of this size is kept
            block = bytearray(nbytes + _ALIGNMENT)
        view = memoryview(block)
        weakref.finalize(view, self._give_back, nbytes, block).atexit = False
        return view, -torch.frombuffer(view, dtype=torch.uint8).data_ptr() % _ALIGNMENT

    def set_limit(self, limit: int | None) -> None:
        """A fixed bound, or None for the automatic one."""
        self.fixed = limit
        self._shrink(self._limit)

    def clear(self) -> None:
        """Keep nothing, until the next update."""
        self._automatic = 0
        self._shrink(0)

    def _give_back(self, nbytes: int, block: bytearray) -> None:
        if nbytes <= self._limit:
            self._at_most += nbytes
            self._spare.setdefault(nbytes, []).append(block)
            if self._at_most > self._limit:
                self._shrink(self._limit)

    def _shrink(self, limit: int) -> None:
        """Let go of blocks of the sizes that were not used for longest."""
        excess = self.kept - limit
        for nbytes, blocks in self._spare.copy().items():
            if excess <= 0:
                break
            count = len(blocks)
            del blocks[: -(-excess // nbytes)]
            excess -= nbytes * (count - len(blocks))
            if not blocks:
                self._spare.pop(nbytes, None)
        self._at_most = self.kept


_cache = _Cache()
if hasattr(os, "register_at_fork"):
    # Else the parent would copy each page that it writes, for a child that may have no use for it.
    os.register_at_fork(after_in_child=_cache.clear)
