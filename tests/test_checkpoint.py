"""A state goes into torch.optim and files and comes back; a run stopped in one place continues in the other."""

import copy
import dataclasses
import itertools
import re
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optree
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import torch.utils._pytree as torch_pytree
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from functional_adam import (
    AdamHparams,
    AdamState,
    adam_init,
    adam_update,
    from_torch_state_dict,
    state_from_dict,
    state_to_dict,
    to_torch_state_dict,
)
from tests.builders import assert_unchanged, snapshot
from tests.oracles import KERNELS, TORCH_FLAGS
from tests.strategies import PROPERTY, Pair, hyperparameters, is_dense, random_tensor, seeds, tensors, trees
from tests.tolerances import assert_equal

# For all parameters, and for the second group of a split list of them.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"lr": 0.01}, {}),
    "coupled": ({"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}, {}),
    "decoupled": ({"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}, {}),
    "groups": ({"lr": 0.1}, {"lr": 0.5, "betas": (0.5, 0.7), "eps": 0.1, "weight_decay": 0.5}),
}


def leaf(seed: int, shape: tuple[int, ...] = (3, 2), dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor(shape, dtype, seed)


def unsorted_tree(seed: int = 0) -> dict[str, Tensor]:
    """Names as of layers 0 to 11, whose sorted order is not theirs; all of one shape, so that a mix-up is silent."""
    return {f"layers.{i}.weight": leaf(seed + i) for i in range(12)}


def random_state(params: Any, hparams: AdamHparams, seed: int, *, per_leaf_step: bool = False) -> AdamState:
    """A state with values that differ everywhere, and steps too if each leaf has its own."""
    counter = itertools.count(seed)

    def fill(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(random_tensor(x.shape, x.dtype, next(counter), positive=True))

    state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
    steps = optree.tree_map(lambda x: x + next(counter) % 1000, state.step)
    moments = {name: optree.tree_map(fill, getattr(state, name)) for name in state._fields[1:4]}
    return state._replace(step=steps, **moments)


def torch_run(params: Any, gradients: Sequence[Any], optimizer: torch.optim.Optimizer) -> None:
    for grads in gradients:
        for param, gradient in zip(*map(torch_pytree.tree_leaves, (params, grads)), strict=True):
            param.grad = None if gradient is None else gradient.clone()
        optimizer.step()


def strides_of(tree: Any) -> list[tuple[int, ...]]:
    return [x.stride() for x in optree.tree_leaves(tree)]


def memory_of(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in optree.tree_leaves(tree) if isinstance(x, Tensor) and x.numel()}


# torch.optim


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("options", "others"), OPTIONS.values(), ids=OPTIONS)
def test_a_run_goes_on_from_torch_to_here_and_back_bit_for_bit(
    kernel: Any, options: dict[str, Any], others: dict[str, Any]
) -> None:
    def groups_of(weights: dict[str, torch.nn.Parameter]) -> list[Any]:
        listed = [*weights.values()]
        return [{"params": listed[:7]}, {"params": listed[7:], **others}] if others else listed

    weights = {key: torch.nn.Parameter(x) for key, x in unsorted_tree().items()}
    optimizer = torch.optim.Adam(groups_of(weights), **options, **TORCH_FLAGS[kernel])
    gradients = [unsorted_tree(50 * step) for step in range(1, 7)]
    torch_run(weights, gradients[:2], optimizer)
    params = {key: x.detach().clone() for key, x in weights.items()}
    state, hparams = from_torch_state_dict(params, copy.deepcopy(optimizer.state_dict()))
    if not others:
        assert hparams == AdamHparams(**options)
    for grads in gradients[2:4]:
        torch_run(weights, [grads], optimizer)
        params, state = adam_update(params, grads, state, hparams, kernel=kernel)
        assert_equal(params, {key: x.detach() for key, x in weights.items()})
    assert state.step.item() == 4

    resumed = {key: torch.nn.Parameter(x.clone()) for key, x in params.items()}
    kind = torch.optim.AdamW if hparams.decoupled_weight_decay else torch.optim.Adam
    second = kind(groups_of(resumed))
    state_dict = to_torch_state_dict(params, state, hparams)
    for group in state_dict["param_groups"]:
        group.update(TORCH_FLAGS[kernel])
    if others:
        assert [group["params"] for group in state_dict["param_groups"]] == [[*range(7)], [*range(7, 12)]]
    second.load_state_dict(state_dict)
    before = snapshot(state)
    for grads in gradients[4:]:
        torch_run(resumed, [grads], second)
        # torch has taken over the tensors of the dict, and writes to them.
        assert_unchanged(state, before)
        torch_run(weights, [grads], optimizer)
        assert_equal([x.detach() for x in resumed.values()], [x.detach() for x in weights.values()])


def test_the_dict_has_the_form_that_torch_gives_it() -> None:
    weights = [torch.nn.Parameter(leaf(0)), torch.nn.Parameter(leaf(1))]
    optimizer = torch.optim.Adam(weights, amsgrad=True)
    torch_run(weights, [[leaf(2), leaf(3)]], optimizer)
    hparams = AdamHparams(amsgrad=True)
    params = [leaf(0), leaf(1)]
    _, state = adam_update(params, [leaf(2), leaf(3)], adam_init(params, hparams), hparams, kernel="single")
    found, expected = to_torch_state_dict(params, state, hparams), optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert {key: [*entry] for key, entry in found["state"].items()} == {
        key: [*entry] for key, entry in expected["state"].items()
    }
    assert_equal(found["state"], expected["state"])
    # torch counts in place: a step must not be shared.
    assert found["state"][0]["step"] is not found["state"][1]["step"]


@PROPERTY
@given(trees(tensors(overlapping=False)), seeds, hyperparameters(), st.booleans(), st.data())
def test_a_state_comes_back_from_the_dict_of_torch_however_groups_interleave(
    params: Any, seed: int, options: dict[str, Any], per_leaf_step: bool, data: st.DataObject
) -> None:
    leaves, treespec = optree.tree_flatten(params)
    rates = data.draw(st.lists(st.sampled_from([0.1, 0.2]), min_size=len(leaves), max_size=len(leaves)))
    options["lr"] = treespec.unflatten(rates) if data.draw(st.booleans()) and leaves else options["lr"]
    hparams = AdamHparams(**options)
    state = random_state(params, hparams, seed, per_leaf_step=per_leaf_step)
    state_dict = to_torch_state_dict(params, state, hparams)
    assert memory_of(state_dict).isdisjoint(memory_of(state))
    found, found_hparams = from_torch_state_dict(params, state_dict)
    found_rates, expected_rates = (optree.broadcast_prefix(h.lr, params) for h in (found_hparams, hparams))
    assert found_rates == expected_rates
    assert isinstance(found_hparams.lr, float) or len({*expected_rates}) > 1
    assert dataclasses.replace(found_hparams, lr=0.1) == dataclasses.replace(hparams, lr=0.1)
    assert memory_of(found).isdisjoint(memory_of(state_dict))
    assert_equal(found[1:], state[1:])
    steps = optree.tree_leaves(state.step) if leaves else [torch.zeros(())]
    assert_equal(found.step, steps[0] if len({*map(float, steps)}) <= 1 else state.step)
    for x, model in zip(optree.tree_leaves(found.exp_avg), leaves, strict=True):
        assert x.stride() == (model if is_dense(model) else torch.empty_like(model)).stride()


TREES: dict[str, tuple[Any, list[str] | None]] = {  # leaves that are their places, and their names
    "dict": ({"b": 0, "a": 1, "10": 2, "2": 3}, ["b", "a", "10", "2"]),
    "ordered": (OrderedDict(b=0, a=1), ["b", "a"]),
    "default": (defaultdict(list, {"b": 0, "a": 1}), ["b", "a"]),
    "nested": (
        {"z": [0, (1, {"y": 2, "x": 3})], "a": Pair(4, {"b": 5, "a": 6}), "m": None},
        ["z.0", "z.1.0", "z.1.1.y", "z.1.1.x", "a.first", "a.second.b", "a.second.a"],
    ),
    "unsortable": ({"w": 0, 3: 1, ("a", 1): 2}, ["w", "3", "('a', 1)"]),
    "numbers": ({1: 0, 0: 1}, None),
    "list": ([0, 1], None),
    "bare": (0, None),
    "empty": ({}, None),
}


@pytest.mark.parametrize(("tree", "names"), TREES.values(), ids=TREES)
def test_an_index_is_the_place_by_insertion(tree: Any, names: list[str] | None) -> None:
    params = optree.tree_map(lambda i: torch.full((2,), float(i)), tree)
    state = adam_init(params, AdamHparams())._replace(exp_avg=params)
    state_dict = to_torch_state_dict(params, state, AdamHparams())
    assert {i: entry["exp_avg"].tolist() for i, entry in state_dict["state"].items()} == {
        i: [i, i] for i in range(len(optree.tree_leaves(params)))
    }
    assert state_dict["param_groups"][0].get("param_names") == names


def named_optimizer(names: list[str], tensors_: list[Tensor], **options: Any) -> torch.optim.Adam:
    weights = [(name, torch.nn.Parameter(x)) for name, x in zip(names, tensors_, strict=True)]
    optimizer = torch.optim.Adam(weights, **options)
    torch_run([w for _, w in weights], [[w.detach() for _, w in weights]], optimizer)
    return optimizer


def test_names_are_followed_where_they_are() -> None:
    state_dict = named_optimizer(["b.weight", "a.0", "c.first"], [leaf(i) for i in range(3)]).state_dict()
    params = {"a": [leaf(1)], "c": Pair(leaf(2), None), "b": {"weight": leaf(0)}}
    expected = optree.tree_map(lambda x: 0 + (1 - 0.9) * x, params)
    assert_equal(from_torch_state_dict(params, state_dict)[0].exp_avg, expected)
    # A list has no names to compare: then it is the order.
    state, _ = from_torch_state_dict([leaf(0), leaf(1), leaf(2)], state_dict)
    assert_equal(state.exp_avg, [0 + (1 - 0.9) * leaf(i) for i in range(3)])
    # Names may stand in the place of indices.
    group = state_dict["param_groups"][0]
    names = group.pop("param_names")
    group["params"] = names
    state_dict["state"] = dict(zip(names, state_dict["state"].values(), strict=True))
    assert_equal(from_torch_state_dict(params, state_dict)[0].exp_avg, expected)


INTERLEAVED: dict[str, tuple[Any, list[list[str]] | None]] = {  # leaves 0 and 2 are a group; their names
    "dict": ({"a": 0, "b": 1, "c": 2}, [["a", "c"], ["b"]]),
    "unsorted": ({"c": 0, "a": 1, "b": 2}, [["c", "b"], ["a"]]),
    "nested": ({"a": [0, Pair(1, {"x": 2})]}, [["a.0", "a.1.second.x"], ["a.1.first"]]),
    "list": ([0, 1, 2], [["0", "2"], ["1"]]),
    "numbers": ({3: 0, 1: 1, 2: 2}, [["0", "2"], ["1"]]),
    "clash": ({"a.b": 0, "a": {"b": 1, "c": 2}}, [["0", "2"], ["1"]]),
    "clash_of_numbers": ({"a": {1: 0, "1": 1, "2": 2}}, [["0", "2"], ["1"]]),
}


@pytest.mark.parametrize(("tree", "names"), INTERLEAVED.values(), ids=INTERLEAVED)
def test_groups_that_interleave_go_to_torch_and_come_back_by_name(tree: Any, names: list[list[str]]) -> None:
    params, rates = optree.tree_map(lambda _: torch.ones(2), tree), {0: 0.1, 1: 0.2, 2: 0.1}
    hparams = AdamHparams(lr=optree.tree_map(rates.__getitem__, tree))
    state = adam_init(params, hparams)._replace(exp_avg=optree.tree_map(lambda i: torch.full((2,), 1.0 * i), tree))
    state_dict = to_torch_state_dict(params, state, hparams)
    assert [group["param_names"] for group in state_dict["param_groups"]] == names
    found, found_hparams = from_torch_state_dict(params, state_dict)
    assert found_hparams == hparams
    assert_equal(found.exp_avg, state.exp_avg)

    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.Adam([{"params": [weights[0], weights[2]]}, {"params": [weights[1]]}])
    optimizer.load_state_dict(state_dict)
    assert [optimizer.state[weight]["exp_avg"].tolist() for weight in weights] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    again, again_hparams = from_torch_state_dict(params, optimizer.state_dict())
    assert again_hparams == hparams
    assert_equal(again, found)


def test_groups_that_agree_are_one_run() -> None:
    weights = [torch.nn.Parameter(leaf(i)) for i in range(3)]
    groups = [{"params": [weights[2], weights[0]]}, {"params": [weights[1]]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    torch_run(weights, [[leaf(5), leaf(6), leaf(7)]], optimizer)
    params = {"c": weights[2].detach(), "a": weights[0].detach(), "b": weights[1].detach()}
    state, hparams = from_torch_state_dict(params, optimizer.state_dict())
    assert hparams == AdamHparams(lr=0.1, weight_decay=0.01, decoupled_weight_decay=True)
    assert_equal(state.exp_avg["c"], optimizer.state[weights[2]]["exp_avg"])
    assert_equal(state.exp_avg["b"], optimizer.state[weights[1]]["exp_avg"])
    # The index counts, in whatever group and order it stands.
    state_dict = optimizer.state_dict()
    state_dict["param_groups"] = [{**state_dict["param_groups"][0], "params": ids} for ids in ([2, 0], [1])]
    assert_equal(from_torch_state_dict(params, state_dict)[0], state)


def test_groups_that_differ_in_a_flag_are_an_error() -> None:
    for name in ("amsgrad", "maximize"):
        groups = [{**GROUP, "params": [0]}, {**GROUP, "params": [1], name: True}]
        with pytest.raises(ValueError, match=rf"differ in '{name}': \[False, True\]"):
            from_torch_state_dict([TWO, TWO], {"state": {}, "param_groups": groups})


@pytest.mark.parametrize("kernel", ["single", "fused"])
def test_parameters_that_never_had_a_gradient_begin_at_step_0(kernel: Any) -> None:
    weights = [torch.nn.Parameter(leaf(i)) for i in range(3)]
    optimizer = torch.optim.Adam(weights, **TORCH_FLAGS[kernel])
    torch_run(weights, [[leaf(10), None, None], [leaf(10), None, leaf(12)]], optimizer)
    params = [w.detach().clone() for w in weights]
    state, hparams = from_torch_state_dict(params, optimizer.state_dict())
    assert [step.item() for step in state.step] == [2, 0, 1]
    assert_equal(state.exp_avg[1], torch.zeros(3, 2))
    grads = [leaf(20), leaf(21), None]
    torch_run(weights, [grads], optimizer)
    assert_equal(adam_update(params, grads, state, hparams, kernel=kernel)[0], [w.detach() for w in weights])


def test_an_optimizer_before_its_first_step_gives_the_first_state() -> None:
    params = [leaf(0), leaf(1)]
    state_dict = torch.optim.Adam([torch.nn.Parameter(x) for x in params]).state_dict()
    assert_equal(from_torch_state_dict(params, state_dict)[0], adam_init(params, AdamHparams(), per_leaf_step=True))


def one_leaf(**entry: Any) -> dict[str, Any]:
    """A dict of torch for a single parameter of shape (2,), with some of its entry replaced."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    torch_run([weight], [[torch.ones(2)]], optimizer)
    state_dict = optimizer.state_dict()
    return {**state_dict, "state": {0: {**state_dict["state"][0], **entry}}}


def test_steps_of_any_kind_are_read() -> None:
    for step in (7, 7.0, torch.tensor(7.0), torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)):
        state, _ = from_torch_state_dict(torch.ones(2), one_leaf(step=step))
        assert_equal(state.step, torch.tensor(7.0))


def test_moments_keep_their_dtype_and_take_the_layout_of_the_parameter() -> None:
    params = leaf(0, (4, 3), torch.bfloat16).T
    moment = leaf(1, (3, 4))
    weight = torch.nn.Parameter(params)
    state_dict = to_torch_state_dict(params, adam_init(params, AdamHparams()), AdamHparams())
    state_dict["state"][0].update(exp_avg=moment, exp_avg_sq=moment.square())
    state, hparams = from_torch_state_dict(params, state_dict)
    assert_equal(state.exp_avg, moment)
    assert state.exp_avg.stride() == params.stride()
    assert_equal(to_torch_state_dict(params, state, hparams)["state"], state_dict["state"])
    # torch itself rounds them.
    optimizer = torch.optim.Adam([weight])
    optimizer.load_state_dict(state_dict)
    assert optimizer.state[weight]["exp_avg"].dtype is torch.bfloat16


def test_numbers_may_be_tensors() -> None:
    lr = torch.tensor([0.01])
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=lr, betas=(torch.tensor(0.5), torch.tensor(0.75)))
    torch_run([weight], [[torch.ones(2)]], optimizer)
    _, hparams = from_torch_state_dict(torch.ones(2), optimizer.state_dict())
    lr.zero_()
    assert_equal(hparams.lr, torch.tensor(0.01))
    assert [float(x) for x in hparams.betas] == [0.5, 0.75]
    group = to_torch_state_dict(torch.ones(2), adam_init(torch.ones(2), hparams), hparams)["param_groups"][0]
    assert_equal(group["lr"], hparams.lr)
    assert group["lr"] is not hparams.lr


def without(mapping: dict[Any, Any], key: Any) -> dict[Any, Any]:
    return {k: v for k, v in mapping.items() if k != key}


GOOD, TWO = one_leaf(), torch.ones(2)
GROUP, AT = GOOD["param_groups"][0], r"\['state'\]\[0\]"


def with_groups(groups: Any) -> dict[str, Any]:
    return {**GOOD, "param_groups": groups}


def with_group(**changes: Any) -> dict[str, Any]:
    return with_groups([{**GROUP, **changes}])


# Behind "state_dict".
BAD: list[tuple[Any, type[Exception], str]] = [
    ([], TypeError, r" is of type list"),
    (without(GOOD, "param_groups"), ValueError, r" has the keys 'state'\. Expected"),
    (with_groups(3), TypeError, r" .* of types dict and int"),
    (with_groups([]), ValueError, r"\['param_groups'\] is empty"),
    (with_groups([3]), TypeError, r"\['param_groups'\]\[0\] is of type int"),
    (with_groups([without(GROUP, "lr")]), ValueError, r"\['param_groups'\]\[0\] has no 'lr'"),
    (with_group(params=3), TypeError, r"\['param_groups'\]\[0\]\['params'\] is 3"),
    (with_group(betas=(0.9,)), ValueError, r"\['param_groups'\]\[0\]\['betas'\] is \(0\.9,\)\. Expected a pair"),
    (with_group(params=[0, 1]), ValueError, r"\['param_groups'\] .* the 1 leaves of params: they add 1\."),
    (with_group(params=[]), ValueError, r"\['param_groups'\] .* they lack 0\."),
    (with_group(params=[0, 0]), ValueError, r"\['param_groups'\] .* they repeat 0\."),
    (with_group(amsgrad=True), ValueError, r"\['state'\]\[0\] lacks 'max_exp_avg_sq'"),
    ({**GOOD, "state": {0: 3}}, TypeError, r"\['state'\]\[0\] is of type int"),
    ({**GOOD, "state": {0: {}, 7: {}}}, ValueError, r"\['state'\] has 7, which no group lists"),
    ({**GOOD, "state": {0: {"step": 1.0}}}, ValueError, r"\['state'\]\[0\] lacks 'exp_avg', 'exp_avg_sq'"),
    (one_leaf(mu_product=TWO[0]), ValueError, r"\['state'\]\[0\] has the extra 'mu_product'"),  # of NAdam
    (one_leaf(exp_avg=TWO[:1]), ValueError, rf"{AT}\['exp_avg'\] has shape \(1,\), but params has shape \(2,\)"),
    (one_leaf(exp_avg=TWO.long()), TypeError, rf"{AT}\['exp_avg'\] is of torch.int64"),
    (one_leaf(exp_avg=TWO.cfloat()), TypeError, rf"{AT}\['exp_avg'\] is of torch.complex64, but params is of"),
    (one_leaf(exp_avg=TWO.to_sparse()), TypeError, rf"{AT}\['exp_avg'\] has the layout torch.sparse_coo"),
    (one_leaf(exp_avg_sq=[1.0, 1.0]), TypeError, rf"{AT}\['exp_avg_sq'\] is of type list. Expected a tensor"),
    (one_leaf(step=-1.0), ValueError, rf"{AT}\['step'\] is -1.0\. Expected a whole number"),
    (one_leaf(step=torch.tensor(0.5)), ValueError, rf"{AT}\['step'\] is .*0.5.*\. Expected a whole number"),
    (one_leaf(step=float("nan")), ValueError, rf"{AT}\['step'\] is nan\. Expected a whole number"),
    (one_leaf(step="1"), TypeError, rf"{AT}\['step'\] is '1' \(str\)\. Expected a number"),
    (one_leaf(step=True), TypeError, rf"{AT}\['step'\] is True \(bool\)\. Expected a number"),
    (one_leaf(step=torch.zeros(0)), ValueError, rf"{AT}\['step'\] has shape \(0,\)\. Expected \(\)"),
    (one_leaf(step=torch.ones(3)), ValueError, rf"{AT}\['step'\] has shape \(3,\)\. Expected \(\)"),
    (one_leaf(step=torch.tensor(True)), TypeError, rf"{AT}\['step'\] is a tensor of torch\.bool"),
    (one_leaf(step=torch.tensor(1j)), TypeError, rf"{AT}\['step'\] is a tensor of torch\.complex64"),
]


@pytest.mark.parametrize(("state_dict", "error", "match"), BAD, ids=[match for *_, match in BAD])
def test_a_damaged_dict_of_torch_is_a_clear_error(state_dict: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"state_dict{match}"):
        from_torch_state_dict(TWO, state_dict)


def test_wrong_numbers_in_a_dict_of_torch_are_those_of_hparams() -> None:
    with pytest.raises(ValueError, match=r"^Invalid learning rate: -1"):
        from_torch_state_dict(TWO, with_group(lr=-1.0))
    with pytest.raises(ValueError, match=r"^hparams.lr has shape \(2,\)"):
        from_torch_state_dict(TWO, with_group(lr=TWO))


@pytest.mark.parametrize(
    ("ids", "names", "error", "match"),
    [
        ([[0, 0], [1]], [["a", "b"], ["c"]], ValueError, r"names .* repeat an index"),
        ([[0, 1], [2]], [["a"], ["b", "c"]], ValueError, r"\[0\] has 2 'params', but 1 'param_names'"),
        ([[0, 1], [2]], [["a", "b"], None], ValueError, r"names .* lack 'c'\."),
        ([[0, 1], [2]], [["a", "d"], ["c"]], ValueError, r"names .* lack 'b' and add 'd'"),
        ([[0, 1], [2, 3]], [["a", "b"], ["c", "d"]], ValueError, r"names .* they add 'd'"),
        ([[0, 1, 2], [3]], [["a", "b", "c"], None], ValueError, r"lack the names of some parameters"),
        ([[0, 1, 2], [2]], [["a", "b", "c"], None], ValueError, r"repeat an index"),
        ([[0, 1], [2]], [["a", "b"], 3], TypeError, r"\[1\]\['param_names'\] is of type int\. Expected names"),
    ],
)
def test_names_that_are_not_one_for_each_parameter_are_an_error(
    ids: Any, names: Any, error: type[Exception], match: str
) -> None:
    params = dict.fromkeys("abc", TWO)
    hparams = AdamHparams(lr={"a": 0.1, "b": 0.2, "c": 0.1})
    state_dict = to_torch_state_dict(params, adam_init(params, hparams), hparams)
    for group, group_ids, group_names in zip(state_dict["param_groups"], ids, names, strict=True):
        group |= {"params": group_ids, "param_names": group_names}
    with pytest.raises(error, match=match):
        from_torch_state_dict(params, state_dict)


def test_names_that_clash_are_an_error() -> None:
    state_dict = named_optimizer(["a", "b"], [TWO, TWO]).state_dict()
    with pytest.raises(ValueError, match=r"^Two leaves of params have one name"):
        from_torch_state_dict({"a.b": TWO, "a": {"b": TWO}}, state_dict)


def test_a_state_that_does_not_fit_is_not_written() -> None:
    params, hparams = {"w": leaf(0)}, AdamHparams()
    state = adam_init(params, hparams)
    with pytest.raises(ValueError, match=r"state.exp_avg lacks \['v'\]"):
        to_torch_state_dict({"v": leaf(0)}, state, hparams)
    with pytest.raises(ValueError, match=r"amsgrad"):
        to_torch_state_dict(params, state, AdamHparams(amsgrad=True))
    with pytest.raises(ValueError, match=r"state.step has shape \(3,\)"):
        to_torch_state_dict(params, state._replace(step=torch.ones(3)), hparams)


# Flat dicts


@PROPERTY
@given(params=trees(tensors(overlapping=False)), seed=seeds, amsgrad=st.booleans(), per_leaf_step=st.booleans())
def test_a_state_comes_back_from_its_flat_dict(params: Any, seed: int, amsgrad: bool, per_leaf_step: bool) -> None:
    hparams = AdamHparams(amsgrad=amsgrad)
    state = random_state(params, hparams, seed, per_leaf_step=per_leaf_step)
    flat = state_to_dict(state)
    assert all(type(key) is str and type(x) is Tensor and x.is_contiguous() for key, x in flat.items())
    assert len(memory_of(flat)) == sum(x.numel() > 0 for x in flat.values())
    assert memory_of(flat).isdisjoint(memory_of(state))
    found = state_from_dict(flat, params, hparams)
    assert memory_of(found).isdisjoint(memory_of(flat))
    assert_equal(found, state)
    assert strides_of(found) == strides_of(state)


KEYS = st.text(max_size=4) | st.sampled_from(["a", "b", "a.b", "']['", "'", '"', "\\", "0"]) | st.integers(0, 2)


KEYED = st.recursive(
    st.just(0), lambda x: st.dictionaries(KEYS, x, min_size=1) | st.lists(x, min_size=1), max_leaves=20
)


@PROPERTY
@given(tree=KEYED)
@example({"a.b": 0, "a": {"b": 0}})
def test_different_paths_have_different_keys(tree: Any) -> None:
    params, hparams = optree.tree_map(lambda _: torch.zeros(()), tree), AdamHparams(amsgrad=True)
    state = random_state(params, hparams, 0, per_leaf_step=True)
    flat = state_to_dict(state)
    assert len(flat) == 1 + 4 * len(optree.tree_leaves(params))
    assert_equal(state_from_dict(flat, params, hparams), state)


def test_keys_of_one_repr_are_an_error() -> None:
    class Same:
        def __repr__(self) -> str:
            return "same"

    state = adam_init({Same(): leaf(0), Same(): leaf(1)}, AdamHparams())
    with pytest.raises(ValueError, match=r"Two leaves of state.exp_avg have the path \[same\]"):
        state_to_dict(state)


def hard_run() -> tuple[Any, AdamState, AdamHparams]:
    """A state with all that files find hard: layouts, dtypes, nesting, no elements."""
    hparams = AdamHparams(amsgrad=True, weight_decay=0.1)
    params = {
        "conv": leaf(0, (2, 3, 4, 4)).to(memory_format=torch.channels_last),
        "layers": [Pair(leaf(1, (4, 3)).T, leaf(2, ())), leaf(3, (2,), torch.bfloat16)],
        "empty": leaf(4, (0, 2)),
    }
    return params, random_state(params, hparams, 5), hparams


def through_torch(tree: Any, path: Path) -> Any:
    torch.save(tree, path)
    return torch.load(path, weights_only=True)


def through_safetensors(flat: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    safetensors.torch.save_file(flat, path)
    return safetensors.torch.load_file(path)


def through_distributed_checkpoint(flat: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    dcp.save(flat, checkpoint_id=path)
    loaded = {key: torch.zeros_like(x) for key, x in flat.items()}
    dcp.load(loaded, checkpoint_id=path)
    return loaded


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("through", [through_torch, through_safetensors, through_distributed_checkpoint])
def test_flat_dicts_go_through_files(through: Callable[..., Any], tmp_path: Path) -> None:
    params, state, hparams = hard_run()
    found = state_from_dict(through(state_to_dict(state), tmp_path / "state"), params, hparams)
    assert_equal(found, state)
    assert strides_of(found) == strides_of(state)


def test_dicts_of_torch_go_through_torch_save(tmp_path: Path) -> None:
    params, state, hparams = hard_run()
    state_dict = through_torch(to_torch_state_dict(params, state, hparams), tmp_path / "optimizer.pt")
    found, found_hparams = from_torch_state_dict(params, state_dict)
    assert_equal(found, state)
    assert found_hparams == hparams


SAVED_TREES: dict[str, Any] = {
    "dict": {"w": leaf(0), "b": leaf(1, (2,), torch.bfloat16)},
    "ordered": OrderedDict(w=leaf(0), b=(leaf(1), [leaf(2)])),
    "bare": leaf(0, dtype=torch.complex64),
    "without leaves": {},
}


@pytest.mark.parametrize("params", SAVED_TREES.values(), ids=SAVED_TREES)
@pytest.mark.parametrize("options", [{}, {"per_leaf_step": True, "master_params": True}], ids=["plain", "masters"])
def test_states_and_hyperparameters_load_with_weights_only(
    params: Any, options: dict[str, bool], tmp_path: Path
) -> None:
    numbers: dict[str, Any] = {"lr": torch.tensor(0.1), "betas": (0.5, torch.tensor(0.75, dtype=torch.float64))}
    if isinstance(params, dict):
        numbers["weight_decay"] = type(params)(dict.fromkeys(params, 0.1))
    hparams = AdamHparams(**numbers, amsgrad=bool(options), decoupled_weight_decay=True)
    state = adam_init(params, hparams, **options)
    params, state = adam_update(params, params, state, hparams)
    loaded_params, loaded, loaded_hparams = through_torch((params, state, hparams), tmp_path / "run.pt")
    assert type(loaded) is AdamState
    assert type(loaded_hparams) is AdamHparams
    assert repr(loaded_hparams) == repr(hparams)
    assert_equal((loaded_params, loaded), (params, state))
    assert_equal(
        adam_update(loaded_params, loaded_params, loaded, loaded_hparams), adam_update(params, params, state, hparams)
    )


def test_a_new_process_loads_states_and_hyperparameters_with_weights_only(tmp_path: Path) -> None:
    hparams = AdamHparams(lr={"w": 0.5}, maximize=True)
    state = adam_init({"w": torch.ones(2)}, hparams)
    torch.save({"state": state, "hparams": hparams}, tmp_path / "run.pt")
    code = (
        f"import torch, functional_adam; loaded = torch.load({str(tmp_path / 'run.pt')!r}, weights_only=True);"
        "print(loaded['hparams'].lr, loaded['hparams'].maximize, loaded['state'].exp_avg['w'].tolist())"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout == "{'w': 0.5} True [0.0, 0.0]\n"


def test_stacked_states_come_back_with_a_step_that_members_share() -> None:
    params, hparams = {"w": leaf(0, (3, 2)), "b": leaf(1, (3,))}, AdamHparams()
    states = vmap(lambda p: adam_init(p, hparams))(params)
    apart = states._replace(step=torch.tensor([1.0, 2.0, 3.0]))
    by_leaf = random_state({"w": params["w"], "b": leaf(1, ())}, hparams, 2, per_leaf_step=True)
    by_leaf = by_leaf._replace(step={"w": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor(4.0)})
    one = optree.tree_map(lambda x: x[:1], states)
    for state, strides in ((states, [(0,)]), (apart, [(1,)]), (by_leaf, [(), (1,)]), (one, [(0,)])):
        found = state_from_dict(state_to_dict(state), state.exp_avg, hparams)
        assert_equal(found, state)
        assert strides_of(found.step) == strides


def test_tracked_states_are_written_as_plain_tensors() -> None:
    params, hparams = torch.ones(2, requires_grad=True), AdamHparams()
    _, state = adam_update(params, params * 2, adam_init(params, hparams), hparams)
    assert state.exp_avg.requires_grad
    flat, state_dict = state_to_dict(state), to_torch_state_dict(params, state, hparams)
    assert not any(x.requires_grad for x in optree.tree_leaves((flat, state_dict)) if isinstance(x, Tensor))
    found = state_from_dict(flat, params, hparams), from_torch_state_dict(params, state_dict)[0]
    assert not any(x.requires_grad for x in optree.tree_leaves(found))


FLAT = state_to_dict(adam_init({"w": torch.ones(2)}, AdamHparams()))
EXP_AVG = re.escape("flat[\"exp_avg['w']\"]")


def flat_of(exp_avg: Any = TWO, *, step: Any = 0.0) -> dict[str, Any]:
    """A flat dict of a single parameter, with a moment or a step of its own."""
    return {**FLAT, "exp_avg['w']": exp_avg, "step": torch.tensor(step)}


BAD_FLAT: dict[str, tuple[Any, type[Exception], str]] = {
    "no_dict": ([], TypeError, r"^flat is of type list"),
    "no_format": (without(FLAT, "format"), ValueError, r"^flat has no number under 'format'"),
    "format_of_no_kind": ({**FLAT, "format": 1}, ValueError, r"^flat has no number under 'format'"),
    "later_format": ({**FLAT, "format": torch.tensor(2)}, ValueError, r"^flat is of format 2, but .* reads format 1"),
    "missing": (without(FLAT, "exp_avg['w']"), ValueError, r"^flat lacks \"exp_avg\['w'\]\""),
    "extra": ({**FLAT, "exp_avg['v']": TWO}, ValueError, r"^flat has the extra \"exp_avg\['v'\]\""),
    "no_step": (without(FLAT, "step"), ValueError, r"^flat lacks \"step\['w'\]\""),
    "shape": (flat_of(TWO[:1]), ValueError, rf"^{EXP_AVG} has shape \(1,\), but params\['w'\] has shape \(2,\)\."),
    "dtype": (flat_of(TWO.int()), TypeError, rf"^{EXP_AVG} is of torch.int32"),
    "complex": (flat_of(TWO.cfloat()), TypeError, rf"^{EXP_AVG} is of torch.complex64, but params\['w'\] is of"),
    "no_tensor": (flat_of([0.0, 0.0]), TypeError, rf"^{EXP_AVG} is of type list. Expected a tensor"),
    "negative_step": (flat_of(step=-1.0), ValueError, r"^flat\['step'\] is .*Expected a whole number"),
    "stacked_step": (flat_of(step=[1.0] * 3), ValueError, r"^flat\['step'\] has shape \(3,\)\. Expected \(\)"),
    "complex_step": (flat_of(step=1 + 0j), TypeError, r"^flat\['step'\] .* torch.complex64.* a real tensor"),
    "flag_step": (flat_of(step=True), TypeError, r"^flat\['step'\] .* torch.bool.* a real tensor"),
}


@pytest.mark.parametrize(("flat", "error", "match"), BAD_FLAT.values(), ids=BAD_FLAT)
def test_a_damaged_flat_dict_is_a_clear_error(flat: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        state_from_dict(flat, {"w": torch.ones(2)}, AdamHparams())


def test_a_flat_dict_must_fit_its_parameters() -> None:
    expected = r"exp_avg\['w'\]\\*\"\] is of torch.float32, but params\['w'\] is of torch.complex64"
    with pytest.raises(TypeError, match=expected):
        state_from_dict(FLAT, {"w": TWO.cfloat()}, AdamHparams())
    with pytest.raises(ValueError, match=r"^flat lacks \"max_exp_avg_sq\['w'\]\".*amsgrad"):
        state_from_dict(FLAT, {"w": TWO}, AdamHparams(amsgrad=True))


@pytest.mark.parametrize(("count", "more"), [(1, ""), (4, ""), (5, " and 1 more"), (7, " and 3 more")])
def test_the_first_few_keys_that_a_flat_dict_lacks_and_adds_are_listed(count: int, more: str) -> None:
    params, hparams = [torch.ones(2)] * count, AdamHparams()
    flat = state_to_dict(adam_init(params, hparams))
    renamed = {key.replace("exp_avg[", "mean["): x for key, x in flat.items()}
    lacked, added = (", ".join(f"'{name}[{i}]'" for i in range(min(count, 4))) for name in ("exp_avg", "mean"))
    with pytest.raises(ValueError, match=re.escape(f"flat lacks {lacked}{more} and has the extra {added}{more}. ")):
        state_from_dict(renamed, params, hparams)


@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_a_state_goes_where_its_parameters_are(per_leaf_step: bool) -> None:
    hparams = AdamHparams(amsgrad=True)
    flat = state_to_dict(random_state({"w": leaf(0)}, hparams, 1, per_leaf_step=per_leaf_step))
    found = state_from_dict(flat, {"w": leaf(0).to("meta")}, hparams)
    assert {x.device.type for x in optree.tree_leaves(found)} == {"meta"}


def test_a_flat_dict_is_where_its_state_is_whatever_the_default_device() -> None:
    state = adam_init({"w": leaf(0)}, AdamHparams())
    with torch.device("meta"):
        flat = state_to_dict(state)
    assert {x.device.type for x in flat.values()} == {"cpu"}


def test_what_is_no_state_is_not_written() -> None:
    with pytest.raises(TypeError, match=r"^state is of type dict\. Expected an AdamState"):
        state_to_dict({"step": torch.ones(())})  # type: ignore[arg-type]
    params, hparams = torch.ones(2), AdamHparams()
    donated = adam_init(params, hparams)
    adam_update(params, torch.ones(2), donated, hparams, donate=True)
    with pytest.raises(RuntimeError, match=r"^state.step is empty: this state was donated"):
        state_to_dict(donated)
    with pytest.raises(RuntimeError, match=r"^state.step is empty"):
        to_torch_state_dict(params, donated, hparams)
