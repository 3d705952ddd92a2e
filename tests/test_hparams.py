"""AdamHparams and AdamState are data: frozen, checked where they are built, and pytrees rebuilt from anything."""

import copy
import dataclasses
import inspect
import itertools
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

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
from tests.builders import assert_same_bits, make_call
from tests.strategies import Pair

# torch scripts some formulas when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")

NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")
PATHS = dict(zip(NUMBERS, ("lr", "betas[0]", "betas[1]", "eps", "weight_decay"), strict=True))


def build(kind: Callable[..., Any] = AdamHparams, **numbers: Any) -> Any:
    """AdamHparams with the betas as two arguments."""
    betas = (numbers.pop("beta1", 0.9), numbers.pop("beta2", 0.999))
    return kind(betas=betas, **numbers)


def leaves_of(hparams: AdamHparams) -> list[Any]:
    return [hparams.lr, *hparams.betas, hparams.eps, hparams.weight_decay]


each_number = pytest.mark.parametrize("name", NUMBERS)
each_pytree = pytest.mark.parametrize("pytree", [optree, torch_pytree])


# A frozen dataclass with torch's names and defaults.


def test_names_and_defaults_are_those_of_torch_and_are_keyword_only() -> None:
    hparams = AdamHparams()
    theirs = inspect.signature(torch.optim.Adam).parameters
    for field in dataclasses.fields(hparams):
        assert getattr(hparams, field.name) == theirs[field.name].default
    assert [field.name for field in dataclasses.fields(hparams)] == ["lr", "betas", "eps", "weight_decay", *FLAGS]
    with pytest.raises(TypeError, match="positional argument"):
        AdamHparams(0.1)  # type: ignore[misc]
    with pytest.raises(TypeError, match="momentum"):
        AdamHparams(momentum=0.9)  # type: ignore[call-arg]


@each_pytree
def test_fields_cannot_be_assigned(pytree: Any) -> None:
    for hparams in (AdamHparams(), pytree.tree_map(float, AdamHparams())):
        for name in ("lr", "betas", "amsgrad"):
            with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{name}'"):
                setattr(hparams, name, getattr(hparams, name))
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'lr'"):
            del hparams.lr


def test_equal_numbers_make_equal_hparams() -> None:
    assert AdamHparams(lr=0.1) == AdamHparams(lr=0.1)
    assert AdamHparams(lr=0.1) != AdamHparams(lr=0.2)
    assert AdamHparams(amsgrad=True) != AdamHparams()
    assert hash(AdamHparams(lr=0.1)) == hash(AdamHparams(lr=0.1))
    assert AdamHparams(betas=[0.8, 0.9]) == AdamHparams(betas=(0.8, 0.9))  # type: ignore[arg-type]
    rest = {"beta1": 0.2, "eps": 0.3, "weight_decay": 0.4, "maximize": True}
    assert dataclasses.replace(build(lr=0.1, **rest), lr=0.5) == build(lr=0.5, **rest)


# A pytree node: numbers are leaves, flags are structure.


@each_pytree
def test_flags_are_structure_and_rebuilding_checks_nothing(pytree: Any) -> None:
    for flag in FLAGS:
        flagged = pytree.tree_structure(AdamHparams(**{flag: True}))
        assert flagged != pytree.tree_structure(AdamHparams())
        assert flagged == pytree.tree_structure(AdamHparams(lr=7.0, **{flag: True}))
    for placeholder in (-1.0, None, "lr", object(), float("nan"), True, (1, 2)):
        rebuilt = pytree.tree_map(lambda _, x=placeholder: x, AdamHparams(amsgrad=True))
        assert type(rebuilt) is AdamHparams
        assert all(x is placeholder for x in leaves_of(rebuilt))
        assert [getattr(rebuilt, flag) for flag in FLAGS] == [True, False, False]


def test_it_is_a_node_in_every_namespace_whose_treespecs_can_be_saved_and_whose_paths_name_the_fields() -> None:
    hparams = AdamHparams(amsgrad=True)
    assert optree.tree_leaves({"a": hparams, "b": 1.0}) == [*leaves_of(hparams), 1.0]
    assert optree.tree_leaves(hparams, namespace="another") == leaves_of(hparams)
    treespec, spec = optree.tree_structure(hparams), torch_pytree.tree_structure(hparams)
    assert pickle.loads(pickle.dumps(treespec)) == treespec
    assert torch_pytree.treespec_loads(torch_pytree.treespec_dumps(spec)) == spec
    paths = [torch_pytree.keystr(path)[1:] for path, _ in torch_pytree.tree_leaves_with_path(hparams)]
    assert paths == [a.codify("")[1:] for a in optree.tree_accessors(hparams)] == [*PATHS.values()]


def test_an_optree_without_its_private_name_makes_the_same_node() -> None:
    code = """
import importlib, types
import optree, torch

real = importlib.import_module
importlib.import_module = lambda name: types.ModuleType(name) if name == "optree.registry" else real(name)
from functional_adam import AdamHparams, adam_init, adam_update
importlib.import_module = real

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


number = st.floats(0.0, 0.999) | st.floats(0.0, 0.999).map(torch.tensor)
# The last is for vmap.
number |= st.sampled_from([0, torch.tensor(0.5, dtype=torch.float64), torch.tensor([0.1, 0.5])])


@settings(deadline=None, max_examples=50)
@given(st.tuples(number, number, number, number, number), st.tuples(*[st.booleans()] * 3))
def test_numbers_are_kept_and_flatten_and_unflatten_are_inverse(
    numbers: tuple[Any, ...], flags: tuple[bool, ...]
) -> None:
    hparams = build(**dict(zip(NUMBERS, numbers, strict=True)), **dict(zip(FLAGS, flags, strict=True)))
    for pytree in (optree, torch_pytree):
        leaves, treespec = pytree.tree_flatten(hparams)
        rebuilt = treespec.unflatten(leaves)
        for found in (leaves_of(hparams), leaves, leaves_of(rebuilt)):
            assert all(a is b for a, b in zip(found, numbers, strict=True))
        assert tuple(getattr(rebuilt, flag) for flag in FLAGS) == flags


@pytest.mark.parametrize("round_trip", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy])
def test_copies_are_equal_and_not_checked(round_trip: Callable[[Any], Any]) -> None:
    hparams = build(lr=0.1, beta1=0.2, weight_decay=0.5, maximize=True)
    gradients: Any = optree.tree_map(lambda x: -x, hparams)
    for x in (hparams, gradients):
        assert type(round_trip(x)) is AdamHparams
        assert round_trip(x) == x
    of_tensor = AdamHparams(lr=torch.tensor(0.1))
    copied = round_trip(of_tensor)
    assert torch.equal(copied.lr, of_tensor.lr)
    is_shallow = round_trip is copy.copy
    assert (copied.lr is of_tensor.lr) == (copied.lr.data_ptr() == of_tensor.lr.data_ptr()) == is_shallow
    call = make_call(hparams=AdamHparams(lr=0.1, amsgrad=True))
    assert_same_bits(adam_update(*round_trip(call)), adam_update(*call))


def test_fields_that_an_older_version_has_not_saved_have_their_defaults_and_later_ones_are_refused() -> None:
    def load(changes: dict[str, Any], missing: str = "") -> AdamHparams:
        hparams = AdamHparams(lr=0.1, betas=(0.2, 0.3), maximize=True)
        vars(hparams).update(changes)
        vars(hparams).pop(missing, None)
        return pickle.loads(pickle.dumps(hparams))

    assert vars(load({}, missing="weight_decay")) == vars(AdamHparams(lr=0.1, betas=(0.2, 0.3), maximize=True))
    with pytest.raises(TypeError, match=r"A saved AdamHparams holds \['lr', .*'nesterov'\]. Expected a dict .*later"):
        load({"nesterov": True})
    with pytest.raises(TypeError, match=r"A saved AdamHparams holds list. Expected a dict with the keys \['lr', "):
        object.__new__(AdamHparams).__setstate__([0.1])
    with pytest.raises(TypeError, match=r"hparams.amsgrad is 'no'. Expected True or False"):
        load({"amsgrad": "no"})


# Values are checked where hyperparameters are built.


def torch_message(name: str, value: float) -> str:
    """What `torch.optim.Adam` says to the same value."""
    with pytest.raises(ValueError, match="Invalid") as caught:
        build(lambda **given: torch.optim.Adam([torch.ones(1)], **given), **{name: value})
    return str(caught.value)


@each_number
def test_values_out_of_range_get_torchs_message(name: str) -> None:
    is_beta = name.startswith("beta")
    expected = r"Expected a number in \[0, 1\)" if is_beta else "Expected a number >= 0"
    for value in (-1.0, -1e-30, float("nan"), float("-inf"), *((1.0, 1.5, float("inf")) if is_beta else ())):
        message = torch_message(name, value)
        what = message.partition(":")[0]
        with pytest.raises(ValueError, match=f"^{re.escape(message)}.*{expected}") as caught:
            build(**{name: value})
        assert type(caught.value) is ValueError
        for x in (torch.tensor(value), torch.tensor([0.5, value]), torch.tensor(value, requires_grad=True)):
            with torch.no_grad(), pytest.raises(ValueError, match=f"^{what}: .*{expected}"):
                build(**{name: x})
        with pytest.raises(ValueError, match=f"^{what}"):
            build(lambda **changes: dataclasses.replace(AdamHparams(), **changes), **{name: value})


@each_number
def test_numbers_of_the_wrong_type_are_named(name: str) -> None:
    for value in ("0.1", None, True, 1j, torch.tensor(1j), torch.tensor(True)):
        with pytest.raises(TypeError, match=rf"^hparams\.{re.escape(PATHS[name])} is .*Expected a "):
            build(**{name: value})


def test_betas_are_a_pair_and_flags_are_bools() -> None:
    for betas in ((0.9,), (0.9, 0.99, 0.999), 0.9, None, "ab", {0.9, 0.99}):
        with pytest.raises(ValueError, match=r"Invalid betas: .*Expected a pair of numbers"):
            AdamHparams(betas=betas)
    for flag, value in itertools.product(FLAGS, (1, 0.0, None, "yes", torch.tensor(True))):
        with pytest.raises(TypeError, match=rf"^hparams\.{flag} is .*Expected True or False"):
            AdamHparams(**{flag: value})


@each_number
@pytest.mark.parametrize(("value", "path"), [(AdamHparams(), ""), ({"w": [0.1, AdamHparams()]}, "['w'][1]")])
def test_hyperparameters_are_no_number_of_hyperparameters(name: str, value: Any, path: str) -> None:
    where = re.escape(f"hparams.{PATHS[name]}")
    match = rf"^{where}{re.escape(path)} is an AdamHparams\. Expected a number"
    with pytest.raises(TypeError, match=match):
        build(**{name: value})
    with pytest.raises(TypeError, match=rf"^{where} is an AdamHparams"):
        make_fx(lambda x: build(**{name: value}) and x)(torch.ones(()))
    # Rebuilt ones are checked where they are used.
    rebuilt: Any = optree.tree_map(lambda x: value if x == 0.25 else x, build(**{name: 0.25}))
    params = {"w": [torch.ones(2), torch.ones(2)]}
    with pytest.raises(TypeError, match=match):
        adam_update(params, params, adam_init(params, AdamHparams()), rebuilt)


# A tensor that somebody watches, or that lives elsewhere, is not read.


def in_dual_level(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        run(forward_ad.make_dual(x, torch.ones_like(x)))


WATCHERS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda run, x: torch.func.vmap(run)(torch.stack([x, x])),
    "grad": lambda run, x: torch.func.grad(lambda x: run(x).sum())(x),
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (x,)),
    "dual_level": in_dual_level,
    "autograd": lambda run, x: run(x.clone().requires_grad_()),
    "meta": lambda run, x: run(x.to("meta")),
    "make_fx": lambda run, x: make_fx(run)(x),
    "symbolic": lambda run, x: make_fx(run, tracing_mode="symbolic")(x),
    "compile": lambda run, x: torch.compile(run, backend="eager")(x),
}


@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS)
def test_watched_tensors_are_not_read_and_their_state_prints(watch: Callable[..., Any]) -> None:
    seen: list[Any] = []

    def run(x: Tensor) -> Tensor:
        kept = [leaves_of(build(**{name: x}))[index] for index, name in enumerate(NUMBERS)]
        params, state = adam_update(x, x, adam_init(x, AdamHparams()), AdamHparams())
        seen.append(([y is x for y in kept], repr(state)))
        return params + sum(kept)

    watch(run, torch.full((2,), -1.0))
    are_kept, text = seen[0]
    assert are_kept == [True] * 5
    shape = r"f32\[\w+\]"
    assert re.fullmatch(rf"AdamState\(step=f32\[\], exp_avg={shape}, exp_avg_sq={shape}, .*", text)


# AdamState.


@each_pytree
def test_state_is_a_named_tuple_for_both_pytrees(pytree: Any) -> None:
    assert AdamState._fields == ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_params")
    assert AdamState._field_defaults == {"max_exp_avg_sq": (), "master_params": ()}
    params = {"a": torch.ones(2), "b": (torch.ones(3), torch.ones(()))}
    for amsgrad, per_leaf_step in itertools.product((False, True), repeat=2):
        hparams = AdamHparams(amsgrad=amsgrad)
        state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
        _, new = adam_update(params, params, state, hparams)
        assert [x == () for x in state[3:]] == [x == () for x in new[3:]] == [not amsgrad, True]
        leaves, treespec = pytree.tree_flatten(state)
        assert all(type(x) is Tensor for x in leaves)
        assert len(leaves) == (3 if per_leaf_step else 1) + 3 * (3 if amsgrad else 2)
        rebuilt = treespec.unflatten(leaves)
        assert type(rebuilt) is AdamState
        assert all(a is b for a, b in zip(pytree.tree_leaves(rebuilt), leaves, strict=True))


# How a state prints.


@optree.dataclasses.dataclass(namespace="")
class Layer:
    weight: Any


@optree.dataclasses.dataclass(namespace="")
class StrictLayer:
    weight: Any

    def __post_init__(self) -> None:
        assert isinstance(self.weight, Tensor)


def text_of(step: str, moment: str, second: str = "", rest: str = "max_exp_avg_sq=(), master_params=()") -> str:
    return f"AdamState(step={step}, exp_avg={moment}, exp_avg_sq={second or moment}, {rest})"


PRINTED: list[tuple[Any, str]] = [
    (torch.nn.Parameter(torch.ones(2, 3)), "f32[2, 3]"),
    (torch.ones((), dtype=torch.float64, device="meta"), "f64[]"),
    ([torch.ones(1, dtype=x) for x in (torch.float16, torch.bfloat16, torch.cdouble)], "[f16[1], bf16[1], c128[1]]"),
    ({"w": torch.ones(2), 3: {"b": torch.ones(0, 4)}}, "{'w': f32[2], 3: {'b': f32[0, 4]}}"),
    (OrderedDict(w=torch.ones(2)), "OrderedDict({'w': f32[2]})"),
    ((torch.ones(1), (torch.ones(2),), ()), "(f32[1], (f32[2],), ())"),
    (Pair(torch.ones(1), None), "Pair(first=f32[1], second=None)"),
    ({"l": Layer([torch.ones(1)])}, "{'l': Layer(weight=[f32[1]])}"),
    (StrictLayer(torch.zeros(1)), "StrictLayer(weight=tensor([0.]))"),  # which refuses anything else
    ({}, "{}"),
]


def test_a_state_prints_dtypes_and_shapes() -> None:
    for params, expected in PRINTED:
        state = adam_init(params, AdamHparams())
        assert repr(state) == str(state) == f"{state}" == text_of("f32[]", expected)
        assert repr({"state": [state]}) == f"{{'state': [{state}]}}"


def test_of_many_leaves_the_first_are_printed() -> None:
    text = repr(adam_init({f"w{i}": torch.ones(64, 64) for i in range(150)}, AdamHparams()))
    assert text.count("f32[64, 64]") == 48
    assert "'w23': f32[64, 64], ... 126 more}, exp_avg_sq={'w0'" in text
    uneven = [[torch.ones(1)] * 23, (torch.ones(1), torch.ones(1)), torch.ones(1)]
    text = repr(adam_init(uneven, AdamHparams()))
    assert "f32[1]], (f32[1], ... 1 more), ... 1 more], exp_avg_sq=" in text
    assert "more" not in repr(adam_init([torch.ones(1)] * 24, AdamHparams()))


def test_every_field_of_a_state_is_printed_until_it_is_donated() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16)}
    for per_leaf_step, steps in ((True, "{'a': f32[], 'b': f32[]}"), (False, "f32[]")):
        hparams, grads = AdamHparams(amsgrad=True), optree.tree_map(torch.ones_like, params)
        state = adam_init(params, hparams, per_leaf_step=per_leaf_step, master_params=True)
        moments = "{'a': f32[2], 'b': f32[2]}"
        expected = text_of(steps, moments, rest=f"max_exp_avg_sq={moments}, master_params={{'a': (), 'b': f32[2]}}")
        assert repr(state) == expected
        _, new = adam_update(params, grads, state, hparams, donate=True)
        assert repr(new) == expected
        rest = "max_exp_avg_sq=donated, master_params=donated"
        assert repr(state) == text_of("donated", "donated", rest=rest)
        assert repr(state.exp_avg["a"]).startswith("tensor([")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_state_of_anything_prints() -> None:
    state = adam_init({"w": torch.ones(2)}, AdamHparams())
    for leaf in (None, 1.5, "*", object(), (), torch.ones(1) > 0):
        shown = "bool[1]" if isinstance(leaf, Tensor) else repr(leaf)
        assert repr(optree.tree_map(lambda _, x=leaf: x, state)) == text_of(shown, f"{{'w': {shown}}}")
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    sparse = torch.eye(2).to_sparse()
    assert repr(AdamState(sparse, nested, sparse)) == text_of("f32[2, 2]", "f32[nested]", "f32[2, 2]")
