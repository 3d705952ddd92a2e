"""How close is close: the one table of tolerances by dtype, and the comparisons that use it."""

from typing import Any

import optree
import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {  # rtol, atol
    torch.float64: (1e-11, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.float16: (4e-3, 2e-3),
    torch.bfloat16: (3e-2, 1.5e-2),
}


def assert_close(actual: Any, expected: Any, dtype: torch.dtype | None = None) -> None:
    """Compare two pytrees leaf by leaf, to the tolerance of `dtype`, or else of each actual leaf.

    Leaves of `expected` may be tensors of any dtype, NumPy arrays or numbers. Structures must be the same.
    """
    for a, e in _pairs(actual, expected):
        rtol, atol = TOLERANCES[(dtype or a.dtype).to_real()]
        _compare(a, e, rtol, atol)


def assert_within_roundings(actual: Any, expected: Any, count: int) -> None:
    """Compare two pytrees leaf by leaf, to `count` times the relative spacing of numbers of each actual leaf."""
    for a, e in _pairs(actual, expected):
        _compare(a, e, count * torch.finfo(a.dtype).eps, 0.0)


def assert_rounded_once(actual: Any, expected: Any) -> None:
    """Compare two pytrees leaf by leaf: a half type is as near as it can be to what float32 gives for `expected`."""
    rtol, atol = TOLERANCES[torch.float32]
    for a, e in _pairs(actual, expected):
        _compare(a, e, torch.finfo(a.dtype).eps / 2 + rtol, atol)


def assert_equal(actual: Any, expected: Any) -> None:
    """Compare two pytrees of tensors leaf by leaf: same dtypes, shapes and values."""
    for a, e in _pairs(actual, expected):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def _pairs(actual: Any, expected: Any) -> list[tuple[Tensor, Any]]:
    actual_leaves, actual_spec = optree.tree_flatten(actual, none_is_leaf=True)
    expected_leaves, expected_spec = optree.tree_flatten(expected, none_is_leaf=True)
    assert actual_spec == expected_spec
    return [(a, e) for a, e in zip(actual_leaves, expected_leaves, strict=True) if not (a is None and e is None)]


def _compare(actual: Tensor, expected: Any, rtol: float, atol: float) -> None:
    wide = torch.complex128 if actual.dtype.is_complex else torch.float64
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.detach().to("cpu", wide), expected.detach().to("cpu", wide), rtol=rtol, atol=atol)
