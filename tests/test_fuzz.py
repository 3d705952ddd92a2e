"""Whatever stands where an argument should: the call works, or says what is wrong in a documented way; nothing changes.

An error is the package's own if a `raise` of the package made it. What an argument raises itself, passes through.
"""

import ast
import functools
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import optree
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import functional_adam
from functional_adam import (
    AdamHparams,
    AdamState,
    _FunctionalAdam,
    adam_init,
    adam_update,
    explain,
    from_torch_state_dict,
    recycling,
    state_from_dict,
    state_to_dict,
    to_torch_state_dict,
    transformation,
)
from functional_adam.distributed import step_in_backward
from tests.builders import assert_unchanged, snapshot
from tests.oracles import KERNELS
from tests.strategies import PROPERTY

# torch says so of formats, whatever is done with them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning"),
]

PACKAGE = str(Path(functional_adam.__file__).parent)
DOCUMENTED = (TypeError, ValueError, RuntimeError)


class JunkError(Exception):
    """What an argument raises itself."""


def refuse(*_: Any, **__: Any) -> Any:
    raise JunkError


class RefusesFunctions(torch.Tensor):
    __torch_function__ = classmethod(refuse)


RefusesBool = type("RefusesBool", (), {"__bool__": refuse})
RefusesEq = type("RefusesEq", (), {"__eq__": refuse, "__hash__": object.__hash__})
RefusesAttributes = type("RefusesAttributes", (), {"__getattr__": refuse})
RefusesIteration = type("RefusesIteration", (), {"__iter__": refuse})

# Expressions, evaluated anew for each call.
JUNK_SOURCE = """[
None, True, False, 0, 1, -1, 1.5, math.nan, math.inf, -math.inf, 1e308, 1j, 10**400, -(10**400), "text", "", b"bytes",
(), (1, 2), slice(1), ..., int, range(3), torch.float32, torch.device("cpu"), Fraction(10**400), Fraction(1, 2),
Decimal(1), np.float32(0.5), np.float64("nan"), np.int64(3), np.bool_(True), np.ones(2), np.array(0.5), object(),
[1, 2], [], {"w": 1}, {1: 2}, {}, {1}, (x for x in [1]), iter([]), refuse, [torch.ones(2)],
{"w": torch.ones(2), "b": [torch.ones(3)]}, AdamState(1, 2, 3), AdamState(None, None, None), AdamHparams(),
torch.tensor(1), torch.tensor(True), torch.tensor(1j), torch.tensor(math.nan), torch.tensor(-1.0), torch.tensor(-1e30),
torch.tensor(1e30), torch.ones(2, device="meta"), torch.ones((), device="meta"), torch.ones(2).to_sparse(),
torch.tensor(1.0).to_sparse(), torch.ones(2, 2).to_sparse_csr(), torch.ones(2).to_mkldnn(),
torch.ones(2).to(torch.float8_e4m3fn), torch.ones(()).to(torch.float8_e4m3fn),
torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged), torch.empty(0), torch.ones(2),
torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.long), torch.ones(3, 3), torch.ones(2).cfloat(),
torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True), torch.ones(2).as_subclass(RefusesFunctions),
torch.ones(()).as_subclass(RefusesFunctions), RefusesBool(), RefusesEq(), RefusesAttributes(), RefusesIteration(),
]"""
JUNK = [ast.unparse(x) for x in cast("ast.List", ast.parse(JUNK_SOURCE, mode="eval").body).elts]
NAMES = {**globals(), "Decimal": Decimal, "Fraction": Fraction, "np": np}

Arguments = dict[str, Any]


def replaced(tree: Any, slot: tuple[Any, ...], junk: Any) -> Any:
    """A copy of the containers of `tree`, with `junk` at `slot`."""
    if not slot:
        return junk
    key, rest = slot[0], slot[1:]
    if isinstance(tree, AdamHparams):  # rebuilt, and so unchecked
        leaves, treespec = optree.tree_flatten(tree)
        place = ("lr", "beta1", "beta2", "eps", "weight_decay").index(key)
        leaves[place] = {"w": junk, "b": leaves[place]} if rest else junk
        return optree.tree_unflatten(treespec, leaves)
    if isinstance(tree, AdamState):
        return tree._replace(**{key: replaced(getattr(tree, key), rest, junk)})
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[key] = replaced(copy[key] if isinstance(copy, list) or key in copy else None, rest, junk)
    return copy


def tensors_in(x: Any) -> Iterator[Tensor]:
    """All plain dense tensors in `x`, however they are kept."""
    if type(x) in (Tensor, torch.nn.Parameter):
        if x.device.type == "cpu" and not x.is_nested and x.layout is torch.strided:
            yield x
    elif isinstance(x, AdamHparams):
        yield from tensors_in(x.numbers())
    elif isinstance(x, torch.optim.Optimizer):
        yield from tensors_in([x.param_groups, list(x.state.values())])
    elif isinstance(x, (dict, list, tuple)):
        yield from (y for value in (x.values() if isinstance(x, dict) else x) for y in tensors_in(value))


@functools.cache
def raises_of(file: str) -> set[int]:
    """The lines at which `file` raises."""
    return {node.lineno for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Raise)}


def is_own(error: BaseException) -> bool:
    """Whether a `raise` of the package, or of torch.optim.Optimizer below the adapter, made `error`."""
    at: TracebackType | None = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    assert at is not None
    file = at.tb_frame.f_code.co_filename
    return file.startswith(PACKAGE) and at.tb_lineno in raises_of(file)


def fault_of(call: Callable[[Arguments], Any], given: Arguments, *, is_pure: bool = False) -> str | None:
    """What is wrong with what `call` does to `given`, or None. What works may donate, unless it `is_pure`."""
    tensors = [*tensors_in(given)]
    before = snapshot(tensors)
    try:
        call(given)
    except JunkError:
        is_pure = True
    except Exception as error:
        is_pure = True
        if not isinstance(error, DOCUMENTED) or not is_own(error):
            return f"{type(error).__name__}: {str(error)[:200]}"
    try:
        assert_unchanged(tensors if is_pure else [], before if is_pure else [])
    except AssertionError:
        return "something has changed"
    return None


def put(given: Arguments, slot: str, junk: str) -> Arguments:
    """`given` with the value of `junk` at a slot: an argument and the keys below it, with dots between."""
    keys = tuple(int(key) if key.isdigit() else key for key in slot.split("."))
    return replaced(given, keys, eval(junk, NAMES))


def faults(good: Callable[[], Arguments], call: Callable[[Arguments], Any], slots: Iterable[str]) -> list[str]:
    """The faults of `call` with each piece of junk in each of `slots`."""
    call(good())
    given, found = good(), []
    for slot, junk in itertools.product(slots, JUNK):
        done: list[Any] = []
        fault = fault_of(lambda given, done=done: done.append(call(given)), put(given, slot, junk))
        found += [f"{slot} is {junk}: {fault}"] if fault else []
        given = good() if done else given  # what was refused is unchanged
    return found


def giving(call: Callable[..., Any], *names: str) -> Callable[[Arguments], Any]:
    """`call` by name with the arguments `names`, or all."""
    return lambda given: call(**{name: given[name] for name in names or given})


# adam_update.

OPTIONS = {"kernel": "auto", "donate": False, "grad_scale": None, "found_inf": None}
TREES = ("params", "grads", "params.w", "grads.w")
MOMENTS = [f"state.{name}{key}" for name in AdamState._fields for key in ("", ".w")]
NUMBERS = [f"hparams.{name}{key}" for name in ("lr", "beta1", "beta2", "eps", "weight_decay") for key in ("", ".w")]
PLAIN_SLOTS = ("state", "hparams", *OPTIONS, *TREES, *MOMENTS[::2], *NUMBERS)
STATE_SLOTS = (*MOMENTS, "state.step.b.0", "state.exp_avg.b.0")
UPDATE_SLOTS = ("state", "hparams", *OPTIONS, *TREES, "params.b.0", "grads.b.0", *STATE_SLOTS, *NUMBERS)


def update_arguments(*, is_plain: bool = False, **options: Any) -> Arguments:
    hparams = AdamHparams(amsgrad=not is_plain)
    params = {"w": torch.ones(2, dtype=torch.float32 if is_plain else torch.bfloat16), "b": [torch.ones(3)]}
    state = adam_init(params, hparams, per_leaf_step=not is_plain, master_params=not is_plain)
    grads = {"w": torch.ones(2), "b": [torch.ones(3)]}
    return {"params": params, "grads": grads, "state": state, "hparams": hparams, **OPTIONS, **options}


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize(("kernel", "donate"), [("single", True), ("foreach", False), ("fused", True)])
def test_an_update_takes_junk_or_names_it(is_plain: bool, kernel: str, donate: bool) -> None:
    good = functools.partial(update_arguments, is_plain=is_plain, kernel=kernel, donate=donate)
    assert not faults(good, giving(adam_update), PLAIN_SLOTS if is_plain else UPDATE_SLOTS)


@PROPERTY
@given(
    junk=st.lists(st.tuples(st.sampled_from(UPDATE_SLOTS), st.sampled_from(JUNK)), min_size=2, max_size=4),
    kernel=st.sampled_from(KERNELS),
    donate=st.booleans(),
)
def test_an_update_takes_several_pieces_of_junk_or_names_one(
    junk: list[tuple[str, str]], kernel: str, donate: bool
) -> None:
    given = update_arguments(kernel=kernel, donate=donate)
    # Deep slots first: what holds them may become junk too.
    for slot, text in sorted(junk, key=lambda pair: -pair[0].count(".")):
        given = put(given, slot, text)
    fault = fault_of(giving(adam_update), given)
    assert not fault, (junk, fault)


@pytest.mark.parametrize("kernel", KERNELS)
def test_numbers_too_large_for_the_dtype_become_infinite(kernel: str) -> None:
    for lr, weight_decay, decoupled in itertools.product((1e38, 1e308), (1e39, 1e308), (False, True)):
        numbers = {"lr": {"w": 0.1, "b": lr}, "weight_decay": {"w": 0.1, "b": weight_decay}}
        hparams = AdamHparams(**numbers, decoupled_weight_decay=decoupled)
        new, _ = adam_update(**update_arguments(is_plain=True, hparams=hparams, kernel=kernel, donate=True))
        assert new["w"].isfinite().all()
        assert not new["b"][0].isfinite().any()


# The others.


def init_arguments() -> Arguments:
    given = update_arguments(is_plain=True)
    options = {"per_leaf_step": False, "moment_dtype": None, "master_params": False}
    return {"params": given["params"], "hparams": given["hparams"], **options}


def flat_arguments() -> Arguments:
    given = update_arguments()
    return {"flat": state_to_dict(given["state"]), "params": given["params"], "hparams": given["hparams"]}


def dict_arguments() -> Arguments:
    hparams = AdamHparams(amsgrad=True, lr={"w": 0.1, "b": 0.2})
    params = update_arguments(is_plain=True)["params"]
    return {"params": params, "state_dict": to_torch_state_dict(params, adam_init(params, hparams), hparams)}


def adapter_arguments() -> Arguments:
    params, grads = ([torch.ones(2), torch.ones(3)] for _ in range(2))
    optimizer = _FunctionalAdam(params, lr=0.1)
    optimizer.step([torch.ones(2), torch.ones(3)])
    one = {"param": params[0], "grad": grads[0]}
    group = {name: optimizer.param_groups[0][name] for name in GROUP}
    return {"optimizer": optimizer, "params": params, "grads": grads, **one, "closure": None, **group}


def step_with_group(given: Arguments) -> None:
    given["optimizer"].param_groups[0].update({name: given[name] for name in GROUP})
    given["optimizer"].step(given["grads"])


FLAT_KEYS = ("format", "step['w']", "exp_avg['w']", "exp_avg_sq['b'][0]", "max_exp_avg_sq['w']", "master_params['w']")
ADAM = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 0.1, "weight_decay": 0.1, "amsgrad": True}
GROUP = (*ADAM, "maximize")
GROUP_KEYS = ("params", *GROUP, "decoupled_weight_decay", "param_names", "foreach")
STATE_DICT_SLOTS = (
    *("params", "params.w", "state_dict", "state_dict.state", "state_dict.param_groups"),
    *(f"state_dict.state.{key}" for key in (0, 7, "more")),
    *(f"state_dict.state.0.{key}" for key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "more")),
    *(f"state_dict.param_groups.{i}" for i in (0, 1)),
    *(f"state_dict.param_groups.{i}.{key}" for i in (0, 1) for key in GROUP_KEYS),
    *(f"state_dict.param_groups.0.{key}.0" for key in ("params", "betas")),
)
# What works as arguments, the call, and where junk goes.
CALLS: dict[str, tuple[Callable[[], Arguments], Callable[[Arguments], Any], Iterable[str]]] = {
    "adam_init": (init_arguments, giving(adam_init), (*init_arguments(), "params.w")),
    "explain": (update_arguments, giving(explain), UPDATE_SLOTS),
    "AdamHparams": (lambda: {**ADAM, "maximize": True}, giving(AdamHparams), (*GROUP, "betas.0", "betas.1")),
    "state_to_dict": (update_arguments, giving(state_to_dict, "state"), ("state", *STATE_SLOTS)),
    "state_from_dict": (
        flat_arguments,
        giving(state_from_dict),
        ("flat", "params", "hparams", "params.w", *(f"flat.{key}" for key in (*FLAT_KEYS, "more", 7))),
    ),
    "to_torch_state_dict": (
        update_arguments,
        giving(to_torch_state_dict, "params", "state", "hparams"),
        ("params", "state", "hparams", "params.w", *STATE_SLOTS, *NUMBERS),
    ),
    "from_torch_state_dict": (dict_arguments, giving(from_torch_state_dict), STATE_DICT_SLOTS),
    "transformation.adam": (lambda: {**ADAM, "kernel": "auto"}, giving(transformation.adam), (*ADAM, "kernel")),
    "set_cache_limit": (lambda: {"limit": None}, giving(recycling.set_cache_limit), ("limit",)),
    "step_in_backward": (
        lambda: {"optimizer": _FunctionalAdam([torch.ones(2, requires_grad=True)])},
        giving(step_in_backward),
        ("optimizer",),
    ),
    # The adapter, whose constructor and groups torch.optim.Optimizer checks.
    "step": (
        adapter_arguments,
        lambda given: given["optimizer"].step(given["grads"], closure=given["closure"]),
        ("grads", "grads.0", "grads.1"),
    ),
    "step with a group": (adapter_arguments, step_with_group, GROUP),
    "step_param": (
        adapter_arguments,
        lambda given: given["optimizer"].step_param(given["param"], given["grad"]),
        ("param", "grad"),
    ),
    "step_params": (
        adapter_arguments,
        lambda given: given["optimizer"].step_params(given["params"], given["grads"]),
        ("params", "grads", "params.1", "grads.1"),
    ),
}
for inplace in (False, True):
    plain_arguments = functools.partial(update_arguments, is_plain=True, inplace=inplace)
    CALLS[f"apply_updates, inplace={inplace}"] = (
        plain_arguments,
        lambda given: transformation.apply_updates(given["params"], given["grads"], inplace=given["inplace"]),
        (*TREES, "params.b.0", "grads.b.0", "inplace"),
    )
    for decay in (0.0, 0.1):
        CALLS[f"update of transformation.adam(weight_decay={decay}), inplace={inplace}"] = (
            plain_arguments,
            lambda given, decay=decay: transformation.adam(weight_decay=decay).update(
                given["grads"], given["state"], given["params"], inplace=given["inplace"]
            ),
            ("state", "inplace", *TREES, *MOMENTS[::2]),
        )


@pytest.fixture(autouse=True)
def _cache_as_before() -> Iterator[None]:
    yield
    recycling.set_cache_limit(None)
    recycling.empty_cache()


@pytest.mark.parametrize("name", CALLS)
def test_a_function_takes_junk_or_names_it(name: str) -> None:
    assert not faults(*CALLS[name])


# Damaged checkpoints: files first, whose readers are not ours, then what they hold.


def checkpoint() -> tuple[Any, AdamHparams, AdamState]:
    params = {"w": torch.linspace(-1, 1, 6).view(2, 3), "b": [torch.linspace(0, 1, 5)]}
    hparams = AdamHparams(amsgrad=True, lr=0.1)
    _, state = adam_update(params, params, adam_init(params, hparams), hparams)
    return params, hparams, state


def saved(kind: str) -> bytes:
    _, _, state = checkpoint()
    if kind == "safetensors":
        return safetensors.torch.save(state_to_dict(state))
    file = io.BytesIO()
    torch.save(state_to_dict(state), file)
    return file.getvalue()


def loaded(kind: str, data: bytes) -> Any:
    return safetensors.torch.load(data) if kind == "safetensors" else torch.load(io.BytesIO(data), weights_only=True)


def made_by(call: Callable[..., Any], **given: Any) -> list[Any]:
    """What `call` has made: one thing, or nothing, with an error of ours; what was given is as before."""
    made: list[Any] = []
    fault = fault_of(lambda given: made.append(call(**given)), given, is_pure=True)
    assert not fault, fault
    return made


def assert_refused_or_whole(flat: Any) -> None:
    """Either an error, or a state like the one that was saved, whatever its values."""
    params, hparams, state = checkpoint()
    leaves, treespec = optree.tree_flatten(state)
    for new in made_by(state_from_dict, flat=flat, params=params, hparams=hparams):
        new_leaves, new_treespec = optree.tree_flatten(new)
        assert new_treespec == treespec
        assert [x.shape for x in new_leaves] == [x.shape for x in leaves]
        assert all(x.dtype.is_floating_point for x in new_leaves)
        adam_update(params, params, new, hparams)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@PROPERTY
@given(data=st.data())
def test_a_damaged_file_is_refused_or_makes_a_whole_state(kind: str, data: st.DataObject) -> None:
    content = bytearray(saved(kind))
    # Most of a file of torch.save is padding: damage where there is something, in half of the examples.
    full = [i for i, byte in enumerate(content) if byte]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(full) | st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    try:
        flat = loaded(kind, bytes(content))
    except Exception:  # whatever their readers raise; no state was made
        return
    assert_refused_or_whole(flat)


VALUES: dict[str, Callable[[Any], Any]] = {
    **{f"to {name}": lambda x, name=name: getattr(x.abs(), name)() for name in ("double", "half", "long", "tolist")},
    "other shape": lambda x: x.new_zeros(7),
    "one dimension more": lambda x: x[None],
    "complex": lambda x: x.to(torch.complex64),
    "NaN": lambda x: x * math.nan,
    "number": lambda _: 1.0,
    "None": lambda _: None,
    "text": lambda _: "x",
    "two": lambda x: x + 1,
    "transposed": lambda x: x.T.contiguous() if x.dim() == 2 else x,
}
NEW_KEYS = ("step['w']", "exp_avg['x']", "master_params", "", 3, 7)


def damage(data: st.DataObject, tree: Any) -> None:
    """Change dicts and lists in one to three places: drop, add, rename, swap, or another value."""
    for _ in range(data.draw(st.integers(1, 3))):
        node, value = None, tree
        while isinstance(value, (dict, list)) and value and (node is None or data.draw(st.integers(0, 4))):
            node, keys = value, list(value) if isinstance(value, dict) else range(len(value))
            key = data.draw(st.sampled_from(keys))
            value = node[key]
        if node is None:
            return
        what = data.draw(st.sampled_from(("drop", "add", "rename", "swap", *VALUES)))
        if what == "swap":
            other = data.draw(st.sampled_from(keys))
            node[key], node[other] = node[other], value
        elif what in VALUES:
            fits = isinstance(value, Tensor) or what in ("number", "None", "text")
            node[key] = VALUES[what](value) if fits else value
        if what in ("drop", "rename"):
            del node[key]
        if what in ("add", "rename"):
            node.append(value) if isinstance(node, list) else node.update({data.draw(st.sampled_from(NEW_KEYS)): value})


@PROPERTY
@given(data=st.data())
def test_a_damaged_flat_dict_is_refused_or_makes_a_whole_state(data: st.DataObject) -> None:
    flat = dict(state_to_dict(checkpoint()[2]))
    damage(data, flat)
    assert_refused_or_whole(flat)


def test_another_format_is_refused() -> None:
    params, hparams, state = checkpoint()
    for number in (0, 2, -1, 1.5, math.nan, 2**62):
        flat = {**state_to_dict(state), "format": torch.tensor(number)}
        with pytest.raises(ValueError, match=r"flat is of format .*, but this version reads format 1"):
            state_from_dict(flat, params, hparams)


def torch_checkpoint(name: str, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parameters, and the state dict of an optimizer of torch that has updated some like them."""
    leaves = [torch.ones(2, 3, requires_grad=True), torch.ones(5, requires_grad=True)]
    optimizer = getattr(torch.optim, name)(leaves, **options)
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    return {"w": torch.ones(2, 3), "x": torch.ones(5)}, optimizer.state_dict()


# Not RAdam: it keeps just what Adam keeps, and torch does not tell them apart either.
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "Rprop", "ASGD"])
def test_the_state_dict_of_another_optimizer_is_refused_and_unchanged(name: str) -> None:
    params, state_dict = torch_checkpoint(name)
    assert made_by(from_torch_state_dict, params=params, state_dict=state_dict) == []
    with pytest.raises(ValueError, match=r"state_dict\['(state|param_groups)'\]\[0\] (has no|lacks|has the extra) '"):
        from_torch_state_dict(params, state_dict)


@PROPERTY
@given(data=st.data())
def test_a_damaged_state_dict_is_refused_or_makes_a_whole_state(data: st.DataObject) -> None:
    params, state_dict = torch_checkpoint("Adam", amsgrad=True)
    damage(data, state_dict)
    for state, hparams in made_by(from_torch_state_dict, params=params, state_dict=state_dict):
        assert optree.tree_structure(state.exp_avg) == optree.tree_structure(params)
        adam_update(params, params, state, hparams)
