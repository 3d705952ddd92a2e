"""A state goes into torch.optim and files and comes back; a run stopped in one place continues in the other."""

import copy
import itertools
import re
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import optree
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
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
from tests.oracles import KERNELS, TORCH_FLAGS
from tests.strategies import PROPERTY, Pair, hyperparameters, is_dense, random_tensor, seeds, tensors, trees
from tests.tolerances import assert_equal

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.01},
    "coupled": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "decoupled": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


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


def torch_run(params: list[Tensor], gradients: list[list[Tensor]], optimizer: torch.optim.Optimizer) -> None:
    for grads in gradients:
        for param, gradient in zip(params, grads, strict=True):
            param.grad = gradient.clone()
        optimizer.step()


def memory_of(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in optree.tree_leaves(tree) if isinstance(x, Tensor) and x.numel()}


# torch.optim


@every_kernel
@every_option
def test_a_run_of_torch_continues_here_bit_for_bit(kernel: Any, options: dict[str, Any]) -> None:
    weights = {key: torch.nn.Parameter(x) for key, x in unsorted_tree().items()}
    optimizer = torch.optim.Adam(weights.values(), **options, **TORCH_FLAGS[kernel])
    torch_run([*weights.values()], [[leaf(50 * s + i) for i in range(12)] for s in (1, 2)], optimizer)

    params = {key: x.detach().clone() for key, x in weights.items()}
    state, hparams = from_torch_state_dict(params, copy.deepcopy(optimizer.state_dict()))
    assert hparams == AdamHparams(**options)
    for s in (3, 4, 5):
        grads = [leaf(50 * s + i) for i in range(12)]
        torch_run([*weights.values()], [grads], optimizer)
        params, state = adam_update(params, dict(zip(params, grads, strict=True)), state, hparams, kernel=kernel)
        assert_equal(params, {key: x.detach() for key, x in weights.items()})
    assert state.step.item() == 5


@every_kernel
@every_option
def test_a_run_continues_in_torch_bit_for_bit(kernel: Any, options: dict[str, Any]) -> None:
    hparams, params = AdamHparams(**options), unsorted_tree()
    state = adam_init(params, hparams)
    for s in (1, 2):
        params, state = adam_update(params, unsorted_tree(50 * s), state, hparams, kernel=kernel)

    weights = {key: torch.nn.Parameter(x.clone()) for key, x in params.items()}
    kind = torch.optim.AdamW if hparams.decoupled_weight_decay else torch.optim.Adam
    optimizer = kind(weights.values())
    state_dict = to_torch_state_dict(params, state, hparams)
    state_dict["param_groups"][0].update(TORCH_FLAGS[kernel])
    optimizer.load_state_dict(state_dict)
    before = copy.deepcopy(state)
    for s in (3, 4, 5):
        grads = unsorted_tree(50 * s)
        torch_run([*weights.values()], [[*grads.values()]], optimizer)
        # torch has taken over the tensors of the dict, and writes to them.
        if s == 3:
            assert_equal(state, before)
        params, state = adam_update(params, grads, state, hparams, kernel=kernel)
        assert_equal({key: x.detach() for key, x in weights.items()}, params)


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
@given(params=trees(tensors(overlapping=False)), seed=seeds, options=hyperparameters(), per_leaf_step=st.booleans())
def test_a_state_comes_back_from_the_dict_of_torch(
    params: Any, seed: int, options: dict[str, Any], per_leaf_step: bool
) -> None:
    hparams = AdamHparams(**options)
    state = random_state(params, hparams, seed, per_leaf_step=per_leaf_step)
    state_dict = to_torch_state_dict(params, state, hparams)
    assert memory_of(state_dict).isdisjoint(memory_of(state))
    found, found_hparams = from_torch_state_dict(params, state_dict)
    assert found_hparams == hparams
    assert memory_of(found).isdisjoint(memory_of(state_dict))
    assert_equal(found[1:], state[1:])
    steps = optree.tree_leaves(state.step) if optree.tree_leaves(params) else [torch.zeros(())]
    if len({*map(float, steps)}) <= 1:
        assert_equal(found.step, steps[0])
    else:
        assert_equal(found.step, state.step)
    for x, model in zip(optree.tree_leaves(found.exp_avg), optree.tree_leaves(params), strict=True):
        assert x.stride() == (model if is_dense(model) else torch.empty_like(model)).stride()


TREES: dict[str, Any] = {
    "dict": {"b": 0, "a": 1, "10": 2, "2": 3},
    "ordered": OrderedDict(b=0, a=1),
    "default": defaultdict(list, {"b": 0, "a": 1}),
    "nested": {"z": [0, (1, {"y": 2, "x": 3})], "a": Pair(4, {"b": 5, "a": 6}), "m": None},
    "unsortable": {"w": 0, 3: 1, ("a", 1): 2},
    "bare": 0,
    "empty": {},
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_an_index_is_the_place_by_insertion(tree: Any) -> None:
    params = optree.tree_map(lambda i: torch.full((2,), float(i)), tree)
    state = adam_init(params, AdamHparams())._replace(exp_avg=params)
    entries = to_torch_state_dict(params, state, AdamHparams())["state"]
    assert {i: entry["exp_avg"].tolist() for i, entry in entries.items()} == {
        i: [i, i] for i in range(len(optree.tree_leaves(params)))
    }


def named_optimizer(names: list[str], tensors_: list[Tensor], **options: Any) -> torch.optim.Adam:
    weights = [(name, torch.nn.Parameter(x)) for name, x in zip(names, tensors_, strict=True)]
    optimizer = torch.optim.Adam(weights, **options)
    torch_run([w for _, w in weights], [[w.detach() for _, w in weights]], optimizer)
    return optimizer


def test_names_are_followed_where_they_are() -> None:
    optimizer = named_optimizer(["b.weight", "a.0", "c.first"], [leaf(i) for i in range(3)])
    params = {"a": [leaf(1)], "c": Pair(leaf(2), None), "b": {"weight": leaf(0)}}
    state, _ = from_torch_state_dict(params, optimizer.state_dict())
    assert_equal(state.exp_avg, optree.tree_map(lambda x: 0 + (1 - 0.9) * x, params))
    # A list has no names to compare: then it is the order.
    state, _ = from_torch_state_dict([leaf(0), leaf(1), leaf(2)], optimizer.state_dict())
    assert_equal(state.exp_avg, [0 + (1 - 0.9) * leaf(i) for i in range(3)])


def test_names_in_place_of_indices_are_followed() -> None:
    state_dict = named_optimizer(["b", "a"], [leaf(0), leaf(1)]).state_dict()
    group = {**state_dict["param_groups"][0], "params": ["b", "a"]}
    del group["param_names"]
    named = {"state": {"b": state_dict["state"][0], "a": state_dict["state"][1]}, "param_groups": [group]}
    state, _ = from_torch_state_dict({"a": leaf(1), "b": leaf(0)}, named)
    assert_equal(state.exp_avg, {"a": (1 - 0.9) * leaf(1), "b": (1 - 0.9) * leaf(0)})


@PROPERTY
@given(params=trees(tensors(overlapping=False)), seed=seeds, data=st.data())
def test_a_state_comes_back_to_its_leaves_however_groups_interleave(
    params: Any, seed: int, data: st.DataObject
) -> None:
    leaves, treespec = optree.tree_flatten(params)
    rates = data.draw(st.lists(st.sampled_from([0.1, 0.2]), min_size=len(leaves), max_size=len(leaves)))
    hparams = AdamHparams(lr=treespec.unflatten(rates) if leaves else 0.1)
    state = random_state(params, hparams, seed, per_leaf_step=data.draw(st.booleans()))
    found, found_hparams = from_torch_state_dict(params, to_torch_state_dict(params, state, hparams))
    assert optree.broadcast_prefix(found_hparams.lr, params) == rates
    assert_equal(found[1:], state[1:])


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


def test_only_groups_in_order_go_without_names() -> None:
    for params in ([leaf(0), leaf(1)], leaf(0), {1: leaf(0), 0: leaf(1)}):
        hparams = AdamHparams()
        group = to_torch_state_dict(params, adam_init(params, hparams), hparams)["param_groups"][0]
        assert "param_names" not in group


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


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_groups_that_differ_in_a_flag_are_an_error(name: str) -> None:
    weights = [torch.nn.Parameter(leaf(i)) for i in range(2)]
    optimizer = torch.optim.Adam([{"params": [weights[0]]}, {"params": [weights[1]], name: True}])
    with pytest.raises(ValueError, match=rf"differ in '{name}': \[False, True\]\. .*make the groups agree"):
        from_torch_state_dict([leaf(0), leaf(1)], optimizer.state_dict())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "other", [{"lr": 0.5}, {"betas": (0.5, 0.999)}, {"betas": (0.9, 0.7)}, {"eps": 0.1}, {"weight_decay": 0.5}], ids=str
)
def test_groups_become_trees_and_trees_groups(kernel: Any, other: dict[str, Any]) -> None:
    def optimizer_of(weights: list[torch.nn.Parameter]) -> torch.optim.Adam:
        groups = [{"params": weights[:2]}, {"params": weights[2:], **other}]
        return torch.optim.Adam(groups, lr=0.1, **TORCH_FLAGS[kernel])

    weights = [torch.nn.Parameter(leaf(i)) for i in range(3)]
    optimizer = optimizer_of(weights)
    gradients = [[leaf(10 * step + i) for i in range(3)] for step in range(6)]
    torch_run(weights, gradients[:2], optimizer)
    params = [weight.detach().clone() for weight in weights]
    state, hparams = from_torch_state_dict(params, optimizer.state_dict())
    for grads in gradients[2:4]:
        params, state = adam_update(params, grads, state, hparams, kernel=kernel)
    torch_run(weights, gradients[2:4], optimizer)
    for param, weight in zip(params, weights, strict=True):
        assert_equal(param, weight.detach())
    # And back, into a new optimizer with the same groups.
    resumed = [torch.nn.Parameter(param.clone()) for param in params]
    second = optimizer_of(resumed)
    state_dict = to_torch_state_dict(params, state, hparams)
    assert [group["params"] for group in state_dict["param_groups"]] == [[0, 1], [2]]
    for group in state_dict["param_groups"]:
        group.update(TORCH_FLAGS[kernel])
    second.load_state_dict(state_dict)
    torch_run(resumed, gradients[4:], second)
    torch_run(weights, gradients[4:], optimizer)
    for param, weight in zip(resumed, weights, strict=True):
        assert_equal(param.detach(), weight.detach())


@pytest.mark.parametrize("kernel", ["single", "fused"])
def test_parameters_that_never_had_a_gradient_begin_at_step_0(kernel: Any) -> None:
    weights = [torch.nn.Parameter(leaf(i)) for i in range(3)]
    optimizer = torch.optim.Adam(weights, **TORCH_FLAGS[kernel])
    for used in ([0], [0, 2]):
        for i, weight in enumerate(weights):
            weight.grad = leaf(10 + i) if i in used else None
        optimizer.step()
    params = [w.detach().clone() for w in weights]
    state, hparams = from_torch_state_dict(params, optimizer.state_dict())
    assert [step.item() for step in state.step] == [2, 0, 1]
    assert_equal(state.exp_avg[1], torch.zeros(3, 2))
    grads = [leaf(20), leaf(21), None]
    for weight, gradient in zip(weights, grads, strict=True):
        weight.grad = gradient
    optimizer.step()
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


@pytest.mark.parametrize(
    "step", [7, 7.0, torch.tensor(7.0), torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)], ids=repr
)
def test_steps_of_any_kind_are_read(step: Any) -> None:
    state, _ = from_torch_state_dict(torch.ones(2), one_leaf(step=step))
    assert state.step.dtype is torch.float32
    assert state.step.shape == ()
    assert state.step.item() == 7


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


def with_group(**changes: Any) -> dict[str, Any]:
    state_dict = one_leaf()
    return {**state_dict, "param_groups": [{**state_dict["param_groups"][0], **changes}]}


GOOD = one_leaf()
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no_dict": ([], TypeError, r"^state_dict is of type list"),
    "no_groups": (without(GOOD, "param_groups"), ValueError, r"has the keys 'state', expected"),
    "empty_groups": ({**GOOD, "param_groups": []}, ValueError, r"\['param_groups'\] is empty"),
    "group_of_no_kind": ({**GOOD, "param_groups": [3]}, TypeError, r"\['param_groups'\]\[0\] is of type int"),
    "groups_of_no_kind": ({**GOOD, "param_groups": 3}, TypeError, r"of types dict and int"),
    "params_of_no_kind": (with_group(params=3), TypeError, r"\['param_groups'\]\[0\]\['params'\] is 3"),
    "entry_of_no_kind": ({**GOOD, "state": {0: 3}}, TypeError, r"\['state'\]\[0\] is of type int"),
    "no_lr": ({**GOOD, "param_groups": [without(GOOD["param_groups"][0], "lr")]}, ValueError, r"\[0\] has no 'lr'"),
    "wrong_lr": (with_group(lr=-1.0), ValueError, r"^Invalid learning rate: -1"),
    "stacked_lr": (with_group(lr=torch.ones(2)), ValueError, r"^hparams.lr has shape \(2,\)"),
    "extra_index": (with_group(params=[0, 1]), ValueError, r"indices .* match the 1 leaves of params: they add 1\."),
    "missing_index": (with_group(params=[]), ValueError, r"they lack 0\."),
    "repeated_index": (with_group(params=[0, 0]), ValueError, r"they repeat 0\."),
    "unlisted_entry": ({**GOOD, "state": {0: {}, 7: {}}}, ValueError, r"\['state'\] has 7, which no group lists"),
    "no_moment": ({**GOOD, "state": {0: {"step": 1.0}}}, ValueError, r"\['state'\]\[0\] lacks 'exp_avg', 'exp_avg_sq'"),
    "no_maximum": (with_group(amsgrad=True), ValueError, r"\['state'\]\[0\] lacks 'max_exp_avg_sq'"),
    "of_nadam": (one_leaf(mu_product=torch.ones(())), ValueError, r"\['state'\]\[0\] has the extra 'mu_product'"),
    "shape": (
        one_leaf(exp_avg=torch.ones(1)),
        ValueError,
        r"\[0\]\['exp_avg'\] has shape \(1,\), but params has \(2,\)",
    ),
    "integers": (one_leaf(exp_avg=torch.ones(2, dtype=torch.int64)), TypeError, r"is a tensor of torch.int64"),
    "complex": (one_leaf(exp_avg=torch.ones(2, dtype=torch.complex64)), TypeError, r"expected a dense real"),
    "sparse": (one_leaf(exp_avg=torch.ones(2).to_sparse()), TypeError, r"torch.sparse_coo, expected a dense"),
    "no_tensor": (one_leaf(exp_avg_sq=[1.0, 1.0]), TypeError, r"\['exp_avg_sq'\] is of type list, expected a tensor"),
    "negative_step": (one_leaf(step=-1.0), ValueError, r"\[0\]\['step'\] is -1.0, expected a whole number"),
    "half_step": (one_leaf(step=torch.tensor(0.5)), ValueError, r"expected a whole number"),
    "nan_step": (one_leaf(step=float("nan")), ValueError, r"expected a whole number"),
    "step_of_no_kind": (one_leaf(step="1"), TypeError, r"\['step'\] is '1' \(str\)\. Expected a number"),
    "flag_step": (one_leaf(step=True), TypeError, r"\['step'\] is True \(bool\)\. Expected a number"),
    "step_of_nothing": (one_leaf(step=torch.zeros(0)), ValueError, r"\['step'\] has shape \(0,\), expected \(\)"),
    "bool_step": (
        one_leaf(step=torch.tensor(True)),
        TypeError,
        r"\['step'\] is a tensor of torch\.bool\. ",
    ),
    "complex_step": (
        one_leaf(step=torch.tensor(1j)),
        TypeError,
        r"\['step'\] is a tensor of torch\.complex64\.",
    ),
    "one_beta": (with_group(betas=(0.9,)), ValueError, r"\[0\]\['betas'\] is \(0\.9,\), expected a pair of numbers"),
    "stacked_step": (one_leaf(step=torch.ones(3)), ValueError, r"\['step'\] has shape \(3,\), expected \(\)"),
}


@pytest.mark.parametrize(("state_dict", "error", "match"), BAD.values(), ids=BAD)
def test_a_damaged_dict_of_torch_is_a_clear_error(state_dict: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        from_torch_state_dict(torch.ones(2), state_dict)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"a": 0, "c": 1}, r"The names .* they lack 'c' and add 'b'\. .*take 'param_names' out"),
        ({"a": 0}, r"they add 'b'"),
        ({"a.b": 0, "a": {"b": 1}}, r"^Two leaves of params have one name"),
    ],
)
def test_names_that_do_not_match_are_an_error(params: Any, match: str) -> None:
    state_dict = named_optimizer(["a", "b"], [leaf(0), leaf(1)]).state_dict()
    with pytest.raises(ValueError, match=match):
        from_torch_state_dict(optree.tree_map(leaf, params), state_dict)


@pytest.mark.parametrize(
    ("ids", "names", "error", "match"),
    [
        ([[0, 0], [1]], [["a", "b"], ["c"]], ValueError, r"The names .* they repeat an index\."),
        ([[0, 1], [2]], [["a"], ["b", "c"]], ValueError, r"\[0\] has 2 'params', but 1 'param_names'\. Give each"),
        ([[0, 1], [2]], [["a", "b"], None], ValueError, r"The names .* they lack 'c'\."),
        ([[0, 1, 2], [3]], [["a", "b", "c"], None], ValueError, r"they lack the names of some parameters\."),
        ([[0, 1, 2], [2]], [["a", "b", "c"], None], ValueError, r"they repeat an index\."),
        ([[0, 1], [2]], [["a", "b"], 3], TypeError, r"\[1\]\['param_names'\] is of type int, expected names"),
    ],
)
def test_names_that_are_not_one_for_each_parameter_are_an_error(
    ids: Any, names: Any, error: type[Exception], match: str
) -> None:
    params = {name: torch.ones(2) for name in "abc"}
    hparams = AdamHparams(lr={"a": 0.1, "b": 0.2, "c": 0.1})
    state_dict = to_torch_state_dict(params, adam_init(params, hparams), hparams)
    for group, group_ids, group_names in zip(state_dict["param_groups"], ids, names, strict=True):
        group |= {"params": group_ids, "param_names": group_names}
    with pytest.raises(error, match=match):
        from_torch_state_dict(params, state_dict)


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
    assert [x.stride() for x in optree.tree_leaves(found)] == [x.stride() for x in optree.tree_leaves(state)]


KEYS = st.text(max_size=4) | st.sampled_from(["a", "b", "a.b", "']['", "'", '"', "\\", "0"]) | st.integers(0, 2)


@PROPERTY
@given(data=st.data())
def test_different_paths_have_different_keys(data: st.DataObject) -> None:
    nodes = st.recursive(
        st.just(0), lambda child: st.dictionaries(KEYS, child, min_size=1) | st.lists(child, min_size=1), max_leaves=20
    )
    tree = data.draw(nodes)
    params = optree.tree_map(lambda _: torch.zeros(()), tree)
    state = adam_init(params, AdamHparams(amsgrad=True), per_leaf_step=True)
    assert len(state_to_dict(state)) == 1 + 4 * len(optree.tree_leaves(params))


def test_dotted_and_nested_names_do_not_collide() -> None:
    params, hparams = {"a.b": leaf(0), "a": {"b": leaf(1)}}, AdamHparams()
    state = adam_init(params, hparams)._replace(exp_avg=params)
    flat = state_to_dict(state)
    assert list(flat)[:4] == ["format", "step", "exp_avg['a']['b']", "exp_avg['a.b']"]
    assert_equal(state_from_dict(flat, params, hparams), state)


def test_keys_of_one_repr_are_an_error() -> None:
    class Same:
        def __repr__(self) -> str:
            return "same"

    state = adam_init({Same(): leaf(0), Same(): leaf(1)}, AdamHparams())
    with pytest.raises(ValueError, match=r"Two leaves of state.exp_avg have the path \[same\]"):
        state_to_dict(state)


@pytest.fixture
def run() -> tuple[Any, AdamState, AdamHparams]:
    """A state with all that files find hard: layouts, dtypes, nesting, no elements."""
    hparams = AdamHparams(amsgrad=True, weight_decay=0.1)
    params = {
        "conv": leaf(0, (2, 3, 4, 4)).to(memory_format=torch.channels_last),
        "layers": [Pair(leaf(1, (4, 3)).T, leaf(2, ())), leaf(3, (2,), torch.bfloat16)],
        "empty": leaf(4, (0, 2)),
    }
    return params, random_state(params, hparams, 5), hparams


def assert_same_state(found: AdamState, state: AdamState) -> None:
    assert_equal(found, state)
    assert [x.stride() for x in optree.tree_leaves(found)] == [x.stride() for x in optree.tree_leaves(state)]


def test_flat_dicts_go_through_torch_save(run: tuple[Any, AdamState, AdamHparams], tmp_path: Path) -> None:
    params, state, hparams = run
    torch.save(state_to_dict(state), tmp_path / "state.pt")
    assert_same_state(state_from_dict(torch.load(tmp_path / "state.pt", weights_only=True), params, hparams), state)


def test_flat_dicts_go_through_safetensors(run: tuple[Any, AdamState, AdamHparams], tmp_path: Path) -> None:
    params, state, hparams = run
    safetensors.torch.save_file(state_to_dict(state), tmp_path / "state.safetensors")
    flat = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert_same_state(state_from_dict(flat, params, hparams), state)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_flat_dicts_go_through_distributed_checkpoint(run: tuple[Any, AdamState, AdamHparams], tmp_path: Path) -> None:
    params, state, hparams = run
    dcp.save(state_to_dict(state), checkpoint_id=tmp_path / "state")
    flat = state_to_dict(adam_init(params, hparams))
    dcp.load(flat, checkpoint_id=tmp_path / "state")
    assert_same_state(state_from_dict(flat, params, hparams), state)


def test_dicts_of_torch_go_through_torch_save(run: tuple[Any, AdamState, AdamHparams], tmp_path: Path) -> None:
    params, state, hparams = run
    torch.save(to_torch_state_dict(params, state, hparams), tmp_path / "optimizer.pt")
    found = from_torch_state_dict(params, torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert_equal(found[0], state)
    assert found[1] == hparams


SAVED_TREES: dict[str, Any] = {
    "dict": {"w": leaf(0), "b": leaf(1, (2,), torch.bfloat16)},
    "ordered": OrderedDict(w=leaf(0), b=(leaf(1), [leaf(2)])),
    "bare": leaf(0, dtype=torch.complex64),
    "without leaves": {},
}


@pytest.mark.parametrize("params", SAVED_TREES.values(), ids=SAVED_TREES)
@pytest.mark.parametrize("options", [{}, {"per_leaf_step": True, "master_params": True}], ids=["plain", "masters"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_states_and_hyperparameters_load_with_weights_only(
    params: Any, options: dict[str, bool], amsgrad: bool, tmp_path: Path
) -> None:
    numbers: dict[str, Any] = {"lr": torch.tensor(0.1), "betas": (0.5, torch.tensor(0.75, dtype=torch.float64))}
    if isinstance(params, dict):
        numbers["weight_decay"] = type(params)(dict.fromkeys(params, 0.1))
    hparams = AdamHparams(**numbers, amsgrad=amsgrad, decoupled_weight_decay=True)
    state = adam_init(params, hparams, **options)
    params, state = adam_update(params, params, state, hparams)
    torch.save((params, state, hparams), tmp_path / "run.pt")
    loaded_params, loaded, loaded_hparams = torch.load(tmp_path / "run.pt", weights_only=True)
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
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout == "{'w': 0.5} True [0.0, 0.0]\n"


def test_stacked_states_come_back_with_a_step_that_members_share() -> None:
    params, hparams = {"w": leaf(0, (3, 2)), "b": leaf(1, (3,))}, AdamHparams()
    states = vmap(lambda p: adam_init(p, hparams))(params)
    found = state_from_dict(state_to_dict(states), params, hparams)
    assert_equal(found, states)
    assert found.step.stride() == states.step.stride() == (0,)
    apart = states._replace(step=torch.tensor([1.0, 2.0, 3.0]))
    found = state_from_dict(state_to_dict(apart), params, hparams)
    assert_equal(found, apart)
    assert found.step.stride() == (1,)


def test_tracked_states_are_written_as_plain_tensors() -> None:
    params, hparams = torch.ones(2, requires_grad=True), AdamHparams()
    _, state = adam_update(params, params * 2, adam_init(params, hparams), hparams)
    assert state.exp_avg.requires_grad
    flat, state_dict = state_to_dict(state), to_torch_state_dict(params, state, hparams)
    assert not any(x.requires_grad for x in optree.tree_leaves((flat, state_dict)) if isinstance(x, Tensor))
    found = state_from_dict(flat, params, hparams), from_torch_state_dict(params, state_dict)[0]
    assert not any(x.requires_grad for x in optree.tree_leaves(found))


FLAT = state_to_dict(adam_init({"w": torch.ones(2)}, AdamHparams()))
BAD_FLAT: dict[str, tuple[Any, type[Exception], str]] = {
    "no_dict": ([], TypeError, r"^flat is of type list"),
    "no_format": (without(FLAT, "format"), ValueError, r"^flat has no number under 'format'"),
    "format_of_no_kind": ({**FLAT, "format": 1}, ValueError, r"^flat has no number under 'format'"),
    "later_format": ({**FLAT, "format": torch.tensor(2)}, ValueError, r"^flat is of format 2, but .* reads format 1"),
    "missing": (without(FLAT, "exp_avg['w']"), ValueError, r"^flat lacks \"exp_avg\['w'\]\"\. Give the params"),
    "extra": ({**FLAT, "exp_avg['v']": torch.ones(2)}, ValueError, r"^flat has the extra \"exp_avg\['v'\]\""),
    "no_step": (without(FLAT, "step"), ValueError, r"^flat lacks \"step\['w'\]\""),
    "shape": ({**FLAT, "exp_avg['w']": torch.ones(1)}, ValueError, r"has shape \(1,\), but params\['w'\] has \(2,\)"),
    "dtype": ({**FLAT, "exp_avg['w']": torch.ones(2).int()}, TypeError, r"is a tensor of torch.int32"),
    "no_tensor": ({**FLAT, "exp_avg['w']": [0.0, 0.0]}, TypeError, r"is of type list, expected a tensor"),
    "negative_step": (
        {**FLAT, "step": torch.tensor(-1.0)},
        ValueError,
        r"^flat\['step'\] is .*expected a whole number",
    ),
    "stacked_step": ({**FLAT, "step": torch.ones(3)}, ValueError, r"^flat\['step'\] has shape \(3,\), expected \(\)"),
}


@pytest.mark.parametrize(("flat", "error", "match"), BAD_FLAT.values(), ids=BAD_FLAT)
def test_a_damaged_flat_dict_is_a_clear_error(flat: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        state_from_dict(flat, {"w": torch.ones(2)}, AdamHparams())


SENTENCES: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "no_format": (
        without(FLAT, "format"),
        ValueError,
        "flat has no number under 'format'. Expected a dict that state_to_dict has made.",
    ),
    "later_format": (
        {**FLAT, "format": torch.tensor(2)},
        ValueError,
        "flat is of format 2, but this version reads format 1. Load it with the version that wrote it, or a later one.",
    ),
    "shape": (
        {**FLAT, "exp_avg['w']": torch.ones(1)},
        ValueError,
        "flat[\"exp_avg['w']\"] has shape (1,), but params['w'] has (2,). "
        "Give the params that the state was made with, in the same order.",
    ),
    "complex": (
        {**FLAT, "exp_avg['w']": torch.ones(2, dtype=torch.complex64)},
        TypeError,
        "flat[\"exp_avg['w']\"] is a tensor of torch.complex64 and torch.strided, "
        "expected a dense real floating one as params['w'] is.",
    ),
    "complex_step": (
        {**FLAT, "step": torch.tensor(1 + 0j)},
        TypeError,
        "flat['step'] is a tensor of torch.complex64. Expected a real tensor: convert it first.",
    ),
    "flag_step": (
        {**FLAT, "step": torch.tensor(True)},
        TypeError,
        "flat['step'] is a tensor of torch.bool. Expected a real tensor: convert it first.",
    ),
}


@pytest.mark.parametrize(("flat", "error", "message"), SENTENCES.values(), ids=SENTENCES)
def test_a_fault_of_a_flat_dict_is_said_in_a_sentence(
    flat: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        state_from_dict(flat, {"w": torch.ones(2)}, AdamHparams())


def test_a_real_moment_of_a_complex_parameter_is_named() -> None:
    expected = r"exp_avg\['w'\]\\*\"\] is a tensor of torch.float32 .* a dense complex one as params\['w'\] is\.$"
    with pytest.raises(TypeError, match=expected):
        state_from_dict(FLAT, {"w": torch.ones(2, dtype=torch.complex64)}, AdamHparams())


@pytest.mark.parametrize(("count", "more"), [(1, ""), (4, ""), (5, " and 1 more"), (7, " and 3 more")])
def test_the_first_few_keys_that_a_flat_dict_lacks_and_adds_are_listed(count: int, more: str) -> None:
    params, hparams = [torch.ones(2)] * count, AdamHparams()
    flat = state_to_dict(adam_init(params, hparams))
    renamed = {key.replace("exp_avg[", "mean["): x for key, x in flat.items()}
    lacked, added = (", ".join(f"'{name}[{i}]'" for i in range(min(count, 4))) for name in ("exp_avg", "mean"))
    expected = (
        f"flat lacks {lacked}{more} and has the extra {added}{more}. "
        "Give the params that the state was made with, and hparams with its amsgrad."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        state_from_dict(renamed, params, hparams)


def test_a_stack_of_one_member_comes_back() -> None:
    params, hparams = {"w": leaf(0, (1, 2))}, AdamHparams()
    states = vmap(lambda p: adam_init(p, hparams))(params)
    found = state_from_dict(state_to_dict(states), params, hparams)
    assert_equal(found, states)
    assert found.step.shape == (1,)


def test_leaves_may_be_stacked_apart() -> None:
    params, hparams = {"w": leaf(0, (3, 2)), "b": leaf(1, ())}, AdamHparams()
    state = random_state(params, hparams, 2, per_leaf_step=True)
    state = state._replace(step={"w": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor(4.0)})
    assert_equal(state_from_dict(state_to_dict(state), params, hparams), state)


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


def test_amsgrad_must_be_what_it_was() -> None:
    with pytest.raises(ValueError, match=r"^flat lacks \"max_exp_avg_sq\['w'\]\".* with its amsgrad"):
        state_from_dict(FLAT, {"w": torch.ones(2)}, AdamHparams(amsgrad=True))


def test_what_is_no_state_is_not_written() -> None:
    with pytest.raises(TypeError, match=r"^state is of type dict, expected an AdamState"):
        state_to_dict({"step": torch.ones(())})  # type: ignore[arg-type]
    params, hparams = torch.ones(2), AdamHparams()
    donated = adam_init(params, hparams)
    adam_update(params, torch.ones(2), donated, hparams, donate=True)
    with pytest.raises(RuntimeError, match=r"^state.step is empty: this state was donated"):
        state_to_dict(donated)
    with pytest.raises(RuntimeError, match=r"^state.step is empty"):
        to_torch_state_dict(params, donated, hparams)
