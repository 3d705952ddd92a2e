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
from tests.builders import clone
from tests.oracles import KERNELS
from tests.strategies import PROPERTY, Pair, is_dense, random_tensor, tensors, trees
from tests.tolerances import assert_equal

OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}

kernels = pytest.mark.parametrize("kernel", KERNELS)
MODES = [*product((False, True), repeat=2)]
every_mode = pytest.mark.parametrize(("donate", "per_leaf_step"), MODES)


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
    "dict": lambda: _with_keys(dict, "w", "b", "a"),
    "numbered_names": lambda: _with_keys(dict, *(f"layers.{i}" for i in range(12))),
    "ordered_dict": lambda: _with_keys(OrderedDict, "w", "b", "a"),
    "default_dict": lambda: _with_keys(lambda items: defaultdict(list, items), "w", "b", "a"),
    "unsortable_keys": lambda: _with_keys(dict, "w", 3, ("a", 1), 1, "b"),
    "unsortable_ordered_dict": lambda: _with_keys(OrderedDict, "w", 3, ("a", 1), 1, "b"),
    "list": lambda: [leaf(0), leaf(1, ())],
    "tuple": lambda: (leaf(0), leaf(1, ())),
    "one_tuple": lambda: (leaf(0),),
    "namedtuple": lambda: Pair(leaf(0), leaf(1, ())),
    "nested": lambda: {"b": [leaf(0), (leaf(1), {"z": leaf(2), "a": leaf(3)})], "a": Pair(leaf(4), [leaf(5)])},
    "empty_dict": dict,
    "empty_list": list,
    "empty_tuple": tuple,
    "none": lambda: None,
    "nested_empty": lambda: {"b": [], "a": leaf(0), "c": {}, "d": ()},
    "none_subtrees": lambda: {"b": None, "a": leaf(0), "c": [None, leaf(1)], "d": Pair(leaf(2), None)},
    "own_node": lambda: {"b": Attention(leaf(0), heads=4), "a": Attention([leaf(1)], heads=2, key=leaf(2))},
}
every_tree = pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())


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


@every_tree
def test_init_makes_zeros_in_the_form_of_params(make: Callable[[], Any]) -> None:
    params = make()
    for amsgrad, per_leaf_step in product((False, True), repeat=2):
        hparams = AdamHparams(amsgrad=amsgrad)
        state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
        check_state_form(state, params, hparams, per_leaf_step=per_leaf_step)
        assert not any(x.any() for x in optree.tree_leaves(state))
        for moments in (state.exp_avg, state.exp_avg_sq):
            assert [x.shape for x in optree.tree_leaves(moments)] == [x.shape for x in optree.tree_leaves(params)]


@kernels
@every_tree
def test_form_is_kept_and_an_update_is_that_of_the_leaves(kernel: str, make: Callable[[], Any]) -> None:
    hparams = AdamHparams(**OPTIONS)
    for donate, per_leaf_step in MODES:
        params, flat = make(), optree.tree_leaves(make())
        state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
        flat_state = adam_init(flat, hparams)
        for count in (1, 2):
            grads = gradients_of(make())
            params, state = adam_update(params, grads, state, hparams, kernel=kernel, donate=donate)
            flat, flat_state = adam_update(flat, optree.tree_leaves(grads), flat_state, hparams, kernel=kernel)
            assert_same_form(params, make())
            check_state_form(state, make(), hparams, per_leaf_step=per_leaf_step)
            assert all(step.item() == count for step in optree.tree_leaves(state.step))
        for tree, leaves in zip((params, *state[1:4]), (flat, *flat_state[1:4]), strict=True):
            assert_equal(optree.tree_leaves(tree), leaves)


def test_gradients_and_moments_are_found_by_key_whatever_their_order() -> None:
    params = {"w": leaf(0), "b": leaf(1), "a": leaf(2)}
    grads = {"w": leaf(3), "b": leaf(4), "a": leaf(5)}
    hparams = AdamHparams(**OPTIONS)
    state = adam_init(params, hparams)
    expected = adam_update(params, grads, state, hparams)

    def reverse(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(reversed(tree.items()))

    mixed_state = state._replace(exp_avg=reverse(state.exp_avg))
    assert_equal(adam_update(params, reverse(grads), mixed_state, hparams), expected)
    new_params, _ = adam_update(reverse(params), grads, state, hparams)
    assert list(new_params) == ["a", "b", "w"]
    assert_equal(new_params, expected[0])


@every_mode
@PROPERTY
@given(params=trees(tensors(overlapping=False)), amsgrad=st.booleans(), kernel=st.sampled_from(KERNELS))
def test_state_is_a_fixed_point(donate: bool, per_leaf_step: bool, params: Any, amsgrad: bool, kernel: str) -> None:
    hparams = AdamHparams(amsgrad=amsgrad, weight_decay=0.1)
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


@PROPERTY
@given(params=trees(tensors(dtypes=[torch.float32, torch.float64, torch.bfloat16])), kernel=st.sampled_from(KERNELS))
def test_random_tree_update_is_the_update_of_each_leaf_alone(params: Any, kernel: str) -> None:
    hparams = AdamHparams(**OPTIONS)
    grads = gradients_of(params)
    new_params, state = adam_update(params, grads, adam_init(params, hparams), hparams, kernel=kernel)
    rows = zip(*(optree.tree_leaves(tree) for tree in (params, grads, new_params, *state[1:4])), strict=True)
    for param, grad, *actual in rows:
        alone, alone_state = adam_update(param, grad, adam_init(param, hparams), hparams, kernel=kernel)
        assert_equal(actual, [alone, *alone_state[1:4]])


@kernels
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_none_gradients_stand_still_in_any_tree(kernel: str, donate: bool) -> None:
    def make() -> Any:
        return {"b": Pair(leaf(0), leaf(1)), "a": [leaf(2)]}

    hparams = AdamHparams(**OPTIONS)
    state = adam_init(make(), hparams, per_leaf_step=True)
    grads = {"b": Pair(leaf(3), None), "a": [leaf(4)]}
    params, new = adam_update(make(), grads, clone(state), hparams, kernel=kernel, donate=donate)
    assert_equal(params["b"].second, leaf(1))
    assert_equal([tree["b"].second for tree in new[:4]], [tree["b"].second for tree in state[:4]])
    assert [step.item() for step in (new.step["b"].first, new.step["a"][0])] == [1, 1]
    assert not torch.equal(params["b"].first, leaf(0))
    assert not torch.equal(params["a"][0], leaf(2))


@every_mode
@pytest.mark.parametrize(("kind", "other"), [(list, tuple), (tuple, list)])
def test_a_list_may_stand_for_a_tuple_at_the_root(donate: bool, per_leaf_step: bool, kind: Any, other: Any) -> None:
    def make(seed: int) -> list[Any]:
        return [leaf(seed), {"a": leaf(seed + 1)}]

    hparams, alike = AdamHparams(lr=other((0.1, 0.2))), AdamHparams(lr=kind((0.1, 0.2)))
    state = adam_init(kind(make(0)), hparams, per_leaf_step=per_leaf_step)
    expected = adam_update(kind(make(0)), kind(make(2)), state, alike)
    mixed = state._replace(exp_avg=clone(other(state.exp_avg)), exp_avg_sq=clone(state.exp_avg_sq))
    assert explain(kind(make(0)), other(make(2)), mixed, hparams) == explain(kind(make(0)), kind(make(2)), state, alike)
    params, new = adam_update(kind(make(0)), other(make(2)), mixed, hparams, donate=donate)
    assert_equal((params, new.exp_avg, new.exp_avg_sq), (expected[0], *expected[1][1:3]))
    # Below the root nodes are what they are.
    with pytest.raises(ValueError, match=r"^grads\[0\] is of type tuple, but params\[0\] is of type list\."):
        adam_update([[leaf(0)]], [(leaf(0),)], adam_init([[leaf(0)]], hparams), hparams)


def test_a_list_of_parameters_takes_what_autograd_returns() -> None:
    params = [leaf(0).requires_grad_(), leaf(1).requires_grad_()]
    grads = torch.autograd.grad(sum(p.square().sum() for p in params), params)
    hparams = AdamHparams()
    with torch.no_grad():
        new, _ = adam_update(params, grads, adam_init(params, hparams), hparams)
        expected, _ = adam_update(params, [*grads], adam_init(params, hparams), hparams)
    assert type(new) is list
    assert_equal(new, expected)


X = torch.ones(2)
MANY = {f"{i:03}": X for i in range(300)}
DIFFERENCES: list[tuple[Any, Any, str]] = [  # params, grads, and what is said
    ({"a": X, "b": X}, {"b": X}, "grads lacks ['a'], but params has ['a', 'b']."),
    ({"b": X}, {"a": X, "b": X}, "grads has the extra ['a'], but params has ['b']."),
    ({"a": X, "b": X}, {"b": X, "c": X}, "grads lacks ['a'] and has the extra ['c'], but params has ['a', 'b']."),
    (
        MANY,
        dict.fromkeys([*MANY][:-1], X),
        "grads lacks ['299'], but params has ['000', '001', '002', '003'] and 296 more.",
    ),
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
