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
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from functional_adam import AdamHparams, AdamState, GrowingGraphWarning, adam_init, adam_update
from tests.builders import assert_unchanged, make_call, snapshot, tensors_of, transposed
from tests.equations_oracle import DOUBLE, LEAVES, Point, make_point, reference, weighted
from tests.oracles import KERNELS
from tests.strategies import random_tensor
from tests.test_rules import updated
from tests.tolerances import assert_close, assert_equal

# torch scripts some formulas when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")

AMSGRAD = {"amsgrad": True}
ADAMW_MAXIMIZE = {"decoupled_weight_decay": True, "maximize": True}


# Derivatives with respect to one input, as of the textbook; with respect to all inputs: test_rules.


def of_one(
    name: str, shape: tuple[int, ...], *, step: float = 3.0, **flags: bool
) -> tuple[Callable[[Any], Any], Callable[[Any], Any], Tensor]:
    """Our update and the textbook's as functions of the leaf or number `name`, and where to differentiate them."""
    point, scale = make_point(shape), torch.tensor(2.0, dtype=DOUBLE)
    given = {**point._asdict(), "step": torch.tensor(step, dtype=DOUBLE), "grad_scale": scale}

    def of(function: Callable[..., Any]) -> Callable[[Any], Any]:
        def run(x: Tensor) -> Any:
            now = {**given, name: [x] if name in LEAVES else x}
            at = Point(**{field: now.pop(field) for field in Point._fields})
            return function(at, **now, **flags)

        return run

    x = given[name]
    return of(updated), of(reference), x[0] if name in LEAVES else x


@pytest.mark.parametrize("flags", [AMSGRAD, ADAMW_MAXIMIZE], ids=",".join)
@pytest.mark.parametrize("name", [*Point._fields, "step", "grad_scale"])
def test_derivatives_by_one_input_in_every_mode_agree_with_the_textbook(flags: dict[str, bool], name: str) -> None:
    run, textbook, x = of_one(name, (2,), **flags)
    matters = name != "max_exp_avg_sq" or "amsgrad" in flags
    assert_close(run(x), textbook(x))

    # step and grad_scale pass through float32, and so do their derivatives.
    expected = grad(lambda x: weighted(textbook(x)))(x)
    assert bool(expected.abs().max() > 0) is matters
    assert_close(grad(lambda x: weighted(run(x)))(x), expected, torch.float32)
    leaf = x.clone().requires_grad_()
    loss = weighted(run(leaf))
    assert loss.requires_grad is matters
    if matters:
        assert_close(torch.autograd.grad(loss, leaf), (expected,), torch.float32)

    tangent = torch.linspace(0.5, 1.5, x.numel(), dtype=DOUBLE).reshape(x.shape)
    expected = jvp(textbook, (x,), (tangent,))
    assert_close(jvp(run, (x,), (tangent,)), expected, torch.float32)
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(y) for y in run(forward_ad.make_dual(x, tangent))]
        tangents = [torch.zeros_like(y.primal) if y.tangent is None else y.tangent for y in duals]
    assert_close(tangents, expected[1], torch.float32)

    expected = hessian(lambda x: weighted(textbook(x)))(x)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert_close(outer(inner(lambda x: weighted(run(x))))(x), expected, torch.float32)


def test_third_derivative_agrees_with_the_textbook() -> None:
    *functions, x = of_one("grads", (1,))
    got, expected = (jacfwd(jacfwd(jacrev(lambda x, f=f: weighted(f(x)))))(x) for f in functions)
    assert expected.abs().max() > 0
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("step", [0.0, 3.0])
@pytest.mark.parametrize("name", ["lr", "beta1", "beta2"])
def test_derivatives_by_a_number_that_is_zero_agree_with_the_textbook(name: str, step: float) -> None:
    *functions, x = of_one(name, (3,), step=step)
    got, expected = (jacrev(lambda x, f=f: f(x)[0])(torch.zeros_like(x)) for f in functions)
    assert expected.abs().min() > 0
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("differentiate", [jacrev, jacfwd])
def test_the_derivative_of_the_root_is_zero_at_zero(differentiate: Callable[..., Any]) -> None:
    # exp_avg_sq = 0 and g = 0, but m != 0: p - lr / (1 - b1) * m / eps, whatever the derivative of the root.
    param, m, zeros = (torch.tensor(x, dtype=DOUBLE) for x in ([1.0, -2.0], [0.5, 0.0], [0.0, 0.0]))
    hparams = AdamHparams(lr=torch.tensor(0.1, dtype=DOUBLE), betas=(0.5, 0.5), eps=0.25)

    def run(p: Tensor, v: Tensor) -> Tensor:
        return adam_update(p, zeros, AdamState(torch.tensor(0.0), m, v), hparams)[0]

    assert_close(run(param, zeros), param - 0.1 / 0.5 * (0.5 * m) / 0.25)
    of_param, of_v = differentiate(run, argnums=(0, 1))(param, zeros)
    assert torch.equal(of_param, torch.eye(2, dtype=DOUBLE))
    assert torch.equal(of_v, torch.zeros(2, 2, dtype=DOUBLE))


# Updates that are skipped, recorded for long, or checkpointed.


def by_equations(run: Callable[..., Tensor], *at: Tensor) -> Any:
    """Forward mode within forward mode, which no kernel can follow."""
    zeros = tuple(map(torch.zeros_like, at))
    return jacfwd(lambda *at: jvp(run, at, zeros)[0], argnums=(0, 1))(*at)


WAYS: dict[str, Callable[..., Any]] = {
    "autograd": lambda run, *at: torch.autograd.functional.jacobian(run, at),
    "reverse": lambda run, *at: jacrev(run, argnums=(0, 1))(*at),
    "forward": lambda run, *at: jacfwd(run, argnums=(0, 1))(*at),
    "equations": by_equations,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_a_skipped_update_is_the_identity_to_derivatives(way: str, moment: str) -> None:
    nan, inf = float("nan"), float("inf")
    param, gradient, broken = (torch.tensor(x, dtype=DOUBLE) for x in ([1.0, -2.0], [0.0, inf], [nan, inf]))
    for scale, is_decoupled in ((None, False), (0.0, True), (nan, False), (inf, True)):
        hparams = AdamHparams(eps=0.0, weight_decay=0.1, amsgrad=True, decoupled_weight_decay=is_decoupled)
        state = adam_init(param, hparams)._replace(**{moment: broken})
        run = partial(skipped, state=state, hparams=hparams, scale=scale)
        identity = torch.eye(2, dtype=DOUBLE)
        assert_equal(WAYS[way](run, param, gradient), (identity, torch.zeros_like(identity)))


def skipped(p: Tensor, g: Tensor, *, state: AdamState, hparams: AdamHparams, scale: Any) -> Tensor:
    return adam_update(p, g, state, hparams, grad_scale=scale, found_inf=1.0)[0]


def update_in_a_row(
    count: int, *, lr: Any = 1e-3, dtype: Any = torch.float32, tracks_state: bool = False, found_inf: Any = None
) -> Tensor:
    param, hparams = torch.ones(2, dtype=dtype, requires_grad=not tracks_state), AdamHparams(lr=lr)
    state = adam_init(param, hparams, moment_dtype=torch.float32 if dtype is torch.bfloat16 else None)
    if tracks_state:
        state = state._replace(exp_avg_sq=state.exp_avg_sq.requires_grad_())
    for _ in range(count):
        param, state = adam_update(param, torch.ones_like(param), state, hparams, found_inf=found_inf)
        param = param.detach() if tracks_state else param
    return param


HOW = [{}, {"dtype": torch.bfloat16}, {"dtype": torch.complex64}, {"found_inf": torch.tensor(0.0)}]


@pytest.mark.parametrize("how", [*HOW, {"tracks_state": True}], ids=str)
def test_the_hundredth_recorded_update_in_a_row_warns_once_where_it_is_called(how: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        update_in_a_row(99, **how)
        assert not caught
        update_in_a_row(210, **how)
    [warning] = caught
    assert warning.category is GrowingGraphWarning
    assert "100 updates in a row" in str(warning.message)
    assert warning.filename == __file__
    assert "adam_update(param" in Path(__file__).read_text().splitlines()[warning.lineno - 1]


def test_updates_that_are_not_recorded_or_are_differentiated_by_torch_func_do_not_warn() -> None:
    with torch.no_grad():
        update_in_a_row(101)
    assert grad(lambda lr: update_in_a_row(101, lr=lr).sum())(torch.tensor(0.1)).isfinite()


def keep(kept: str) -> Any:
    """The contexts of a checkpoint that keeps the results of the operation called so, and recomputes all others."""

    def policy(_: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        is_kept = operation.name().removeprefix("aten::").split(".")[0] == kept
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda: create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("is_tracked", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (300, 400)], ids=["small", "recycled"])
@pytest.mark.parametrize("layout", [Tensor.clone, transposed])
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

    expected = torch.autograd.grad(loss(weight), weight)
    for kept in ("clone", "_foreach_clone", "copy_", "empty_like", "_foreach_add", "sqrt", "sin"):
        out = checkpoint(loss, weight, use_reentrant=False, context_fn=keep(kept))
        refusal = ""
        try:
            assert_close(torch.autograd.grad(out, weight), expected)
        except RuntimeError as error:
            refusal = str(error)
        is_known = "cached during selective activation checkpoint has been mutated" in refusal
        assert not refusal or (is_known and kept != "sin"), (kept, refusal)


# Tracers.


@pytest.mark.parametrize(("mode", "flags"), [("real", {}), ("fake", AMSGRAD), ("symbolic", ADAMW_MAXIMIZE)])
def test_a_traced_step_bakes_in_no_value(mode: str, flags: dict[str, bool]) -> None:
    def run(params: Any, grads: Any, state: AdamState, lr: Tensor, found_inf: Tensor, grad_scale: Tensor) -> Any:
        hparams = AdamHparams(lr=lr, weight_decay=0.1, **flags)
        return adam_update(params, grads, state, hparams, found_inf=found_inf, grad_scale=grad_scale)

    def make(seed: int, *numbers: float) -> tuple[Any, ...]:
        call = make_call(hparams=AdamHparams(**flags), seed=seed, step=float(seed))
        return (*call[:3], *map(torch.tensor, numbers))

    graph = make_fx(run, tracing_mode=mode)(*make(1, 0.1, 0.0, 1.0))
    for arguments in (make(1, 0.1, 0.0, 1.0), make(5, 0.3, 0.0, 4.0), make(5, 0.3, 1.0, 4.0)):
        before = snapshot(arguments)
        assert_close(graph(*arguments), run(*arguments))
        assert_unchanged(arguments, before)


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
def test_transforms_inside_a_compiled_function_equal_eager() -> None:
    def run(params: Tensor, grads: Tensor, lrs: Tensor) -> Any:
        def loss(p: Tensor, g: Tensor, lr: Tensor) -> Tensor:
            hparams = AdamHparams(lr=lr)
            return (adam_update(p, g, adam_init(p, hparams), hparams)[0] ** 2).sum()

        return vmap(grad(loss, argnums=(0, 2)))(params, grads, lrs)

    arguments = *(random_tensor((4, 3), torch.float32, seed) for seed in (0, 1)), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert_close(torch.compile(run, fullgraph=True, backend="eager")(*arguments), run(*arguments))


# A torch that lacks what the package asks it for.


@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_a_torch_without_the_level_of_duals_counts_as_one_with_duals(
    per_leaf_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_call(per_leaf_step=per_leaf_step)
    expected = adam_update(*call)
    monkeypatch.delattr(forward_ad, "_current_level")
    assert_equal(adam_update(*call), expected)
    with pytest.raises(RuntimeError, match="forward-mode dual level"):
        adam_update(*call, donate=True)


PRIVATE_NAMES = (
    *("_C._len_torch_dispatch_stack", "_C._are_functorch_transforms_active", "_C._functorch._unwrap_batched"),
    *("_C._functorch.get_interpreter_stack", "_C._functorch.get_unwrapped", "_C._functorch.is_gradtrackingtensor"),
    *("_C._functorch.is_functorch_wrapped_tensor", "_C._functorch.is_legacy_batchedtensor"),
)
# Each name is hidden while a process that has torch already imports the package.
WITHOUT_EACH = """
import functools, os, sys
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
    torch.set_default_dtype(torch.float64)
    p, lr, rates = torch.tensor([1.0, -2.0]), torch.tensor(0.1), torch.tensor([0.1, 0.2, 0.3])

    def f(lr, g=p):
        return adam_update(p, g, adam_init(p, AdamHparams()), AdamHparams(lr=lr))[0].pow(2).sum()

    # p' = p - lr * sign(p) but for eps, so that the second derivative is 2 for each element.
    assert abs(jacfwd(jacfwd(f))(lr).item() - 4) < 1e-6
    assert abs(grad(grad(f))(lr).item() - 4) < 1e-6
    assert torch.allclose(vmap(f)(rates), torch.stack([f(x) for x in rates]))
    assert grad(lambda scale: vmap(lambda g: f(0.1, g))(scale * torch.ones(3, 2)).sum())(lr).isfinite()
    q, hparams = p.clone().requires_grad_(), AdamHparams(lr=0.1)
    new = adam_update(q, p, adam_init(p, hparams), hparams)[0]
    assert torch.equal(torch.autograd.grad(new, q, torch.eye(2), is_grads_batched=True)[0], torch.eye(2))

for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        check(path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, path
"""


def test_a_torch_without_a_private_name_costs_speed_and_no_derivative() -> None:
    command = [sys.executable, "-c", WITHOUT_EACH, *PRIVATE_NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
