"""Moments in a dtype of their own and float32 masters of low-precision parameters: the numbers are those of float32."""

import itertools
import re
from typing import Any

import optree
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.func import grad, vmap

from functional_adam import (
    AdamHparams,
    AdamState,
    adam_init,
    adam_update,
    from_torch_state_dict,
    state_from_dict,
    state_to_dict,
    to_torch_state_dict,
)
from tests.builders import as_bytes, assert_unchanged, clone, snapshot, tensors_of
from tests.oracles import KERNELS
from tests.strategies import in_layout, random_tensor
from tests.tolerances import assert_close, assert_equal

# torch warns once in a process, in whichever test comes first.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

HALVES = (torch.bfloat16, torch.float16)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "coupled_amsgrad": {"weight_decay": 0.1, "amsgrad": True},
    "decoupled_maximize": {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
}
MASTERS: dict[str, Any] = {"moment_dtype": torch.float32, "master_params": True}

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_donate = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
each_half = pytest.mark.parametrize("half", HALVES, ids=["bfloat16", "float16"])
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make_tree(dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    return {
        "b": random_tensor((), dtype, 10 * seed),
        "layers": [random_tensor((3, 5), dtype, 10 * seed + 1), random_tensor((17,), dtype, 10 * seed + 2)],
    }


def make_mixed(seed: int = 0) -> dict[str, Tensor]:
    dtypes = {"bf": torch.bfloat16, "cp": torch.complex64, "fp": torch.float32, "hf": torch.float16}
    return {name: random_tensor((4, 3), dtype, 10 * seed + i) for i, (name, dtype) in enumerate(dtypes.items())}


def to(tree: Any, dtype: torch.dtype) -> Any:
    return optree.tree_map(lambda x: x.to(dtype), tree)


def train(
    params: Any, gradients: list[Any], hparams: AdamHparams, init: dict[str, Any], **how: Any
) -> tuple[Any, AdamState]:
    params = clone(params)
    state = adam_init(params, hparams, **init)
    for grads in gradients:
        params, state = adam_update(params, grads, state, hparams, **how)
    return params, state


def moments(state: AdamState) -> tuple[Any, ...]:
    return state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq


# What is kept in which dtype.


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ({}, "bfloat16 float16 float32 complex32 complex64 float64"),
        ({"moment_dtype": torch.float32}, "float32 float32 float32 complex64 complex64 float32"),
        ({"moment_dtype": torch.float64}, "float64 float64 float64 complex128 complex128 float64"),
        ({"master_params": True}, "float32 float32 float32 complex64 complex64 float64"),
        (MASTERS | {"moment_dtype": torch.float16}, "float16 float16 float16 complex32 complex32 float16"),
    ],
)
def test_masters_are_float32_copies_of_halves_and_moments_have_their_dtype_unless_chosen(
    amsgrad: bool, init: dict[str, Any], expected: str
):
    params = make_mixed() | {"ch": random_tensor((3,), torch.complex64, 9).to(torch.complex32)}
    params["db"] = random_tensor((3,), torch.float64, 8)
    state = adam_init(params, AdamHparams(amsgrad=amsgrad), **init)
    assert (state.max_exp_avg_sq != ()) is amsgrad
    for moment in moments(state)[: 2 + amsgrad]:
        dtypes = [str(moment[name].dtype) for name in ("bf", "hf", "fp", "ch", "cp", "db")]
        assert dtypes == [f"torch.{name}" for name in expected.split()]
        assert_equal(moment, optree.tree_map(lambda p, m: torch.zeros_like(p, dtype=m.dtype), params, moment))
    if "master_params" not in init:
        assert state.master_params == ()
        return
    assert [state.master_params[name] for name in ("cp", "db", "fp")] == [(), (), ()]
    for name, wide in (("bf", torch.float32), ("hf", torch.float32), ("ch", torch.complex64)):
        assert_equal(state.master_params[name], params[name].to(wide))


# The numbers are those of float32, rounded.


@each_kernel
@each_donate
@each_half
@each_option
@pytest.mark.parametrize("kept", ["float32_moments", "masters", "masters_with_half_moments"])
def test_half_parameters_train_as_float32_ones(
    kernel: str, donate: bool, half: torch.dtype, options: dict[str, Any], kept: str
):
    hparams = AdamHparams(lr=0.01, **options)
    moment_dtype = half if kept == "masters_with_half_moments" else torch.float32
    has_masters = kept != "float32_moments"
    params = make_tree(half)
    wide = to(params, torch.float32)
    state = adam_init(params, hparams, moment_dtype=moment_dtype, master_params=has_masters)
    wide_state = adam_init(wide, hparams, moment_dtype=moment_dtype)
    for seed in (1, 2, 3):
        grads = make_tree(half, seed)
        grads["layers"][0] = random_tensor((3, 5), torch.float32, seed)  # which nothing rounds
        if has_masters:
            params = optree.tree_map(lambda x: torch.full_like(x, torch.nan), params)  # which nothing reads
        else:
            wide = to(params, torch.float32)
        params, state = adam_update(params, grads, state, hparams, kernel=kernel, donate=donate)
        wide, wide_state = adam_update(wide, to(grads, torch.float32), wide_state, hparams, kernel=kernel)
        assert_equal(params, to(wide, half))
        assert_equal(state, wide_state._replace(master_params=wide if has_masters else ()))


@each_kernel
@each_half
def test_masters_keep_what_low_precision_loses(kernel: str, half: torch.dtype):
    ones, hparams = torch.ones(5, dtype=half), AdamHparams(lr=1e-4)
    lost, _ = train(ones, [ones] * 100, hparams, {"moment_dtype": torch.float32}, kernel=kernel)
    assert torch.equal(lost, ones)  # no update reaches half of the spacing below 1
    kept, state = train(ones, [ones] * 100, hparams, MASTERS, kernel=kernel)
    assert_close(state.master_params, torch.full((5,), 0.99, dtype=torch.float64))
    assert torch.equal(kept, torch.full((5,), 0.99).to(half))


@each_kernel
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_leaves_of_a_mixed_tree_are_as_if_alone(kernel: str, per_leaf_step: bool):
    hparams = AdamHparams(lr=0.01, weight_decay=0.1, amsgrad=True)
    init, gradients = make_mixed(), [make_mixed(seed) for seed in (1, 2, 3)]
    given = {**MASTERS, "per_leaf_step": per_leaf_step}
    params, state = train(init, gradients, hparams, given, kernel=kernel)
    for name in init:
        alone = [{name: grads[name]} for grads in gradients]
        one, one_state = train({name: init[name]}, alone, hparams, given, kernel=kernel)
        assert_equal(params[name], one[name])
        assert_equal([moment[name] for moment in moments(state)], [moment[name] for moment in moments(one_state)])
        assert_equal(state.master_params[name], one_state.master_params[name])
        if init[name].dtype in HALVES:
            assert_equal(params[name], state.master_params[name].to(init[name].dtype))
        else:
            assert state.master_params[name] == ()


# Bits in half types.

ALL_HALVES = (*HALVES, torch.complex32)
DECAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "coupled": {"weight_decay": 0.3},
    "coupled_amsgrad_maximize": {"weight_decay": 0.3, "amsgrad": True, "maximize": True},
    "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
}


def make_matrix(dtype: torch.dtype, seed: int, layout: str) -> Tensor:
    return in_layout(random_tensor((50, 67), dtype, seed), layout)


def bits_of_two_steps(of_param: str, of_rest: str, dtype: torch.dtype, hparams: AdamHparams, **how: Any) -> list[bytes]:
    """Of a parameter in the first of the layouts, with moments and gradients in the second."""
    params = make_matrix(dtype, 0, of_param)
    state = adam_init(params, hparams)
    state = state._replace(exp_avg=in_layout(state.exp_avg, of_rest), exp_avg_sq=in_layout(state.exp_avg_sq, of_rest))
    for seed in (1, 2):
        params, state = adam_update(params, make_matrix(dtype, seed, of_rest), state, hparams, **how)
    return [as_bytes(x).numpy().tobytes() for x in tensors_of((params, state))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, *ALL_HALVES], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("beta2", [0.93, 0.75])
def test_bits_of_half_types_depend_on_kernel_and_gaps(dtype: torch.dtype, decay: str, beta2: float):
    """Foreach has those of single where its factors are numbers of the dtype; donation changes them with gaps."""
    hparams = AdamHparams(lr=0.25, betas=(0.85, beta2), eps=1e-3, **DECAYS[decay])
    # 1 - lr * weight_decay is 0.925.
    are_exact = dtype not in ALL_HALVES or (beta2 == 0.75 and decay != "decoupled")
    for layouts in itertools.product(("contiguous", "transposed", "strided"), ("contiguous", "transposed")):
        pure, donated = (
            {k: bits_of_two_steps(*layouts, dtype, hparams, kernel=k, donate=donate) for k in KERNELS}
            for donate in (False, True)
        )
        assert (pure["single"] == pure["foreach"]) == are_exact
        depends = decay.startswith("coupled") and layouts[0] == "strided" and sum_depends_on_gaps(dtype, layouts[1])
        for kernel in KERNELS:
            assert (pure[kernel] == donated[kernel]) != (depends and kernel != "fused")


def sum_depends_on_gaps(dtype: torch.dtype, of_grad: str) -> bool:
    """Whether torch rounds `grad + 0.3 * param` differently where the parameter has gaps."""
    if dtype not in ALL_HALVES:
        return False
    dtype = dtype.to_real()
    param, grad = make_matrix(dtype, 0, "contiguous"), make_matrix(dtype, 1, of_grad)
    return not torch.equal(grad.add(param, alpha=0.3), grad.add(in_layout(param, "strided"), alpha=0.3))


# What stands still.


@each_kernel
@each_donate
@pytest.mark.parametrize("found", [None, 1.0, torch.nan])
def test_what_stands_still_keeps_parameter_and_master(kernel: str, donate: bool, found: float | None):
    params, grads, hparams = make_mixed(), make_mixed(1), AdamHparams(lr=0.1, weight_decay=0.1)
    state = adam_init(params, hparams, **MASTERS, per_leaf_step=True)
    # The parameter is not its rounded master, to show whether it is touched.
    state = state._replace(master_params=state.master_params | {"bf": torch.full((4, 3), 5.0)})
    grads["bf"] = torch.full_like(params["bf"], torch.inf) if found else None
    before = clone((params, state))
    got = adam_update(params, grads, state, hparams, kernel=kernel, donate=donate, found_inf=found)
    for name in params:
        new, old = ([p[name], *(column[name] for column in s if column)] for p, s in (got, before))
        is_same = [torch.equal(x, y) for x, y in zip(tensors_of(new), tensors_of(old), strict=True)]
        assert is_same == [found is not None or name == "bf"] * len(is_same)


# Layouts of masters.

GIVEN: dict[str, dict[str, Any]] = {
    "moving": {},
    "no gradient": {},
    "found nothing": {"found_inf": torch.tensor(0.0)},
    "found": {"found_inf": torch.tensor(1.0)},
}


@each_kernel
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex32], ids=str)
def test_a_parameter_keeps_its_strides_whatever_those_of_its_master(kernel: str, given: str, dtype: torch.dtype):
    values, grads = (None if given == "no gradient" and i else random_tensor((2, 3, 1, 4), dtype, i) for i in (0, 1))
    hparams = AdamHparams(lr=0.1)
    first = adam_init(values, hparams, master_params=True)
    expected = adam_update(values, grads, first, hparams, kernel=kernel, **GIVEN[given])
    assert torch.equal(as_bytes(expected[0]), as_bytes(values)) == (given in ("no gradient", "found"))
    layouts = ("contiguous", "transposed", "channels_last", "size_one_stride", "strided")
    for of_param, of_master in itertools.product(layouts, layouts):
        param, master = in_layout(values.clone(), of_param), in_layout(first.master_params.clone(), of_master)
        state = adam_init(values, hparams, master_params=True)._replace(master_params=master)
        seen: list[tuple[int, ...]] = []

        def update(scale: Tensor, param: Tensor = param, state: AdamState = state, seen: Any = seen) -> Tensor:
            given_grads = None if grads is None else grads * scale
            new, _ = adam_update(param, given_grads, state, hparams, kernel=kernel, **GIVEN[given])
            seen.append(new.stride())
            return new

        # The stride of a dimension of size 1 says nothing, and need not be kept where an update is watched.
        if dtype is torch.bfloat16 and given != "found" and of_param != "size_one_stride":
            one = torch.ones((), dtype=dtype)
            assert_equal(update(one.clone().requires_grad_()).detach(), update(one))
            torch.func.grad(lambda scale, update=update: update(scale).sum())(one)
            vmap(lambda scale, update=update: update(scale).sum())(one.expand(2))
            assert seen == [torch.empty_like(param).stride()] * 4
        for donate in (False, True):
            strides = [x.stride() if donate else torch.empty_like(x).stride() for x in (param, master)]
            new, new_state = adam_update(param, grads, state, hparams, kernel=kernel, donate=donate, **GIVEN[given])
            assert [new.stride(), new_state.master_params.stride()] == strides
            assert_close((new, new_state.master_params), (expected[0], expected[1].master_params))
            assert_equal(new, new_state.master_params.to(dtype))


# Under transforms.


@each_kernel
@pytest.mark.parametrize("own_numbers", [False, True])
@each_option
def test_vmap_is_a_loop(kernel: str, own_numbers: bool, options: dict[str, Any]):
    params, gradients = (
        {name: torch.stack([make_mixed(start + i)[name] for i in range(4)]) for name in ("bf", "fp", "hf")}
        for start in (1, 5)
    )
    lrs, founds = torch.tensor([0.1, 0.01, 0.02, 0.001]), torch.tensor([0.0, 1.0, torch.nan, 0.0])

    def run(params: Any, grads: Any, lr: Tensor, found: Tensor) -> Any:
        hparams = AdamHparams(lr=lr if own_numbers else 0.01, **options)
        state = adam_init(params, hparams, **MASTERS)
        # Parameters are not their rounded masters, to show whether they are touched.
        state = state._replace(master_params=optree.tree_map(lambda x: x + 1, state.master_params))
        for _ in range(2):
            found_inf = found if own_numbers else None
            params, state = adam_update(params, grads, state, hparams, kernel=kernel, found_inf=found_inf)
        return params, state

    got = vmap(run)(params, gradients, lrs, founds)
    for i in range(4):
        *given, (new, state) = optree.tree_map(lambda x, i=i: x[i], (params, gradients, lrs, founds, got))
        assert_close((new, state), run(*given))
        is_still = own_numbers and i in (1, 2)
        for name in ("bf", "hf"):
            assert_equal(new[name], given[0][name] if is_still else state.master_params[name].to(new[name].dtype))


def hand_written(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, wd: float) -> tuple[Tensor, Tensor, Tensor]:
    """The second step, in float64: lr 0.1, betas 0.9 and 0.99, eps 1e-3, coupled weight decay."""
    g = g + wd * p
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    return p - 0.1 * (m / (1 - 0.9**2)) / ((v / (1 - 0.99**2)).sqrt() + 1e-3), m, v


@each_kernel
@each_half
@pytest.mark.parametrize("is_master", [False, True])
def test_derivatives_are_those_of_the_equations(kernel: str, half: torch.dtype, is_master: bool):
    """A rounded parameter passes its derivative to its master."""
    hparams = AdamHparams(lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
    dtypes = (torch.float32 if is_master else half, half, torch.float32, torch.float32)
    given = [random_tensor((6,), dtype, i, positive=i == 3) for i, dtype in enumerate(dtypes)]
    # The derivative that reaches a rounded parameter has its dtype: weights that bfloat16 and float16 can hold.
    weights = [random_tensor((6,), torch.bfloat16, 10 + i).double() for i in range(3)]

    def loss(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        state = AdamState(torch.tensor(1.0), m, v, master_params=p if is_master else ())
        param, state = adam_update(torch.zeros(6, dtype=half) if is_master else p, g, state, hparams, kernel=kernel)
        total = sum((x * w).sum() for x, w in zip((param, *state[1:3]), weights, strict=True))
        return total + (state.master_params * weights[1]).sum() if is_master else total

    def expected_loss(*given: Tensor) -> Tensor:
        of_param = weights[0] + weights[1] if is_master else weights[0]
        return sum((x * w).sum() for x, w in zip(hand_written(*given, wd=0.1), (of_param, *weights[1:]), strict=True))

    got = grad(loss, argnums=(0, 1, 2, 3))(*given)
    expected = grad(expected_loss, argnums=(0, 1, 2, 3))(*[x.double() for x in given])
    assert [x.dtype for x in got] == list(dtypes)
    assert_close(got, expected)


@each_kernel
def test_derivatives_of_members_are_those_of_a_loop(kernel: str):
    hparams = AdamHparams(lr=0.1, weight_decay=0.1)
    masters, grads = random_tensor((3, 6), torch.float32, 0), random_tensor((3, 6), torch.bfloat16, 1)

    def loss(master: Tensor, gradient: Tensor) -> Tensor:
        param = master.bfloat16()
        state = adam_init(param, hparams, **MASTERS)._replace(master_params=master)
        for _ in range(2):
            param, state = adam_update(param, gradient, state, hparams, kernel=kernel)
        return (state.master_params**3).sum() + param.float().sum()

    got = vmap(grad(loss, argnums=(0, 1)))(masters, grads)
    for i in range(3):
        assert_close([x[i] for x in got], [*grad(loss, argnums=(0, 1))(masters[i], grads[i])])


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_is_eager():
    hparams = AdamHparams(lr=0.1, weight_decay=0.1)
    params, grads = make_tree(torch.bfloat16), make_tree(torch.bfloat16, 1)
    state = adam_init(params, hparams, **MASTERS)
    compiled = torch.compile(adam_update, fullgraph=True, backend="aot_eager")
    assert_close(compiled(params, grads, state, hparams), adam_update(params, grads, state, hparams))


# Checkpoints.


def test_flat_dicts_keep_masters_and_those_of_torch_have_none():
    hparams = AdamHparams(lr=0.1, amsgrad=True)
    params, state = train(make_mixed(), [make_mixed(1)], hparams, MASTERS)
    flat = state_to_dict(state)
    masters = ["master_params['bf']", "master_params['hf']"]
    assert [name for name in flat if name.startswith("master_params")] == masters
    again = state_from_dict(safetensors.torch.load(safetensors.torch.save(flat)), params, hparams)
    assert_equal(again, state)
    got = to_torch_state_dict(params, state, hparams)
    assert [*got["state"][0]] == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert_equal(from_torch_state_dict(params, got)[0], state._replace(master_params=()))


# Donation.


def test_donation_refuses_masters_that_overlap_or_require_grad():
    params, hparams, memory = {"w": torch.ones(4).bfloat16()}, AdamHparams(), torch.ones(32).bfloat16()
    state = adam_init(params, hparams, **MASTERS)
    master, strided = state.master_params["w"], {"w": memory[::4]}
    strided_state = adam_init(strided, hparams, **MASTERS)
    watched = state._replace(master_params={"w": master.clone().requires_grad_()})
    either = r"Cannot donate .*state\.master_params\['w'\].*params\['w'\]|Cannot donate params.*state\.master_params"
    for given, given_state, gradient, message in (
        (params, state, master, r"Cannot donate .*state\.master_params\['w'\].*grads\['w'\]"),
        (params, state, params["w"], r"Cannot donate params\['w'\]: it shares memory with grads\['w'\]"),
        ({"w": master.view(torch.bfloat16)[:4]}, state, torch.ones(4), either),
        (strided, strided_state, memory.view(torch.float32)[4:12], "shares memory with"),
        (params, watched, torch.ones(4), "Cannot donate: the update is watched by autograd"),
    ):
        before = snapshot((given, gradient, given_state))
        with pytest.raises(RuntimeError, match=message):
            adam_update(given, {"w": gradient}, given_state, hparams, donate=True)
        assert_unchanged((given, gradient, given_state), before)


# What cannot be.


@pytest.mark.parametrize("wrong", ["float32", 32, float, torch.int64, torch.complex64, torch.bool])
def test_moment_dtype_must_be_a_floating_dtype_with_a_complex_form_where_it_needs_one(wrong: Any):
    with pytest.raises(TypeError, match=rf"^moment_dtype is {re.escape(repr(wrong))}\. Expected a floating dtype"):
        adam_init({"w": torch.ones(2)}, AdamHparams(), moment_dtype=wrong)
    with pytest.raises(TypeError, match=r"moment_dtype is torch\.bfloat16, which has no complex form"):
        adam_init({"w": torch.ones(2, dtype=torch.complex64)}, AdamHparams(), moment_dtype=torch.bfloat16)


MASTER = torch.ones(2, 3)
WRONG_MASTERS: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": ({"w": torch.ones(3, 2), "x": ()}, ValueError, r"\['w'\] has shape \(3, 2\)"),
    "bfloat16": ({"w": MASTER.bfloat16(), "x": ()}, TypeError, r"\['w'\] is of torch\.bfloat16"),
    "float64": ({"w": MASTER.double(), "x": ()}, TypeError, r"\['w'\] is of torch\.float64"),
    "integer": ({"w": MASTER.long(), "x": ()}, TypeError, r"\['w'\] is of torch\.int64"),
    "number": ({"w": 1.0, "x": ()}, TypeError, r"\['w'\] is of type float"),
    "sparse": ({"w": MASTER.to_sparse(), "x": ()}, TypeError, r"\['w'\] has the layout"),
    "superfluous": ({"w": MASTER, "x": torch.ones(2)}, TypeError, r"\['x'\] is given, but params\['x'\]"),
    "missing_leaf": ({"x": ()}, ValueError, r".*'w'"),
    "extra_leaf": ({"w": MASTER, "x": (), "y": ()}, ValueError, r".*'y'"),
    "none": ({"w": None, "x": ()}, TypeError, r"\['w'\]"),
}


@pytest.mark.parametrize(("masters", "error", "message"), WRONG_MASTERS.values(), ids=WRONG_MASTERS)
def test_wrong_masters_are_named(masters: Any, error: type[Exception], message: str):
    params, hparams = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "x": torch.ones(2)}, AdamHparams()
    state = adam_init(params, hparams, master_params=True)._replace(master_params=masters)
    before = snapshot((params, state.exp_avg))
    for donate in (False, True):
        with pytest.raises(error, match=r"state\.master_params" + message):
            adam_update(params, params, state, hparams, donate=donate)
        assert_unchanged((params, state.exp_avg), before)
