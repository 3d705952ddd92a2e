"""A wrong call raises the right class, says where, what came, what was expected, what to do, and changes nothing."""

import copy
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import KERNELS_AND_AUTO, assert_same_bits, assert_unchanged, clone, snapshot, tensors_of
from tests.strategies import Pair

# torch says so of the format, whatever is done with it.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

HPARAMS = AdamHparams(lr=0.1)
NESTED = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)
JAGGED = torch.nested.as_nested_tensor([torch.ones(4)] * 3, layout=torch.jagged)
ONE = torch.ones(1)
WEIGHT = "params['layer'][0]"
TENSORS = [WEIGHT, "grads['layer'][0]", "state.exp_avg_sq['layer'][0]"]
TENSORS += ["state.step", "hparams.lr", "grad_scale", "found_inf"]


class Point(NamedTuple):
    x: Any
    y: Any


def good_call(*, per_leaf_step: bool = False) -> dict[str, Any]:
    """The arguments of `adam_update`, with all kinds of nodes and all kinds of moments."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pair, point = (randn(5), randn(1)), Point(randn(2), randn())
    params = {"layer": [randn(3, 4), randn(4)], "nothing": None, "pair": pair, "point": point}
    hparams = AdamHparams(lr=0.1, amsgrad=True)
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
    grads = optree.tree_map(lambda x: randn(*x.shape), params)
    return {"params": params, "grads": grads, "state": state, "hparams": hparams}


def put(tree: Any, keys: Sequence[str], make: Callable[[Any], Any]) -> Any:
    """A copy of `tree` with `make(x)` for the x at `keys`; hyperparameters are not checked, as after a tree map."""
    if not keys:
        return make(tree)
    key, *rest = keys
    if isinstance(tree, dict):
        return {**tree, key: put(tree.get(key), rest, make)}
    if isinstance(tree, AdamHparams):
        rebuilt = copy.copy(tree)
        vars(rebuilt)[key] = put(getattr(tree, key), rest, make)
        return rebuilt
    if hasattr(tree, "_fields"):
        return tree._replace(**{key: put(getattr(tree, key), rest, make)})
    items = [*tree]
    items[int(key)] = put(items[int(key)], rest, make)
    return type(tree)(items)


def pattern(text: str) -> str:
    """Anything may stand for the dots in `text`."""
    return "^" + ".*".join(map(re.escape, text.split(" ... ")))


def none(_: Any) -> None:
    return None


def to_meta(x: Tensor) -> Tensor:
    return x.to("meta")


def two_tensors(x: Tensor | None) -> TwoTensor:
    x = torch.tensor(0.5) if x is None else torch.as_tensor(x)
    return TwoTensor(x.clone(), x.clone())


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tree: {key: x for key, x in tree.items() if key not in keys}


def donated(state: AdamState) -> AdamState:
    call = {**good_call(), "state": clone(state)}
    adam_update(**call, donate=True)
    return call["state"]


# Where the call is broken, how, the error, and what it says behind that place.
FAULTS: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    # Structure.
    ("grads", without("pair"), ValueError, "lacks ['pair'] ... params"),
    ("grads", tensors_of, ValueError, "is of type list ... params is of type dict"),
    ("grads", none, ValueError, "is None ... params is of type dict"),
    ("grads['pair']", lambda x: (*x, ONE), ValueError, "has length 3 ... params['pair'] has length 2"),
    ("grads['layer']", lambda x: x[0], ValueError, "is of type Tensor ... params['layer'] is of type list"),
    ("grads['layer'][0]", list, TypeError, "is of type list ... a tensor"),
    ("grads['point']", lambda x: Pair(*x), ValueError, "is of type Pair ... params['point'] is of type Point"),
    ("grads['point']", tuple, ValueError, "is of type tuple ... params['point'] is of type Point"),
    ("state.exp_avg", lambda _: (), ValueError, "is of type tuple ... params is of type dict"),
    ("state.exp_avg_sq", without("point"), ValueError, "lacks ['point']"),
    ("state.max_exp_avg_sq", without("pair"), ValueError, "lacks ['pair']"),
    ("state.step", lambda x: {"layer": [x, x], "nothing": None}, ValueError, "lacks ['pair', 'point']"),
    # Shape and device.
    ("grads['layer'][0]", lambda x: x.mT, ValueError, f"has shape (4, 3) ... {WEIGHT} has shape (3, 4)"),
    ("grads['point'].y", lambda x: x[None], ValueError, "has shape (1,) ... params['point'].y has shape ()"),
    ("state.exp_avg['layer'][0]", Tensor.flatten, ValueError, f"(12,) ... {WEIGHT} has shape (3, 4)"),
    ("state.exp_avg_sq['layer'][0]", Tensor.sum, ValueError, f"() ... {WEIGHT} has shape (3, 4)"),
    ("state.max_exp_avg_sq['layer'][0]", Tensor.flatten, ValueError, f"(12,) ... {WEIGHT} has shape (3, 4)"),
    ("grads['layer'][0]", to_meta, ValueError, f"is on meta ... {WEIGHT} is on cpu"),
    ("state.max_exp_avg_sq['layer'][0]", to_meta, ValueError, f"is on meta ... {WEIGHT} is on cpu"),
    ("state.step", to_meta, ValueError, "is on meta ... is on cpu ... per_leaf_step=True"),
    ("state.step['layer'][1]", to_meta, ValueError, "is on meta ... is on cpu"),
    # Kinds of tensors.
    ("grads['layer'][0]", Tensor.to_sparse, TypeError, "torch.sparse_coo ... a dense tensor"),
    ("params['layer'][0]", Tensor.to_sparse_csr, TypeError, "torch.sparse_csr ... a dense tensor"),
    ("grads['layer'][0]", lambda _: JAGGED, TypeError, "nested ... a dense tensor"),
    ("params['layer'][0]", lambda _: NESTED, TypeError, "nested ... a dense tensor"),
    ("grads['layer'][0]", Tensor.long, TypeError, "torch.int64 ... a floating or complex dtype"),
    ("params['layer'][0]", Tensor.bool, TypeError, "torch.bool ... a floating or complex dtype"),
    ("state.max_exp_avg_sq['layer'][0]", Tensor.int, TypeError, "torch.int32 ... a floating or complex dtype"),
    *((where, two_tensors, TypeError, "is of type TwoTensor ... a plain tensor or a DTensor") for where in TENSORS),
    ("grads['layer'][0]", Tensor.cfloat, TypeError, f"torch.complex64 ... {WEIGHT} is of torch.float32"),
    ("state.max_exp_avg_sq['layer'][0]", Tensor.cfloat, TypeError, f"complex64 ... {WEIGHT} is of torch.float32"),
    ("params['layer'][0]", lambda _: 1.0, TypeError, "is of type float ... a tensor"),
    ("state.exp_avg['layer'][0]", none, TypeError, "is of type NoneType ... a tensor"),
    # Swapped and wrong arguments.
    ("grads", lambda _: good_call()["state"], TypeError, "is of type AdamState ... gradients ... The order is"),
    ("state", lambda _: HPARAMS, TypeError, "is of type AdamHparams ... the AdamState ... The order is"),
    ("state", tuple, TypeError, "is of type tuple ... the AdamState ... The order is"),
    ("hparams", lambda _: 1e-3, TypeError, "is of type float ... AdamHparams ... The order is"),
    ("state.master_params", lambda _: good_call()["params"], TypeError, "is given ... torch.float32"),
    ("state.max_exp_avg_sq", lambda _: (), ValueError, "is () ... hparams.amsgrad is True"),
    # Hyperparameters as they can come out of a tree map or a stack.
    ("hparams.lr", lambda _: ONE, ValueError, "has shape (1,) ... a number or a 0-dim tensor"),
    ("hparams.betas[1]", lambda _: torch.ones(2), ValueError, "has shape (2,) ... a number or a 0-dim tensor"),
    ("hparams.eps", none, TypeError, "is None ... a number or a 0-dim tensor"),
    ("hparams.betas[0]", lambda _: "lr", TypeError, "is 'lr' ... a number or a 0-dim tensor"),
    ("hparams.lr", lambda _: True, TypeError, "is True ... a number or a 0-dim tensor"),
    ("hparams.weight_decay", lambda _: torch.tensor(1j), TypeError, "torch.complex64 ... a real tensor"),
    # Options.
    ("kernel", lambda _: "quick", ValueError, "is 'quick' ... 'auto', 'single', 'foreach', 'fused'"),
    ("found_inf", lambda _: torch.zeros(1), ValueError, "has shape (1,) ... a number or a 0-dim tensor"),
    ("grad_scale", lambda _: torch.tensor(1 + 0j), TypeError, "torch.complex64 ... a real"),
    ("grad_scale", lambda _: 1j, TypeError, "is of type complex ... a number or a 0-dim tensor"),
    ("found_inf", lambda _: "no", TypeError, "is of type str ... a number or a 0-dim tensor"),
    # Gradients that are None.
    ("grads['point'].y", none, ValueError, "is None ... share one step ... per_leaf_step=True"),
    # Steps.
    ("state.step", lambda x: x.expand(4), ValueError, "has shape (4,) ... ()"),
    ("state.step", Tensor.double, TypeError, "is of torch.float64 ... torch.float32"),
    ("state.step", none, TypeError, "is of type NoneType ... 0-dim float32 tensor"),
    ("state.step['layer'][1]", Tensor.bfloat16, TypeError, "is of torch.bfloat16 ... torch.float32"),
    ("state.step['layer'][1]", lambda x: x.expand(2), ValueError, "has shape (2,) ... ()"),
    ("state.step['layer'][1]", lambda _: 0.0, TypeError, "is of type float ... 0-dim float32 tensor"),
]
# The same where the place that is named is not the one that was changed, or stands for another fault.
MOMENT = "state.exp_avg['layer'][0]"
OTHER_FAULTS: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    (WEIGHT, to_meta, ValueError, f"{MOMENT} is on cpu ... {WEIGHT} is on meta"),
    (WEIGHT, Tensor.cfloat, TypeError, f"{MOMENT} is of torch.float32 ... {WEIGHT} is of torch.complex64"),
    ("hparams", lambda _: HPARAMS, ValueError, "state.max_exp_avg_sq is kept ... hparams.amsgrad is False"),
    ("state", donated, RuntimeError, "state.step ... was donated ... Use the state that came back"),
]
ALL_FAULTS = [(*fault[:3], f"{fault[0]} ... {fault[3]}") for fault in FAULTS] + OTHER_FAULTS


@pytest.mark.parametrize(("where", "make", "error", "message"), ALL_FAULTS, ids=[x[3] for x in ALL_FAULTS])
def test_a_wrong_call_says_what_is_wrong_and_changes_nothing(
    where: str, make: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    call = good_call(per_leaf_step=where.startswith("state.step["))
    before, expected = snapshot(list(call.values())), adam_update(**call)
    for kernel, donate in itertools.product(KERNELS_AND_AUTO, (False, True)):
        broken = put({**call, "kernel": kernel, "donate": donate}, re.findall(r"\w+", where), make)
        with pytest.raises(error, match=pattern(message)) as caught:
            adam_update(**broken)
        # One sentence of the package's own.
        assert type(caught.value) is error
        assert str(caught.value).endswith(".")
        assert "{" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert_unchanged(list(call.values()), before)
    assert_same_bits(adam_update(**call), expected)


@pytest.mark.parametrize(("key", "message"), [(None, "grads has"), ("a{0}b", "grads['a{0}b'] has")])
def test_the_path_of_a_leaf_may_be_empty_or_odd(key: str | None, message: str) -> None:
    param, grad = (torch.ones(n) if key is None else {key: torch.ones(n)} for n in (3, 2))
    with pytest.raises(ValueError, match=pattern(f"{message} shape (2,) ... {message.replace('grads', 'params')}")):
        adam_update(param, grad, adam_init(param, HPARAMS), HPARAMS)


def test_fused_cannot_run_on_the_meta_device_and_auto_can() -> None:
    param = torch.ones(3, device="meta")
    state = adam_init(param, HPARAMS)
    with pytest.raises(RuntimeError, match=r"kernel='fused' cannot run here.*on meta.*cpu and cuda.*kernel='auto'"):
        adam_update(param, param, state, HPARAMS, kernel="fused")
    for kernel in ("auto", "single", "foreach"):
        new, new_state = adam_update(param, param, state, HPARAMS, kernel=kernel)
        assert (new.device.type, new.shape) == ("meta", (3,))
        assert new_state.step.device.type == "meta"


def test_a_torch_without_a_kernel_says_so_and_auto_takes_the_next() -> None:
    code = """
import os
import torch

def try_without(hidden, missing, chosen):
    for name in hidden:
        delattr(torch, name)
    from functional_adam import AdamHparams, adam_init, adam_update, explain

    params, hparams = torch.tensor([1.0, -2.0]), AdamHparams(lr=0.1)
    call = (params, params, adam_init(params, hparams), hparams)
    explanation = explain(*call)
    assert explanation.computed_by == chosen
    for kernel, name in missing.items():
        try:
            adam_update(*call, kernel=kernel)
        except RuntimeError as error:
            assert str(error).startswith(f"kernel='{kernel}' cannot run here: {explanation.reasons[kernel]}."), error
            assert explanation.reasons[kernel] == f"this torch has no torch.{name}"
        else:
            raise AssertionError(kernel)
    (auto, _), (other, _) = (adam_update(*call, kernel=k) for k in ("auto", chosen))
    assert torch.equal(auto, other) and not torch.equal(auto, params)

for case in (
    (["_fused_adamw_"], {"fused": "_fused_adam_"}, "foreach"),
    (["_fused_adam_", "_foreach_addcdiv_"], {"fused": "_fused_adam_", "foreach": "_foreach_addcdiv_"}, "single"),
):
    # The package looks once, when it is imported.
    child = os.fork()
    if not child:
        try_without(*case)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, case
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# Subclasses of tensors that are not refused.


class Subclass(Tensor):
    """A tensor with Python behaviour of its own."""


def test_subclasses_that_run_an_operation_once_are_updated() -> None:
    call = good_call()
    for root, make in itertools.product(
        ("grads", "params"), (lambda x: x.as_subclass(Subclass), AsyncCollectiveTensor)
    ):
        for kernel in KERNELS_AND_AUTO:
            got = adam_update(**put(call, [root, "layer", "0"], make), kernel=kernel)
            assert_same_bits(got, adam_update(**call, kernel=kernel))


def test_a_tracer_takes_subclasses_apart() -> None:
    param, grad = torch.zeros(3), torch.ones(3)
    state, update = adam_init(param, HPARAMS), torch.compile(adam_update, backend="eager")
    expected, _ = adam_update(param, grad, state, HPARAMS)
    new, _ = update(param, TwoTensor(grad, grad.clone()), state, HPARAMS)
    for part in (new.a, new.b):
        torch.testing.assert_close(part, expected)


# adam_init.


def test_init_refuses_what_cannot_be_updated() -> None:
    for leaf, message in (
        (torch.ones(2, dtype=torch.int64), "torch.int64 ... floating or complex"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo ... dense"),
        (NESTED, "nested ... dense"),
        (TwoTensor(torch.ones(2), torch.ones(2)), "is of type TwoTensor ... a plain tensor or a DTensor"),
        ("w", "is of type str ... a tensor"),
    ):
        for per_leaf_step in (False, True):
            with pytest.raises(TypeError, match=pattern(f"params['b'][0] ... {message}")):
                adam_init({"a": torch.ones(2), "b": [leaf]}, HPARAMS, per_leaf_step=per_leaf_step)


CONTAINERS: dict[str, Callable[[], Any]] = {
    "generator": lambda: torch.nn.Linear(2, 2).parameters(),
    "module": lambda: torch.nn.Linear(2, 2),
    "ParameterDict": lambda: torch.nn.ParameterDict({"w": torch.ones(2)}),
    "ParameterList": lambda: torch.nn.ParameterList([torch.ones(2)]),
    "values": lambda: {"w": torch.ones(2)}.values(),
    "map": lambda: map(torch.clone, [torch.ones(2)]),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_what_holds_parameters_and_is_no_tree_of_them_is_told_what_to_pass(make: Callable[[], Any]) -> None:
    params, state = make(), AdamState(torch.zeros(()), torch.ones(2), torch.ones(2))
    message = (
        f"is of type {type(params).__name__}. ... pass {{name: p.detach() for name, p in model.named_parameters()}}"
    )
    with pytest.raises(TypeError, match=pattern(f"params['a'][0] {message}")):
        adam_init({"a": [params]}, HPARAMS)
    with pytest.raises(TypeError, match=pattern(f"params {message}")):
        adam_update(params, torch.ones(2), state, HPARAMS)


def test_init_refuses_what_is_not_hparams() -> None:
    for given in (None, {"lr": 0.1}, 0.1, AdamState(1, 2, 3)):
        with pytest.raises(TypeError, match=rf"hparams is of type {type(given).__name__}\. Expected an AdamHparams"):
            adam_init(torch.ones(2), given)


def test_init_refuses_mixed_devices_with_a_shared_step() -> None:
    params = {"a": torch.ones(2), "b": [torch.ones(2, device="meta")]}
    with pytest.raises(ValueError, match=r"params\['b'\]\[0\] is on meta.*params\['a'\] is on cpu.*per_leaf_step=True"):
        adam_init(params, HPARAMS)
    state = adam_init(params, HPARAMS, per_leaf_step=True)
    assert (state.step["a"].device.type, state.step["b"][0].device.type) == ("cpu", "meta")
