"""How the elements of a tensor lie in memory."""

import torch
from torch import Tensor


def foreign_layout(x: Tensor) -> str | None:
    """The name of a layout that is not strided: sparse, nested, and their like; else None."""
    return "nested" if x.is_nested else None if x.layout is torch.strided else str(x.layout)


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` fill a block of memory, in any order of dimensions, without gap or overlap."""
    if x.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != filled:
            return False
        filled *= size
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
    order = sorted(range(x.dim()), key=lambda dim: (-strides[dim], -x.shape[dim]))
    back = sorted(range(x.dim()), key=lambda dim: order[dim])
    # A clone, since contiguous() keeps what it finds in dimensions of size 1.
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
