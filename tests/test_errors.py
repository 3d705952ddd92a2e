"""A wrong call raises the right class, says where, what came, what was expected, what to do, and changes nothing."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor

from functional_adam import AdamHparams, AdamState, adam_init, adam_update

# torch says so of the format, whatever is done with it.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

KERNELS = ("auto", "single", "foreach", "fused")
HPARAMS = AdamHparams(lr=0.1)


class Call(NamedTuple):
    """The arguments of one `adam_update`."""

    params: Any
    grads: Any
    state: Any
    hparams: Any
    options: dict[str, Any]

    def run(self, **options: Any) -> Any:
        return adam_update(*self[:4], **{**options, **self.options})


class Point(NamedTuple):
    x: Any
    y: Any


class OtherPoint(NamedTuple):
    x: Any
    y: Any


class Fault(NamedTuple):
    """How to break a call, and what the error must be."""

    error: type[Exception]
    words: tuple[str, ...]  # where, what came, what was expected, what to do
    break_call: Callable[[Call], Call]


def good_call(*, hparams: AdamHparams = HPARAMS, per_leaf_step: bool = False) -> Call:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    params = {"layer": [randn(3, 4), randn(4)], "point": Point(randn(2), randn()), "pair": (randn(5), randn(1))}
    grads = torch_pytree.tree_map(lambda x: randn(*x.shape), params)
    return Call(params, grads, adam_init(params, hparams, per_leaf_step=per_leaf_step), hparams, {})


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def snapshot(tree: Any) -> list[tuple[Any, ...]]:
    return [(x._version, x.data_ptr(), x.shape, x.clone()) for x in tensors_of(tree)]


def assert_unchanged(tree: Any, before: list[tuple[Any, ...]]) -> None:
    for now, then in zip(snapshot(tree), before, strict=True):
        assert now[:-1] == then[:-1]
        assert torch.equal(now[-1], then[-1])


def grads(**entries: Any) -> Callable[[Call], Call]:
    return lambda call: call._replace(grads={**call.grads, **entries})


def first_grad(make: Callable[[Tensor], Any]) -> Callable[[Call], Call]:
    return lambda call: call._replace(
        grads={**call.grads, "layer": [make(call.grads["layer"][0]), call.grads["layer"][1]]}
    )


def first_param(make: Callable[[Tensor], Any]) -> Callable[[Call], Call]:
    return lambda call: call._replace(
        params={**call.params, "layer": [make(call.params["layer"][0]), call.params["layer"][1]]}
    )


def moment(name: str, make: Callable[[Tensor], Any]) -> Callable[[Call], Call]:
    def break_call(call: Call) -> Call:
        tree = getattr(call.state, name)
        return call._replace(
            state=call.state._replace(**{name: {**tree, "layer": [make(tree["layer"][0]), tree["layer"][1]]}})
        )

    return break_call


def step(make: Callable[[Tensor], Any]) -> Callable[[Call], Call]:
    return lambda call: call._replace(state=call.state._replace(step=make(call.state.step)))


def leaf_step(make: Callable[[Tensor], Any]) -> Callable[[Call], Call]:
    def break_call(call: Call) -> Call:
        state = adam_init(call.params, call.hparams, per_leaf_step=True)
        layer = state.step["layer"]
        return call._replace(state=state._replace(step={**state.step, "layer": [layer[0], make(layer[1])]}))

    return break_call


def state(**fields: Any) -> Callable[[Call], Call]:
    return lambda call: call._replace(state=call.state._replace(**fields))


def options(**given: Any) -> Callable[[Call], Call]:
    return lambda call: call._replace(options=given)


def hparams(given: Any) -> Callable[[Call], Call]:
    return lambda call: call._replace(hparams=given)


def rebuilt(name: str, value: Any) -> Callable[[Call], Call]:
    """Hyperparameters as a tree map leaves them: unchecked."""
    index = ("lr", "betas[0]", "betas[1]", "eps", "weight_decay").index(name)
    leaves, treespec = torch_pytree.tree_flatten(HPARAMS)
    leaves[index] = value
    return hparams(treespec.unflatten(leaves))


def swap_grads_and_state(call: Call) -> Call:
    return call._replace(grads=call.state, state=call.grads)


def swap_state_and_hparams(call: Call) -> Call:
    return call._replace(state=call.hparams, hparams=call.state)


def drop(key: str) -> Callable[[Call], Call]:
    return lambda call: call._replace(grads={k: v for k, v in call.grads.items() if k != key})


def without_layer(call: Call) -> Call:
    params = {**call.params, "layer": None}
    return call._replace(params=params, state=adam_init(params, call.hparams))


def moments_without(name: str, key: str) -> Callable[[Call], Call]:
    return lambda call: call._replace(
        state=call.state._replace(**{name: {k: v for k, v in getattr(call.state, name).items() if k != key}})
    )


def with_amsgrad_state(call: Call) -> Call:
    return call._replace(state=adam_init(call.params, AdamHparams(amsgrad=True)))


def donated_state(call: Call) -> Call:
    copied = torch_pytree.tree_map(Tensor.clone, (call.params, call.state))
    adam_update(copied[0], call.grads, copied[1], call.hparams, donate=True)
    return call._replace(state=copied[1])


NESTED = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)
JAGGED = torch.nested.as_nested_tensor([torch.ones(4)] * 3, layout=torch.jagged)
TWO_NUMBERS = TwoTensor(torch.tensor(0.5), torch.tensor(0.5))
OF_TWO_TENSORS = ("is of type TwoTensor", "__torch_dispatch__", "Expected a plain tensor or a DTensor", "unwrap it")

FAULTS: dict[str, Fault] = {
    # Structure.
    "missing grad": Fault(ValueError, ("grads", "lacks ['pair']", "params", "structure of params"), drop("pair")),
    "extra grad": Fault(
        ValueError, ("grads", "extra ['more']", "params", "structure of params"), grads(more=torch.ones(1))
    ),
    "list for tuple": Fault(
        ValueError,
        ("grads['pair']", "type list", "params['pair'] is of type tuple", "structure of params"),
        grads(pair=[torch.ones(5), torch.ones(1)]),
    ),
    "tuple for list": Fault(
        ValueError,
        ("grads['layer']", "type tuple", "params['layer'] is of type list", "structure of params"),
        grads(layer=(torch.ones(3, 4), torch.ones(4))),
    ),
    "shorter list": Fault(
        ValueError,
        ("grads['layer']", "length 1", "params['layer'] has length 2", "structure of params"),
        grads(layer=[torch.ones(3, 4)]),
    ),
    "longer tuple": Fault(
        ValueError,
        ("grads['pair']", "length 3", "params['pair'] has length 2", "structure of params"),
        grads(pair=(torch.ones(5), torch.ones(1), torch.ones(1))),
    ),
    "another NamedTuple": Fault(
        ValueError,
        ("grads['point']", "type OtherPoint", "params['point'] is of type Point", "structure of params"),
        grads(point=OtherPoint(torch.ones(2), torch.ones(()))),
    ),
    "tuple for NamedTuple": Fault(
        ValueError,
        ("grads['point']", "type tuple", "params['point'] is of type Point", "structure of params"),
        grads(point=(torch.ones(2), torch.ones(()))),
    ),
    "tensor for list": Fault(
        ValueError,
        ("grads['layer']", "type Tensor", "params['layer'] is of type list", "structure of params"),
        grads(layer=torch.ones(3, 4)),
    ),
    "None for list": Fault(
        ValueError,
        ("grads['layer']", "is None", "params['layer'] is of type list", "structure of params"),
        grads(layer=None),
    ),
    "tensor for None": Fault(
        ValueError,
        ("grads['layer']", "type Tensor", "params['layer'] is None", "structure of params"),
        lambda call: grads(layer=torch.ones(3))(without_layer(call)),
    ),
    "longer tuple behind None": Fault(
        ValueError,
        ("grads['pair']", "length 3", "params['pair'] has length 2", "structure of params"),
        lambda call: grads(layer=None, pair=(torch.ones(5),) * 3)(without_layer(call)),
    ),
    "list for leaf": Fault(
        TypeError, ("grads['layer'][0]", "type list", "Expected a tensor"), first_grad(lambda x: list(x))
    ),
    "list for all grads": Fault(
        ValueError,
        ("grads is of type list", "params is of type dict", "structure of params"),
        lambda call: call._replace(grads=tensors_of(call.grads)),
    ),
    "all grads None": Fault(
        ValueError, ("grads is None", "params is of type dict", "structure of params"), lambda c: c._replace(grads=None)
    ),
    "missing exp_avg": Fault(
        ValueError, ("state.exp_avg", "lacks ['pair']", "structure of params"), moments_without("exp_avg", "pair")
    ),
    "missing exp_avg_sq": Fault(
        ValueError,
        ("state.exp_avg_sq", "lacks ['point']", "structure of params"),
        moments_without("exp_avg_sq", "point"),
    ),
    "absent exp_avg": Fault(
        ValueError, ("state.exp_avg", "type tuple", "params is of type dict", "structure of params"), state(exp_avg=())
    ),
    "step tree of another structure": Fault(
        ValueError,
        ("state.step", "lacks ['pair', 'point']", "structure of params"),
        state(step={"layer": [torch.tensor(0.0), torch.tensor(0.0)]}),
    ),
    # Shape and device.
    "shape of grad": Fault(
        ValueError,
        ("grads['layer'][0]", "(4, 3)", "params['layer'][0] has shape (3, 4)", "must match"),
        first_grad(lambda x: x.mT),
    ),
    "shape of grad that broadcasts": Fault(
        ValueError,
        ("grads['layer'][0]", "(4,)", "params['layer'][0] has shape (3, 4)", "must match"),
        first_grad(lambda x: x[0]),
    ),
    "shape of last grad": Fault(
        ValueError,
        ("grads['point'].y", "(1,)", "params['point'].y has shape ()", "must match"),
        grads(point=Point(torch.ones(2), torch.ones(1))),
    ),
    "shape of exp_avg": Fault(
        ValueError,
        ("state.exp_avg['layer'][0]", "(12,)", "params['layer'][0] has shape (3, 4)", "adam_init"),
        moment("exp_avg", lambda x: x.flatten()),
    ),
    "shape of exp_avg_sq": Fault(
        ValueError,
        ("state.exp_avg_sq['layer'][0]", "()", "params['layer'][0] has shape (3, 4)", "adam_init"),
        moment("exp_avg_sq", lambda x: x.sum()),
    ),
    "device of grad": Fault(
        ValueError,
        ("grads['layer'][0]", "is on meta", "params['layer'][0] is on cpu", "must match"),
        first_grad(lambda x: x.to("meta")),
    ),
    "device of exp_avg": Fault(
        ValueError,
        ("state.exp_avg['layer'][0]", "is on meta", "params['layer'][0] is on cpu", "adam_init"),
        moment("exp_avg", lambda x: x.to("meta")),
    ),
    "device of step": Fault(
        ValueError, ("state.step", "is on meta", "is on cpu", "per_leaf_step=True"), step(lambda x: x.to("meta"))
    ),
    "device of a leaf's step": Fault(
        ValueError,
        ("state.step['layer'][1]", "is on meta", "is on cpu", "Move the state"),
        leaf_step(lambda x: x.to("meta")),
    ),
    "device of param": Fault(
        ValueError,
        ("params['layer'][0]", "is on meta", "is on cpu"),
        first_param(lambda x: x.to("meta")),
    ),
    # Kinds of tensors.
    "sparse grad": Fault(
        TypeError,
        ("grads['layer'][0]", "torch.sparse_coo", "Expected a dense tensor", "to_dense()"),
        first_grad(lambda x: x.to_sparse()),
    ),
    "sparse param": Fault(
        TypeError,
        ("params['layer'][0]", "torch.sparse_coo", "Expected a dense tensor", "to_dense()"),
        first_param(lambda x: x.to_sparse()),
    ),
    "compressed sparse grad": Fault(
        TypeError,
        ("grads['layer'][0]", "torch.sparse_csr", "Expected a dense tensor", "to_dense()"),
        first_grad(lambda x: x.to_sparse_csr()),
    ),
    "integer grad": Fault(
        TypeError,
        ("grads['layer'][0]", "torch.int64", "Expected a floating or complex dtype", "convert it"),
        first_grad(lambda x: x.long()),
    ),
    "bool param": Fault(
        TypeError,
        ("params['layer'][0]", "torch.bool", "Expected a floating or complex dtype", "convert it"),
        first_param(lambda x: x > 0),
    ),
    "integer moment": Fault(
        TypeError,
        ("state.exp_avg['layer'][0]", "torch.int32", "Expected a floating or complex dtype", "convert it"),
        moment("exp_avg", lambda x: x.int()),
    ),
    "nested grad": Fault(
        TypeError,
        ("grads['layer'][0]", "nested", "Expected a dense tensor", "take it out"),
        first_grad(lambda _: JAGGED),
    ),
    "nested param": Fault(
        TypeError,
        ("params['layer'][0]", "nested", "Expected a dense tensor", "take it out"),
        first_param(lambda _: NESTED),
    ),
    "grad of two tensors": Fault(
        TypeError, ("grads['layer'][0]", *OF_TWO_TENSORS), first_grad(lambda x: TwoTensor(x, x.clone()))
    ),
    "param of two tensors": Fault(
        TypeError, ("params['layer'][0]", *OF_TWO_TENSORS), first_param(lambda x: TwoTensor(x, x.clone()))
    ),
    "moment of two tensors": Fault(
        TypeError,
        ("state.exp_avg_sq['layer'][0]", *OF_TWO_TENSORS),
        moment("exp_avg_sq", lambda x: TwoTensor(x, x.clone())),
    ),
    "step of two tensors": Fault(
        TypeError, ("state.step", *OF_TWO_TENSORS), step(lambda x: TwoTensor(x.clone(), x.clone()))
    ),
    "lr of two tensors": Fault(TypeError, ("hparams.lr", *OF_TWO_TENSORS), rebuilt("lr", TWO_NUMBERS)),
    "grad_scale of two tensors": Fault(TypeError, ("grad_scale", *OF_TWO_TENSORS), options(grad_scale=TWO_NUMBERS)),
    "found_inf of two tensors": Fault(TypeError, ("found_inf", *OF_TWO_TENSORS), options(found_inf=TWO_NUMBERS)),
    "complex grad of a real param": Fault(
        TypeError,
        ("grads['layer'][0]", "torch.complex64", "params['layer'][0] is of torch.float32", "must match"),
        first_grad(lambda x: x.to(torch.complex64)),
    ),
    "complex moment of a real param": Fault(
        TypeError,
        ("state.exp_avg['layer'][0]", "torch.complex64", "params['layer'][0] is of torch.float32", "adam_init"),
        moment("exp_avg", lambda x: x.to(torch.complex64)),
    ),
    "real moment of a complex param": Fault(
        TypeError,
        ("state.exp_avg['layer'][0]", "torch.float32", "params['layer'][0] is of torch.complex64", "adam_init"),
        first_param(lambda x: x.to(torch.complex64)),
    ),
    "number for param": Fault(
        TypeError, ("params['layer'][0]", "type float", "Expected a tensor"), first_param(lambda _: 1.0)
    ),
    "number for grad": Fault(
        TypeError, ("grads['layer'][0]", "type float", "Expected a tensor"), first_grad(lambda _: 1.0)
    ),
    "None for moment": Fault(
        TypeError, ("state.exp_avg['layer'][0]", "NoneType", "Expected a tensor"), moment("exp_avg", lambda _: None)
    ),
    # Swapped and wrong arguments.
    "state for grads": Fault(
        TypeError, ("grads is an AdamState", "expected a pytree of gradients", "The order is"), swap_grads_and_state
    ),
    "grads for state": Fault(
        TypeError,
        ("state is of type dict", "expected the AdamState", "The order is"),
        lambda call: call._replace(state=call.grads),
    ),
    "hparams for state": Fault(
        TypeError, ("state is of type AdamHparams", "expected the AdamState", "The order is"), swap_state_and_hparams
    ),
    "tuple for state": Fault(
        TypeError,
        ("state is of type tuple", "expected the AdamState", "The order is"),
        lambda call: call._replace(state=tuple(call.state)),
    ),
    "no hparams": Fault(
        TypeError, ("hparams is of type NoneType", "expected AdamHparams", "The order is"), hparams(None)
    ),
    "dict for hparams": Fault(
        TypeError, ("hparams is of type dict", "expected AdamHparams", "The order is"), hparams({"lr": 0.1})
    ),
    "number for hparams": Fault(
        TypeError, ("hparams is of type float", "expected AdamHparams", "The order is"), hparams(1e-3)
    ),
    "master_params": Fault(
        TypeError,
        ("state.master_params", "is given", "torch.float32 and needs no copy", "Put ()"),
        lambda call: call._replace(state=call.state._replace(master_params=call.params)),
    ),
    # AMSGrad.
    "AMSGrad state missing": Fault(
        ValueError,
        ("state.max_exp_avg_sq", "is ()", "hparams.amsgrad is True", "adam_init"),
        hparams(AdamHparams(amsgrad=True)),
    ),
    "AMSGrad state superfluous": Fault(
        ValueError, ("state.max_exp_avg_sq", "is kept", "hparams.amsgrad is False", "adam_init"), with_amsgrad_state
    ),
    # Hyperparameters as they can come out of a tree map or a stack.
    "stacked lr": Fault(
        ValueError,
        ("hparams.lr", "(3,)", "Expected a number or a 0-dim tensor", "torch.func.vmap"),
        hparams(AdamHparams(lr=torch.full((3,), 0.1))),
    ),
    "stacked beta": Fault(
        ValueError,
        ("hparams.betas[1]", "(2,)", "Expected a number or a 0-dim tensor", "torch.func.vmap"),
        hparams(AdamHparams(betas=(0.9, torch.full((2,), 0.1)))),
    ),
    "lr of one element": Fault(
        ValueError,
        ("hparams.lr", "(1,)", "Expected a number or a 0-dim tensor", "torch.func.vmap"),
        hparams(AdamHparams(lr=torch.full((1,), 0.1))),
    ),
    "placeholder None": Fault(
        TypeError, ("hparams.eps", "None", "Expected a number or a 0-dim tensor"), rebuilt("eps", None)
    ),
    "placeholder string": Fault(
        TypeError, ("hparams.betas[0]", "'lr'", "Expected a number or a 0-dim tensor"), rebuilt("betas[0]", "lr")
    ),
    "placeholder bool": Fault(
        TypeError, ("hparams.lr", "True", "Expected a number or a 0-dim tensor"), rebuilt("lr", True)
    ),
    "placeholder complex": Fault(
        TypeError,
        ("hparams.weight_decay", "torch.complex64", "Expected a real tensor", "convert it"),
        rebuilt("weight_decay", torch.tensor(1j)),
    ),
    # Kernels.
    "unknown kernel": Fault(
        ValueError,
        ("kernel is 'quick'", "Expected one of 'auto', 'single', 'foreach', 'fused'"),
        options(kernel="quick"),
    ),
    "kernel None": Fault(ValueError, ("kernel is None", "Expected one of 'auto'"), options(kernel=None)),
    # Options.
    "1-dim found_inf": Fault(
        ValueError, ("found_inf", "(1,)", "Expected a number or a 0-dim tensor"), options(found_inf=torch.zeros(1))
    ),
    "1-dim grad_scale": Fault(
        ValueError, ("grad_scale", "(2,)", "Expected a number or a 0-dim tensor"), options(grad_scale=torch.ones(2))
    ),
    "complex found_inf": Fault(
        TypeError, ("found_inf", "torch.complex64", "Expected a real"), options(found_inf=torch.tensor(0j))
    ),
    "complex grad_scale": Fault(
        TypeError, ("grad_scale", "torch.complex64", "Expected a real"), options(grad_scale=torch.tensor(1 + 0j))
    ),
    "complex number as grad_scale": Fault(
        TypeError, ("grad_scale", "type complex", "Expected a number or a 0-dim tensor"), options(grad_scale=1j)
    ),
    "string as found_inf": Fault(
        TypeError, ("found_inf", "type str", "Expected a number or a 0-dim tensor"), options(found_inf="no")
    ),
    # Gradients that are None.
    "None grad with a shared step": Fault(
        ValueError,
        ("grads['layer'][0]", "is None", "share one step", "zeros", "per_leaf_step=True"),
        first_grad(lambda _: None),
    ),
    "last grad None with a shared step": Fault(
        ValueError,
        ("grads['point'].y", "is None", "share one step", "zeros", "per_leaf_step=True"),
        grads(point=Point(torch.ones(2), None)),
    ),
    # Steps.
    "step of shape (1,)": Fault(
        ValueError, ("state.step", "(1,)", "expected ()", "torch.func.vmap"), step(lambda x: x.reshape(1))
    ),
    "stacked step": Fault(
        ValueError, ("state.step", "(4,)", "expected ()", "torch.func.vmap"), step(lambda x: x.expand(4))
    ),
    "float64 step": Fault(
        TypeError, ("state.step", "torch.float64", "expected torch.float32", ".float()"), step(lambda x: x.double())
    ),
    "integer step": Fault(
        TypeError, ("state.step", "torch.int64", "expected torch.float32", ".float()"), step(lambda x: x.long())
    ),
    "bfloat16 step of a leaf": Fault(
        TypeError,
        ("state.step['layer'][1]", "torch.bfloat16", "expected torch.float32", ".float()"),
        leaf_step(lambda x: x.bfloat16()),
    ),
    "stacked step of a leaf": Fault(
        ValueError,
        ("state.step['layer'][1]", "(2,)", "expected ()", "torch.func.vmap"),
        leaf_step(lambda x: x.expand(2)),
    ),
    "number as step of a leaf": Fault(
        TypeError,
        ("state.step['layer'][1]", "type float", "Expected a 0-dim float32 tensor", "adam_init"),
        leaf_step(lambda _: 0.0),
    ),
    "number as step": Fault(
        TypeError, ("state.step", "type int", "0-dim float32 tensor", "adam_init"), step(lambda _: 0)
    ),
    "no step": Fault(TypeError, ("state.step", "NoneType", "0-dim float32 tensor", "adam_init"), step(lambda _: None)),
    # Right value, wrong moment.
    "donated state": Fault(RuntimeError, ("state.step", "was donated", "Use the state that came back"), donated_state),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_call_says_what_is_wrong_and_changes_nothing(name: str, donate: bool, kernel: str) -> None:
    error, words, break_call = FAULTS[name]
    call = good_call()
    before = snapshot(call)
    expected = call.run(kernel=kernel)
    broken = break_call(call)
    with pytest.raises(error, match=re.escape(words[0])) as caught:
        broken.run(kernel=kernel, donate=donate)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), word
    assert_unchanged(call, before)
    torch.testing.assert_close(tensors_of(call.run(kernel=kernel)), tensors_of(expected), rtol=0, atol=0)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_call_is_a_sentence(name: str, donate: bool) -> None:
    error, words, break_call = FAULTS[name]
    with pytest.raises(error, match=re.escape(words[0])) as caught:
        break_call(good_call()).run(donate=donate)
    message = str(caught.value)
    assert message.endswith(".")
    assert "{" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


# The moment.


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_odd_key_does_not_break_the_message(kernel: str) -> None:
    params = {"a{0}b": torch.ones(2)}
    state = adam_init(params, HPARAMS)
    with pytest.raises(ValueError, match=re.escape("grads['a{0}b'] has shape (3,)")):
        adam_update(params, {"a{0}b": torch.ones(3)}, state, HPARAMS, kernel=kernel)


def test_fused_cannot_run_on_the_meta_device_and_auto_can() -> None:
    param = torch.ones(3, device="meta")
    state = adam_init(param, HPARAMS)
    with pytest.raises(RuntimeError, match=r"kernel='fused' cannot run here.*on meta.*cpu and cuda.*kernel='auto'"):
        adam_update(param, param, state, HPARAMS, kernel="fused")
    for kernel in ("auto", "single", "foreach"):
        new, new_state = adam_update(param, param, state, HPARAMS, kernel=kernel)
        assert (new.device.type, new.shape) == ("meta", (3,))
        assert new_state.step.device.type == "meta"


@pytest.mark.parametrize(
    ("hidden", "missing", "chosen"),
    [
        (("_fused_adam_",), {"fused": "_fused_adam_"}, "foreach"),
        (("_fused_adamw_",), {"fused": "_fused_adam_"}, "foreach"),
        (("_fused_adam_", "_foreach_addcdiv_"), {"fused": "_fused_adam_", "foreach": "_foreach_addcdiv_"}, "single"),
    ],
)
def test_a_torch_without_a_kernel_says_so_and_auto_takes_the_next(
    hidden: tuple[str, ...], missing: dict[str, str], chosen: str
) -> None:
    code = f"""
import torch
for name in {hidden}:
    delattr(torch, name)
from functional_adam import AdamHparams, adam_init, adam_update

params, hparams = torch.tensor([1.0, -2.0]), AdamHparams(lr=0.1)
state = adam_init(params, hparams)
for kernel, name in {missing}.items():
    try:
        adam_update(params, params, state, hparams, kernel=kernel)
    except RuntimeError as error:
        text = f"kernel='{{kernel}}' cannot run here: this torch has no torch.{{name}}. Use kernel='auto'."
        assert str(error) == text, error
    else:
        raise AssertionError(kernel)
(auto, _), (chosen, _) = (adam_update(params, params, state, hparams, kernel=k) for k in ("auto", "{chosen}"))
assert torch.equal(auto, chosen) and not torch.equal(auto, params)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("donate", [False, True])
def test_a_wrong_bare_leaf_is_named_by_its_root(kernel: str, donate: bool) -> None:
    param, grad = torch.ones(3), torch.ones(2)
    with pytest.raises(ValueError, match=r"^grads has shape \(2,\), but params has shape \(3,\)"):
        adam_update(param, grad, adam_init(param, HPARAMS), HPARAMS, kernel=kernel, donate=donate)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("donate", [False, True])
def test_amsgrad_moments_are_checked_like_the_others(kernel: str, donate: bool) -> None:
    call = good_call(hparams=AdamHparams(amsgrad=True))
    before = snapshot(call)
    for make, error, word in (
        (lambda x: x.flatten(), ValueError, r"has shape \(12,\)"),
        (lambda x: x.int(), TypeError, "is of torch.int32"),
        (lambda x: x.to("meta"), ValueError, "is on meta"),
        (lambda x: x.to(torch.complex64), TypeError, "is of torch.complex64"),
    ):
        with pytest.raises(error, match=rf"state\.max_exp_avg_sq\['layer'\]\[0\] {word}"):
            moment("max_exp_avg_sq", make)(call).run(kernel=kernel, donate=donate)
    with pytest.raises(ValueError, match=r"state\.max_exp_avg_sq lacks \['pair'\]"):
        moments_without("max_exp_avg_sq", "pair")(call).run(kernel=kernel, donate=donate)
    assert_unchanged(call, before)


# Subclasses of tensors that are not refused.


class Subclass(Tensor):
    """A tensor with Python behaviour of its own."""


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "break_call",
    [
        first_grad(lambda x: x.as_subclass(Subclass)),
        first_param(lambda x: x.as_subclass(Subclass)),
        first_grad(AsyncCollectiveTensor),
    ],
    ids=["grad", "param", "grad of a collective"],
)
def test_subclasses_that_run_an_operation_once_are_updated(kernel: str, break_call: Callable[[Call], Call]) -> None:
    expected, got = good_call().run(kernel=kernel), break_call(good_call()).run(kernel=kernel)
    for x, y in zip(tensors_of(got), tensors_of(expected), strict=True):
        assert torch.equal(x, y)


def test_a_tracer_takes_subclasses_apart() -> None:
    param, grad = torch.zeros(3), torch.ones(3)
    state, update = adam_init(param, HPARAMS), torch.compile(adam_update, backend="eager")
    expected, _ = adam_update(param, grad, state, HPARAMS)
    new, _ = update(param, TwoTensor(grad, grad.clone()), state, HPARAMS)
    for part in (new.a, new.b):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("kernel", ["single", "foreach"])
def test_updates_are_traced_ahead_of_time(kernel: str) -> None:
    param, grad = torch.zeros(3), torch.ones(3)
    state = adam_init(param, HPARAMS)

    def flat(param: Tensor, grad: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        new, new_state = adam_update(param, grad, AdamState(*state), HPARAMS, kernel=kernel)
        return new, *new_state[:3]

    traced = aot_function(flat, fw_compiler=lambda graph, _: graph)
    for x, y in zip(traced(param, grad, *state[:3]), flat(param, grad, *state[:3]), strict=True):
        assert torch.equal(x, y)


# adam_init.


@pytest.mark.parametrize("per_leaf_step", [False, True])
@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (torch.ones(2, dtype=torch.int64), ("torch.int64", "floating or complex", "convert it")),
        (torch.ones(2, dtype=torch.bool), ("torch.bool", "floating or complex", "convert it")),
        (torch.eye(2).to_sparse(), ("torch.sparse_coo", "dense", "to_dense()")),
        (NESTED, ("nested", "dense", "take it out")),
        (TwoTensor(torch.ones(2), torch.ones(2)), OF_TWO_TENSORS),
        (1.0, ("type float", "Expected a tensor")),
        ("w", ("type str", "Expected a tensor")),
    ],
    ids=str,
)
def test_init_refuses_what_cannot_be_updated(leaf: Any, words: tuple[str, ...], per_leaf_step: bool) -> None:
    with pytest.raises(TypeError, match=re.escape("params['b'][0]")) as caught:
        adam_init({"a": torch.ones(2), "b": [leaf]}, HPARAMS, per_leaf_step=per_leaf_step)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("given", [None, {"lr": 0.1}, 0.1, AdamState(1, 2, 3)], ids=lambda x: type(x).__name__)
def test_init_refuses_what_is_not_hparams(given: Any) -> None:
    with pytest.raises(TypeError, match=rf"hparams is of type {type(given).__name__}, expected AdamHparams"):
        adam_init(torch.ones(2), given)


def test_init_refuses_mixed_devices_with_a_shared_step() -> None:
    params = {"a": torch.ones(2), "b": [torch.ones(2, device="meta")]}
    with pytest.raises(ValueError, match=r"params\['b'\]\[0\] is on meta.*params\['a'\] is on cpu.*per_leaf_step=True"):
        adam_init(params, HPARAMS)
    state = adam_init(params, HPARAMS, per_leaf_step=True)
    assert (state.step["a"].device.type, state.step["b"][0].device.type) == ("cpu", "meta")


# AdamHparams, with torch's own messages.


def torch_message(**given: Any) -> str:
    """What `torch.optim.Adam` says to the same value."""
    with pytest.raises(ValueError, match="Invalid") as caught:
        torch.optim.Adam([torch.ones(1)], **given)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
        ({"eps": float("nan")}, "Invalid epsilon value: nan"),
        ({"betas": (-0.1, 0.9)}, "Invalid beta parameter at index 0: -0.1"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"betas": (0.9, float("nan"))}, "Invalid beta parameter at index 1: nan"),
        ({"weight_decay": -0.5}, "Invalid weight_decay value: -0.5"),
        ({"weight_decay": float("nan")}, "Invalid weight_decay value: nan"),
    ],
    ids=str,
)
def test_values_out_of_range_get_torchs_message(given: dict[str, Any], message: str) -> None:
    assert torch_message(**given) == message
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*Expected a number") as caught:
        AdamHparams(**given)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("name", ["lr", "betas[0]", "betas[1]", "eps", "weight_decay"])
@pytest.mark.parametrize(
    "value",
    ["0.1", None, True, 1j, torch.tensor(1j), torch.tensor(True)],
    ids=lambda x: f"{type(x).__name__}-{x}",
)
def test_hparams_of_the_wrong_type_are_named(name: str, value: Any) -> None:
    given = {"betas[0]": {"betas": (value, 0.9)}, "betas[1]": {"betas": (0.9, value)}}.get(name, {name: value})
    with pytest.raises(TypeError, match=rf"^hparams\.{re.escape(name)} is .*Expected a "):
        AdamHparams(**given)


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), 0.9, None, "ab", (), {0.9, 0.99}], ids=str)
def test_betas_are_a_pair(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid betas: .*Expected a pair of numbers"):
        AdamHparams(betas=betas)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "decoupled_weight_decay"])
@pytest.mark.parametrize("value", [1, 0.0, None, "yes", torch.tensor(True)], ids=lambda x: f"{type(x).__name__}-{x}")
def test_flags_are_bools(flag: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^hparams\.{flag} is .*Expected True or False"):
        AdamHparams(**{flag: value})
