"""AdamHparams and AdamState are data: frozen, checked where they are built, and pytrees rebuilt from anything."""

import copy
import dataclasses
import inspect
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from functional_adam import AdamHparams, AdamState, adam_init, adam_update

# torch scripts some formulas when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")

NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")


def build(**numbers: Any) -> AdamHparams:
    """AdamHparams with the betas as two arguments."""
    betas = (numbers.pop("beta1", 0.9), numbers.pop("beta2", 0.999))
    return AdamHparams(betas=betas, **numbers)


def leaves_of(hparams: AdamHparams) -> list[Any]:
    return [hparams.lr, *hparams.betas, hparams.eps, hparams.weight_decay]


def optree_flatten(tree: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    leaves, treespec = optree.tree_flatten(tree)
    return leaves, treespec.unflatten


def torch_flatten(tree: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    leaves, treespec = torch_pytree.tree_flatten(tree)
    return leaves, treespec.unflatten


each_number = pytest.mark.parametrize("name", NUMBERS)
each_flag = pytest.mark.parametrize("flag", FLAGS)
each_flatten = pytest.mark.parametrize("flatten", [optree_flatten, torch_flatten])


# A frozen dataclass with torch's names and defaults.


def test_names_and_defaults_are_those_of_torch() -> None:
    hparams = AdamHparams()
    theirs = inspect.signature(torch.optim.Adam).parameters
    for field in dataclasses.fields(hparams):
        assert getattr(hparams, field.name) == theirs[field.name].default
    assert [field.name for field in dataclasses.fields(hparams)] == ["lr", "betas", "eps", "weight_decay", *FLAGS]


def test_fields_cannot_be_assigned() -> None:
    hparams = AdamHparams()
    for name in ("lr", "betas", "amsgrad"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(hparams, name, getattr(hparams, name))
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'lr'"):
        del hparams.lr


def test_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        AdamHparams(0.1)  # type: ignore[misc]


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="momentum"):
        AdamHparams(momentum=0.9)  # type: ignore[call-arg]


def test_equal_numbers_make_equal_hparams() -> None:
    assert AdamHparams(lr=0.1) == AdamHparams(lr=0.1)
    assert AdamHparams(lr=0.1) != AdamHparams(lr=0.2)
    assert AdamHparams(amsgrad=True) != AdamHparams()
    assert hash(AdamHparams(lr=0.1)) == hash(AdamHparams(lr=0.1))


def test_betas_may_be_a_list() -> None:
    assert AdamHparams(betas=[0.8, 0.9]) == AdamHparams(betas=(0.8, 0.9))  # type: ignore[arg-type]


# A pytree node: numbers are leaves, flags are structure.


@each_flatten
def test_leaves_are_the_five_numbers_in_order(flatten: Callable[..., Any]) -> None:
    hparams = build(lr=0.1, beta1=0.2, beta2=0.3, eps=0.4, weight_decay=0.5, amsgrad=True)
    leaves, unflatten = flatten(hparams)
    assert leaves == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert unflatten(leaves) == hparams


@each_flag
def test_flags_are_structure(flag: str) -> None:
    plain, flagged = AdamHparams(), AdamHparams(**{flag: True})
    assert optree.tree_structure(plain) != optree.tree_structure(flagged)
    assert torch_pytree.tree_structure(plain) != torch_pytree.tree_structure(flagged)
    assert optree.tree_structure(flagged) == optree.tree_structure(AdamHparams(lr=7.0, **{flag: True}))
    assert torch_pytree.tree_structure(flagged) == torch_pytree.tree_structure(AdamHparams(lr=7.0, **{flag: True}))


def test_it_is_a_node_without_naming_a_namespace() -> None:
    assert not optree.tree_is_leaf(AdamHparams())
    assert optree.tree_leaves({"a": AdamHparams(), "b": 1.0}) == [*leaves_of(AdamHparams()), 1.0]
    assert optree.tree_leaves(AdamHparams(), namespace="another") == leaves_of(AdamHparams())


def test_an_optree_without_its_private_name_makes_the_same_node() -> None:
    code = """
import importlib, types
import optree, torch

real = importlib.import_module
importlib.import_module = lambda name: types.ModuleType(name) if name == "optree.registry" else real(name)
import functional_adam.adam.hparams
importlib.import_module = real
from functional_adam import AdamHparams, adam_init, adam_update

hparams = AdamHparams(lr=0.1, maximize=True)
assert optree.tree_leaves(hparams) == [0.1, 0.9, 0.999, 1e-08, 0.0]
assert optree.tree_map(lambda x: x / 2, hparams) == AdamHparams(
    lr=0.05, betas=(0.45, 0.4995), eps=5e-9, maximize=True
)
assert optree.tree_structure(hparams) != optree.tree_structure(AdamHparams(lr=0.1))
assert [path.codify("hparams") for path in optree.tree_accessors(hparams)][:2] == ["hparams.lr", "hparams.betas[0]"]
params = torch.ones(2)
assert adam_update(params, params, adam_init(params, hparams), hparams)[0].allclose(torch.tensor(1.1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_paths_name_the_fields() -> None:
    expected = ["hparams.lr", "hparams.betas[0]", "hparams.betas[1]", "hparams.eps", "hparams.weight_decay"]
    assert [a.codify("hparams") for a in optree.tree_accessors(AdamHparams())] == expected
    paths = [torch_pytree.keystr(path) for path, _ in torch_pytree.tree_leaves_with_path(AdamHparams())]
    assert paths == [path.removeprefix("hparams") for path in expected]


@pytest.mark.parametrize("tree_map", [optree.tree_map, torch_pytree.tree_map])
@pytest.mark.parametrize(
    "placeholder", [-1.0, None, "lr", object(), float("nan"), True, 1j, (1, 2)], ids=lambda x: type(x).__name__
)
def test_rebuilding_from_leaves_checks_nothing(tree_map: Callable[..., Any], placeholder: Any) -> None:
    hparams = AdamHparams(amsgrad=True)
    rebuilt = tree_map(lambda _: placeholder, hparams)
    assert type(rebuilt) is AdamHparams
    assert all(x is placeholder for x in leaves_of(rebuilt))
    assert [getattr(rebuilt, flag) for flag in FLAGS] == [True, False, False]


@each_flatten
def test_rebuilt_hparams_are_frozen(flatten: Callable[..., Any]) -> None:
    leaves, unflatten = flatten(AdamHparams())
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'lr'"):
        unflatten(leaves).lr = 0.1


number = st.one_of(st.floats(0.0, 0.999), st.floats(0.0, 0.999).map(torch.tensor))


@settings(deadline=None, max_examples=50)
@given(st.tuples(number, number, number, number, number), st.tuples(*[st.booleans()] * 3))
def test_flatten_and_unflatten_are_inverse(numbers: tuple[Any, ...], flags: tuple[bool, ...]) -> None:
    hparams = build(**dict(zip(NUMBERS, numbers, strict=True)), **dict(zip(FLAGS, flags, strict=True)))
    for flatten in (optree_flatten, torch_flatten):
        leaves, unflatten = flatten(hparams)
        assert all(a is b for a, b in zip(leaves, numbers, strict=True))
        rebuilt = unflatten(leaves)
        assert all(a is b for a, b in zip(leaves_of(rebuilt), numbers, strict=True))
        assert tuple(getattr(rebuilt, flag) for flag in FLAGS) == flags
        assert rebuilt.numbers() == numbers


@pytest.mark.parametrize("round_trip", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy])
def test_copies_are_equal(round_trip: Callable[[Any], Any]) -> None:
    hparams = build(lr=0.1, beta1=0.2, weight_decay=0.5, maximize=True)
    copied = round_trip(hparams)
    assert type(copied) is AdamHparams
    assert copied == hparams


@pytest.mark.parametrize("round_trip", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_copies_of_tensor_hparams_have_tensors_of_their_own(round_trip: Callable[[Any], Any]) -> None:
    hparams = AdamHparams(lr=torch.tensor(0.1))
    copied = round_trip(hparams)
    assert torch.equal(copied.lr, torch.tensor(0.1))
    assert copied.lr.data_ptr() != hparams.lr.data_ptr()


def test_copies_of_gradients_are_not_checked() -> None:
    gradients: Any = optree.tree_map(lambda x: -x, build(lr=0.5))
    assert copy.deepcopy(gradients).lr == -0.5


def saved(changes: dict[str, Any], missing: str = "") -> bytes:
    """A pickle of an AdamHparams with other contents."""
    hparams = AdamHparams(lr=0.1, betas=(0.2, 0.3), maximize=True)
    vars(hparams).update(changes)
    vars(hparams).pop(missing, None)
    return pickle.dumps(hparams)


def test_fields_that_an_older_file_lacks_have_their_defaults() -> None:
    loaded = pickle.loads(saved({}, missing="weight_decay"))
    assert vars(loaded) == vars(AdamHparams(lr=0.1, betas=(0.2, 0.3), maximize=True))


def test_what_a_later_version_has_saved_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"A saved AdamHparams holds \['lr', .*'nesterov'\]. Expected a dict with .*later"
    ):
        pickle.loads(saved({"nesterov": True}))
    with pytest.raises(TypeError, match=r"A saved AdamHparams holds list. Expected a dict with the keys \['lr', "):
        object.__new__(AdamHparams).__setstate__([0.1])


def test_saved_flags_are_flags() -> None:
    with pytest.raises(TypeError, match=r"hparams.amsgrad is 'no'. Expected True or False"):
        pickle.loads(saved({"amsgrad": "no"}))


def test_a_treespec_survives_pickle_and_json() -> None:
    treespec = optree.tree_structure(AdamHparams(amsgrad=True))
    assert pickle.loads(pickle.dumps(treespec)) == treespec
    spec = torch_pytree.tree_structure(AdamHparams(amsgrad=True))
    assert torch_pytree.treespec_loads(torch_pytree.treespec_dumps(spec)) == spec


# Values are checked where hyperparameters are built.

WHAT = {
    "lr": "Invalid learning rate",
    "beta1": "Invalid beta parameter at index 0",
    "beta2": "Invalid beta parameter at index 1",
    "eps": "Invalid epsilon value",
    "weight_decay": "Invalid weight_decay value",
}


@each_number
@pytest.mark.parametrize("kind", [float, torch.tensor, lambda x: torch.tensor([0.5, x])], ids=["float", "0d", "1d"])
@pytest.mark.parametrize("value", [-1.0, -1e-30, float("nan"), float("-inf")])
def test_values_out_of_range_are_refused(name: str, kind: Callable[[float], Any], value: float) -> None:
    with pytest.raises(ValueError, match=WHAT[name]):
        build(**{name: kind(value)})


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("kind", [float, torch.tensor, lambda x: torch.tensor([0.5, x])], ids=["float", "0d", "1d"])
@pytest.mark.parametrize("value", [1.0, 1.5, float("inf")])
def test_betas_from_one_on_are_refused(name: str, kind: Callable[[float], Any], value: float) -> None:
    with pytest.raises(ValueError, match=rf"{WHAT[name]}.*\[0, 1\)"):
        build(**{name: kind(value)})


@each_number
@pytest.mark.parametrize("value", [0, 0.0, 0.5, torch.tensor(0.0), torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_values_in_range_are_kept_as_they_are(name: str, value: Any) -> None:
    assert leaves_of(build(**{name: value}))[NUMBERS.index(name)] is value


NESTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "number": (lambda x: x, ""),
    "tree": (lambda x: {"w": [0.1, x]}, r"\['w'\]\[1\]"),
}


@each_number
@pytest.mark.parametrize("nested", NESTED)
def test_hyperparameters_are_no_number_of_hyperparameters(name: str, nested: str) -> None:
    put, path = NESTED[nested]
    where = {"beta1": r"betas\[0\]", "beta2": r"betas\[1\]"}.get(name, name)
    match = rf"^hparams\.{where}{path} is an AdamHparams\. Expected a number .* give one of its numbers"
    with pytest.raises(TypeError, match=match):
        build(**{name: put(AdamHparams())})
    with pytest.raises(TypeError, match=rf"^hparams\.{where} is an AdamHparams"):
        make_fx(lambda x: build(**{name: put(AdamHparams())}) and x)(torch.ones(()))
    # Rebuilt ones are checked where they are used.
    rebuilt: Any = optree.tree_map(lambda x: put(AdamHparams()) if x == 0.25 else x, build(**{name: 0.25}))
    params = {"w": [torch.ones(2), torch.ones(2)]}
    with pytest.raises(TypeError, match=match):
        adam_update(params, params, adam_init(params, AdamHparams()), rebuilt)


@pytest.mark.parametrize("name", ["lr", "beta1", "eps", "weight_decay"])
def test_replace_checks_again(name: str) -> None:
    changes: dict[str, Any] = {"betas": (-1.0, 0.9)} if name == "beta1" else {name: -1.0}
    with pytest.raises(ValueError, match=WHAT[name]):
        dataclasses.replace(AdamHparams(), **changes)


def test_replace_keeps_the_rest() -> None:
    hparams = build(lr=0.1, beta1=0.2, eps=0.3, weight_decay=0.4, maximize=True)
    replaced = dataclasses.replace(hparams, lr=0.5)
    assert replaced == build(lr=0.5, beta1=0.2, eps=0.3, weight_decay=0.4, maximize=True)
    assert hparams.lr == 0.1


@each_number
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stacked_tensors_are_allowed_for_vmap(name: str, dtype: torch.dtype) -> None:
    value = torch.tensor([0.1, 0.2, 0.5], dtype=dtype)
    hparams = build(**{name: value})
    got = torch.func.vmap(lambda x: optree.tree_leaves(build(**{name: x}))[NUMBERS.index(name)])(value)
    assert leaves_of(hparams)[NUMBERS.index(name)] is value
    assert torch.equal(got, value)


# A tensor that somebody watches, or that lives elsewhere, is not read.


def in_vmap(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.vmap(run)(x.expand(2))


def in_grad(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.grad(run)(x)


def in_jvp(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.jvp(run, (x,), (x,))


def in_dual_level(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        run(forward_ad.make_dual(x, torch.ones_like(x)))


def in_autograd(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    run(x.clone().requires_grad_())


def on_meta(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    run(x.to("meta"))


@each_number
@pytest.mark.parametrize("watch", [in_vmap, in_grad, in_jvp, in_dual_level, in_autograd, on_meta])
def test_watched_tensors_are_not_read(name: str, watch: Callable[..., None]) -> None:
    seen: list[Any] = []

    def run(x: Tensor) -> Tensor:
        kept = leaves_of(build(**{name: x}))[NUMBERS.index(name)]
        seen.append(kept is x)
        return kept * 2

    watch(run, torch.tensor(-1.0))
    assert seen == [True]


@each_number
def test_tensors_that_require_grad_are_read_where_grad_mode_is_off(name: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=WHAT[name]):
        build(**{name: torch.tensor(-1.0, requires_grad=True)})


# AdamState.


@pytest.mark.parametrize("per_leaf_step", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@each_flatten
def test_state_is_a_named_tuple_for_both_pytrees(
    flatten: Callable[..., Any], amsgrad: bool, per_leaf_step: bool
) -> None:
    params = {"a": torch.ones(2), "b": (torch.ones(3), torch.ones(()))}
    state = adam_init(params, AdamHparams(amsgrad=amsgrad), per_leaf_step=per_leaf_step)
    assert isinstance(state, tuple)
    assert AdamState._fields == ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_params")
    leaves, unflatten = flatten(state)
    assert all(type(x) is Tensor for x in leaves)
    assert len(leaves) == (3 if per_leaf_step else 1) + 3 * (3 if amsgrad else 2)
    rebuilt = unflatten(leaves)
    assert type(rebuilt) is AdamState
    assert all(a is b for a, b in zip(flatten(rebuilt)[0], leaves, strict=True))


def test_absent_fields_of_the_state_are_empty_tuples() -> None:
    assert AdamState._field_defaults == {"max_exp_avg_sq": (), "master_params": ()}
    state = adam_init(torch.ones(2), AdamHparams())
    assert state.max_exp_avg_sq == ()
    assert state.master_params == ()
    _, state = adam_update(torch.ones(2), torch.ones(2), state, AdamHparams())
    assert state.max_exp_avg_sq == ()
    assert state.master_params == ()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_step_is_float32_whatever_the_default_dtype(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        state = adam_init(torch.ones(2), AdamHparams())
        params, new_state = adam_update(torch.ones(2), torch.ones(2), state, AdamHparams())
    finally:
        torch.set_default_dtype(before)
    assert state.step.dtype == new_state.step.dtype == torch.float32
    assert params.dtype == default
    assert state.step.shape == ()


@pytest.mark.parametrize("round_trip", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_a_copied_state_continues_with_the_same_bits(round_trip: Callable[[Any], Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(3, generator=generator), "b": [torch.randn(2, 2, generator=generator)]}
    hparams = AdamHparams(lr=0.1, amsgrad=True)
    params, state = adam_update(params, params, adam_init(params, hparams), hparams)
    expected = adam_update(params, params, state, hparams)
    got = adam_update(*round_trip((params, params, state, hparams)))
    for a, b in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)


# How a state prints.

REST = "max_exp_avg_sq=(), master_params=()"


class Point(NamedTuple):
    x: Any
    y: Any


@optree.dataclasses.dataclass(namespace="")
class Layer:
    weight: Any


@optree.dataclasses.dataclass(namespace="")
class StrictLayer:
    weight: Any

    def __post_init__(self) -> None:
        assert isinstance(self.weight, Tensor)


def printed(params: Any, **options: bool) -> str:
    return repr(adam_init(params, AdamHparams(), **options))


PRINTED: dict[str, tuple[Any, str]] = {
    "bare": (torch.ones(2, 3), "f32[2, 3]"),
    "scalar": (torch.ones((), dtype=torch.float64), "f64[]"),
    "dtypes": (
        [torch.ones(1, dtype=x) for x in (torch.float16, torch.bfloat16, torch.complex64, torch.complex128)],
        "[f16[1], bf16[1], c64[1], c128[1]]",
    ),
    "dict": ({"w": torch.ones(2), 3: {"b": torch.ones(0, 4)}}, "{'w': f32[2], 3: {'b': f32[0, 4]}}"),
    "ordered": (OrderedDict(w=torch.ones(2)), "OrderedDict({'w': f32[2]})"),
    "tuples": ((torch.ones(1), (torch.ones(2),), ()), "(f32[1], (f32[2],), ())"),
    "named": (Point(torch.ones(1), None), "Point(x=f32[1], y=None)"),
    "node": ({"l": Layer([torch.ones(1)])}, "{'l': Layer(weight=[f32[1]])}"),
    "strict": (StrictLayer(torch.zeros(1)), "StrictLayer(weight=tensor([0.]))"),  # which refuses anything else
    "parameter": (torch.nn.Parameter(torch.ones(2)), "f32[2]"),
    "meta": (torch.ones(2, device="meta"), "f32[2]"),
    "none": ({}, "{}"),
}


@pytest.mark.parametrize(("params", "expected"), PRINTED.values(), ids=PRINTED)
def test_a_state_prints_dtypes_and_shapes(params: Any, expected: str) -> None:
    assert printed(params) == f"AdamState(step=f32[], exp_avg={expected}, exp_avg_sq={expected}, {REST})"


def test_a_state_prints_alike_within_other_containers() -> None:
    state = adam_init(torch.ones(2), AdamHparams(amsgrad=True))
    text = "AdamState(step=f32[], exp_avg=f32[2], exp_avg_sq=f32[2], max_exp_avg_sq=f32[2], master_params=())"
    assert repr({"state": [state]}) == f"{{'state': [{text}]}}"
    assert str(state) == f"{state}" == text


def test_each_step_and_master_is_printed() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16)}
    moments = "{'a': f32[2], 'b': f32[2]}"
    assert printed(params, per_leaf_step=True, master_params=True) == (
        f"AdamState(step={{'a': f32[], 'b': f32[]}}, exp_avg={moments}, exp_avg_sq={moments}, max_exp_avg_sq=(), "
        "master_params={'a': (), 'b': f32[2]})"
    )


def test_of_many_leaves_the_first_are_printed() -> None:
    flat = {f"w{i}": torch.ones(64, 64) for i in range(150)}
    text = printed(flat)
    assert text.count("f32[64, 64]") == 48
    assert "'w23': f32[64, 64], ... 126 more}, exp_avg_sq={'w0'" in text
    nested = [{"weight": torch.ones(2), "bias": torch.ones(2)} for _ in range(75)]
    assert "{'weight': f32[2], 'bias': f32[2]}, ... 63 more], exp_avg_sq=" in printed(nested)
    assert len(printed(flat)) < 1500
    uneven = [[torch.ones(1)] * 23, (torch.ones(1), torch.ones(1)), torch.ones(1)]
    assert "f32[1]], (f32[1], ... 1 more), ... 1 more], exp_avg_sq=" in printed(uneven)
    enough = [torch.ones(1)] * 24
    assert "more" not in printed(enough)


@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_a_donated_state_says_so(per_leaf_step: bool) -> None:
    params, hparams = {"w": torch.ones(2, dtype=torch.bfloat16)}, AdamHparams()
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step, master_params=True)
    _, new = adam_update(params, optree.tree_map(torch.clone, params), state, hparams, donate=True)
    assert repr(state) == (
        "AdamState(step=donated, exp_avg=donated, exp_avg_sq=donated, max_exp_avg_sq=(), master_params=donated)"
    )
    assert "donated" not in repr(new)
    assert repr(state.exp_avg["w"]).startswith("tensor([")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_state_of_anything_prints() -> None:
    state = adam_init({"w": torch.ones(2)}, AdamHparams())
    text = "AdamState(step={0}, exp_avg={{'w': {0}}}, exp_avg_sq={{'w': {0}}}, " + REST + ")"
    for leaf in (None, 1.5, "*", object(), (), torch.ones(1) > 0):
        shown = "bool[1]" if isinstance(leaf, Tensor) else repr(leaf)
        assert repr(optree.tree_map(lambda _, x=leaf: x, state)) == text.format(shown)
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    sparse = torch.eye(2).to_sparse()
    assert repr(AdamState(sparse, nested, sparse)) == (
        f"AdamState(step=f32[2, 2], exp_avg=f32[nested], exp_avg_sq=f32[2, 2], {REST})"
    )


def watched_by_vmap(function: Callable[[Tensor], Tensor]) -> None:
    torch.func.vmap(function)(torch.ones(3, 2))


def watched_by_forward_mode(function: Callable[[Tensor], Tensor]) -> None:
    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))


@pytest.mark.parametrize(
    "watch",
    [
        watched_by_vmap,
        watched_by_forward_mode,
        lambda f: torch.func.grad(lambda x: f(x).sum())(torch.ones(2)),
        lambda f: make_fx(f)(torch.ones(2)),
        lambda f: make_fx(f, tracing_mode="symbolic")(torch.ones(2)),
        lambda f: torch.compile(f, backend="eager")(torch.ones(2)),
        lambda f: torch.compile(f, backend="eager", dynamic=True)(torch.ones(2)),
    ],
    ids=["vmap", "jvp", "grad", "make_fx", "symbolic", "compile", "dynamic"],
)
def test_a_watched_state_prints(watch: Callable[[Callable[[Tensor], Tensor]], Any]) -> None:
    texts: list[str] = []

    def update(x: Tensor) -> Tensor:
        params, state = adam_update(x, x, adam_init(x, AdamHparams()), AdamHparams())
        texts.append(repr(state))
        return params

    watch(update)
    shape = r"f32\[\w+\]"
    assert re.fullmatch(rf"AdamState\(step=f32\[\], exp_avg={shape}, exp_avg_sq={shape}, .*", texts[0])
