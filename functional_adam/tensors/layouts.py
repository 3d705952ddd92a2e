"""How the elements of a tensor lie in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor


def foreign_layout(x: Tensor) -> str | None:
    """The name of a layout that is not strided: sparse, nested, and their like; else None."""
    return "nested" if x.is_nested else None if x.layout is torch.strided else str(x.layout)


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` fill a block of memory, in any order of dimensions, without gap or overlap."""
    if x.is_contiguous():
        return True
    strides, filled = x.stride(), 1
    for dim in reversed(_from_outermost(strides, x.shape)):
        if x.shape[dim] != 1:
            if strides[dim] != filled:
                return False
            filled *= x.shape[dim]
    return True


def strides_like(model: Tensor) -> tuple[int, ...]:
    """The strides of `torch.empty_like(model)`: its own where it is dense."""
    return model.stride() if is_dense(model) else torch.empty_like(model).stride()


def is_laid_out_like(x: Tensor, model: Tensor) -> bool:
    """Whether the elements of `x` lie in memory in the order of `torch.empty_like(model)`, without gap or overlap."""
    # The stride of a dimension of size 1 says nothing about memory.
    strides = zip(x.stride(), strides_like(model), x.shape, strict=True)
    return x.numel() <= 1 or all(here == there for here, there, size in strides if size != 1)


def with_layout_of(x: Tensor, model: Tensor) -> Tensor:
    """`x` with the strides of `torch.empty_like(model)`, by operations that can be differentiated, mapped and traced.

    Those of dimensions of size 1 may differ where they are unusual.
    """
    strides = strides_like(model)
    if x.stride() == strides:
        return x
    order = _from_outermost(strides, x.shape)
    back = [order.index(dim) for dim in range(x.dim())]
    # A clone, since contiguous() keeps what it finds in dimensions of size 1.
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def as_real(x: Tensor) -> Tensor:
    """Real and imaginary parts of a complex leaf are independent to an elementwise update."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def as_leaf(real: Tensor, leaf: Tensor) -> Tensor:
    """`real`, which `as_real` made of something like `leaf`, in the dtype of `leaf`."""
    return (torch.view_as_complex(real) if leaf.is_complex() else real).to(leaf.dtype)


def _from_outermost(strides: Sequence[int], shape: Sequence[int]) -> list[int]:
    """The dimensions in the order of their strides, the largest first; among equal strides by size.

    Sorted by comparisons alone, since a compiler cannot trace `sorted` on sizes that it keeps dynamic.
    """
    order: list[int] = []
    for dim, (stride, size) in enumerate(zip(strides, shape, strict=True)):
        place = 0
        for other in order:
            if strides[other] > stride or (strides[other] == stride and shape[other] >= size):
                place += 1
        order.insert(place, dim)
    return order
