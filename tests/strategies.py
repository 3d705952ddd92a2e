"""What properties are tested on: hypothesis strategies for pytrees, shapes, layouts, dtypes and hyperparameters."""

import math
import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

# More examples, from fresh seeds; what fails is printed so that it can be repeated.
IS_LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"

PROPERTY = settings(
    deadline=None,
    max_examples=2000 if IS_LONG else 60,
    derandomize=not IS_LONG,
    print_blob=IS_LONG,
    database=None,
    # Fixtures that only choose (a dtype, a device) may be shared by examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

REAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
DTYPES = (*REAL_DTYPES, *COMPLEX_DTYPES)
PRECISE_DTYPES = (torch.float32, torch.float64, *COMPLEX_DTYPES)

LAYOUTS = (
    "contiguous",
    "transposed",  # dense, dimensions in reversed order
    "channels_last",  # dense, dimension 1 innermost
    "offset",  # contiguous, behind other elements of its storage
    "strided",  # every second element
    "gaps",  # rows with gaps between them
    "size_one_stride",  # contiguous, with strides of size-1 dimensions that follow from nothing
    "expanded",  # stride 0 in the first dimension
    "constant",  # stride 0 in all dimensions, as the gradient of a sum
)
OVERLAPPING_LAYOUTS = ("expanded", "constant")
seeds = st.integers(0, 2**16)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int, *, positive: bool = False) -> Tensor:
    """Standard normal values, away from 0 by 0.1; their absolute values, part by part, if `positive`."""
    generator = torch.Generator().manual_seed(seed)
    real_shape = (*shape, 2) if dtype.is_complex else tuple(shape)
    x = torch.randn(real_shape, dtype=torch.float64, generator=generator)
    x = x + 0.1 * torch.where(x < 0, -1.0, 1.0)
    x = x.abs() if positive else x
    return (torch.view_as_complex(x) if dtype.is_complex else x).to(dtype)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in memory as `layout` says; expanded layouts repeat some of the values.

    A layout that a shape does not allow becomes the nearest one that it does.
    """
    if layout == "transposed":
        return _in_order(x, range(x.dim())[::-1])
    if layout == "channels_last":
        return _in_order(x, [0, *range(2, x.dim()), 1]) if x.dim() > 2 else x.contiguous()
    if layout == "offset":
        return x.new_zeros(x.numel() + 3)[3:].view(x.shape).copy_(x)
    if layout == "strided":
        return x.new_zeros((*x.shape, 2))[..., 0].copy_(x)
    if layout == "gaps":
        return x.new_zeros((*x.shape[:-1], x.shape[-1] + 1))[..., :-1].copy_(x) if x.dim() else x.clone()
    if layout == "size_one_stride":
        strides = [3 * s + 1 if n == 1 else s for s, n in zip(x.contiguous().stride(), x.shape, strict=True)]
        return x.contiguous().as_strided(x.shape, strides)
    if layout == "expanded":
        return x[:1].clone().expand(x.shape) if x.dim() and x.numel() else x.clone()
    if layout == "constant":
        return x.flatten()[0].clone().expand(x.shape) if x.numel() else x.clone()
    assert layout == "contiguous"
    return x.clone(memory_format=torch.contiguous_format)


def _in_order(x: Tensor, order: Iterable[int]) -> Tensor:
    order = list(order)
    back = [order.index(i) for i in range(x.dim())]
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` fill a block of memory, each place once."""
    sizes = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1)
    return x.numel() == 0 or all(s == math.prod(n for _, n in sizes[:i]) for i, (s, _) in enumerate(sizes))


def shapes(max_dims: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """From () to `max_dims` dimensions, with empty ones and dimensions of size 1."""
    return st.lists(st.sampled_from([3, 1, 2, 5, 9, 0]), max_size=max_dims).map(tuple)


def layouts(*, overlapping: bool = True) -> st.SearchStrategy[str]:
    """Names for `in_layout`; without `overlapping` only those whose tensors can be written."""
    return st.sampled_from([name for name in LAYOUTS if overlapping or name not in OVERLAPPING_LAYOUTS])


@st.composite
def tensors(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES, *, max_dims: int = 4, overlapping: bool = True
) -> Tensor:
    """Tensors of any shape, of one of `dtypes`, in any layout."""
    x = random_tensor(draw(shapes(max_dims)), draw(st.sampled_from(dtypes)), draw(seeds))
    return in_layout(x, draw(layouts(overlapping=overlapping)))


class Pair(NamedTuple):
    """A node of `trees`."""

    first: Any
    second: Any


_KEYS = ("w", "b", "10", "2", 0, 7, ("a", 1))  # cannot be sorted together


def trees(leaves: st.SearchStrategy[Any], *, max_leaves: int = 8) -> st.SearchStrategy[Any]:
    """Pytrees of all standard containers, nested, empty ones and None among them; perhaps a bare leaf."""

    def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        items = st.lists(st.tuples(st.sampled_from(_KEYS), children), max_size=4, unique_by=lambda item: item[0])
        sequences = st.lists(children, max_size=3)
        return st.one_of(
            items.map(dict),
            items.map(OrderedDict),
            items.map(lambda pairs: defaultdict(list, pairs)),
            sequences,
            sequences.map(tuple),
            st.builds(Pair, children, children),
        )

    return st.recursive(leaves | st.none(), containers, max_leaves=max_leaves)


@st.composite
def hyperparameters(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of AdamHparams and of torch.optim.Adam."""
    betas = st.sampled_from([0.9, 0.999, 0.0, 0.5]) | st.floats(0.0, 0.9999)
    return {
        "lr": draw(st.sampled_from([1e-3, 0.0]) | st.floats(1e-6, 0.5)),
        "betas": (draw(betas), draw(betas)),
        "eps": draw(st.sampled_from([1e-8, 1e-3, 10.0]) | st.floats(1e-10, 1.0)),
        "weight_decay": draw(st.sampled_from([0.0, 0.01]) | st.floats(0.0, 1.0)),
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "decoupled_weight_decay": draw(st.booleans()),
    }
