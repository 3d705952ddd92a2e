"""Nodes that torch's pytree knows and optree does not: TensorDicts, and classes that a program registers with torch."""

import dataclasses
import importlib
import itertools
import re
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.func import grad, vmap

from functional_adam import (
    AdamHparams,
    AdamState,
    adam_init,
    adam_update,
    explain,
    from_torch_state_dict,
    state_from_dict,
    state_to_dict,
    to_torch_state_dict,
    transformation,
)
from tests.builders import tensors_of
from tests.interruptions import Interruption, interrupt
from tests.oracles import KERNELS
from tests.strategies import random_tensor
from tests.tensordicts import replace, tensordict
from tests.test_threads import together
from tests.tolerances import assert_close, assert_equal

# The module that learns nodes: what comes between cannot be placed, and what another call has learned cannot be
# forgotten, from outside.
TREES: Any = importlib.import_module("functional_adam.tensors.trees")
OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01, "amsgrad": True}
LazyStackedTensorDict, TensorDict = tensordict.LazyStackedTensorDict, tensordict.TensorDict


@pytest.fixture(autouse=True)
def _in_a_program_that_imports_tensordict(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch)


@tensordict.tensorclass
class Layer:
    weight: Tensor
    bias: Tensor


@dataclasses.dataclass
class Block:
    weight: Any
    bias: Any
    layers: Any = None


torch_pytree.register_dataclass(Block)


class Bag:
    """A node without keys."""

    def __init__(self, size: int, *items: Any) -> None:
        self.size, self.items = size, items


torch_pytree.register_pytree_node(
    Bag, lambda bag: ([*bag.items], bag.size), lambda items, size: Bag(size, *items), serialized_type_name="Bag"
)


def leaf(seed: int) -> Tensor:
    return random_tensor((2, 3), torch.float32, seed)


# Each made of four leaves, with their paths.
IN_A_DICT = ("['w']", "['b']", "['in']['x']", "['in']['y']")
MAKERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "TensorDict": (lambda w, b, x, y: TensorDict({"w": w, "b": b, "in": {"x": x, "y": y}}, []), IN_A_DICT),
    "batched": (lambda w, b, x, y: TensorDict({"w": w, "b": b, "in": {"x": x, "y": y}}, [2]), IN_A_DICT),
    "within_a_dict": (
        lambda w, b, x, y: {"z": TensorDict({"w": w, "b": b}, []), "a": [x, TensorDict({"y": y}, [])]},
        ("['z']['w']", "['z']['b']", "['a'][0]", "['a'][1]['y']"),
    ),
    "lazy_stack": (
        lambda w, b, x, y: LazyStackedTensorDict(TensorDict({"w": w, "b": b}), TensorDict({"w": x, "b": y})),
        ("[0]['w']", "[0]['b']", "[1]['w']", "[1]['b']"),
    ),
    "tensorclass": (
        lambda w, b, x, y: [Layer(w, b, batch_size=[]), Layer(x, y, batch_size=[])],
        ("[0]['weight']", "[0]['bias']", "[1]['weight']", "[1]['bias']"),
    ),
    "dataclass": (
        lambda w, b, x, y: Block(w, b, [Block(x, None), TensorDict({"y": y}, [])]),
        (".weight", ".bias", ".layers[0].weight", ".layers[1]['y']"),
    ),
    "without_keys": (
        lambda w, b, x, y: Bag(3, w, b, Bag(2, x, y)),
        tuple(f"[<flat index {i}>]" for i in ("0", "1", "2>][<flat index 0", "2>][<flat index 1")),
    ),
}
every_node = pytest.mark.parametrize(("make", "paths"), MAKERS.values(), ids=MAKERS)


def tree_of(make: Callable[..., Any], seed: int) -> Any:
    return make(*(leaf(seed + i) for i in range(4)))


@every_node
def test_an_update_is_that_of_a_list_of_the_leaves(make: Callable[..., Any], paths: tuple[str, ...]) -> None:
    hparams, structure = AdamHparams(**OPTIONS), torch_pytree.tree_structure(tree_of(make, 0))
    for kernel, per_leaf_step, donate in itertools.product(KERNELS, (False, True), (False, True)):
        params, flat = tree_of(make, 0), [leaf(i) for i in range(4)]
        state, flat_state = (adam_init(x, hparams, per_leaf_step=per_leaf_step) for x in (params, flat))
        addresses = [x.data_ptr() for x in tensors_of(params)]
        for seed in (10, 20):
            grads = [leaf(seed + i) for i in range(4)]
            params, state = adam_update(params, make(*grads), state, hparams, kernel=kernel, donate=donate)
            flat, flat_state = adam_update(flat, grads, flat_state, hparams, kernel=kernel)
        assert torch_pytree.tree_structure(params) == torch_pytree.tree_structure(state.exp_avg) == structure
        for tree, expected in zip((params, *state[1:4]), (flat, *flat_state[1:4]), strict=True):
            assert_equal(tensors_of(tree), expected)
        assert ([x.data_ptr() for x in tensors_of(params)] == addresses) == donate
    assert {*explain(params, params, state, hparams).groups[0].leaves} == {f"params{path}" for path in paths}
    for index, path in enumerate(paths):
        grads = make(*(torch.ones(2, 3, dtype=torch.int32 if i == index else torch.float32) for i in range(4)))
        with pytest.raises(TypeError, match=rf"^grads{re.escape(path)} is of torch.int32\."):
            adam_update(params, grads, state, hparams)


@every_node
def test_states_go_to_files_and_to_torch_and_back(make: Callable[..., Any], paths: tuple[str, ...]) -> None:
    hparams, params = AdamHparams(**OPTIONS), tree_of(make, 0)
    for per_leaf_step in (False, True):
        state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
        _, state = adam_update(params, tree_of(make, 10), state, hparams)
        flat = state_to_dict(state)
        assert {key for key in flat if re.match(r"exp_avg\b", key)} == {f"exp_avg{path}" for path in paths}
        found = state_from_dict(flat, params, hparams)
        assert type(found.exp_avg) is type(params)
        assert_equal([tensors_of(tree) for tree in found], [tensors_of(tree) for tree in state])
        state_dict = to_torch_state_dict(params, state, hparams)
        assert_equal([state_dict["state"][i]["exp_avg"] for i in range(4)], tensors_of(state.exp_avg))
        found, found_hparams = from_torch_state_dict(params, state_dict)
        assert found_hparams == hparams
        assert_equal([tensors_of(tree) for tree in found[1:]], [tensors_of(tree) for tree in state[1:]])


def alone(param: Tensor, grad: Tensor, **numbers: Any) -> Tensor:
    """A parameter after its first update."""
    hparams = AdamHparams(**numbers)
    return adam_update(param, grad, adam_init(param, hparams), hparams)[0]


@every_node
def test_numbers_that_differ_come_from_torch_as_a_tree_of_plain_nodes(
    make: Callable[..., Any], paths: tuple[str, ...]
) -> None:
    params, rates = tree_of(make, 0), [0.1, 0.2, 0.1, 0.4]
    groups = [{"params": [torch.nn.Parameter(x)], "lr": lr} for x, lr in zip(tensors_of(params), rates, strict=True)]
    state, hparams = from_torch_state_dict(params, torch.optim.Adam(groups).state_dict())
    new, _ = adam_update(params, tree_of(make, 10), state, hparams)
    assert len(paths) == len(rates)
    for i, x in enumerate(tensors_of(new)):
        assert_equal(x, alone(tensors_of(params)[i], leaf(10 + i), lr=rates[i]))


def test_a_dict_or_a_tree_alike_gives_the_numbers_of_a_tensordict() -> None:
    params, grads = (TensorDict({"w": leaf(i), "in": {"x": leaf(i + 1)}}, []) for i in (0, 10))
    first, second = (torch.tensor(x, dtype=torch.float64) for x in (0.1, 0.2))
    expected = [alone(leaf(0), leaf(10), lr=0.1), alone(leaf(1), leaf(11), lr=0.2)]
    for lr in ({"in": {"x": 0.2}, "w": 0.1}, {"w": 0.1, "in": 0.2}, TensorDict({"w": first, "in": {"x": second}})):
        hparams = AdamHparams(lr=lr)
        new, _ = adam_update(params, grads, adam_init(params, hparams), hparams)
        assert_close([new["w"], new["in", "x"]], expected)


def test_tensordicts_are_met_by_key_whatever_their_order_and_batch_size() -> None:
    hparams = AdamHparams(**OPTIONS)
    params, grads = TensorDict({"w": leaf(0), "b": leaf(1)}, []), TensorDict({"b": leaf(3), "w": leaf(2)}, [2])
    new, _ = adam_update(params, grads, adam_init(params, hparams), hparams)
    assert new.batch_size == torch.Size([])
    expected = {"w": alone(leaf(0), leaf(2), **OPTIONS), "b": alone(leaf(1), leaf(3), **OPTIONS)}
    assert_equal(dict(new.items()), expected)
    bag = Bag(2, leaf(0))
    for given, other, match in (
        (params, TensorDict({"w": leaf(2), "c": leaf(3)}, []), r"lacks \['b'\] .* extra \['c'\], .* has \['w', 'b'\]"),
        (params, Bag(2, leaf(0), leaf(1)), "is of type Bag, but params is of type TensorDict"),
        (bag, Bag(3, leaf(1)), "has 3 beside its children, but params has 2 beside its children"),
    ):
        with pytest.raises(ValueError, match=f"^grads {match}"):
            adam_update(given, other, adam_init(given, hparams), hparams)


def test_masters_of_some_leaves_stand_in_a_dict() -> None:
    params, hparams = TensorDict({"w": leaf(0).bfloat16(), "b": leaf(1)}, [2]), AdamHparams(**OPTIONS)
    state = adam_init(params, hparams, master_params=True)
    assert state.master_params["b"] == ()
    new, state = adam_update(params, params, state, hparams)
    assert_equal(new["w"], state.master_params["w"].bfloat16())
    found = state_from_dict(state_to_dict(state), params, hparams)
    assert_equal(found.master_params["w"], state.master_params["w"])


def test_the_gradient_of_a_network_is_a_tensordict() -> None:
    torch.manual_seed(0)
    network, inputs, hparams = torch.nn.Linear(3, 4), torch.randn(8, 3), AdamHparams(lr=0.1)
    params = TensorDict.from_module(network).detach().clone()

    def loss(p: Any) -> Tensor:
        with p.to_module(network):
            return network(inputs).square().mean()

    new, _ = adam_update(params, grad(loss)(params), adam_init(params, hparams), hparams)
    network(inputs).square().mean().backward()
    assert_equal(dict(new.items()), {name: alone(p.detach(), p.grad, lr=0.1) for name, p in network.named_parameters()})


# A lazy stack is no stack under vmap: torch's own tree_map returns it with another shape (tensordict 0.14).
def test_an_ensemble_from_modules_is_mapped() -> None:
    torch.manual_seed(0)
    networks = [torch.nn.Linear(3, 2) for _ in range(4)]
    params = tensordict.from_modules(*networks, as_module=False, lazy_stack=False).detach().clone()
    rates = torch.tensor([0.1, 0.2, 0.3, 0.4])
    state = vmap(lambda p: adam_init(p, AdamHparams()))(params)
    new, state = vmap(lambda p, s, lr: adam_update(p, p, s, AdamHparams(lr=lr)))(params, state, rates)
    for i, network in enumerate(networks):
        for name, p in network.named_parameters():
            assert_close(new[name][i], alone(p.detach(), p.detach(), lr=rates[i]))
    assert state.step.tolist() == [1.0] * 4


@pytest.mark.usefixtures("fresh_compiler")
def test_a_tensordict_is_compiled() -> None:
    hparams = AdamHparams(lr={"w": 0.1, "in": 0.2})
    params = TensorDict({"w": leaf(0), "in": {"x": leaf(1)}}, [])
    state = adam_init(params, hparams)
    compiled = torch.compile(lambda *trees: adam_update(*trees, hparams), fullgraph=True, backend="eager")
    for got, expected in zip(compiled(params, params, state), adam_update(params, params, state, hparams), strict=True):
        assert_close(tensors_of(got), tensors_of(expected))


@every_node
def test_transformations_take_them(make: Callable[..., Any], paths: tuple[str, ...]) -> None:
    optimizer = transformation.adam(0.1, weight_decay=0.1, per_leaf_step=True)
    expected = [alone(leaf(i), leaf(10 + i), lr=0.1, weight_decay=0.1) for i in range(4)]
    for inplace in (False, True):
        params = tree_of(make, 0)
        updates, state = optimizer.update(tree_of(make, 10), optimizer.init(params), params, inplace=inplace)
        new = transformation.apply_updates(params, updates, inplace=inplace)
        assert_close(tensors_of(new), expected)
        assert [float(step) for step in tensors_of(state.step)] == [1.0] * len(paths)


def fresh_node() -> Any:
    class Fresh:
        def __init__(self, *items: Any) -> None:
            self.items = items

    torch_pytree.register_pytree_node(Fresh, lambda x: ([*x.items], None), lambda items, _: Fresh(*items))
    return Fresh


def test_a_node_that_an_update_meets_first_is_learned_then() -> None:
    hparams = AdamHparams(lr={"a": 0.1})
    outer, inner = fresh_node(), fresh_node()

    def make(seed: int) -> Any:
        return {"a": outer(leaf(seed), [inner(leaf(seed + 1))])}

    moments = [torch_pytree.tree_map(torch.zeros_like, make(0)) for _ in range(2)]
    new, _ = adam_update(make(0), make(10), AdamState(torch.zeros(()), *moments), hparams)
    assert_equal(tensors_of(new), [alone(leaf(seed), leaf(10 + seed), lr=0.1) for seed in (0, 1)])


def test_numbers_of_a_node_that_nobody_met_are_learned() -> None:
    node = fresh_node()
    assert AdamHparams(lr=node(0.1, 0.2)).lr.items == (0.1, 0.2)
    with pytest.raises(TypeError, match=r"^hparams\.lr\[<flat index 1>\] is 'x'"):
        AdamHparams(lr=node(0.1, "x"))


def test_threads_learn_a_node_at_once() -> None:
    node = fresh_node()
    found = together([lambda: adam_init(node(torch.ones(2)), AdamHparams())] * 4)
    assert [len(state.exp_avg.items) for state in found] == [1] * 4


def init_a_nested_node() -> None:
    adam_init(fresh_node()(torch.ones(2)), AdamHparams())


def is_learning(code: CodeType) -> bool:
    return code.co_filename == TREES.__file__ and code.co_name.endswith(("learn", "_register"))


@pytest.mark.parametrize("action", [interrupt, init_a_nested_node])
def test_nodes_are_learned_whatever_comes_between(action: Callable[[], None]) -> None:
    counts: list[int] = []

    def try_each_place() -> None:
        is_over = True
        while is_over:
            node, interruption = fresh_node(), Interruption(len(counts), action, is_learning)
            trace = sys.gettrace()
            try:
                sys.settrace(interruption)
                adam_init(node(torch.ones(2)), AdamHparams())
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(trace)
            counts.append(len(adam_init(node(torch.ones(2)), AdamHparams()).exp_avg.items))
            is_over = interruption.is_over

    together([try_each_place])
    assert len(counts) > 30
    assert counts == [1] * len(counts)


def test_a_node_that_another_call_has_registered_meanwhile_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    params = fresh_node()(torch.ones(2))
    adam_init(params, AdamHparams())
    monkeypatch.setattr(TREES, "_learned", set())
    assert TREES.learn([params])
    assert {type(params)} == TREES._learned


def test_a_node_that_optree_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no such node")

    params = fresh_node()(torch.ones(2))
    monkeypatch.setattr(optree, "register_pytree_node", refuse)
    with pytest.raises(ValueError, match="no such node"):
        adam_init(params, AdamHparams())


def test_nothing_changes_for_others() -> None:
    before = {*optree.register_pytree_node.get()}
    params = TensorDict({"w": leaf(0)}, [])
    adam_init(params, AdamHparams())
    assert {*optree.register_pytree_node.get()} == before
    assert optree.tree_leaves(params)[0] is params
