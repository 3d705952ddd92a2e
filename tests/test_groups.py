"""Numbers per subtree or leaf: as the param groups of `torch.optim`, one kernel call a set, under every transform."""

import dataclasses
import itertools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch._dynamo.config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from functional_adam import (
    AdamHparams,
    AdamState,
    adam_init,
    adam_update,
    explain,
    from_torch_state_dict,
    to_torch_state_dict,
)
from tests.builders import assert_unchanged, snapshot, tensors_of
from tests.oracles import KERNELS, TORCH_FLAGS
from tests.strategies import PROPERTY, random_tensor, seeds, trees
from tests.test_cuda_path import Recorder
from tests.tolerances import assert_close, assert_equal


class Block(NamedTuple):
    weight: Any
    bias: Any


NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
DEFAULTS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
CASES: dict[str, dict[str, Any]] = {  # prefixes of `make_tree`
    "lr_by_part": {"lr": {"head": 0.1, "layers": 0.01, "norm": 0.0}},
    "mask": {"weight_decay": {"head": {"b": 0, "w": 1}, "layers": [Block(0.1, 0.0)] * 2, "norm": 0.0}},
    "all": {
        "lr": {"head": {"b": 0.1, "w": 0.2}, "layers": 0.3, "norm": 0.4},
        "beta1": {"head": 0.9, "layers": [0.5, 0.9], "norm": 0.9},
        "beta2": {"head": 0.99, "layers": [Block(0.9, 0.5), 0.9], "norm": 0.0},
        "eps": {"head": 1e-8, "layers": 1e-3, "norm": 1e-8},
        "weight_decay": {"head": {"b": 0.0, "w": 0.1}, "layers": [Block(0.2, 0.0), 0.3], "norm": 0.0},
    },
    "tensors": {
        "lr": {"head": torch.tensor(0.1), "layers": [0.3, torch.tensor(0.2, dtype=torch.float64)], "norm": 1},
        "beta1": {"head": 0.9, "layers": torch.tensor(0.8), "norm": 0.0},
        "beta2": torch.tensor(0.99, dtype=torch.float64),
        "eps": {"head": {"b": 1e-8, "w": torch.tensor(1e-3)}, "layers": 1e-8, "norm": 1e-8},
        "weight_decay": {"head": torch.tensor(0.1), "layers": [0, torch.tensor(0.3)], "norm": 0.2},
    },
}
FLAGS: dict[str, dict[str, bool]] = {
    "adam": {},
    "decoupled": {"decoupled_weight_decay": True},
    "all_flags": {"amsgrad": True, "maximize": True, "decoupled_weight_decay": True},
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def make_tree(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    shapes = {"head": {"b": (), "w": (5, 2)}, "layers": [Block((3, 4), (4,)), Block((4, 5), (5,))], "norm": (17,)}
    leaves, treespec = optree.tree_flatten(shapes, is_leaf=lambda x: type(x) is tuple)
    return treespec.unflatten(random_tensor(shape, dtype, 10 * seed + i) for i, shape in enumerate(leaves))


def make_hparams(numbers: dict[str, Any], **flags: bool) -> AdamHparams:
    lr, beta1, beta2, eps, weight_decay = (numbers.get(name, DEFAULTS[name]) for name in NUMBERS)
    return AdamHparams(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, **flags)


def rows_of(numbers: dict[str, Any], params: Any) -> list[tuple[Any, ...]]:
    """lr, beta1, beta2, eps and weight_decay of each leaf."""
    columns = (optree.broadcast_prefix(numbers.get(name, DEFAULTS[name]), params) for name in NUMBERS)
    return [*zip(*columns, strict=True)]


def torch_groups(
    params: Any, gradients: list[Any], numbers: dict[str, Any], flags: dict[str, bool], kernel: str
) -> tuple[Any, ...]:
    """Parameters, moments and steps of `torch.optim` with one group per distinct set of numbers, as lists."""
    leaves = [p.clone().requires_grad_() for p in optree.tree_leaves(params)]
    groups: dict[tuple[float, ...], list[Tensor]] = {}
    for leaf, row in zip(leaves, rows_of(numbers, params), strict=True):
        groups.setdefault(tuple(float(x) for x in row), []).append(leaf)
    optimizer = torch.optim.Adam(
        [
            {"params": group, "lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
            for (lr, beta1, beta2, eps, weight_decay), group in groups.items()
        ],
        **flags,
        **TORCH_FLAGS[kernel],
    )
    for grads in gradients:
        for leaf, gradient in zip(leaves, optree.tree_leaves(grads, none_is_leaf=True), strict=True):
            leaf.grad = None if gradient is None else gradient.clone()
        optimizer.step()
    absent = {"step": torch.tensor(0.0)}  # torch makes no state for a leaf that it never moved
    states = [optimizer.state[leaf] or {**absent, "exp_avg": torch.zeros_like(leaf)} for leaf in leaves]
    return [p.detach() for p in leaves], [s["exp_avg"] for s in states], [s["step"] for s in states]


def run(
    params: Any, gradients: list[Any], hparams: AdamHparams, *, per_leaf_step: bool = False, **how: Any
) -> tuple[Any, AdamState]:
    params = optree.tree_map(torch.clone, params)
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
    for grads in gradients:
        params, state = adam_update(params, grads, state, hparams, **how)
    return params, state


def check_against_torch(got: tuple[Any, AdamState], expected: tuple[Any, ...]) -> None:
    params, state = got
    leaves = optree.tree_leaves(params)
    steps = [state.step] * len(leaves) if isinstance(state.step, Tensor) else optree.tree_leaves(state.step)
    assert_equal((leaves, optree.tree_leaves(state.exp_avg), steps), expected)


# The numbers of torch.


@each_kernel
@pytest.mark.parametrize("case", CASES)
def test_prefixes_have_the_bits_of_param_groups(kernel: str, case: str) -> None:
    params, gradients = make_tree(), [make_tree(seed=seed) for seed in (1, 2, 3)]
    for flags in FLAGS.values():
        expected = torch_groups(params, gradients, CASES[case], flags, kernel)
        for donate in (False, True):
            got = run(params, gradients, make_hparams(CASES[case], **flags), kernel=kernel, donate=donate)
            check_against_torch(got, expected)


@each_kernel
@pytest.mark.parametrize(("case", "dtype"), [("all", torch.float32), ("tensors", torch.bfloat16)])
def test_leaves_without_gradient_stand_still_as_in_torch(kernel: str, case: str, dtype: torch.dtype) -> None:
    params, gradients = make_tree(dtype), [make_tree(dtype, seed) for seed in (1, 2, 3, 4)]
    for t, grads in enumerate(gradients):
        grads["norm"] = None  # frozen from the start
        grads["head"]["w"] = grads["head"]["w"] if t == 1 else None
        grads["layers"][0] = Block(None, None) if t > 1 else grads["layers"][0]
    expected = torch_groups(params, gradients, CASES[case], {}, kernel)
    for donate in (False, True):
        hparams = make_hparams(CASES[case])
        new, state = run(params, gradients, hparams, per_leaf_step=True, kernel=kernel, donate=donate)
        check_against_torch((new, state), expected)
        assert_equal(new["norm"], params["norm"])
        assert [state.step["norm"], state.step["head"]["w"], state.step["layers"][0].bias] == [0, 1, 2]


@each_kernel
def test_a_skipped_or_scaled_update_with_prefixes_is_that_of_each_part_and_changes_no_input(kernel: str) -> None:
    params, grads, hparams = make_tree(), make_tree(seed=1), make_hparams(CASES["tensors"])
    state, scaled = adam_init(params, hparams), optree.tree_map(lambda g: g * 8, grads)
    tensors = tensors_of((params, grads, state, hparams, scaled))
    before = snapshot(tensors)
    skipped = adam_update(params, grads, state, hparams, kernel=kernel, found_inf=torch.tensor(True))
    assert_equal(skipped, (params, state))
    got = adam_update(params, scaled, state, hparams, kernel=kernel, grad_scale=torch.tensor(8.0))
    assert_equal(got, adam_update(params, grads, state, hparams, kernel=kernel))
    assert_unchanged(tensors, before)


# One call a set.


def fused_calls(function: Callable[..., Any], *args: Any, **how: Any) -> list[int]:
    """How many leaves each call of a fused kernel gets, in ascending order."""
    with Recorder() as recorder:
        function(*args, **how)
    return sorted(len(args[0]) for _, args, _, _ in recorder.named("_fused_adam_", "_fused_adamw_"))


CALLS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "lr_by_part": (CASES["lr_by_part"], [1, 2, 4]),
    "mask": (CASES["mask"], [1, 2, 4]),  # 1 for head.w, 0.1 for two weights, 0 for the other four
    "tensors": (CASES["tensors"], [1, 1, 1, 2, 2]),
    "equal_numbers": ({"lr": optree.tree_map(lambda _: 0.1, make_tree())}, [7]),
    "equal_tensors": ({"lr": optree.tree_map(lambda _: torch.tensor(0.1), make_tree())}, [7]),
}


@pytest.mark.parametrize(("numbers", "counts"), CALLS.values(), ids=CALLS)
def test_the_kernel_is_called_once_per_distinct_set(numbers: dict[str, Any], counts: list[int]) -> None:
    for flags, donate in itertools.product(FLAGS.values(), (False, True)):
        call = (make_tree(), [make_tree(seed=1)], make_hparams(numbers, **flags))
        assert fused_calls(run, *call, donate=donate) == counts


def test_the_kernel_is_called_once_per_distinct_set_under_a_transform() -> None:
    hparams, params, grads = make_hparams(CASES["mask"]), make_tree(), make_tree(seed=1)
    assert fused_calls(grad(lambda p: ours(p, [grads], hparams)), params) == CALLS["mask"][1]
    stacked = optree.tree_map(lambda x: torch.stack([x, x]), (params, grads))
    assert fused_calls(vmap(lambda p, g: run(p, [g], hparams)), *stacked) == CALLS["mask"][1]


@pytest.mark.parametrize("function", [adam_update, explain])
@pytest.mark.parametrize("kind", ["own", "shared", "number"])
def test_work_is_in_proportion_to_the_leaves(function: Callable[..., Any], kind: str) -> None:
    def count_instructions(size: int) -> int:
        params, one = {str(i): torch.ones(2) for i in range(size)}, torch.tensor(0.1)
        hparams = AdamHparams(lr={k: {"own": torch.tensor(0.1), "shared": one, "number": 0.1}[kind] for k in params})
        state = adam_init(params, hparams)
        count = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            count += event == "opcode"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            function(params, params, state, hparams)
        finally:
            sys.settrace(before)
        return count

    works = [count_instructions(size) for size in (20, 20, 40, 80)]  # what is only done once is done in the first
    assert works[3] - works[2] < 2.05 * (works[2] - works[1])


# Derivatives, mapping, compiling.


def weighted_sum(leaves: list[Tensor]) -> Tensor:
    weights = (torch.linspace(1, 2, p.numel(), dtype=p.dtype).reshape(p.shape) for p in leaves)
    return sum((index + 1) * (p * weight).sum() for index, (p, weight) in enumerate(zip(leaves, weights, strict=True)))


def reference(params: Any, gradients: list[Any], hparams: AdamHparams) -> Tensor:
    """A weighted sum of the parameters after an update by each of `gradients`, by the equations in float64."""
    numbers = (hparams.lr, *hparams.betas, hparams.eps, hparams.weight_decay)
    rows = zip(*(optree.broadcast_prefix(number, params) for number in numbers), strict=True)
    new: list[Tensor] = []
    columns = zip(optree.tree_leaves(params), rows, *(optree.tree_leaves(g) for g in gradients), strict=True)
    for p, (lr, beta1, beta2, eps, weight_decay), *grads in columns:
        m = v = torch.zeros_like(p)
        for t, g in enumerate(grads, start=1):
            if hparams.decoupled_weight_decay:
                p = p - lr * weight_decay * p
            else:
                g = g + weight_decay * p
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            p = p - lr * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
        new.append(p)
    return weighted_sum(new)


def ours(params: Any, gradients: list[Any], hparams: AdamHparams, **how: Any) -> Tensor:
    return weighted_sum(optree.tree_leaves(run(params, gradients, hparams, **how)[0]))


@each_kernel
@pytest.mark.parametrize("decoupled_weight_decay", [False, True], ids=["coupled", "decoupled"])
def test_derivatives_by_every_number_of_the_trees_agree_with_the_equations(
    kernel: str, decoupled_weight_decay: bool
) -> None:
    params, gradients = make_tree(torch.float64), [make_tree(torch.float64, seed) for seed in (1, 2)]
    # All numbers as tensors; eps is raised so that second derivatives are of moderate size.
    numbers = {**CASES["all"], "eps": {"head": 0.1, "layers": [0.2, 0.3], "norm": 0.4}}
    hparams = make_hparams(numbers, decoupled_weight_decay=decoupled_weight_decay)
    hparams = optree.tree_map(lambda x: torch.tensor(float(x), dtype=torch.float64), hparams)
    by_kernel, by_equations = partial(ours, params, gradients, kernel=kernel), partial(reference, params, gradients)

    got, expected = grad(by_kernel)(hparams), grad(by_equations)(hparams)
    assert optree.tree_structure(got) == optree.tree_structure(hparams)
    assert_close(got, expected)
    assert all(x.abs() > 0 for x in optree.tree_leaves(got.lr))
    tangents = optree.tree_map(lambda x: x + 0.1, hparams)
    forward = jvp(by_kernel, (hparams,), (tangents,))
    assert_close(forward, jvp(by_equations, (hparams,), (tangents,)))
    assert forward[1].abs() > 0
    leaves = optree.tree_map(lambda x: x.clone().requires_grad_(), hparams)
    by_kernel(leaves).backward()
    assert_close(optree.tree_map(lambda x: x.grad, leaves), expected)
    # Of members, with numbers of their own.
    members = [optree.tree_map(lambda x, i=i: x / i, hparams) for i in (1, 2, 3)]
    mapped = vmap(grad(by_kernel))(optree.tree_map(lambda *xs: torch.stack(xs), *members))
    assert_close(mapped, optree.tree_map(lambda *xs: torch.stack(xs), *map(grad(by_equations), members)))
    # Numbers beside the tensors that are differentiated by.
    beside = {"betas": (0.9, 0.999), "eps": 0.1, "weight_decay": {"head": 0.1, "layers": 0, "norm": 0.3}}
    mixed = dataclasses.replace(hparams, **beside)
    second, expected_second = (
        hessian(lambda lr, by=by: by(dataclasses.replace(mixed, lr=lr)))(mixed.lr) for by in (by_kernel, by_equations)
    )
    assert_close(second, expected_second)
    assert second["norm"]["norm"].abs() > 0


@each_kernel
def test_mapping_over_trees_of_stacked_numbers_equals_a_loop(kernel: str) -> None:
    params, grads = make_tree(torch.float64), make_tree(torch.float64, 1)
    values = torch.linspace(0.1, 0.5, 3, dtype=torch.float64)
    members = {name: {"head": {"b": values, "w": values / 2}, "layers": values / 3} for name in NUMBERS}

    def update(numbers: Any) -> Any:
        hparams = make_hparams({name: {**tree, "norm": 0.25} for name, tree in numbers.items()})
        return run(params, [grads], hparams, kernel=kernel)

    alone = [update(optree.tree_map(lambda x, i=i: x[i], members)) for i in range(3)]
    assert_close(vmap(update)(members), optree.tree_map(lambda *xs: torch.stack(xs), *alone))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_update_finds_numbers_by_key_and_compiles_once_for_all_tensors() -> None:
    # Numbers in an order of keys, and in a kind of dict, that are those of the parameters or others.
    decays = {"a": {"weight": 0.5, "bias": 0.0}, "b": OrderedDict(weight=0.25, bias=0.5)}
    decays |= {"c": OrderedDict(bias=0.5, weight=0.0), "d": OrderedDict({3: 0.5, "weight": 0.25})}
    names = ("weight", "bias")
    keys = {"a": OrderedDict.fromkeys(names), "b": dict.fromkeys(names)}
    keys |= {"c": OrderedDict.fromkeys(names), "d": dict.fromkeys(("weight", 3))}
    params = optree.tree_map(lambda _: torch.ones(2), keys, none_is_leaf=True)
    grads = optree.tree_map(torch.zeros_like, params)
    grads["d"][3] = None
    given = AdamHparams(weight_decay=decays, decoupled_weight_decay=True)
    state = adam_init(params, given, per_leaf_step=True)

    @torch.compile(fullgraph=True, backend="eager")
    def update(params: Any, rates: Any) -> Any:
        return adam_update(params, grads, state, dataclasses.replace(given, lr=rates))

    for half in (0.5, 0.25):
        rates = {"a": 0.5, "b": {"weight": torch.tensor(half), "bias": 0.5}, "c": torch.tensor(half), "d": 0.5}
        with torch._dynamo.config.patch(error_on_recompile=True):
            new, new_state = update(params, rates)
        found = optree.tree_map(lambda x: x[0].item(), new)
        assert found["a"] == {"weight": 0.75, "bias": 1.0}
        assert found["b"] == {"weight": 1 - half / 4, "bias": 0.75}
        assert found["c"] == {"weight": 1.0, "bias": 1 - half / 2}
        assert found["d"] == {"weight": 0.875, 3: 1.0}
        assert [new_state.step["d"][key].item() for key in ("weight", 3)] == [1.0, 0.0]


# Errors.

PLACES = {name: {"beta1": r"betas\[0\]", "beta2": r"betas\[1\]"}.get(name, name) for name in NUMBERS}
# What differs from a tree of a number a part, and what the error says behind hparams.lr.
WRONG_PREFIXES: list[tuple[dict[str, Any], str]] = [
    ({"tail": 0.1}, r" has the extra \['tail'\], but params has .* prefix of params"),
    ({"head": {"b": 0.1, "v": 0.1}}, r"\['head'\] .* prefix"),
    ({"layers": [0.1]}, r"\['layers'\] has length 1, but params\['layers'\] has length 2"),
    ({"layers": [0.1, Block(0.1, None)]}, r"(\['layers'\]\[1\].bias) is None, but params\1 is of type Tensor\."),
    ({"head": None}, r"\['head'\] is None, but params\['head'\] is of type dict\."),
    ({"layers": (0.1, 0.1)}, r"\['layers'\] is of type tuple"),
    ({"layers": [(0.1, 0.1), 0.1]}, r"\['layers'\]\[0\] is of type tuple"),
    ({"norm": {"w": 0.1}}, r"\['norm'\] is of type dict"),
    ({"head": torch.ones(1)}, r"\['head'\] has shape \(1,\)\. Expected"),
]


@pytest.mark.parametrize(("changed", "match"), WRONG_PREFIXES, ids=[match for _, match in WRONG_PREFIXES])
def test_a_prefix_that_does_not_fit_names_the_path(changed: dict[str, Any], match: str) -> None:
    params = make_tree()
    hparams = AdamHparams(lr={"head": 0.1, "layers": 0.1, "norm": 0.1, **changed})
    with pytest.raises(ValueError, match=rf"^hparams\.lr{match}"):
        adam_update(params, make_tree(seed=1), adam_init(params, AdamHparams()), hparams)


@pytest.mark.parametrize("name", NUMBERS)
def test_what_does_not_fit_or_is_no_number_names_the_number_and_changes_nothing(name: str) -> None:
    params = make_tree()
    state = adam_init(params, AdamHparams())
    before = snapshot((params, state))
    hparams = make_hparams({name: {"head": 0.1, "layers": 0.1}})
    match = rf"^hparams\.{PLACES[name]} lacks \['norm'\], but params has .* a number or a pytree prefix of params"
    with pytest.raises(ValueError, match=match):
        adam_update(params, make_tree(seed=1), state, hparams, donate=True)
    assert_unchanged((params, state), before)
    path = rf"hparams\.{PLACES[name]}\['head'\]\[1\]"
    for value in ("0.1", True, torch.tensor(1j)):
        with pytest.raises(TypeError, match=f"{path} is .*Expected a"):
            make_hparams({name: {"head": [0.1, value], "layers": 0.1}})
    for value in (-1.0, float("nan"), torch.tensor(-1.0)):
        with pytest.raises(ValueError, match=rf"Invalid .*{path}.*Expected a number"):
            make_hparams({name: {"head": [0.1, value], "layers": 0.1}})


# Any tree, any prefix.


def mappings(items: dict[Any, Any]) -> st.SearchStrategy[Any]:
    """`items` in every kind of dict and every order of insertion, nested ones too."""
    nested = {key: mappings(value) if isinstance(value, dict) else st.just(value) for key, value in items.items()}
    kinds = st.sampled_from([dict, OrderedDict, lambda pairs: defaultdict(list, pairs)])
    values, orders = st.fixed_dictionaries(nested), st.permutations([*items])
    return st.builds(lambda make, found, keys: make([(key, found[key]) for key in keys]), kinds, values, orders)


@PROPERTY
@given(st.data())
def test_numbers_gradients_and_states_reach_their_leaves_by_key_in_every_kind_of_dict(data: st.DataObject) -> None:
    first, second, third, fourth = data.draw(
        st.sampled_from([("weight", "bias", "10", "9"), ("weight", 3, ("a", 1), 1)])
    )

    def tree(leaf: Callable[[int], Any], part: Callable[[int], Any]) -> Any:
        return data.draw(mappings({first: leaf(0), second: {third: leaf(1), fourth: leaf(2)}, third: part(3)}))

    def flat(found: Any) -> list[Any]:
        return [found[first], found[second][third], found[second][fourth], found[third]]

    def of_seed(seed: int) -> Any:
        return tree(*[lambda i: random_tensor((3,), torch.float32, 10 * seed + i)] * 2)

    rates, decays = [0.1, 0.2, 0.3, 0.4], [0.5, 0.0, 0.25, 0.125]
    hparams = AdamHparams(lr=tree(*[rates.__getitem__] * 2), weight_decay=tree(*[decays.__getitem__] * 2))
    params, grads, per_leaf_step = of_seed(0), of_seed(1), data.draw(st.booleans())
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
    if per_leaf_step:
        state = state._replace(step=tree(*[lambda i: torch.tensor(float(i))] * 2))
    state = state._replace(exp_avg=of_seed(2), exp_avg_sq=optree.tree_map(torch.square, of_seed(3)))
    new, new_state = adam_update(params, grads, state, hparams)

    rows = zip(*map(flat, (params, grads, *state[1:3])), rates, decays, strict=True)
    for i, (param, gradient, exp_avg, exp_avg_sq, lr, decay) in enumerate(rows):
        step = flat(state.step)[i] if per_leaf_step else state.step
        alone = AdamHparams(lr=lr, weight_decay=decay)
        expected = adam_update(param, gradient, AdamState(step, exp_avg, exp_avg_sq), alone)
        assert_equal([flat(tree)[i] for tree in (new, *new_state[1:3])], [expected[0], *expected[1][1:3]])

    paths = [f"params[{first!r}]", *(f"params[{second!r}][{key!r}]" for key in (third, fourth)), f"params[{third!r}]"]
    groups = explain(params, grads, state, hparams).groups
    assert {group.leaves[0]: group.hparams.lr for group in groups} == dict(zip(paths, rates, strict=True))
    state_dict = to_torch_state_dict(params, state, hparams)
    for group in state_dict["param_groups"]:
        (index,) = group["params"]
        assert_equal(state_dict["state"][index]["exp_avg"], flat(state.exp_avg)[rates.index(group["lr"])])
    found, found_hparams = from_torch_state_dict(params, state_dict)
    assert flat(found_hparams.lr) == rates
    assert_equal(flat(found.exp_avg), flat(state.exp_avg))


@pytest.mark.parametrize("at_none", [None, 0.5], ids=["none", "number"])
def test_numbers_may_have_none_or_a_number_where_params_have_none(at_none: Any) -> None:
    params = {"w": torch.ones(2), "bias": None, "layers": [Block(torch.ones(3), None)]}
    lr = {"w": 0.1, "bias": at_none, "layers": [Block(0.2, at_none)]}
    new, _ = run(params, [params], AdamHparams(lr=lr))
    expected, _ = run([torch.ones(2), torch.ones(3)], [[torch.ones(2), torch.ones(3)]], AdamHparams(lr=[0.1, 0.2]))
    assert_close([new["w"], new["layers"][0].weight], expected)
    assert new["bias"] is None
    state_dict = to_torch_state_dict(params, adam_init(params, AdamHparams()), AdamHparams(lr=lr))
    found, found_hparams = from_torch_state_dict(params, state_dict)
    assert found_hparams.lr == {"w": 0.1, "bias": None, "layers": [Block(0.2, None)]}
    assert_equal(adam_update(params, params, found, found_hparams)[0], new)


@st.composite
def prefixes(draw: st.DrawFn, tree: Any, numbers: st.SearchStrategy[Any]) -> Any:
    """A tree of `numbers` that is a prefix of `tree`."""
    if tree is None:
        return draw(st.none() | numbers)
    if optree.tree_is_leaf(tree) or draw(st.booleans()):
        return draw(numbers)
    node = optree.tree_flatten_one_level(tree)
    return node.unflatten_func(node.metadata, [draw(prefixes(child, numbers)) for child in node.children])


def some(*values: float) -> st.SearchStrategy[Any]:
    return st.sampled_from([*values, *(torch.tensor(x) for x in values), torch.tensor(values[0], dtype=torch.float64)])


@PROPERTY
@given(st.data())
def test_any_prefix_of_any_tree_equals_a_loop_over_leaves(data: st.DataObject) -> None:
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
    shapes = st.sampled_from([(), (3,), (2, 5), (0,)])
    params = data.draw(trees(st.builds(random_tensor, shapes, dtypes, seeds)))
    values = {"lr": (0.1, 0.01, 0), "beta1": (0.9, 0.0), "beta2": (0.999, 0.5), "eps": (1e-8, 0.1)}
    values["weight_decay"] = (0.0, 0.1)
    numbers = {
        name: data.draw(prefixes(params, some(*x)).filter(lambda found: found is not None))
        for name, x in values.items()
    }
    flags = data.draw(st.sampled_from([*FLAGS.values()]))
    kernel = data.draw(st.sampled_from(KERNELS))
    hparams = make_hparams(numbers, **flags)
    leaves, treespec = optree.tree_flatten(params)
    gradients = [[random_tensor(p.shape, p.dtype, seed) for p in leaves] for seed in (1, 2)]
    new, state = run(params, [treespec.unflatten(g) for g in gradients], hparams, kernel=kernel)
    alone = [
        run(leaf, [*grads], make_hparams(dict(zip(NUMBERS, row, strict=True)), **flags), kernel=kernel)
        for leaf, row, *grads in zip(leaves, rows_of(numbers, params), *gradients, strict=True)
    ]
    assert_equal(optree.tree_leaves(new), [p for p, _ in alone])
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        got = optree.tree_leaves(getattr(state, name))
        assert_equal(got, [x for _, s in alone for x in optree.tree_leaves(getattr(s, name))])
