"""Autograd, torch.func, forward-mode duals and tracers see an update as an ordinary differentiable function."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from functional_adam import AdamHparams, AdamState, GrowingGraphWarning, adam_init, adam_update
from tests.builders import assert_same_bits, assert_unchanged, clone, snapshot, strided, tensors_of, transposed
from tests.equations_oracle import DOUBLE, LEAVES, Point, make_point, reference, stacked, weighted
from tests.oracles import KERNELS
from tests.strategies import random_tensor

# torch scripts some formulas when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")

FLAGS: dict[str, dict[str, bool]] = {
    "adam": {},
    "amsgrad": {"amsgrad": True},
    "adamw_maximize": {"decoupled_weight_decay": True, "maximize": True},
}
each_flags = pytest.mark.parametrize("flags", FLAGS)
NAMES = (*Point._fields, "step", "grad_scale")


def ours(at: Point, *, step: Any = 3.0, grad_scale: Any = 2.0, **flags: bool) -> list[Tensor]:
    """New parameters, moments and maxima, and the step."""
    hparams = AdamHparams(lr=at.lr, betas=(at.beta1, at.beta2), eps=at.eps, weight_decay=at.weight_decay, **flags)
    maxima = at.max_exp_avg_sq if flags.get("amsgrad") else ()
    state = AdamState(torch.as_tensor(step).float(), at.exp_avg, at.exp_avg_sq, maxima)
    params, state = adam_update(at.params, at.grads, state, hparams, grad_scale=grad_scale)
    return tensors_of((params, state[1:], state.step))


def theirs(at: Point, *, step: Any = 3.0, grad_scale: Any = 2.0, **flags: bool) -> list[Tensor]:
    """The same by the textbook, away from zeros and ties."""
    return [*reference(at, step=step, grad_scale=grad_scale, **flags), torch.as_tensor(step) + 1.0]


def assert_close(got: Any, expected: Any, *, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    rows = list(zip(tensors_of(got), tensors_of(expected), strict=True))
    assert rows
    for a, b in rows:
        assert a.shape == b.shape
        torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=rtol, atol=atol)


# step and grad_scale pass through float32, and so do their derivatives.
THROUGH_FLOAT32 = {"rtol": 1e-6, "atol": 1e-7}


# Derivatives with respect to one input, as of the textbook; with respect to all inputs: test_rules.


def of_one(name: str, flags: dict[str, bool], shape: tuple[int, ...]) -> tuple[list[Callable[[Any], Any]], Tensor]:
    """Our update and the textbook's as functions of the leaf or number `name`, and where to differentiate them."""
    at = make_point(shape)
    scalars = {"step": torch.tensor(3.0, dtype=DOUBLE), "grad_scale": torch.tensor(2.0, dtype=DOUBLE)}

    def of(function: Callable[..., Any]) -> Callable[[Any], Any]:
        def run(x: Tensor) -> Any:
            if name in scalars:
                return function(at, **{**scalars, name: x}, **flags)
            return function(at._replace(**{name: [x] if name in LEAVES else x}), **scalars, **flags)

        return run

    given = scalars[name] if name in scalars else getattr(at, name)
    return [of(ours), of(theirs)], given[0] if name in LEAVES else given


@each_flags
@pytest.mark.parametrize("name", NAMES)
def test_first_derivatives_by_one_input_agree_with_the_textbook(flags: str, name: str) -> None:
    functions, x = of_one(name, FLAGS[flags], (3,))
    matters = name != "max_exp_avg_sq" or flags == "amsgrad"
    assert_close(*(f(x) for f in functions))

    got, expected = (grad(lambda x, f=f: weighted(f(x)))(x) for f in functions)
    assert_close(got, expected, **THROUGH_FLOAT32)
    assert bool(expected.abs().max() > 0) is matters
    leaf = x.clone().requires_grad_()
    loss = weighted(functions[0](leaf))
    assert loss.requires_grad is matters
    if matters:
        assert_close(torch.autograd.grad(loss, leaf), [expected], **THROUGH_FLOAT32)

    tangent = torch.linspace(0.5, 1.5, 3, dtype=DOUBLE)[: x.numel()].reshape(x.shape)
    got, expected = (jvp(f, (x,), (tangent,)) for f in functions)
    assert_close(got, expected, **THROUGH_FLOAT32)
    with forward_ad.dual_level():
        outputs = functions[0](forward_ad.make_dual(x, tangent))
        tangents = [forward_ad.unpack_dual(y).tangent for y in outputs]
    for of_dual, of_jvp in zip(tangents, expected[1], strict=True):
        assert_close(torch.zeros_like(of_jvp) if of_dual is None else of_dual, of_jvp, **THROUGH_FLOAT32)


@pytest.mark.parametrize("flags", ["amsgrad", "adamw_maximize"])
@pytest.mark.parametrize("name", NAMES)
def test_every_mix_of_modes_gives_the_second_derivative(flags: str, name: str) -> None:
    functions, x = of_one(name, FLAGS[flags], (2,))
    run, textbook = (lambda x, f=f: weighted(f(x)) for f in functions)
    expected = hessian(textbook)(x)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert_close(outer(inner(run))(x), expected, rtol=1e-5, atol=1e-6)


def test_third_derivative_agrees_with_the_textbook() -> None:
    functions, x = of_one("grads", {}, (1,))
    got, expected = (jacfwd(jacfwd(jacrev(lambda x, f=f: weighted(f(x)))))(x) for f in functions)
    assert expected.abs().max() > 0
    assert_close(got, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["lr", "beta1", "beta2"])
def test_derivatives_by_a_number_that_is_zero_agree_with_the_textbook(name: str) -> None:
    functions, _ = of_one(name, {}, (3,))
    zero = torch.zeros((), dtype=DOUBLE)
    got, expected = (jacrev(lambda x, f=f: f(x)[0])(zero) for f in functions)
    assert expected.abs().min() > 0
    assert_close(got, expected, **THROUGH_FLOAT32)


def test_tracked_parameters_come_back_with_their_history() -> None:
    at = make_point((3,))
    at = at._replace(params=[torch.nn.Parameter(at.params[0])])
    new = ours(at)[0]
    assert type(new) is Tensor
    assert new.requires_grad
    with torch.no_grad():
        assert not ours(at)[0].requires_grad


# torch.func.vmap: dtypes, the first state, and members that are skipped. Members and numbers of every kind: test_rules.


def tree_of(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"w": random_tensor((4, 3, 2), dtype, seed), "b": [random_tensor((4,), dtype, seed + 100)]}


def member(tree: Any, index: int) -> Any:
    return torch_pytree.tree_map(lambda x: x[index], tree)


@each_flags
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_vmap_equals_a_loop(flags: str, dtype: torch.dtype) -> None:
    hparams = AdamHparams(lr=0.1, weight_decay=0.1, **FLAGS[flags])
    rounding = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    init = partial(adam_init, hparams=hparams, per_leaf_step=flags == "amsgrad")
    params = tree_of(0, dtype)
    state = vmap(init)(params)
    loop = [(member(params, i), init(member(params, i))) for i in range(4)]
    for seed in (1, 2, 3):
        grads = tree_of(seed, dtype)
        params, state = vmap(lambda p, g, s: adam_update(p, g, s, hparams))(params, grads, state)
        loop = [adam_update(p, member(grads, i), s, hparams) for i, (p, s) in enumerate(loop)]
        expected = stacked(loop)
        assert torch_pytree.tree_structure((params, state)) == torch_pytree.tree_structure(expected)
        for got, wanted in zip(tensors_of((params, state)), tensors_of(expected), strict=True):
            torch.testing.assert_close(got, wanted, **rounding)


def test_vmap_of_init_gives_every_member_a_step() -> None:
    params = tree_of(0)
    state = vmap(lambda p: adam_init(p, AdamHparams(amsgrad=True)))(params)
    zeros = torch_pytree.tree_map(torch.zeros_like, params)
    assert_same_bits(state, AdamState(torch.zeros(4), zeros, zeros, zeros))
    assert state.master_params == ()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_member_with_an_infinite_gradient_stands_still_and_has_finite_derivatives(bad: float) -> None:
    params, grads = (tree_of(seed, DOUBLE)["w"] for seed in (0, 1))
    grads[1, 0, 0] = bad
    lr = torch.tensor(0.1, dtype=DOUBLE)

    def run(p: Tensor, g: Tensor, lr: Tensor) -> tuple[Tensor, Any]:
        hparams = AdamHparams(lr=lr)
        found_inf = ~g.isfinite().all()
        result = adam_update(p, g, adam_init(p, hparams), hparams, found_inf=found_inf)
        return result[0].sum(), result

    slope = grad(run, argnums=(0, 1, 2), has_aux=True)
    got = vmap(slope, in_dims=(0, 0, None))(params, grads, lr)
    for i in (0, 2, 3):
        assert_close(member(got, i), slope(params[i], grads[i], lr))
    (of_params, of_grads, of_lr), (new, state) = member(got, 1)
    assert_same_bits((new, state), (params[1], adam_init(params[1], AdamHparams())))
    assert_same_bits((of_params, of_grads, of_lr), (torch.ones_like(new), torch.zeros_like(new), torch.zeros_like(lr)))
    # Reverse mode through the mapped function sums the members.
    total = grad(lambda y: vmap(run, in_dims=(0, 0, None))(params, grads, y)[0].sum())(lr)
    assert_close(total, got[0][2].sum())


# At v == 0. First steps, and ties of amsgrad: test_rules.


def zero_case(**numbers: Any) -> tuple[Tensor, AdamState, AdamHparams]:
    hparams = AdamHparams(**numbers)
    param = torch.tensor([1.0, -2.0, 3.0], dtype=DOUBLE)
    return param, adam_init(param, hparams), hparams


@pytest.mark.parametrize("differentiate", [jacrev, jacfwd])
def test_a_zero_gradient_moves_nothing_and_passes_the_parameter_on(differentiate: Callable[..., Any]) -> None:
    param, state, hparams = zero_case(lr=torch.tensor(0.1, dtype=DOUBLE))
    jacobian = differentiate(lambda p: adam_update(p, torch.zeros_like(p), state, hparams)[0])(param)
    assert torch.equal(jacobian, torch.eye(3, dtype=DOUBLE))


def test_the_derivative_of_the_root_is_zero_at_zero() -> None:
    # exp_avg_sq = 0 and g = 0, but m != 0: p - lr / (1 - b1) * m / eps, whatever the derivative of the root.
    param = torch.tensor([1.0], dtype=DOUBLE)
    zero, m = torch.zeros(1, dtype=DOUBLE), torch.tensor([0.5], dtype=DOUBLE)
    hparams = AdamHparams(lr=0.1, betas=(0.5, 0.5), eps=0.25)

    def run(v: Tensor) -> Tensor:
        return adam_update(param, zero, AdamState(torch.tensor(0.0), m, v), hparams)[0].sum()

    assert_close(run(zero), (1 - 0.1 / 0.5 * (0.5 * m) / 0.25).sum())
    assert grad(run)(zero) == 0
    assert jacfwd(run)(zero) == 0


# Options and dtypes under transforms.


@pytest.mark.parametrize("found", [False, True])
def test_found_inf_is_followed_under_autograd(found: bool) -> None:
    param, state, hparams = zero_case(lr=0.1)
    g = torch.tensor([1.0, float("inf") if found else 2.0, 3.0], dtype=DOUBLE)

    def run(p: Tensor) -> tuple[Tensor, Tensor]:
        new, new_state = adam_update(p, g, state, hparams, found_inf=torch.tensor(float(found)))
        return new, new_state.step

    (new, step), pull = vjp(run, param)
    assert torch.equal(new, param) is found
    assert step.item() == float(not found)
    [got] = pull((torch.ones_like(new), torch.zeros_like(step)))
    assert torch.equal(got, torch.ones_like(param))


def by_autograd(run: Callable[..., Tensor], at: tuple[Tensor, ...], weights: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in at]
    return torch.autograd.grad(run(*leaves) @ weights, leaves)


def by_equations(run: Callable[..., Tensor], at: tuple[Tensor, Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    """Forward mode within forward mode, which no kernel can follow."""
    (_, first), (again, second) = jvp(lambda p: jvp(lambda p: run(p, at[1]), (p,), (weights,)), at[:1], (weights,))
    assert torch.equal(again, weights)
    return first, second


WAYS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "autograd": by_autograd,
    "grad": lambda run, at, weights: grad(lambda *at: run(*at) @ weights, argnums=(0, 1))(*at),
    "jvp": lambda run, at, w: tuple(jvp(run, at, tangents)[1] for tangents in ((w, 0 * w), (0 * w, w))),
    "equations": by_equations,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("scale", "moment", "is_decoupled"),
    [
        (None, "exp_avg", False),
        (0.0, "exp_avg_sq", True),
        (float("nan"), "max_exp_avg_sq", False),
        (float("inf"), "exp_avg", True),
        (None, "exp_avg_sq", False),
        (0.0, "max_exp_avg_sq", True),
    ],
)
def test_a_skipped_update_is_the_identity_to_derivatives(
    way: str, scale: float | None, moment: str, is_decoupled: bool
) -> None:
    hparams = AdamHparams(eps=0.0, weight_decay=0.1, amsgrad=True, decoupled_weight_decay=is_decoupled)
    param, gradient, broken, weights = (
        torch.tensor(x, dtype=DOUBLE)
        for x in ([1.0, -2.0], [0.0, float("inf")], [float("nan"), float("inf")], [3.0, 5.0])
    )
    state = adam_init(param, hparams)._replace(**{moment: broken})

    def run(p: Tensor, g: Tensor) -> Tensor:
        return adam_update(p, g, state, hparams, grad_scale=scale, found_inf=1.0)[0]

    assert_same_bits(WAYS[way](run, (param, gradient), weights), (weights, torch.zeros_like(gradient)))


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
    lr: Any = 1e-3,
    dtype: torch.dtype = torch.float32,
    moment_dtype: torch.dtype | None = None,
    tracks_state: bool = False,
    found_inf: Tensor | None = None,
) -> Tensor:
    param, hparams = torch.ones(2, dtype=dtype, requires_grad=not tracks_state), AdamHparams(lr=lr)
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
    assert grad(lambda lr: update_in_a_row(120, lr=lr).sum())(torch.tensor(0.1)).isfinite()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=GrowingGraphWarning)
        update_in_a_row(120)


def keep(*names: str) -> Any:
    """The contexts of a checkpoint that keeps the results of the operations called so, and recomputes all others."""

    def policy(_: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        is_kept = operation.name().removeprefix("aten::").split(".")[0] in names
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda: create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("is_tracked", [False, True])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((5, 3), Tensor.clone), ((300, 400), Tensor.clone), ((5, 3), transposed), ((300, 400), transposed)],
    ids=["small", "recycled", "small_transposed", "recycled_transposed"],
)
def test_selective_checkpoints_of_an_update_are_right_or_refused(
    kernel: Any, is_tracked: bool, shape: tuple[int, int], layout: Callable[[Tensor], Tensor]
) -> None:
    weight = random_tensor(shape, DOUBLE, 0).requires_grad_()
    given, hparams = random_tensor(shape, DOUBLE, 1), AdamHparams(lr=0.1, weight_decay=0.1)
    zeros, ones = (layout(x) for x in (torch.zeros_like(given), torch.ones_like(given)))
    state = adam_init(given, hparams)._replace(exp_avg=zeros, exp_avg_sq=ones)

    def loss(w: Tensor) -> Tensor:
        new, _ = adam_update(w if is_tracked else given, given, state, hparams, kernel=kernel)
        return (new * w.sin()).square().sum()

    [expected] = torch.autograd.grad(loss(weight), weight)
    for kept in ("clone", "_foreach_clone", "copy_", "empty_like", "_foreach_add", "sqrt", "sin"):
        out = checkpoint(loss, weight, use_reentrant=False, context_fn=keep(kept))
        refusal = None
        try:
            [got] = torch.autograd.grad(out, weight)
            assert_close(got, expected)
        except RuntimeError as error:
            refusal = str(error)
        assert refusal is None or "cached during selective activation checkpoint has been mutated" in refusal, kept
        assert refusal is None or kept != "sin"


def test_leaves_without_gradient_pass_their_derivative_on() -> None:
    params = {name: random_tensor((3,), DOUBLE, seed) for seed, name in enumerate("ab")}
    hparams = AdamHparams(lr=0.1)
    state = adam_init(params, hparams, per_leaf_step=True)

    def run(p: Any) -> Any:
        new, new_state = adam_update(p, {"a": random_tensor((3,), DOUBLE, 2), "b": None}, state, hparams)
        assert new_state.step["b"] is not state.step["b"]
        return new

    assert torch.equal(jacrev(run)(params)["b"]["b"], torch.eye(3, dtype=DOUBLE))
    assert torch.equal(run(params)["b"], params["b"])
    assert not torch.equal(run(params)["a"], params["a"])


@each_flags
def test_complex_leaves_are_two_real_ones(flags: str) -> None:
    at, argnums = make_point((3, 2)), tuple(range(5))
    values = [column[0] for column in at[:5]]

    def run_complex(*values: Tensor) -> Tensor:
        outputs = ours(Point(*([torch.view_as_complex(x)] for x in values), *at[5:]), **FLAGS[flags])
        return weighted([torch.view_as_real(y) if y.is_complex() else y for y in outputs])

    def run_real(*values: Tensor) -> Tensor:
        return weighted(ours(Point(*([x] for x in values), *at[5:]), **FLAGS[flags]))

    def derivatives(run: Callable[..., Tensor]) -> Any:
        tangents = jvp(run, tuple(values), tuple(values))
        return grad(run, argnums=argnums)(*values), tangents, hessian(run, argnums=1)(*values)

    assert_close(derivatives(run_complex), derivatives(run_real))


@pytest.mark.parametrize(
    "layout", [transposed, strided, lambda x: x[:1].expand(3, 4)], ids=["t", "strided", "expanded"]
)
def test_layouts_do_not_matter_under_transforms(layout: Callable[[Tensor], Tensor]) -> None:
    at = make_point((3, 4))
    laid = at._replace(**{name: [layout(x) for x in getattr(at, name)] for name in LEAVES})
    plain = torch_pytree.tree_map(lambda x: x.clone(memory_format=torch.contiguous_format), laid)
    assert_close(*(grad(lambda at: weighted(ours(at, amsgrad=True)))(given) for given in (laid, plain)))


# Tracers.


def small_tree(seed: int) -> dict[str, Any]:
    return member(tree_of(seed), 0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_without_values_keep_shapes_and_dtypes(device: str) -> None:
    with FakeTensorMode():
        params = {"a": torch.empty(3, 4, device=device), "b": [torch.empty(2, dtype=torch.bfloat16, device=device)]}
        hparams = AdamHparams(lr=torch.empty((), device=device), amsgrad=True)
        state = adam_init(params, hparams)
        result = adam_update(params, params, state, hparams)
        assert torch_pytree.tree_structure(result) == torch_pytree.tree_structure((params, state))
        for got, given in zip(tensors_of(result), tensors_of((params, state)), strict=True):
            assert (got.shape, got.dtype, got.device) == (given.shape, given.dtype, given.device)


@pytest.mark.parametrize(
    ("mode", "flags"), [("real", "adam"), ("fake", "amsgrad"), ("symbolic", "adamw_maximize"), ("symbolic", "amsgrad")]
)
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
        before = snapshot(arguments)
        assert_close(graph(*arguments), run(*arguments), rtol=1e-6, atol=1e-7)
        assert_unchanged(arguments, before)


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


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are those of the traced call
@pytest.mark.parametrize("shape", [(), (2, 3, 4, 5)], ids=str)
def test_jit_trace_records_the_equations(shape: tuple[int, ...]) -> None:
    def run(lr: Tensor, step: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        p, g, m, v, u = ({"w": x} for x in tensors)
        hparams = AdamHparams(lr=lr, amsgrad=True, weight_decay=0.1)
        return tuple(tensors_of(adam_update(p, g, AdamState(step, m, v, u), hparams)))

    def inputs(seed: int) -> tuple[Tensor, ...]:
        leaves = (random_tensor(shape, DOUBLE, seed + i, positive=True) for i in range(5))
        return torch.tensor(0.1 * seed), torch.tensor(float(seed)), *leaves

    traced = torch.jit.trace(run, inputs(1), check_trace=False)
    assert_close(traced(*inputs(7)), run(*inputs(7)))


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
        before = snapshot((params, state))
        got, expected = compiled(params, small_tree(seed), state), run(params, small_tree(seed), state)
        assert torch_pytree.tree_structure(got) == torch_pytree.tree_structure(expected)
        assert_close(got, expected, rtol=1e-6, atol=1e-7)
        assert_unchanged((params, state), before)
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

    arguments = *(random_tensor((4, 3), torch.float32, seed) for seed in (0, 1)), torch.tensor([0.1, 0.2, 0.3, 0.4])
    got = torch.compile(run, fullgraph=True, backend="eager")(*arguments)
    assert_close(got, run(*arguments), rtol=1e-5, atol=1e-6)


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
@pytest.mark.parametrize("flags", ["amsgrad", "adamw_maximize"])
def test_a_compiled_donation_writes_into_the_given_buffers(flags: str) -> None:
    hparams = AdamHparams(lr=0.1, **FLAGS[flags])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(params: Any, grads: Any, state: AdamState) -> Any:
        return adam_update(params, grads, state, hparams, donate=True)

    params = small_tree(0)
    state = adam_init(params, hparams)
    pointers = [x.data_ptr() for x in tensors_of((params, state))]
    pure = clone((params, state))
    for seed in (1, 2, 3):
        grads = small_tree(seed)
        pure = adam_update(pure[0], grads, pure[1], hparams)
        before, given = snapshot(grads), (params, state)
        params, state = run(params, grads, state)
        assert_close((params, state), pure, rtol=1e-6, atol=1e-7)
        assert_close(given, pure, rtol=1e-6, atol=1e-7)
        assert [x.data_ptr() for x in tensors_of((params, state))] == pointers
        assert_unchanged(grads, before)


# A torch that lacks what the package asks it for.


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
    "_C._len_torch_dispatch_stack",
    "_C._are_functorch_transforms_active",
    "_C._functorch._unwrap_batched",
    "_C._functorch.get_interpreter_stack",
    "_C._functorch.get_unwrapped",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_C._functorch.is_gradtrackingtensor",
    "_C._functorch.is_legacy_batchedtensor",
)
# Each name is hidden while a process that has torch already imports the package.
WITHOUT_EACH = """
import functools, os, sys, traceback
import torch
from torch.func import grad, jacfwd, vmap
import torch._functorch.autograd_function, torch._functorch.eager_transforms, torch._functorch.vmap

jacfwd(jacfwd(torch.exp))(torch.ones(()))  # imports for a second what processes then share

def check(path):
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, torch)
    hidden = getattr(owner, name)
    delattr(owner, name)
    import functional_adam
    setattr(owner, name, hidden)
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

for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            check(path)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, path
"""


def test_a_torch_without_a_private_name_costs_speed_and_no_derivative() -> None:
    command = [sys.executable, "-c", WITHOUT_EACH, *PRIVATE_NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
