"""Kernels and equations compute Adam as the float64 formula says, for all values of what steers an update."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import clone, make_call, tensors_of
from tests.oracles import KERNELS, numpy_adam
from tests.strategies import PRECISE_DTYPES, PROPERTY, hyperparameters, random_tensor, seeds
from tests.tolerances import assert_close, assert_equal, assert_rounded_once, assert_within_roundings

# torch.func.jvp, on first use, meets a deprecation within torch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_way = pytest.mark.parametrize("way", [*KERNELS, "autograd", "equations"])
each_donate = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
each_step = pytest.mark.parametrize("per_leaf_step", [False, True], ids=["shared_step", "per_leaf_step"])

OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}
HPARAMS = AdamHparams(**OPTIONS)


def update(
    params: Any, grads: Any, state: AdamState, hparams: AdamHparams, way: str, **options: Any
) -> tuple[Any, AdamState]:
    """`adam_update` by a kernel, watched by autograd, or by the equations, which two forward-mode levels call for."""
    if way == "autograd":
        tracked = optree.tree_map(lambda p: p.detach().clone().requires_grad_(), params)
        return optree.tree_map(torch.detach, adam_update(tracked, grads, state, hparams, **options))
    if way == "equations":
        zero = (torch.zeros(()),)

        def inner(_: Tensor) -> Any:
            return torch.func.jvp(lambda _: adam_update(params, grads, state, hparams, **options), zero, zero)[0]

        return torch.func.jvp(inner, zero, zero)[0]
    return adam_update(params, grads, state, hparams, kernel=way, **options)


class Unread(Tensor):
    """What stands in the host's memory and is not read, as if on an accelerator: only plain tensors are."""


@each_way
@PROPERTY
@given(
    dtype=st.sampled_from(PRECISE_DTYPES),
    options=hyperparameters(),
    seed=seeds,
    step=st.integers(0, 10_000),
    scale=st.none() | st.floats(0.1, 1e3),
)
def test_steps_agree_with_the_formula(
    way: str, dtype: torch.dtype, options: dict[str, Any], seed: int, step: int, scale: float | None
) -> None:
    hparams = AdamHparams(**options)
    param = random_tensor((3, 7), dtype, seed)
    state = adam_init(param, hparams)._replace(step=torch.tensor(step, dtype=torch.float32))
    expected: Any = (param, *state[1:3], state.max_exp_avg_sq if options["amsgrad"] else None, step)
    for t in range(3):
        grad = random_tensor((3, 7), dtype, seed + t + 1)
        before = [x if x is None or isinstance(x, (int, float, Tensor)) else torch.as_tensor(x) for x in expected]
        expected = numpy_adam(before[0], grad, *before[1:], **options, grad_scale=scale)
        param, state = update(param, grad, state, hparams, way, grad_scale=scale)
    assert_close(param, expected.param)
    assert_close(state.exp_avg, expected.exp_avg)
    assert_close(state.exp_avg_sq, expected.exp_avg_sq)
    if options["amsgrad"]:
        assert_close(state.max_exp_avg_sq, expected.max_exp_avg_sq)
    assert state.step.item() == expected.step


@pytest.mark.parametrize("way", ["fused", "autograd", "equations"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@PROPERTY
@given(options=hyperparameters(), seed=seeds, step=st.integers(0, 10_000))
def test_half_types_are_computed_in_float32_and_rounded_once(
    way: str, dtype: torch.dtype, options: dict[str, Any], seed: int, step: int
) -> None:
    hparams = AdamHparams(**options)
    param, grad, exp_avg = (random_tensor((3, 7), dtype, seed + i) for i in range(3))
    exp_avg_sq, maximum = (random_tensor((3, 7), dtype, seed + i, positive=True) for i in (3, 4))
    maxima = (maximum,) if options["amsgrad"] else ()
    state = AdamState(torch.tensor(step, dtype=torch.float32), exp_avg, exp_avg_sq, *maxima)
    expected = numpy_adam(param, grad, exp_avg, exp_avg_sq, *(maxima or (None,)), step, **options)
    new_param, new = update(param, grad, state, hparams, way)
    assert_rounded_once([new_param, new.exp_avg, new.exp_avg_sq], list(expected[:3]))
    if options["amsgrad"]:
        assert_rounded_once(new.max_exp_avg_sq, expected.max_exp_avg_sq)


@pytest.mark.parametrize("way", ["fused", "autograd", "equations"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_zero_gradients_leave_parameters_finite_and_still(way: str, dtype: torch.dtype) -> None:
    # In float16 eps=1e-8 is 0.
    param = random_tensor((9,), dtype, 0)
    hparams = AdamHparams()
    new_param, _ = update(param, torch.zeros_like(param), adam_init(param, hparams), hparams, way)
    assert_equal(new_param, param)


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.99999), (0.0, 0.0)], ids=str)
def test_bias_correction_is_exact_to_rounding(way: str, dtype: torch.dtype, betas: tuple[float, float]) -> None:
    # The parameter is 0, so that the result is the change and nothing hides its digits.
    param, hparams = torch.zeros(13, dtype=dtype), AdamHparams(betas=betas)
    grad, exp_avg, exp_avg_sq = (random_tensor((13,), dtype, seed, positive=True) for seed in range(3))
    for count in (0, 1, 999, 99_999):
        expected = numpy_adam(param, grad, exp_avg, exp_avg_sq, None, count, betas=betas)
        state = AdamState(torch.tensor(count, dtype=torch.float32), exp_avg, exp_avg_sq)
        new_param, new = update(param, grad, state, hparams, way)
        assert_within_roundings(new_param, expected.param, 5)
        assert new.step.item() == count + 1


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_moments_of_0_and_1_have_their_roots(way: str, dtype: torch.dtype) -> None:
    param, grad = torch.zeros(4, dtype=dtype), torch.tensor([0.0, 1.0, -1.0, 0.0], dtype=dtype)
    exp_avg, exp_avg_sq = torch.tensor([[0.5, 1.0, 2.0, -1.0], [0.0, 1.0, 1.0, 4.0]], dtype=dtype)
    options: dict[str, Any] = {"betas": (0.5, 0.5), "eps": 0.125}
    hparams = AdamHparams(**options)
    state = adam_init(param, hparams)._replace(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    expected = numpy_adam(param, grad, exp_avg, exp_avg_sq, None, 0, **options)
    assert expected.exp_avg_sq.tolist() == [0, 1, 1, 2]
    new_param, _ = update(param, grad, state, hparams, way)
    assert_within_roundings(new_param, expected.param, 5)


@pytest.mark.parametrize(("device", "other"), [("cpu", "cuda"), ("cuda", "cpu"), ("mps", "cpu")])
def test_the_equations_take_numbers_from_any_device(device: str, other: str) -> None:
    with FakeTensorMode():
        params = {"w": torch.empty(3, device=device)}
        number = torch.empty((), device=other)
        numbers = {"lr": number, "betas": (number, number), "eps": number, "weight_decay": number}
        hparams = AdamHparams(**numbers, amsgrad=True, decoupled_weight_decay=True)
        state = adam_init(params, hparams)
        new = update(params, params, state, hparams, "equations", grad_scale=number, found_inf=number)
    assert [x.device.type for x in tensors_of(new)] == [device] * 5


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@each_way
@each_step
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(way: str, per_leaf_step: bool, dtype: torch.dtype) -> None:
    params, grads, *_ = make_call()
    hparams = AdamHparams(**{**OPTIONS, "lr": torch.tensor(0.01, dtype=torch.float32)})

    def run(options: dict[str, float]) -> Any:
        state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
        # Half types stop counting at 256 or 2048.
        state = state._replace(step=optree.tree_map(lambda step: step + 2048, state.step))
        return update(params, grads, state, hparams, way, **options)

    for options in ({"grad_scale": 1001.0}, {"grad_scale": 7}, {"found_inf": 0.0}, {"found_inf": 1e-30}):
        expected = run(options)
        with default_dtype(dtype):
            actual = run(options)
        assert_equal(actual, expected)
        assert {x.dtype for x in tensors_of(actual)} == {torch.float32}
        assert {step.item() for step in tensors_of(actual[1].step)} == {2048 if options.get("found_inf") else 2049}


NUMBERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lr": lambda number: {"lr": number(0.003)},
    "beta1": lambda number: {"betas": (number(0.8), 0.99)},
    "beta2": lambda number: {"betas": (0.8, number(0.99))},
    "eps": lambda number: {"eps": number(0.03)},
    "weight_decay": lambda number: {"weight_decay": number(0.3)},
    "decoupled_weight_decay": lambda number: {"weight_decay": number(0.3), "decoupled_weight_decay": True},
    "all": lambda number: {
        "lr": number(0.003),
        "betas": (number(0.8), number(0.99)),
        "eps": number(0.03),
        "weight_decay": number(0.3),
    },
    "zeros": lambda number: {"lr": number(0), "betas": (number(0), number(0)), "weight_decay": number(0)},
}


@each_way
@pytest.mark.parametrize("name", NUMBERS)
def test_tensor_hyperparameters_count_at_their_own_value(way: str, name: str) -> None:
    params, grads, state, _ = make_call()
    compare = assert_close if way in ("autograd", "equations") else assert_equal
    for dtype in (torch.float32, torch.float64, torch.bfloat16):

        def as_tensor(value: float, dtype: torch.dtype = dtype) -> Tensor:
            return torch.tensor(value, dtype=dtype)

        as_numbers, as_tensors = NUMBERS[name](lambda x, f=as_tensor: f(x).item()), NUMBERS[name](as_tensor)
        expected = update(params, grads, state, AdamHparams(**as_numbers), way)
        compare(update(params, grads, state, AdamHparams(**as_tensors), way), expected)


@each_step
@each_donate
@pytest.mark.parametrize("count", [-1.0, math.nan, -math.inf])
def test_a_step_that_counts_nothing_is_refused(donate: bool, per_leaf_step: bool, count: float) -> None:
    params, grads, state, hparams = make_call(per_leaf_step=per_leaf_step)
    tensors_of(state.step)[-1].fill_(count)
    kept = clone((params, state))
    with pytest.raises(ValueError, match=r"state.step is (-1|nan|-inf)\. Expected a number of updates >= 0"):
        adam_update(params, grads, state, hparams, donate=donate)
    torch.testing.assert_close((params, state), kept, rtol=0, atol=0, equal_nan=True)


@each_donate
@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.999), (0.9, math.nan)])
def test_rebuilt_betas_without_bias_correction_are_refused(donate: bool, betas: tuple[float, float]) -> None:
    params, grads, state, hparams = make_call()
    rebuilt: Any = optree.tree_unflatten(optree.tree_structure(hparams), (0.1, *betas, 1e-8, 0.0))
    kept = clone((params, state))
    with pytest.raises(ValueError, match=r"hparams.betas\[[01]\] is .*\. Expected a number in \[0, 1\)"):
        adam_update(params, grads, state, rebuilt, donate=donate)
    assert_equal((params, state), kept)


FOUND: list[Any] = [
    *(True, 1.0, 2.0, -1, math.nan, math.inf, 1e-300),
    *map(torch.tensor, (3, True, math.nan)),
    torch.tensor(1e-300, dtype=torch.float64),
    torch.tensor(2.0, dtype=torch.float16),
]
NOT_FOUND: list[Any] = [
    *(False, 0, 0.0, -0.0),
    *map(torch.tensor, (0, False)),
    torch.tensor(0.0, dtype=torch.float64),
    torch.tensor(0.0, dtype=torch.float16),
]


@each_way
@pytest.mark.parametrize(
    ("found_inf", "is_found"), [*itertools.product(FOUND, [True]), *itertools.product(NOT_FOUND, [False])], ids=str
)
def test_found_inf_changes_nothing_at_all_unless_it_is_zero(way: str, found_inf: Any, is_found: bool) -> None:
    donates = (False, True) if way in KERNELS else (False,)
    for donate, (per_leaf_step, scale) in itertools.product(donates, ((False, None), (True, 1024.0))):
        params, grads, state, hparams = make_call(hparams=HPARAMS, per_leaf_step=per_leaf_step)
        kept = clone((params, state))
        if is_found:
            grads["leaf0"][0, 0], grads["leaf0"][1, 1] = math.inf, math.nan
        expected = kept if is_found else update(params, grads, state, hparams, way, grad_scale=scale)
        given = clone((params, state)) if donate else (params, state)
        how = {"found_inf": found_inf, "grad_scale": scale, "donate": donate}
        assert_equal(update(given[0], grads, given[1], hparams, way, **how), expected)
        assert_equal((params, state), kept)


@each_kernel
@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_found_inf_that_is_not_read_decides(kernel: str, found: bool, scale: float | None, dtype: torch.dtype) -> None:
    # As on an accelerator, where the kernel is told, and its results are chosen.
    options = {"lr": 0.25, "betas": (0.75, 0.875), "eps": 0.125, "weight_decay": 0.5, "amsgrad": True}
    call = make_call(((3, 5), (3,)), hparams=AdamHparams(**options), dtype=dtype, moment_dtype=torch.float64)
    call.params["leaf1"] = random_tensor((6,), dtype, 9)[::2]  # which fused cannot take
    before, kept_grads = clone(call), clone(call.grads)
    unread = torch.tensor(found).as_subclass(Unread)
    params, state = adam_update(*call, kernel=kernel, donate=True, grad_scale=scale, found_inf=unread)
    assert_equal(call.grads, kept_grads)
    for name in params:
        row, (p, m, v, u) = ([x[name], *(s[name] for s in state[1:4])] for x, state in ((params, state), before[::2]))
        expected = numpy_adam(p, kept_grads[name], m, v, u, 3, **options, grad_scale=scale, found_inf=float(found))
        assert_close(row, [*expected[:4]])
        assert not found or all(torch.equal(new, old) for new, old in zip(row, (p, m, v, u), strict=True))
    assert state.step.item() == 4 - found


HALF, FLOAT, WIDE = torch.bfloat16, torch.float32, torch.float64


@each_way
@pytest.mark.parametrize(
    ("dtype", "moment_dtype", "grad_dtype"),
    [
        (HALF, HALF, FLOAT),
        (HALF, FLOAT, WIDE),
        (FLOAT, FLOAT, HALF),
        (FLOAT, FLOAT, WIDE),
        (FLOAT, WIDE, FLOAT),
        (WIDE, FLOAT, WIDE),
        (torch.complex64, torch.complex64, FLOAT),
        (torch.complex64, torch.complex128, torch.complex64),
    ],
    ids=str,
)
def test_an_update_is_computed_in_the_widest_dtype_of_parameter_and_moments(
    way: str, dtype: torch.dtype, moment_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    options = {**OPTIONS, "eps": 1e-3}
    hparams = AdamHparams(**options)
    wide = torch.promote_types(dtype, moment_dtype)
    param, grad = random_tensor((3, 5), dtype, 0), random_tensor((3, 5), grad_dtype, 1)
    moments = [random_tensor((3, 5), moment_dtype, seed, positive=seed > 2) for seed in (2, 3, 4)]
    state = AdamState(torch.tensor(3.0), *moments)
    new_param, new = actual = update(param, grad, state, hparams, way)
    assert_equal(actual, update(param, grad.to(wide), state, hparams, way))
    if wide is not HALF:
        expected = numpy_adam(param, grad.to(wide), *moments, 3, **options)
        assert_close(new_param, expected.param)
        assert_close([*new[1:4]], [*expected[1:4]])


SCALES: dict[str, Any] = {
    "float": 3.0,
    "int": 7,
    "rounded_float": 0.1,
    "rounded_tensor": torch.tensor(0.1, dtype=torch.float64),
    "float64_tensor": torch.tensor(65536.0, dtype=torch.float64),
    "float16_tensor": torch.tensor(1000.0, dtype=torch.float16),
    "int_tensor": torch.tensor(5),
}


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_grad_scale_divides_the_gradients_in_float32(way: str, dtype: torch.dtype, scale: Any) -> None:
    params, grads, state, hparams = make_call(hparams=HPARAMS, dtype=dtype)
    in_float32 = torch.as_tensor(scale).float().item()
    unscaled = optree.tree_map(lambda g: g / in_float32, grads)
    expected = update(params, unscaled, state, hparams, way)
    kept_grads = clone(grads)
    compare = assert_equal if dtype is torch.float32 else assert_close
    for donate in (False, True) if way in KERNELS else (False,):
        compare(update(params, grads, state, hparams, way, grad_scale=scale, donate=donate), expected)
        assert_equal(grads, kept_grads)


@each_way
@pytest.mark.parametrize("missing", [["leaf0"], ["leaf1", "leaf2"], ["leaf0", "leaf1", "leaf2"]], ids=str)
@pytest.mark.parametrize("found", [None, 1.0])
def test_leaf_without_gradient_stands_still(way: str, missing: list[str], found: float | None) -> None:
    params, full_grads, state, hparams = make_call(hparams=HPARAMS, per_leaf_step=True)
    grads = full_grads | dict.fromkeys(missing)
    moved = (params, state) if found else update(params, full_grads, state, hparams, way)
    new = update(params, grads, state, hparams, way, found_inf=found)
    for key in params:
        source = (params, state) if key in missing else moved
        actual, expected = ([p[key], *(tree[key] for tree in s[:4])] for p, s in (new, source))
        assert_equal(actual, expected)


@each_way
def test_bare_parameter_without_gradient_stands_still(way: str) -> None:
    param = random_tensor((3,), torch.float32, 0)
    state = adam_init(param, HPARAMS)
    assert_equal(update(param, None, state, HPARAMS, way), (param, state))


def test_missing_gradient_with_a_shared_step_is_an_error() -> None:
    params, grads, state, hparams = make_call()
    with pytest.raises(ValueError, match=r"grads\['leaf1'\] is None, but all leaves share one step"):
        adam_update(params, grads | {"leaf1": None}, state, hparams)
