"""Any pytree of tensors can be updated, leaf by leaf, and comes back as it was: structure, order of keys, types."""

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from itertools import product
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functional_adam import AdamHparams, AdamState, adam_init, adam_update, explain
from tests.oracles import KERNELS
from tests.strategies import PROPERTY, Pair, is_dense, random_tensor, tensors, trees
from tests.tolerances import assert_equal

MODES = [*product((False, True), repeat=2)]  # donate, per_leaf_step


@optree.dataclasses.dataclass(namespace="")
class Attention:
    """A node of the user's own, with something in it that is no leaf."""

    query: Any
    heads: int = optree.dataclasses.field(pytree_node=False)
    key: Any = None


def leaf(seed: int, shape: tuple[int, ...] = (3, 2)) -> Tensor:
    return random_tensor(shape, torch.float32, seed)


def _with_keys(make: Callable[[list[tuple[Any, Any]]], Any], *keys: Any) -> Any:
    return make([(key, leaf(index, (index + 1,))) for index, key in enumerate(keys)])


TREES: dict[str, Callable[[], Any]] = {
    "bare_tensor": lambda: leaf(0),
    "numbered_names": lambda: _with_keys(dict, *(f"layers.{i}" for i in range(12))),
    "default_dict": lambda: _with_keys(lambda items: defaultdict(list, items), "w", "b", "a"),
    "unsortable_keys": lambda: _with_keys(dict, "w", 3, ("a", 1), 1, "b"),
    "unsortable_ordered_dict": lambda: _with_keys(OrderedDict, "w", 3, ("a", 1), 1, "b"),
    "nested": lambda: {"b": [leaf(0), (leaf(1), {"z": leaf(2), "a": leaf(3)})], "a": Pair(leaf(4), [leaf(5)])},
    "none": lambda: None,
    "empty_subtrees": lambda: {"b": [None, []], "a": leaf(0), "c": {}, "d": (), "e": Pair(leaf(2, ()), None)},
    "own_node": lambda: {"b": Attention(leaf(0), heads=4), "a": Attention([leaf(1)], heads=2, key=leaf(2))},
}


def gradients_of(params: Any) -> Any:
    return optree.tree_map(lambda p: random_tensor(p.shape, p.dtype, 1000 + p.numel()), params)


def assert_same_form(actual: Any, expected: Any) -> None:
    """Same types of nodes, same keys in the same order, same length, and None where there is None."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        if isinstance(expected, defaultdict):
            assert actual.default_factory is expected.default_factory
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, Attention):
        assert actual.heads == expected.heads
        actual, expected = [actual.query, actual.key], [expected.query, expected.key]
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_form(a, e)


def check_state_form(state: AdamState, params: Any, hparams: AdamHparams, *, per_leaf_step: bool) -> None:
    assert type(state) is AdamState
    assert_same_form(state.exp_avg, params)
    assert_same_form(state.exp_avg_sq, params)
    assert_same_form(state.max_exp_avg_sq, params if hparams.amsgrad else ())
    assert_same_form(state.step, params if per_leaf_step else torch.zeros(()))
    assert state.master_params == ()
    assert all(step.dtype is torch.float32 and step.shape == () for step in optree.tree_leaves(state.step))


@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
def test_form_is_kept_and_an_update_is_that_of_the_leaves(make: Callable[[], Any]) -> None:
    hparams = AdamHparams(lr=0.01, weight_decay=0.1, amsgrad=True)
    for kernel, (donate, per_leaf_step) in product(KERNELS, MODES):
        params, flat = make(), optree.tree_leaves(make())
        state, flat_state = adam_init(params, hparams, per_leaf_step=per_leaf_step), adam_init(flat, hparams)
        check_state_form(state, params, hparams, per_leaf_step=per_leaf_step)
        assert_equal(optree.tree_leaves(state[1:4]), [torch.zeros_like(x) for x in flat * 3])
        for count in (1, 2):
            grads = gradients_of(make())
            params, state = adam_update(params, grads, state, hparams, kernel=kernel, donate=donate)
            flat, flat_state = adam_update(flat, optree.tree_leaves(grads), flat_state, hparams, kernel=kernel)
            assert_same_form(params, make())
            check_state_form(state, make(), hparams, per_leaf_step=per_leaf_step)
            assert all(step.item() == count for step in optree.tree_leaves(state.step))
        for tree, leaves in zip((params, *state[1:4]), (flat, *flat_state[1:4]), strict=True):
            assert_equal(optree.tree_leaves(tree), leaves)


@PROPERTY
@given(trees(tensors(overlapping=False)), st.booleans(), st.sampled_from(KERNELS), st.sampled_from(MODES))
def test_state_is_a_fixed_point(params: Any, amsgrad: bool, kernel: str, mode: tuple[bool, bool]) -> None:
    hparams, (donate, per_leaf_step) = AdamHparams(amsgrad=amsgrad, weight_decay=0.1), mode
    before = adam_init(params, hparams, per_leaf_step=per_leaf_step)
    check_state_form(before, params, hparams, per_leaf_step=per_leaf_step)

    def looks(tree: Any, *, as_new: bool = False) -> list[tuple[Any, ...]]:
        leaves = optree.tree_leaves(tree)
        kept = [x if donate or is_dense(x) or not as_new else torch.empty_like(x) for x in leaves]
        return [(x.shape, x.dtype, x.device, x.stride()) for x in kept]

    looks_before, looks_of_params = looks(before), looks(params, as_new=True)
    form = optree.tree_map(torch.empty_like, params)
    new_params, after = adam_update(params, gradients_of(params), before, hparams, kernel=kernel, donate=donate)
    assert_same_form(new_params, form)
    check_state_form(after, form, hparams, per_leaf_step=per_leaf_step)
    assert looks(after) == looks_before
    assert looks(new_params) == looks_of_params


@pytest.mark.parametrize(("kind", "other"), [(list, tuple), (tuple, list)])
def test_a_list_may_stand_for_a_tuple_at_the_root(kind: Any, other: Any) -> None:
    def make(seed: int) -> list[Any]:
        return [leaf(seed), {"a": leaf(seed + 1)}]

    hparams, alike = AdamHparams(lr=other((0.1, 0.2))), AdamHparams(lr=kind((0.1, 0.2)))
    for donate, per_leaf_step in MODES:
        state = adam_init(kind(make(0)), hparams, per_leaf_step=per_leaf_step)
        expected, expected_state = adam_update(kind(make(0)), kind(make(2)), state, alike)
        mixed = state._replace(exp_avg=other(state.exp_avg))
        explained = explain(kind(make(0)), other(make(2)), mixed, hparams)
        assert explained == explain(kind(make(0)), kind(make(2)), state, alike)
        params, new = adam_update(kind(make(0)), other(make(2)), mixed, hparams, donate=donate)
        assert_equal((params, *new[1:3]), (expected, *expected_state[1:3]))
    # Below the root nodes are what they are.
    with pytest.raises(ValueError, match=r"^grads\[0\] is of type tuple, but params\[0\] is of type list\."):
        adam_update([[leaf(0)]], [(leaf(0),)], adam_init([[leaf(0)]], hparams), hparams)


X = torch.ones(2)
DIFFERENCES: list[tuple[Any, Any, str]] = [  # params, grads, and what is said
    ({"a": X, "b": X}, {"b": X}, "grads lacks ['a'], but params has ['a', 'b']."),
    ({"b": X}, {"a": X, "b": X}, "grads has the extra ['a'], but params has ['b']."),
    ({"a": X, "b": X}, {"b": X, "c": X}, "grads lacks ['a'] and has the extra ['c'], but params has ['a', 'b']."),
    (
        {str(i): X for i in range(5)},
        {str(i + 10): X for i in range(6)},
        "grads lacks ['0', '1', '2', '3'] and 1 more and has the extra ['10', '11', '12', '13'] and 2 more, "
        "but params has ['0', '1', '2', '3'] and 1 more.",
    ),
    (
        {"a": Attention(X, heads=1)},
        {"a": Attention(X, heads=2)},
        "grads['a'] has (('heads', 2),) beside its children, but params['a'] has (('heads', 1),) beside its children.",
    ),
    ({"a": X, "n": None}, {"a": X, "n": X}, "grads['n'] is of type Tensor, but params['n'] is None."),
    ([None, (X,)], [None, [X]], "grads[1] is of type list, but params[1] is of type tuple."),
    ([Pair([X], X)], [Pair((X,), X)], "grads[0].first is of type tuple, but params[0].first is of type list."),
    (Attention([X], heads=1), Attention(None, heads=1), "grads.query is None, but params.query is of type list."),
]


@pytest.mark.parametrize(("params", "grads", "message"), DIFFERENCES, ids=[x[2] for x in DIFFERENCES])
def test_the_first_difference_of_two_trees_is_said_in_a_sentence(params: Any, grads: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        adam_update(params, grads, adam_init(params, AdamHparams()), AdamHparams())


def test_the_first_difference_of_a_prefix_is_said_in_a_sentence() -> None:
    params, hparams = {"a": X, "b": (X,)}, AdamHparams(lr={"a": 0.1, "b": [0.1]})
    expected = "hparams.lr['b'] is of type list, but params['b'] is of type tuple. hparams.lr must be a number or a"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        adam_update(params, params, adam_init(params, hparams), hparams)
