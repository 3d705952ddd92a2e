"""Autograd, torch.func, forward-mode duals and tracers see an update as an ordinary differentiable function."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from functional_adam import AdamHparams, AdamState, GrowingGraphWarning, adam_init, adam_update
from tests.strategies import random_tensor

# torch scripts some formulas when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")

KERNELS = ("auto", "single", "foreach", "fused")
FLAGS: dict[str, dict[str, bool]] = {
    "adam": {},
    "amsgrad": {"amsgrad": True},
    "adamw_maximize": {"decoupled_weight_decay": True, "maximize": True},
}
each_flags = pytest.mark.parametrize("flags", FLAGS)


class Inputs(NamedTuple):
    """One leaf and all numbers, as float64 tensors: everything that a derivative can be taken of."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor
    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    weight_decay: Tensor
    step: Tensor
    grad_scale: Tensor


NAMES = Inputs._fields


def make_inputs(shape: tuple[int, ...] = (3,), *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def randn() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    def rand() -> Tensor:
        return 0.5 + torch.rand(shape, generator=generator, dtype=dtype)

    numbers = (0.1, 0.8, 0.9, 0.01, 0.2, 3.0, 2.0)
    return Inputs(randn(), randn(), randn(), rand(), rand(), *(torch.tensor(x, dtype=torch.float64) for x in numbers))


def ours(x: Inputs, **flags: bool) -> tuple[Tensor, ...]:
    """New param, moments and step."""
    hparams = AdamHparams(lr=x.lr, betas=(x.beta1, x.beta2), eps=x.eps, weight_decay=x.weight_decay, **flags)
    maxima = x.max_exp_avg_sq if flags.get("amsgrad") else ()
    state = AdamState(x.step.float(), x.exp_avg, x.exp_avg_sq, maxima)
    param, state = adam_update(x.param, x.grad, state, hparams, grad_scale=x.grad_scale)
    return (param, *torch_pytree.tree_leaves(state))


def reference(x: Inputs, **flags: bool) -> tuple[Tensor, ...]:
    """The same by the textbook, away from zeros and ties, where plain torch differentiates it rightly."""
    p, t = x.param, x.step + 1
    g = x.grad / x.grad_scale
    g = -g if flags.get("maximize") else g
    if flags.get("decoupled_weight_decay"):
        p = p * (1 - x.lr * x.weight_decay)
    else:
        g = g + x.weight_decay * p
    m = x.beta1 * x.exp_avg + (1 - x.beta1) * g
    v = x.beta2 * x.exp_avg_sq + (1 - x.beta2) * g * g
    u = torch.maximum(x.max_exp_avg_sq, v) if flags.get("amsgrad") else v
    p = p - x.lr * (m / (1 - x.beta1**t)) / ((u / (1 - x.beta2**t)).sqrt() + x.eps)
    return (p, t, m, v, u) if flags.get("amsgrad") else (p, t, m, v)


def weighted(outputs: tuple[Tensor, ...]) -> Tensor:
    """One number that depends on every element of every output, each in its own way."""
    total = torch.zeros((), dtype=torch.float64)
    for index, output in enumerate(outputs):
        weights = torch.arange(1.0, output.numel() + 1, dtype=torch.float64).view(output.shape)
        total = total + ((index + 1) * weights * output.double()).cos().sum()
    return total


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def assert_close(got: Any, expected: Any, *, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    rows = list(zip(tensors_of(got), tensors_of(expected), strict=True))
    assert rows
    for a, b in rows:
        assert a.shape == b.shape
        torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=rtol, atol=atol)


# step and grad_scale pass through float32, and so do their derivatives.
THROUGH_FLOAT32 = {"rtol": 1e-6, "atol": 1e-7}


# Values and first derivatives.


@each_flags
def test_values_agree_with_the_textbook(flags: str) -> None:
    x = make_inputs()
    for got, expected in zip(ours(x, **FLAGS[flags]), reference(x, **FLAGS[flags]), strict=True):
        assert_close(got, expected)


@each_flags
@pytest.mark.parametrize("name", NAMES)
def test_reverse_mode_agrees_with_the_textbook(flags: str, name: str) -> None:
    x, flag = make_inputs(), FLAGS[flags]
    by_name = [
        grad(lambda y, f=f: weighted(f(x._replace(**{name: y}), **flag)))(getattr(x, name)) for f in (ours, reference)
    ]
    assert_close(*by_name, **THROUGH_FLOAT32)
    if name != "max_exp_avg_sq" or "amsgrad" in flag:
        assert by_name[0].abs().max() > 0


@each_flags
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_agrees_with_the_textbook(flags: str, name: str) -> None:
    x, flag = make_inputs(), FLAGS[flags]
    tangent = torch.linspace(0.5, 1.5, 3, dtype=torch.float64).expand(3)[: getattr(x, name).numel()]
    tangent = tangent.reshape(getattr(x, name).shape)
    results = [
        jvp(lambda y, f=f: f(x._replace(**{name: y}), **flag), (getattr(x, name),), (tangent,))
        for f in (ours, reference)
    ]
    assert_close(*results, **THROUGH_FLOAT32)


@each_flags
@pytest.mark.parametrize("name", NAMES)
def test_plain_autograd_agrees_with_the_textbook(flags: str, name: str) -> None:
    x, flag = make_inputs(), FLAGS[flags]
    expected = grad(lambda y: weighted(reference(x._replace(**{name: y}), **flag)))(getattr(x, name))
    leaf = getattr(x, name).clone().requires_grad_()
    loss = weighted(ours(x._replace(**{name: leaf}), **flag))
    if name == "max_exp_avg_sq" and "amsgrad" not in flag:
        assert not loss.requires_grad
        return
    [got] = torch.autograd.grad(loss, leaf)
    assert_close(got, expected, **THROUGH_FLOAT32)


@each_flags
@pytest.mark.parametrize("name", NAMES)
def test_forward_ad_duals_agree_with_the_textbook(flags: str, name: str) -> None:
    x, flag = make_inputs(), FLAGS[flags]
    primal = getattr(x, name)
    tangent = torch.ones_like(primal)
    _, expected = jvp(lambda y: reference(x._replace(**{name: y}), **flag), (primal,), (tangent,))
    with forward_ad.dual_level():
        outputs = ours(x._replace(**{name: forward_ad.make_dual(primal, tangent)}), **flag)
        tangents = [forward_ad.unpack_dual(y).tangent for y in outputs]
    for got, wanted in zip(tangents, expected, strict=True):
        assert_close(torch.zeros_like(wanted) if got is None else got, wanted, **THROUGH_FLOAT32)


DIFFERENTIABLE = NAMES[:10]  # not step and grad_scale: finite differences drown in float32


def of_all(flag: dict[str, bool]) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A function of the float64 inputs, and where to differentiate it."""
    x = make_inputs((2,))
    names = [name for name in DIFFERENTIABLE if name != "max_exp_avg_sq" or flag.get("amsgrad")]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = ours(x._replace(**dict(zip(names, values, strict=True))), **flag)
        return tuple(output for output in outputs if output.dtype == torch.float64)

    return function, tuple(getattr(x, name).clone().requires_grad_() for name in names)


@each_flags
def test_first_derivatives_agree_with_finite_differences(flags: str) -> None:
    function, inputs = of_all(FLAGS[flags])
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)


@each_flags
def test_second_derivatives_agree_with_finite_differences(flags: str) -> None:
    function, inputs = of_all(FLAGS[flags])
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@each_flags
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "second",
    [
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacfwd(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacrev(jacrev(f)),
    ],
    ids=["forward_forward", "forward_reverse", "reverse_forward", "reverse_reverse"],
)
def test_every_mix_of_modes_gives_the_second_derivative(flags: str, name: str, second: Callable[..., Any]) -> None:
    x, flag = make_inputs((2,)), FLAGS[flags]
    expected = hessian(lambda y: weighted(reference(x._replace(**{name: y}), **flag)))(getattr(x, name))
    got = second(lambda y: weighted(ours(x._replace(**{name: y}), **flag)))(getattr(x, name))
    assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_third_derivative_agrees_with_the_textbook() -> None:
    x = make_inputs((1,))
    third = [jacfwd(jacfwd(jacrev(lambda y, f=f: weighted(f(x._replace(grad=y))))))(x.grad) for f in (ours, reference)]
    assert third[1].abs().max() > 0
    assert_close(*third, rtol=1e-6)


def test_all_inputs_can_be_differentiated_at_once() -> None:
    x = make_inputs()
    got, expected = (grad(lambda y, f=f: weighted(f(y, amsgrad=True)))(x) for f in (ours, reference))
    assert_close(got, expected, **THROUGH_FLOAT32)


def test_hyperparameters_are_differentiated_as_one_tree() -> None:
    x = make_inputs()
    hparams = AdamHparams(lr=x.lr, betas=(x.beta1, x.beta2), eps=x.eps, weight_decay=x.weight_decay)

    def loss(hparams: AdamHparams) -> Tensor:
        state = AdamState(x.step.float(), x.exp_avg, x.exp_avg_sq)
        return weighted(adam_update(x.param, x.grad, state, hparams)[:1])

    got = grad(loss)(hparams)
    assert type(got) is AdamHparams
    numbers = ("lr", "beta1", "beta2", "eps", "weight_decay")
    one = torch.ones((), dtype=torch.float64)
    expected = [
        grad(lambda y, n=n: weighted(reference(x._replace(**{n: y}, grad_scale=one))[:1]))(getattr(x, n))
        for n in numbers
    ]
    assert_close(torch_pytree.tree_leaves(got), expected)


def test_meta_gradient_through_an_unrolled_loop_agrees_with_finite_differences() -> None:
    target = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def final_loss(lr: Tensor, start: Tensor) -> Tensor:
        hparams = AdamHparams(lr=lr, eps=1e-3)
        params = {"w": start}
        state = adam_init(params, hparams)
        for _ in range(4):
            grads = grad(lambda p: ((p["w"] - target) ** 2).sum())(params)
            params, state = adam_update(params, grads, state, hparams)
        return ((params["w"] - target) ** 2).sum()

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.3, 0.2, -0.4], dtype=torch.float64, requires_grad=True)
    assert gradcheck(final_loss, (lr, start))
    [got] = torch.autograd.grad(final_loss(lr, start), lr)
    assert_close(got, grad(final_loss)(lr.detach(), start.detach()))


def test_vjp_gives_values_and_cotangents() -> None:
    x = make_inputs()
    outputs, pull = vjp(lambda p: ours(x._replace(param=p)), x.param)
    assert_close(outputs, reference(x))
    cotangents = tuple(torch.ones_like(y) for y in outputs)
    expected = vjp(lambda p: reference(x._replace(param=p)), x.param)[1](tuple(c.double() for c in cotangents))
    assert_close(pull(cotangents), expected)


def test_tracked_parameters_come_back_with_their_history() -> None:
    x = make_inputs()
    outputs = ours(x._replace(param=torch.nn.Parameter(x.param)))
    assert type(outputs[0]) is Tensor
    assert outputs[0].requires_grad
    with torch.no_grad():
        assert not ours(x._replace(param=torch.nn.Parameter(x.param)))[0].requires_grad


# torch.func.vmap equals a Python loop.


def tree_of(shape_seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(shape_seed)
    return {
        "w": torch.randn(4, 3, 2, generator=generator, dtype=dtype),
        "b": [torch.randn(4, generator=generator, dtype=dtype)],
    }


def member(tree: Any, index: int) -> Any:
    return torch_pytree.tree_map(lambda x: x[index], tree)


def stack(trees: list[Any]) -> Any:
    return torch_pytree.tree_map(lambda *xs: torch.stack(xs), *trees)


@each_flags
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_vmap_equals_a_loop(flags: str, dtype: torch.dtype, per_leaf_step: bool) -> None:
    hparams = AdamHparams(lr=0.1, weight_decay=0.1, **FLAGS[flags])
    params, rounding = tree_of(0, dtype), {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    state = vmap(lambda p: adam_init(p, hparams, per_leaf_step=per_leaf_step))(params)
    loop = [(member(params, i), adam_init(member(params, i), hparams, per_leaf_step=per_leaf_step)) for i in range(4)]
    for seed in (1, 2, 3):
        grads = tree_of(seed, dtype)
        params, state = vmap(lambda p, g, s: adam_update(p, g, s, hparams))(params, grads, state)
        loop = [adam_update(p, member(grads, i), s, hparams) for i, (p, s) in enumerate(loop)]
        expected = stack(loop)
        assert torch_pytree.tree_structure((params, state)) == torch_pytree.tree_structure(expected)
        for got, wanted in zip(tensors_of((params, state)), tensors_of(expected), strict=True):
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, **(rounding or {"rtol": 1e-5, "atol": 1e-6}))


def test_vmap_of_init_gives_every_member_a_step() -> None:
    state = vmap(lambda p: adam_init(p, AdamHparams(amsgrad=True)))(tree_of(0))
    assert state.step.shape == (4,)
    assert state.step.dtype == torch.float32
    assert torch.equal(state.step, torch.zeros(4))
    for tree in state[1:4]:
        assert [x.shape for x in tensors_of(tree)] == [(4, 3, 2), (4,)]
        assert all(torch.equal(x, torch.zeros_like(x)) for x in tensors_of(tree))
    assert state.master_params == ()


@pytest.mark.parametrize("name", ["lr", "beta1", "beta2", "eps", "weight_decay"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_each_member_may_have_its_own_number(name: str, decoupled: bool) -> None:
    values = {
        "lr": [0.0, 0.1, 0.2, 0.3],
        "beta1": [0.0, 0.5, 0.9, 0.99],
        "beta2": [0.0, 0.5, 0.9, 0.999],
        "eps": [1e-8, 1e-3, 0.1, 1.0],
        "weight_decay": [0.0, 0.1, 0.2, 0.5],
    }[name]
    stacked = torch.tensor(values, dtype=torch.float64)

    def build(value: Any) -> AdamHparams:
        numbers: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99, "lr": 0.1, "weight_decay": 0.1, name: value}
        betas = (numbers.pop("beta1"), numbers.pop("beta2"))
        return AdamHparams(betas=betas, decoupled_weight_decay=decoupled, **numbers)

    params, grads = tree_of(0, torch.float64), tree_of(1, torch.float64)
    plain = AdamHparams()
    state = vmap(lambda p: adam_init(p, plain))(params)
    expected = stack(
        [
            adam_update(member(params, i), member(grads, i), adam_init(member(params, i), plain), build(x))
            for i, x in enumerate(values)
        ]
    )
    assert_close(vmap(lambda p, g, s, x: adam_update(p, g, s, build(x)))(params, grads, state, stacked), expected)
    # The same with stacked hyperparameters given as one tree.
    hparams = build(stacked)
    in_dims = torch_pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, hparams)
    assert_close(vmap(adam_update, in_dims=(0, 0, 0, in_dims))(params, grads, state, hparams), expected)


def test_members_may_be_at_different_steps() -> None:
    hparams = AdamHparams(lr=0.1)
    params, grads = tree_of(0, torch.float64), tree_of(1, torch.float64)
    state = vmap(lambda p: adam_init(p, hparams))(params)._replace(step=torch.tensor([0.0, 1.0, 10.0, 1000.0]))
    loop = [adam_update(member(params, i), member(grads, i), member(state, i), hparams) for i in range(4)]
    got = vmap(lambda p, g, s: adam_update(p, g, s, hparams))(params, grads, state)
    assert_close(got, stack(loop))
    assert got[1].step.tolist() == [1.0, 2.0, 11.0, 1001.0]


def test_vmap_over_gradients_alone_shares_the_rest() -> None:
    hparams = AdamHparams(lr=0.1)
    params, grads = member(tree_of(0, torch.float64), 0), tree_of(1, torch.float64)
    state = adam_init(params, hparams)
    got = vmap(lambda g: adam_update(params, g, state, hparams)[0])(grads)
    assert_close(got, stack([adam_update(params, member(grads, i), state, hparams)[0] for i in range(4)]))


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_members_may_lie_along_any_dimension(in_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    params, grads = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    hparams = AdamHparams(lr=0.1)

    def run(p: Tensor, g: Tensor) -> Tensor:
        return adam_update(p, g, adam_init(p, hparams), hparams)[0]

    expected = torch.stack(
        [run(p, g) for p, g in zip(params.unbind(in_dim), grads.unbind(in_dim), strict=True)], in_dim
    )
    assert_close(vmap(run, in_dims=in_dim, out_dims=in_dim)(params, grads), expected)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_member_with_an_infinite_gradient_stands_still(bad: float) -> None:
    hparams = AdamHparams(lr=0.1)
    params, grads = tree_of(0, torch.float64), tree_of(1, torch.float64)
    grads["w"][1, 0, 0] = bad
    state = vmap(lambda p: adam_init(p, hparams))(params)

    def run(p: Any, g: Any, s: AdamState) -> Any:
        found_inf = ~torch.stack([x.isfinite().all() for x in tensors_of(g)]).all()
        return adam_update(p, g, s, hparams, found_inf=found_inf)

    got = vmap(run)(params, grads, state)
    for i in range(4):
        expected = (
            (member(params, i), member(state, i))
            if i == 1
            else adam_update(member(params, i), member(grads, i), member(state, i), hparams)
        )
        assert_close(member(got, i), expected)
    assert got[1].step.tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_member_that_stands_still_has_finite_derivatives_and_lets_others_have_theirs(bad: float) -> None:
    params, grads = tree_of(0, torch.float64)["w"], tree_of(1, torch.float64)["w"]
    grads[1, 0, 0] = bad

    def run(p: Tensor, g: Tensor, lr: Tensor) -> Tensor:
        hparams = AdamHparams(lr=lr)
        found_inf = ~g.isfinite().all()
        return adam_update(p, g, adam_init(p, hparams), hparams, found_inf=found_inf)[0].sum()

    lr = torch.tensor(0.1, dtype=torch.float64)
    got = vmap(grad(run, argnums=(0, 1, 2)), in_dims=(0, 0, None))(params, grads, lr)
    assert all(x.isfinite().all() for x in got)
    assert torch.equal(got[0][1], torch.ones(3, 2, dtype=torch.float64))
    assert torch.equal(got[1][1], torch.zeros(3, 2, dtype=torch.float64))
    assert got[2][1] == 0
    for i in (0, 2, 3):
        assert_close(member(got, i), grad(run, argnums=(0, 1, 2))(params[i], grads[i], lr))
    # Reverse mode through the mapped function sums the members.
    total = grad(lambda y: vmap(run, in_dims=(0, 0, None))(params, grads, y).sum())(lr)
    assert_close(total, got[2].sum())


def test_vmap_of_grad_and_grad_of_vmap_agree_with_a_loop() -> None:
    x = make_inputs((4, 3))
    lrs = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def loss(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Tensor) -> Tensor:
        state = AdamState(x.step.float(), m, v)
        return weighted(adam_update(p, g, state, AdamHparams(lr=lr))[:1])

    args = (x.param, x.grad, x.exp_avg, x.exp_avg_sq, lrs)
    argnums = tuple(range(5))
    loop = stack([grad(loss, argnums=argnums)(*(a[i] for a in args)) for i in range(4)])
    assert_close(vmap(grad(loss, argnums=argnums))(*args), loop)
    assert_close(grad(lambda *a: vmap(loss)(*a).sum(), argnums=argnums)(*args), loop)
    assert_close(vmap(jacfwd(loss, argnums=argnums))(*args), loop)


def test_nested_vmap_equals_a_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    params, grads = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    lrs = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)

    def run(p: Tensor, g: Tensor, lr: Any) -> Tensor:
        hparams = AdamHparams(lr=lr)
        return adam_update(p, g, adam_init(p, hparams), hparams)[0]

    got = vmap(vmap(run), in_dims=(0, 0, None))(params, grads, lrs)
    expected = torch.stack([torch.stack([run(params[i, j], grads[i, j], lrs[j]) for j in range(3)]) for i in range(2)])
    assert_close(got, expected)


def test_an_ensemble_of_modules_trains_as_its_members_do() -> None:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    params = {n: torch.randn(4, *s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    x, y = (torch.randn(8, k, generator=generator, dtype=torch.float64) for k in (3, 1))
    hparams = AdamHparams(lr=0.05)

    def train_step(p: Any, s: AdamState) -> tuple[Any, AdamState]:
        grads = grad(lambda q: ((functional_call(model, q, (x,)) - y) ** 2).mean())(p)
        return adam_update(p, grads, s, hparams)

    loop = [(member(params, i), adam_init(member(params, i), hparams)) for i in range(4)]
    state = vmap(lambda p: adam_init(p, hparams))(params)
    for _ in range(3):
        params, state = vmap(train_step)(params, state)
        loop = [train_step(*pair) for pair in loop]
    assert_close((params, state), stack(loop))


# At v == 0 and at ties.


def zero_case(**numbers: Any) -> tuple[Tensor, AdamState, AdamHparams]:
    hparams = AdamHparams(**{"lr": torch.tensor(0.1, dtype=torch.float64), **numbers})
    param = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    return param, adam_init(param, hparams), hparams


GRADS = {"zero": [0.0, 0.0, 0.0], "mixed": [0.0, 1e-3, -1.0], "tiny": [1e-200, -1e-200, 0.0]}


@each_flags
@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("lr", [0.1, 0.0])
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_are_finite_where_the_moments_vanish(
    flags: str, grads: str, eps: float, lr: float, order: int
) -> None:
    g = torch.tensor(GRADS[grads], dtype=torch.float64)
    param, state, _ = zero_case()
    state = adam_init(param, AdamHparams(**FLAGS[flags]))
    number = torch.tensor(lr, dtype=torch.float64)

    def loss(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Tensor, b2: Tensor) -> Tensor:
        hparams = AdamHparams(lr=lr, betas=(0.9, b2), eps=eps, **FLAGS[flags])
        return weighted(adam_update(p, g, state._replace(exp_avg=m, exp_avg_sq=v), hparams)[:1])

    args = (param, g, state.exp_avg, state.exp_avg_sq, number, torch.tensor(0.99, dtype=torch.float64))
    argnums = tuple(range(6))
    function: Any = grad(loss, argnums=argnums)
    if order == 2:
        function = jacrev(function, argnums=argnums)
    assert all(x.isfinite().all() for x in tensors_of(function(*args)))
    if order == 1:
        for index in argnums:
            assert jacfwd(loss, argnums=index)(*args).isfinite().all()


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_the_derivative_with_respect_to_a_beta_is_finite_at_zero(name: str) -> None:
    x = make_inputs()
    zero = torch.zeros((), dtype=torch.float64)
    got, expected = (grad(lambda b, f=f: weighted(f(x._replace(**{name: b}))))(zero) for f in (ours, reference))
    assert got.isfinite()
    assert_close(got, expected, **THROUGH_FLOAT32)


@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_watching_does_not_change_the_value(grads: str, kernel: str) -> None:
    g = torch.tensor(GRADS[grads], dtype=torch.float64)
    param, state, hparams = zero_case(lr=0.1)
    expected = adam_update(param, g, state, hparams, kernel=kernel)
    got = adam_update(param.clone().requires_grad_(), g, state, hparams)
    assert_close(got, expected, rtol=1e-14, atol=1e-15)


def test_a_zero_gradient_moves_nothing_and_passes_the_parameter_on() -> None:
    param, state, hparams = zero_case()
    jacobian = jacrev(lambda p: adam_update(p, torch.zeros_like(p), state, hparams)[0])(param)
    assert torch.equal(jacobian, torch.eye(3, dtype=torch.float64))
    jacobian = jacfwd(lambda p: adam_update(p, torch.zeros_like(p), state, hparams)[0])(param)
    assert torch.equal(jacobian, torch.eye(3, dtype=torch.float64))


def test_the_derivative_of_the_root_is_zero_at_zero() -> None:
    # exp_avg_sq = 0 and g = 0, but m != 0: p - lr / (1 - b1) * m / eps, whatever the derivative of the root.
    param = torch.tensor([1.0], dtype=torch.float64)
    zero, m = torch.zeros(1, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    hparams = AdamHparams(lr=0.1, betas=(0.5, 0.5), eps=0.25)

    def run(v: Tensor) -> Tensor:
        return adam_update(param, zero, AdamState(torch.tensor(0.0), m, v), hparams)[0].sum()

    assert_close(run(zero), (1 - 0.1 / 0.5 * (0.5 * m) / 0.25).sum())
    assert grad(run)(zero) == 0
    assert jacfwd(run)(zero) == 0


def test_derivative_with_respect_to_lr_at_zero_is_the_direction() -> None:
    x = make_inputs()
    zero = torch.zeros((), dtype=torch.float64)
    got, expected = (jacrev(lambda y, f=f: f(x._replace(lr=y))[0])(zero) for f in (ours, reference))
    assert expected.abs().min() > 0
    assert_close(got, expected)


@pytest.mark.parametrize("differentiate", [jacrev, jacfwd])
def test_amsgrad_ties_share_the_derivative(differentiate: Callable[..., Any]) -> None:
    # v = 2 * 0.5 + 2 * 2 * 0.5 = 3 exactly, and so is the maximum so far.
    two, three = (torch.tensor(x, dtype=torch.float64) for x in (2.0, 3.0))
    hparams = AdamHparams(betas=(0.5, 0.5), amsgrad=True)

    def maximum(g: Tensor, v: Tensor, u: Tensor) -> Tensor:
        state = AdamState(torch.tensor(1.0), torch.zeros_like(v), v, u)
        return adam_update(torch.zeros_like(v), g, state, hparams)[1].max_exp_avg_sq

    assert maximum(two, two, three) == 3.0
    got = differentiate(maximum, argnums=(0, 1, 2))(two, two, three)
    # dv/dg = 2 * g * 0.5 = 2, dv/dv = 0.5; half of each goes on.
    assert [x.item() for x in got] == [1.0, 0.25, 0.5]


# Options and dtypes under transforms.


@pytest.mark.parametrize("found", [False, True])
def test_found_inf_is_followed_under_autograd(found: bool) -> None:
    param, state, hparams = zero_case(lr=0.1)
    g = torch.tensor([1.0, float("inf") if found else 2.0, 3.0], dtype=torch.float64)

    def run(p: Tensor) -> tuple[Tensor, Tensor]:
        new, new_state = adam_update(p, g, state, hparams, found_inf=torch.tensor(float(found)))
        return new, new_state.step

    (new, step), pull = vjp(run, param)
    assert torch.equal(new, param) is found
    assert step.item() == float(not found)
    [got] = pull((torch.ones_like(new), torch.zeros_like(step)))
    assert torch.equal(got, torch.ones_like(param))


@pytest.mark.parametrize("way", ["autograd", "grad", "equations", "jvp"])
@pytest.mark.parametrize("scale", [None, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize("is_decoupled", [False, True])
def test_a_skipped_update_is_the_identity_to_derivatives(
    way: str, scale: float | None, moment: str, is_decoupled: bool
) -> None:
    param = torch.tensor([1.0, -2.0], dtype=torch.float64)
    hparams = AdamHparams(eps=0.0, weight_decay=0.1, amsgrad=True, decoupled_weight_decay=is_decoupled)
    state = adam_init(param, hparams)
    state = state._replace(**{moment: torch.tensor([float("nan"), float("inf")], dtype=torch.float64)})
    grad = torch.tensor([0.0, float("inf")], dtype=torch.float64)

    def run(p: Tensor, g: Tensor = grad) -> Tensor:
        return adam_update(p, g, state, hparams, grad_scale=scale, found_inf=1.0)[0]

    weights = torch.tensor([3.0, 5.0], dtype=torch.float64)
    if way == "autograd":
        leaves = param.clone().requires_grad_(), grad.clone().requires_grad_()
        [of_param, of_grad] = torch.autograd.grad(run(*leaves) @ weights, leaves)
    elif way == "grad":
        of_param, of_grad = torch.func.grad(lambda p, g: run(p, g) @ weights, argnums=(0, 1))(param, grad)
    elif way == "jvp":
        of_param, of_grad = (
            jvp(run, (param, grad), tangents)[1] for tangents in ((weights, 0 * weights), (0 * weights, weights))
        )
    else:
        twice = jvp(lambda p: jvp(run, (p,), (weights,)), (param,), (weights,))
        (_, of_param), (of_param_again, of_grad) = twice
        assert torch.equal(of_param_again, weights)
    assert torch.equal(of_param, weights)
    assert torch.equal(of_grad, torch.zeros_like(grad))


HUNDREDS: dict[str, Any] = {
    "plain": {},
    "half": {"dtype": torch.bfloat16, "moment_dtype": torch.float32},
    "complex": {"dtype": torch.complex64},
    "found_inf": {"found_inf": torch.tensor(0.0)},
    "only the state": {"tracks_state": True},
}


def update_in_a_row(
    count: int,
    *,
    dtype: torch.dtype = torch.float32,
    moment_dtype: torch.dtype | None = None,
    tracks_state: bool = False,
    found_inf: Tensor | None = None,
) -> Tensor:
    param, hparams = torch.ones(2, dtype=dtype, requires_grad=not tracks_state), AdamHparams()
    state = adam_init(param, hparams, moment_dtype=moment_dtype)
    if tracks_state:
        state = state._replace(exp_avg_sq=state.exp_avg_sq.requires_grad_())
    for _ in range(count):
        param, state = adam_update(param, torch.ones_like(param), state, hparams, found_inf=found_inf)
        param = param.detach() if tracks_state else param
    return param


@pytest.mark.parametrize("how", HUNDREDS.values(), ids=HUNDREDS.keys())
def test_the_hundredth_recorded_update_in_a_row_warns_once_where_it_is_called(how: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        update_in_a_row(99, **how)
        assert not caught
        update_in_a_row(250, **how)
    [warning] = caught
    assert warning.category is GrowingGraphWarning
    assert "100 updates in a row" in str(warning.message)
    assert "detach" in str(warning.message)
    assert warning.filename == __file__
    assert "adam_update(param" in Path(__file__).read_text().splitlines()[warning.lineno - 1]


def test_updates_that_are_not_recorded_or_are_meant_to_be_do_not_warn() -> None:
    with torch.no_grad():
        update_in_a_row(120)
    slope = grad(lambda lr: run_a_hundred(lr).sum())(torch.tensor(0.1))
    assert slope.isfinite()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=GrowingGraphWarning)
        update_in_a_row(120)


def run_a_hundred(lr: Tensor) -> Tensor:
    param, hparams = torch.ones(2), AdamHparams(lr=lr)
    state = adam_init(param, hparams)
    for _ in range(120):
        param, state = adam_update(param, torch.ones(2), state, hparams)
    return param


def keep(*names: str) -> Any:
    """The contexts of a checkpoint that keeps the results of the operations called so, and recomputes all others."""

    def policy(_: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        is_kept = operation.name().removeprefix("aten::").split(".")[0] in names
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda: create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("is_tracked", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (300, 400)], ids=["small", "recycled"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("kept", ["clone", "_foreach_clone", "copy_", "empty_like", "_foreach_add", "sqrt", "sin"])
def test_selective_checkpoints_of_an_update_are_right_or_refused(
    kernel: str, is_tracked: bool, shape: tuple[int, int], is_transposed: bool, kept: str
) -> None:
    weight = random_tensor(shape, torch.float64, 0).requires_grad_()
    given, hparams = random_tensor(shape, torch.float64, 1), AdamHparams(lr=0.1, weight_decay=0.1)
    state = adam_init(given, hparams)
    if is_transposed:
        state = state._replace(exp_avg=0 * given.T.contiguous().T, exp_avg_sq=0 * given.T.contiguous().T + 1)

    def loss(w: Tensor) -> Tensor:
        new, _ = adam_update(w if is_tracked else given, given, state, hparams, kernel=kernel)
        return (new * w.sin()).square().sum()

    [expected] = torch.autograd.grad(loss(weight), weight)
    out = checkpoint(loss, weight, use_reentrant=False, context_fn=keep(kept))
    refusal = None
    try:
        [got] = torch.autograd.grad(out, weight)
        assert_close(got, expected)
    except RuntimeError as error:
        refusal = str(error)
    assert refusal is None or "cached during selective activation checkpoint has been mutated" in refusal
    assert refusal is None or kept != "sin"


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are those of the traced call
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5)], ids=str)
def test_jit_trace_records_the_equations(shape: tuple[int, ...]) -> None:
    def run(lr: Tensor, step: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        p, g, m, v, u = tensors
        hparams = AdamHparams(lr=lr, amsgrad=True, weight_decay=0.1)
        new, state = adam_update({"w": p}, {"w": g}, AdamState(step, *({"w": x} for x in (m, v, u))), hparams)
        return new["w"], state.step, state.exp_avg["w"], state.exp_avg_sq["w"], state.max_exp_avg_sq["w"]

    def inputs(seed: int) -> tuple[Tensor, ...]:
        leaves = (random_tensor(shape, torch.float64, seed + i, positive=True) for i in range(5))
        return torch.tensor(0.1 * seed), torch.tensor(float(seed)), *leaves

    traced = torch.jit.trace(run, inputs(1), check_trace=False)
    assert_close(traced(*inputs(7)), run(*inputs(7)))


def test_leaves_without_gradient_pass_their_derivative_on() -> None:
    x = make_inputs()
    params = {"a": x.param, "b": x.grad}
    hparams = AdamHparams(lr=0.1)
    state = adam_init(params, hparams, per_leaf_step=True)

    def run(p: Any) -> Any:
        new, new_state = adam_update(p, {"a": x.exp_avg, "b": None}, state, hparams)
        assert new_state.step["b"] is not state.step["b"]
        return new

    jacobian = jacrev(run)(params)
    assert torch.equal(jacobian["b"]["b"], torch.eye(3, dtype=torch.float64))
    assert torch.equal(run(params)["b"], params["b"])
    assert not torch.equal(run(params)["a"], params["a"])


@each_flags
def test_complex_leaves_are_two_real_ones(flags: str) -> None:
    x, flag = make_inputs((3, 2)), FLAGS[flags]
    names = NAMES[:5]

    def run_complex(*values: Tensor) -> Tensor:
        leaves = {name: torch.view_as_complex(value) for name, value in zip(names, values, strict=True)}
        outputs = ours(x._replace(**leaves), **flag)
        return weighted(tuple(torch.view_as_real(y) if y.is_complex() else y for y in outputs))

    def run_real(*values: Tensor) -> Tensor:
        return weighted(ours(x._replace(**dict(zip(names, values, strict=True))), **flag))

    argnums = tuple(range(5))
    assert_close(grad(run_complex, argnums=argnums)(*x[:5]), grad(run_real, argnums=argnums)(*x[:5]))
    assert_close(jvp(run_complex, x[:5], x[:5]), jvp(run_real, x[:5], x[:5]))
    second = hessian(run_complex, argnums=1)(*x[:5])
    assert_close(second, hessian(run_real, argnums=1)(*x[:5]))


def test_complex_gradcheck_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    p, g, m = (torch.randn(2, generator=generator, dtype=torch.complex128, requires_grad=True) for _ in range(3))
    v = torch.complex(*(0.5 + torch.rand(2, 2, generator=generator, dtype=torch.float64)))

    def run(p: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new, state = adam_update(p, g, AdamState(torch.tensor(2.0), m, v), AdamHparams(lr=0.1, eps=0.01))
        return new, state.exp_avg, state.exp_avg_sq

    assert gradcheck(run, (p, g, m), check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_have_the_derivative_of_float64_within_rounding(dtype: torch.dtype) -> None:
    x = make_inputs((5,), dtype=dtype)
    wide = Inputs(*(y.double() for y in x))

    def loss(f: Callable[..., Any], x: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda g, lr: f(x._replace(grad=g, lr=lr))[0].double().sum()

    got = grad(loss(ours, x), argnums=(0, 1))(x.grad, x.lr)
    expected = grad(loss(reference, wide), argnums=(0, 1))(wide.grad, wide.lr)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float64
    assert_close(got, expected, rtol=2e-2, atol=1e-3)
    outputs = vmap(lambda g: ours(x._replace(grad=g))[0])(torch.stack([x.grad, -x.grad]))
    assert outputs.dtype == dtype
    assert_close(outputs[0], reference(wide)[0], rtol=1e-2, atol=1e-2)


def test_mixed_dtypes_keep_theirs_under_transforms() -> None:
    x = make_inputs(dtype=torch.float32)
    mixed = x._replace(param=x.param.bfloat16(), grad=x.grad.double())
    outputs, tangents = jvp(lambda p: ours(mixed._replace(param=p)), (mixed.param,), (mixed.param,))
    dtypes = [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert [y.dtype for y in outputs] == dtypes
    assert [y.dtype for y in tangents] == dtypes
    assert grad(lambda g: ours(mixed._replace(grad=g))[0].double().sum())(mixed.grad).dtype == torch.float64


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_layouts_do_not_matter_under_transforms(layout: str) -> None:
    x = make_inputs((3, 4))
    other = {
        "transposed": lambda y: y.mT.contiguous().mT,
        "expanded": lambda y: y[:1].expand(3, 4),
        "strided": lambda y: torch.stack([y, y], -1)[..., 0],
    }[layout]
    laid = x._replace(**{name: other(getattr(x, name)) for name in NAMES[:5]})
    plain = Inputs(*(y.clone(memory_format=torch.contiguous_format) for y in laid))
    results = [grad(lambda y: weighted(ours(y, amsgrad=True)))(given) for given in (laid, plain)]
    assert_close(*results)


def test_saved_tensors_hooks_and_checkpoint_work_around_an_update() -> None:
    x = make_inputs()
    expected = grad(lambda p: weighted(ours(x._replace(param=p))))(x.param)
    leaf = x.param.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        loss = weighted(ours(x._replace(param=leaf)))
    assert_close(torch.autograd.grad(loss, leaf), [expected])
    loss = torch.utils.checkpoint.checkpoint(lambda p: weighted(ours(x._replace(param=p))), leaf, use_reentrant=False)
    assert_close(torch.autograd.grad(loss, leaf), [expected])


# An explicit kernel.


def value_under_dual(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, x))).primal


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("transform", ["vjp", "jvp", "autograd", "dual", "vmap"])
def test_an_explicit_kernel_computes_the_value_under_a_transform(kernel: str, transform: str) -> None:
    x = make_inputs((37,), dtype=torch.float32)
    state = AdamState(x.step.float(), x.exp_avg, x.exp_avg_sq)

    def run(p: Tensor) -> Tensor:
        return adam_update(p, x.grad, state, AdamHparams(lr=0.1, weight_decay=0.1), kernel=kernel)[0]

    value = {
        "vjp": lambda: vjp(run, x.param)[0],
        "jvp": lambda: jvp(run, (x.param,), (x.param,))[0],
        "autograd": lambda: run(x.param.clone().requires_grad_()).detach(),
        "dual": lambda: value_under_dual(run, x.param),
        "vmap": lambda: vmap(run)(x.param.expand(2, 37))[1],
    }[transform]()
    if transform == "vmap":  # the fused kernel rounds by the position of an element in memory
        torch.testing.assert_close(value, run(x.param), rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(value, run(x.param))


# Tracers.


def small_tree(seed: int) -> dict[str, Any]:
    return member(tree_of(seed), 0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_without_values_keep_shapes_and_dtypes(device: str) -> None:
    with FakeTensorMode():
        params = {"a": torch.empty(3, 4, device=device), "b": [torch.empty(2, dtype=torch.bfloat16, device=device)]}
        hparams = AdamHparams(lr=torch.empty((), device=device), amsgrad=True)
        state = adam_init(params, hparams)
        new, new_state = adam_update(params, params, state, hparams)
        assert torch_pytree.tree_structure((new, new_state)) == torch_pytree.tree_structure((params, state))
        for got, given in zip(tensors_of((new, new_state)), tensors_of((params, state)), strict=True):
            assert (got.shape, got.dtype, got.device) == (given.shape, given.dtype, given.device)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@each_flags
def test_a_traced_step_bakes_in_no_value(mode: str, flags: str) -> None:
    def run(params: Any, grads: Any, state: AdamState, lr: Tensor, found_inf: Tensor, grad_scale: Tensor) -> Any:
        hparams = AdamHparams(lr=lr, weight_decay=0.1, **FLAGS[flags])
        return adam_update(params, grads, state, hparams, found_inf=found_inf, grad_scale=grad_scale)

    def make(seed: int, lr: float, found_inf: float, scale: float, steps: int) -> tuple[Any, ...]:
        params, hparams = small_tree(seed), AdamHparams(**FLAGS[flags])
        state = adam_init(params, hparams)
        for step in range(steps):
            params, state = adam_update(params, small_tree(seed + step + 1), state, hparams)
        return (params, small_tree(seed + 9), state, *(torch.tensor(x) for x in (lr, found_inf, scale)))

    graph = make_fx(run, tracing_mode=mode)(*make(0, 0.1, 0.0, 1.0, 1))
    for arguments in (make(0, 0.1, 0.0, 1.0, 1), make(5, 0.3, 0.0, 4.0, 3), make(5, 0.3, 1.0, 4.0, 3)):
        before = [(x._version, x.clone()) for x in tensors_of(arguments)]
        assert_close(graph(*arguments), run(*arguments), rtol=1e-6, atol=1e-7)
        for x, (version, value) in zip(tensors_of(arguments), before, strict=True):
            assert x._version == version
            assert torch.equal(x, value)


def test_tracing_a_gradient_step_bakes_in_no_value() -> None:
    hparams = AdamHparams(lr=0.1)

    def run(params: Any, state: AdamState) -> Any:
        grads = grad(lambda p: sum((x**2).sum() for x in tensors_of(p)))(params)
        return adam_update(params, grads, state, hparams)

    params = small_tree(0)
    state = adam_init(params, hparams)
    graph = make_fx(run)(params, state)
    for _ in range(3):
        expected = run(params, state)
        assert_close(graph(params, state), expected, rtol=1e-6, atol=1e-7)
        params, state = expected


@pytest.fixture
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@each_flags
def test_compiled_equals_eager(flags: str) -> None:
    hparams = AdamHparams(lr=0.1, weight_decay=0.1, **FLAGS[flags])

    def run(params: Any, grads: Any, state: AdamState) -> Any:
        return adam_update(params, grads, state, hparams)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    params = small_tree(0)
    state = adam_init(params, hparams)
    for seed in (1, 2, 3):
        before = [x.clone() for x in tensors_of((params, state))]
        got, expected = compiled(params, small_tree(seed), state), run(params, small_tree(seed), state)
        assert torch_pytree.tree_structure(got) == torch_pytree.tree_structure(expected)
        assert_close(got, expected, rtol=1e-6, atol=1e-7)
        assert all(torch.equal(x, y) for x, y in zip(tensors_of((params, state)), before, strict=True))
        params, state = expected


@pytest.mark.usefixtures("fresh_compiler")
def test_tensor_hyperparameters_do_not_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def run(params: Any, grads: Any, state: AdamState, lr: Tensor) -> Any:
        return adam_update(params, grads, state, AdamHparams(lr=lr))

    params = small_tree(0)
    state = adam_init(params, AdamHparams())
    for lr in (0.1, 0.2, 0.3):
        expected = adam_update(params, small_tree(1), state, AdamHparams(lr=torch.tensor(lr)))
        params, state = run(params, small_tree(1), state, torch.tensor(lr))
        assert_close((params, state), expected, rtol=1e-6, atol=1e-7)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_transforms_inside_a_compiled_function_equal_eager() -> None:
    def run(params: Tensor, grads: Tensor, lrs: Tensor) -> Any:
        def loss(p: Tensor, g: Tensor, lr: Tensor) -> Tensor:
            hparams = AdamHparams(lr=lr)
            return (adam_update(p, g, adam_init(p, hparams), hparams)[0] ** 2).sum()

        return vmap(grad(loss, argnums=(0, 2)))(params, grads, lrs)

    generator = torch.Generator().manual_seed(0)
    params, grads = (torch.randn(4, 3, generator=generator) for _ in range(2))
    lrs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    got = torch.compile(run, fullgraph=True, backend="eager")(params, grads, lrs)
    assert_close(got, run(params, grads, lrs), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_autograd_through_a_compiled_update_equals_eager(requires_grad: bool) -> None:
    hparams = AdamHparams(lr=0.1)
    state = adam_init(torch.zeros(3), hparams)
    p, g = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, -1.0, 2.0])

    def run(p: Tensor, g: Tensor) -> Tensor:
        return adam_update(p, g, state, hparams)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    gs = [g.clone().requires_grad_(requires_grad) for _ in range(2)]
    outputs = [f(p, x) for f, x in zip((compiled, run), gs, strict=True)]
    assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-7)
    assert [y.requires_grad for y in outputs] == [requires_grad] * 2
    if requires_grad:
        got, expected = (torch.autograd.grad((y**2).sum(), x) for y, x in zip(outputs, gs, strict=True))
        assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("fresh_compiler")
@each_flags
def test_a_compiled_donation_writes_into_the_given_buffers(flags: str) -> None:
    hparams = AdamHparams(lr=0.1, **FLAGS[flags])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(params: Any, grads: Any, state: AdamState) -> Any:
        return adam_update(params, grads, state, hparams, donate=True)

    params = small_tree(0)
    state = adam_init(params, hparams)
    pointers = [x.data_ptr() for x in tensors_of((params, state))]
    pure = torch_pytree.tree_map(torch.clone, (params, state))
    for seed in (1, 2, 3):
        grads = small_tree(seed)
        pure = adam_update(pure[0], grads, pure[1], hparams)
        before, given = [x.clone() for x in tensors_of(grads)], (params, state)
        params, state = run(params, grads, state)
        assert_close((params, state), pure, rtol=1e-6, atol=1e-7)
        assert_close(given, pure, rtol=1e-6, atol=1e-7)
        assert [x.data_ptr() for x in tensors_of((params, state))] == pointers
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(grads), before, strict=True))


@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_a_torch_without_the_level_of_duals_counts_as_one_with_duals(
    per_leaf_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, grads, hparams = small_tree(0), small_tree(1), AdamHparams(lr=0.1)
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
    expected = adam_update(params, grads, state, hparams)
    with monkeypatch.context() as hidden:
        hidden.delattr(forward_ad, "_current_level")
        got = adam_update(params, grads, state, hparams)
        with pytest.raises(RuntimeError, match="forward-mode dual level"):
            adam_update(params, grads, state, hparams, donate=True)
    assert_close(got, expected, rtol=0, atol=0)


PRIVATE_NAMES = (
    "_len_torch_dispatch_stack",
    "_are_functorch_transforms_active",
    "_functorch._unwrap_batched",
    "_functorch.get_interpreter_stack",
    "_functorch.get_unwrapped",
    "_functorch.is_functorch_wrapped_tensor",
    "_functorch.is_gradtrackingtensor",
    "_functorch.is_legacy_batchedtensor",
)


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_a_torch_without_a_private_name_costs_speed_and_no_derivative(name: str) -> None:
    """Hide the name before the package is imported, and compare a second derivative and a map with finite values."""
    owner, _, attribute = ("torch._C." + name).rpartition(".")
    code = f"""
import torch
from torch.func import grad, jacfwd, vmap
import torch._functorch.autograd_function, torch._functorch.eager_transforms, torch._functorch.vmap
hidden = {owner}.{attribute}
del {owner}.{attribute}
import functional_adam.call.update
{owner}.{attribute} = hidden
from functional_adam import AdamHparams, adam_init, adam_update
p = torch.tensor([1.0, -2.0], dtype=torch.float64)

def f(lr, g=p):
    return adam_update(p, g, adam_init(p, AdamHparams()), AdamHparams(lr=lr))[0].pow(2).sum()

lr, rates = torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
# p' = p - lr * sign(p) but for eps, so that the second derivative is 2 for each element.
assert abs(jacfwd(jacfwd(f))(lr).item() - 4) < 1e-6
assert abs(grad(grad(f))(lr).item() - 4) < 1e-6
assert torch.allclose(vmap(f)(rates), torch.stack([f(x) for x in rates]))
total = grad(lambda scale: vmap(lambda g: f(0.1, g))(scale * torch.ones(3, 2, dtype=torch.float64)).sum())(lr)
assert total.isfinite()
q, hparams = p.clone().requires_grad_(), AdamHparams(lr=0.1)
new = adam_update(q, p, adam_init(p, hparams), hparams)[0]
eye = torch.eye(2, dtype=torch.float64)
assert torch.equal(torch.autograd.grad(new, q, eye, is_grads_batched=True)[0], eye)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
