"""Whatever stands where an argument should: the call works, or says what is wrong in a documented way; nothing changes.

An error is the package's own if a `raise` of the package made it. What an argument raises itself, passes through.
"""

import ast
import functools
import io
import itertools
import math
from collections.abc import Callable, Iterator
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
from tests.builders import snapshot
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

JUNK: dict[str, Callable[[], Any]] = {
    **{
        repr(x): lambda x=x: x
        for x in (None, True, False, 0, 1, -1, 1.5, math.nan, math.inf, -math.inf, 1e308, 1j, "text", "", b"bytes")
    },
    **{repr(x): lambda x=x: x for x in ((), (1, 2), slice(1), ..., int, range(3), torch.float32, torch.device("cpu"))},
    "int too large": lambda: 10**400,
    "negative int too large": lambda: -(10**400),
    "fraction too large": lambda: Fraction(10**400),
    "fraction": lambda: Fraction(1, 2),
    "decimal": lambda: Decimal(1),
    "numpy float32": lambda: np.float32(0.5),
    "numpy NaN": lambda: np.float64("nan"),
    "numpy int": lambda: np.int64(3),
    "numpy bool": lambda: np.bool_(True),
    "numpy array": lambda: np.ones(2),
    "numpy 0-dim array": lambda: np.array(0.5),
    "object": object,
    "list": lambda: [1, 2],
    "empty list": list,
    "dict": lambda: {"w": 1},
    "dict of ints": lambda: {1: 2},
    "empty dict": dict,
    "set": lambda: {1},
    "generator": lambda: (x for x in [1]),
    "iterator": lambda: iter([]),
    "function": lambda: refuse,
    "list of tensors": lambda: [torch.ones(2)],
    "tree like params": lambda: {"w": torch.ones(2), "b": [torch.ones(3)]},
    "state of numbers": lambda: AdamState(1, 2, 3),
    "state of None": lambda: AdamState(None, None, None),
    "hparams": AdamHparams,
    "int tensor": lambda: torch.tensor(1),
    "bool tensor": lambda: torch.tensor(True),
    "complex tensor": lambda: torch.tensor(1j),
    "NaN tensor": lambda: torch.tensor(math.nan),
    "negative tensor": lambda: torch.tensor(-1.0),
    "very negative tensor": lambda: torch.tensor(-1e30),
    "large tensor": lambda: torch.tensor(1e30),
    "meta tensor": lambda: torch.ones(2, device="meta"),
    "meta number": lambda: torch.ones((), device="meta"),
    "sparse tensor": lambda: torch.ones(2).to_sparse(),
    "sparse number": lambda: torch.tensor(1.0).to_sparse(),
    "compressed sparse tensor": lambda: torch.ones(2, 2).to_sparse_csr(),
    "mkldnn tensor": lambda: torch.ones(2).to_mkldnn(),
    "float8 tensor": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "float8 number": lambda: torch.ones(()).to(torch.float8_e4m3fn),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "jagged tensor": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged),
    "no elements": lambda: torch.empty(0),
    "vector": lambda: torch.ones(2),
    "double vector": lambda: torch.ones(2, dtype=torch.float64),
    "int vector": lambda: torch.ones(2, dtype=torch.long),
    "matrix": lambda: torch.ones(3, 3),
    "watched vector": lambda: torch.ones(2, requires_grad=True),
    "watched number": lambda: torch.ones((), requires_grad=True),
    "tensor that refuses": lambda: torch.ones(2).as_subclass(RefusesFunctions),
    "number that refuses": lambda: torch.ones(()).as_subclass(RefusesFunctions),
    "refuses bool": RefusesBool,
    "refuses ==": RefusesEq,
    "refuses attributes": RefusesAttributes,
    "refuses iteration": RefusesIteration,
}

Arguments = dict[str, Any]
Slot = tuple[str, ...]  # the argument, and the keys below


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


def tensors_in(x: Any, seen: set[int]) -> Iterator[Tensor]:
    """All plain dense tensors in `x`, however they are kept."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if type(x) in (Tensor, torch.nn.Parameter):
        if x.device.type == "cpu" and not x.is_nested and x.layout is torch.strided:
            yield x
    elif isinstance(x, AdamHparams):
        yield from tensors_in(x.numbers(), seen)
    elif isinstance(x, torch.optim.Optimizer):
        yield from tensors_in([x.param_groups, list(x.state.values())], seen)
    elif isinstance(x, dict):
        yield from (y for value in x.values() for y in tensors_in(value, seen))
    elif isinstance(x, (list, tuple)):
        yield from (y for value in x for y in tensors_in(value, seen))


def is_unchanged(tensors: list[Tensor], before: list[tuple[Any, ...]]) -> bool:
    return all(
        now[:-1] == then[:-1] and torch.equal(now[-1], then[-1])
        for now, then in zip(snapshot(tensors), before, strict=True)
    )


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


def fault_of(call: Callable[[Arguments], Any], given: Arguments) -> str | None:
    """What is wrong with what `call` does to `given`, or None."""
    tensors = [*tensors_in(given, set())]
    before = snapshot(tensors)
    try:
        call(given)
    except JunkError:
        pass
    except Exception as error:
        if not isinstance(error, DOCUMENTED) or not is_own(error):
            return f"{type(error).__name__}: {str(error)[:200]}"
    else:
        return None  # what was donated may have changed
    return None if is_unchanged(tensors, before) else "something has changed"


def faults(good: Callable[[], Arguments], call: Callable[[Arguments], Any], slots: list[Slot]) -> list[str]:
    """The faults of `call` with each piece of junk in each of `slots`."""
    call(good())
    given, found = good(), []
    for slot, name in itertools.product(slots, JUNK):
        done: list[Any] = []
        fault = fault_of(lambda given, done=done: done.append(call(given)), replaced(given, slot, JUNK[name]()))
        found += [f"{slot} is {name}: {fault}"] if fault else []
        given = good() if done else given  # what was refused is unchanged
    return found


# adam_update.


def slots(*names: str) -> list[Slot]:
    """Written as the argument and the keys below it, with dots between."""
    return [tuple(int(key) if key.isdigit() else key for key in name.split(".")) for name in names]


OPTIONS = {"kernel": "auto", "donate": False, "grad_scale": None, "found_inf": None}
TREE_SLOTS = slots("params", "grads", "params.w", "grads.w", "params.b.0", "grads.b.0")
STATE_SLOTS = slots(
    *(f"state.{name}{key}" for name in AdamState._fields for key in ("", ".w")), "state.step.b.0", "state.exp_avg.b.0"
)
NUMBER_SLOTS = slots(
    *(f"hparams.{name}{key}" for name in ("lr", "beta1", "beta2", "eps", "weight_decay") for key in ("", ".w"))
)
UPDATE_SLOTS = [*slots("state", "hparams", *OPTIONS), *TREE_SLOTS, *STATE_SLOTS, *NUMBER_SLOTS]
PLAIN_SLOTS = [slot for slot in UPDATE_SLOTS if len(slot) < 3 or slot in NUMBER_SLOTS]


def update_arguments(*, is_plain: bool = False, **options: Any) -> Arguments:
    hparams = AdamHparams(amsgrad=not is_plain)
    params = {"w": torch.ones(2, dtype=torch.float32 if is_plain else torch.bfloat16), "b": [torch.ones(3)]}
    state = adam_init(params, hparams, per_leaf_step=not is_plain, master_params=not is_plain)
    grads = {"w": torch.ones(2), "b": [torch.ones(3)]}
    return {"params": params, "grads": grads, "state": state, "hparams": hparams, **OPTIONS, **options}


def update(given: Arguments) -> Any:
    options = {name: given[name] for name in OPTIONS}
    return adam_update(given["params"], given["grads"], given["state"], given["hparams"], **options)


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize(("kernel", "donate"), [("single", True), ("foreach", False), ("fused", True)])
def test_an_update_takes_junk_or_names_it(is_plain: bool, kernel: str, donate: bool) -> None:
    good = functools.partial(update_arguments, is_plain=is_plain, kernel=kernel, donate=donate)
    assert not faults(good, update, PLAIN_SLOTS if is_plain else UPDATE_SLOTS)


@PROPERTY
@given(
    junk=st.lists(st.tuples(st.sampled_from(UPDATE_SLOTS), st.sampled_from(sorted(JUNK))), min_size=2, max_size=4),
    kernel=st.sampled_from(KERNELS),
    donate=st.booleans(),
)
def test_an_update_takes_several_pieces_of_junk_or_names_one(
    junk: list[tuple[Slot, str]], kernel: str, donate: bool
) -> None:
    given = update_arguments(kernel=kernel, donate=donate)
    # Deep slots first: what holds them may become junk too.
    for slot, name in sorted(junk, key=lambda pair: -len(pair[0])):
        given = replaced(given, slot, JUNK[name]())
    fault = fault_of(update, given)
    assert not fault, (junk, fault)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_numbers_too_large_for_the_dtype_become_infinite(kernel: str, decoupled: bool) -> None:
    for lr, weight_decay in itertools.product((1e38, 1e308), (1e39, 1e308)):
        hparams = AdamHparams(
            lr={"w": 0.1, "b": lr}, weight_decay={"w": 0.1, "b": weight_decay}, decoupled_weight_decay=decoupled
        )
        new, _ = update(update_arguments(is_plain=True, hparams=hparams, kernel=kernel, donate=True))
        assert new["w"].isfinite().all()
        assert not new["b"][0].isfinite().any()


# The others.


def init_arguments() -> Arguments:
    params, options = update_arguments(is_plain=True)["params"], {"moment_dtype": None, "master_params": False}
    return {"params": params, "hparams": AdamHparams(), "per_leaf_step": False, **options}


def init(given: Arguments) -> Any:
    return adam_init(given.pop("params"), given.pop("hparams"), **given)


def flat_arguments() -> Arguments:
    given = update_arguments()
    return {"flat": state_to_dict(given["state"]), "params": given["params"], "hparams": given["hparams"]}


def dict_arguments() -> Arguments:
    hparams = AdamHparams(amsgrad=True, lr={"w": 0.1, "b": 0.2})
    params = update_arguments(is_plain=True)["params"]
    return {"params": params, "state_dict": to_torch_state_dict(params, adam_init(params, hparams), hparams)}


FLAT_KEYS = ("format", "step['w']", "exp_avg['w']", "exp_avg_sq['b'][0]", "max_exp_avg_sq['w']", "master_params['w']")
GROUP_KEYS = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
GROUP_KEYS = (*GROUP_KEYS, "param_names", "foreach")
CALLS: dict[str, tuple[Callable[[], Arguments], Callable[[Arguments], Any], list[Slot]]] = {
    "adam_init": (init_arguments, init, slots(*init_arguments(), "params.w")),
    "explain": (
        update_arguments,
        lambda given: explain(*list(given.values())[:4], **{name: given[name] for name in OPTIONS}),
        UPDATE_SLOTS,
    ),
    "AdamHparams": (
        lambda: {"lr": 0.1, "betas": (0.9, 0.9), "eps": 0.1, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
        lambda given: AdamHparams(**given),
        slots("lr", "betas", "betas.0", "betas.1", "eps", "weight_decay", "amsgrad", "maximize"),
    ),
    "state_to_dict": (
        update_arguments,
        lambda given: state_to_dict(given["state"]),
        [*slots("state"), *STATE_SLOTS],
    ),
    "state_from_dict": (
        flat_arguments,
        lambda given: state_from_dict(**given),
        slots("flat", "params", "hparams", "params.w", *(f"flat.{key}" for key in (*FLAT_KEYS, "more", 7))),
    ),
    "to_torch_state_dict": (
        update_arguments,
        lambda given: to_torch_state_dict(given["params"], given["state"], given["hparams"]),
        [*slots("params", "state", "hparams", "params.w"), *STATE_SLOTS, *NUMBER_SLOTS],
    ),
    "from_torch_state_dict": (
        dict_arguments,
        lambda given: from_torch_state_dict(**given),
        slots(
            *("params", "params.w", "state_dict", "state_dict.state", "state_dict.param_groups"),
            *(f"state_dict.state.{key}" for key in (0, 7, "more")),
            *(f"state_dict.state.0.{key}" for key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "more")),
            *(f"state_dict.param_groups.{i}" for i in (0, 1)),
            *(f"state_dict.param_groups.{i}.{key}" for i in (0, 1) for key in GROUP_KEYS),
            *(f"state_dict.param_groups.0.{key}.0" for key in ("params", "betas")),
        ),
    ),
    "transformation.adam": (
        lambda: {"lr": 0.1, "betas": (0.9, 0.9), "eps": 0.1, "weight_decay": 0.1, "amsgrad": True, "kernel": "auto"},
        lambda given: transformation.adam(**given),
        slots("lr", "betas", "eps", "weight_decay", "amsgrad", "kernel"),
    ),
    **{
        f"update of transformation.adam(weight_decay={decay}), inplace={inplace}": (
            functools.partial(update_arguments, is_plain=True, inplace=inplace),
            lambda given, decay=decay: transformation.adam(weight_decay=decay).update(
                given["grads"], given["state"], given["params"], inplace=given["inplace"]
            ),
            slots("state", "inplace", *(".".join(slot) for slot in (*TREE_SLOTS[:4], *STATE_SLOTS) if len(slot) < 3)),
        )
        for decay in (0.0, 0.1)
        for inplace in (False, True)
    },
    **{
        f"transformation.apply_updates, inplace={inplace}": (
            functools.partial(update_arguments, is_plain=True, inplace=inplace),
            lambda given: transformation.apply_updates(given["params"], given["grads"], inplace=given["inplace"]),
            [*TREE_SLOTS, *slots("inplace")],
        )
        for inplace in (False, True)
    },
    "recycling.set_cache_limit": (
        lambda: {"limit": None},
        lambda given: recycling.set_cache_limit(given["limit"]),
        slots("limit"),
    ),
    "step_in_backward": (
        lambda: {"optimizer": _FunctionalAdam([torch.ones(2, requires_grad=True)])},
        lambda given: step_in_backward(given["optimizer"]),
        slots("optimizer"),
    ),
}


@pytest.fixture(autouse=True)
def _cache_as_before() -> Iterator[None]:
    yield
    recycling.set_cache_limit(None)
    recycling.empty_cache()


@pytest.mark.parametrize("name", CALLS)
def test_a_function_takes_junk_or_names_it(name: str) -> None:
    assert not faults(*CALLS[name])


# The adapter, whose constructor and groups torch.optim.Optimizer checks.


def adapter_arguments() -> Arguments:
    params, grads = ([torch.ones(2), torch.ones(3)] for _ in range(2))
    optimizer = _FunctionalAdam(params, lr=0.1)
    optimizer.step([torch.ones(2), torch.ones(3)])
    one = {"param": params[0], "grad": grads[0]}
    return {"optimizer": optimizer, "params": params, "grads": grads, **one, "closure": None}


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda x: x["optimizer"].step(x["grads"], closure=x["closure"]), ("grads", "grads.0", "grads.1")),
        (lambda x: x["optimizer"].step_param(x["param"], x["grad"]), ("param", "grad")),
        (
            lambda x: x["optimizer"].step_params(x["params"], x["grads"]),
            ("params", "grads", "params.1", "grads.1"),
        ),
    ],
    ids=["step", "step_param", "step_params"],
)
def test_a_step_of_the_adapter_takes_junk_or_names_it(call: Callable[[Arguments], Any], names: tuple[str, ...]) -> None:
    assert not faults(adapter_arguments, call, slots(*names))


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"])
def test_a_group_of_the_adapter_takes_junk_or_names_it(name: str) -> None:
    def step(given: Arguments) -> None:
        given["optimizer"].param_groups[0][name] = given["junk"]
        given["optimizer"].step(given["grads"])

    assert not [
        (junk, fault)
        for junk, make in JUNK.items()
        if (fault := fault_of(step, {**adapter_arguments(), "junk": make()}))
    ]


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
    tensors = [*tensors_in(given, set())]
    before = snapshot(tensors)
    fault = fault_of(lambda given: made.append(call(**given)), given)
    assert not fault, fault
    assert is_unchanged(tensors, before)
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


def test_an_undamaged_file_makes_the_state() -> None:
    params, hparams, state = checkpoint()
    for kind in ("torch", "safetensors"):
        new = state_from_dict(loaded(kind, saved(kind)), params, hparams)
        assert all(map(torch.equal, optree.tree_leaves(new), optree.tree_leaves(state)))


VALUES = {
    "other shape": lambda x: x.new_zeros(7),
    "one dimension more": lambda x: x[None],
    "other dtype": lambda x: x.abs().double(),
    "half": lambda x: x.abs().half(),
    "int": lambda x: x.abs().long(),
    "complex": lambda x: x.to(torch.complex64),
    "NaN": lambda x: x * math.nan,
    "list": lambda x: x.tolist(),
    "number": lambda _: 1.0,
    "None": lambda _: None,
    "text": lambda _: "x",
    "two": lambda x: x + 1,
    "transposed": lambda x: x.T.contiguous() if x.dim() == 2 else x,
}


@PROPERTY
@given(data=st.data())
def test_a_damaged_flat_dict_is_refused_or_makes_a_whole_state(data: st.DataObject) -> None:
    flat: dict[Any, Any] = dict(state_to_dict(checkpoint()[2]))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(flat, key=str)))
        what = data.draw(st.sampled_from(("drop", "add", "rename", "swap", *VALUES)))
        if what == "drop":
            del flat[key]
        elif what == "add":
            flat[data.draw(st.sampled_from(("step['w']", "exp_avg['x']", "master_params", "", 3)))] = torch.ones(1)
        elif what == "rename":
            flat[f"{key} "] = flat.pop(key)
        elif what == "swap":
            other = data.draw(st.sampled_from(sorted(flat, key=str)))
            flat[key], flat[other] = flat[other], flat[key]
        elif isinstance(flat[key], Tensor):
            flat[key] = VALUES[what](flat[key])
    assert_refused_or_whole(flat)


@pytest.mark.parametrize("number", [0, 2, -1, 1.5, math.nan, 2**62])
def test_another_format_is_refused(number: float) -> None:
    params, hparams, state = checkpoint()
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
    for _ in range(data.draw(st.integers(1, 3))):
        node, path = cast("Any", state_dict), []
        while isinstance(node, (dict, list)) and node and (not path or data.draw(st.integers(0, 4))):
            key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            path.append((node, key))
            node = node[key]
        if not path:
            break
        node, key = path[-1]
        value = node[key]
        what = data.draw(st.sampled_from(("drop", "again", *VALUES)))
        if what == "drop":
            del node[key]
        elif what == "again":
            if isinstance(node, list):
                node.append(value)
            else:
                node[7] = value
        elif isinstance(value, Tensor) or what in ("number", "None", "text"):
            node[key] = VALUES[what](value)
    for state, hparams in made_by(from_torch_state_dict, params=params, state_dict=state_dict):
        assert optree.tree_structure(state.exp_avg) == optree.tree_structure(params)
        adam_update(params, params, state, hparams)
