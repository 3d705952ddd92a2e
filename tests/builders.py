"""What tests build and compare: calls in the middle of training, bits, and snapshots that show what was touched."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from functional_adam import AdamHparams, AdamState, adam_init
from tests.oracles import KERNELS
from tests.strategies import random_tensor

KERNELS_AND_AUTO = ("auto", *KERNELS)


class Call(NamedTuple):
    """The arguments of an update: `adam_update(*call)`."""

    params: Any
    grads: Any
    state: AdamState
    hparams: AdamHparams


def make_call(
    shapes: Sequence[tuple[int, ...]] = ((3, 4), (5,), ()),
    *,
    hparams: AdamHparams | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Callable[[Tensor], Tensor] = Tensor.clone,
    seed: int = 0,
    step: float = 3.0,
    per_leaf_step: bool = False,
    **options: Any,
) -> Call:
    """A call in the middle of training, on a dict with a leaf of each shape; `options` are those of `adam_init`."""
    hparams = AdamHparams(lr=0.1) if hparams is None else hparams

    def tree(offset: int, *, positive: bool = False) -> dict[str, Tensor]:
        leaves = (random_tensor(s, dtype, seed + 100 * offset + i, positive=positive) for i, s in enumerate(shapes))
        return {f"leaf{i}": layout(x) for i, x in enumerate(leaves)}

    params = tree(0)
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step, **options)
    steps = torch_pytree.tree_map(lambda x: x + step, state.step)
    moments = [
        torch_pytree.tree_map(torch.Tensor.copy_, x, tree(2 + i, positive=i > 0)) for i, x in enumerate(state[1:4]) if x
    ]
    return Call(params, tree(1), AdamState(steps, *moments, *state[1 + len(moments) :]), hparams)


def tensors_of(tree: Any) -> list[Tensor]:
    """The leaves of `tree` that are tensors."""
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def clone(tree: Any) -> Any:
    """`tree` with a clone of each tensor."""
    return torch_pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def transposed(x: Tensor) -> Tensor:
    """The same values, dense, with the last two dimensions in reversed order of memory."""
    return x.mT.contiguous().mT if x.dim() >= 2 else x.clone()


def strided(x: Tensor) -> Tensor:
    """The same values with a gap after each element."""
    return torch.stack([x, x.new_full(x.shape, 7.0)], dim=-1)[..., 0]


def negative(x: Tensor) -> Tensor:
    """The same values with the negative bit: its memory holds the negatives."""
    return torch._neg_view(-x)


def as_bytes(x: Tensor) -> Tensor:
    """The values as bytes, so that NaN and the sign of 0 compare too."""
    dense = x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return dense.view(-1).view(torch.uint8)


def assert_same_bits(got: Any, expected: Any) -> None:
    """Compare two trees leaf by leaf: dtypes, shapes and bits."""
    pairs = list(zip(tensors_of(got), tensors_of(expected), strict=True))
    assert pairs
    for a, b in pairs:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(as_bytes(a), as_bytes(b))


def snapshot(tree: Any) -> list[tuple[Any, ...]]:
    """Of each tensor what an update may not touch: place, version counter, shape, strides, bits."""
    return [(x.data_ptr(), x._version, x.shape, x.stride(), as_bytes(x).clone()) for x in tensors_of(tree)]


def assert_unchanged(tree: Any, before: list[tuple[Any, ...]]) -> None:
    """Compare `tree` with a `snapshot` of it."""
    for (*now, bits), (*then, old_bits) in zip(snapshot(tree), before, strict=True):
        assert now == then
        assert torch.equal(bits, old_bits)
