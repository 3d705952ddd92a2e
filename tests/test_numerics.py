"""Kernels and equations compute Adam as the float64 formula says, for all values of what steers an update."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optree
import pytest
import torch
from functional_adam.adam.planning import run_kernel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from functional_adam.adam.equations import Scalars, precise, update_leaf
from functional_adam.tensors.leaves import Buffers
from tests.oracles import KERNELS, numpy_adam
from tests.strategies import PROPERTY, hyperparameters, random_tensor, seeds
from tests.tolerances import assert_close, assert_equal, assert_rounded_once, assert_within_roundings

# torch.func.jvp, on first use, meets a deprecation within torch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")

kernels = pytest.mark.parametrize("kernel", KERNELS)
every_way = pytest.mark.parametrize("way", [*KERNELS, "autograd", "equations"])
every_donate = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
every_step = pytest.mark.parametrize("per_leaf_step", [False, True], ids=["shared_step", "per_leaf_step"])

OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}


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


def make_problem(dtype: torch.dtype = torch.float32, *, per_leaf_step: bool = False) -> tuple[Any, Any, AdamState]:
    """Parameters, gradients and a state that has seen updates."""
    shapes = ((3, 5), (), (17,))
    params = {str(i): random_tensor(shape, dtype, i) for i, shape in enumerate(shapes)}
    grads = {str(i): random_tensor(shape, dtype, i + 10) for i, shape in enumerate(shapes)}
    moments = [
        {str(i): 0.1 * random_tensor(shape, dtype, i + seed, positive=seed > 20) for i, shape in enumerate(shapes)}
        for seed in (20, 30, 40)
    ]
    step: Any = torch.tensor(3.0, dtype=torch.float32)
    return params, grads, AdamState(dict.fromkeys(params, step) if per_leaf_step else step, *moments)


def copy_of(tree: Any) -> Any:
    return optree.tree_map(torch.clone, tree)


def make_column(dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Positive values for two leaves, one of which is not dense."""
    row = random_tensor((6,), dtype, seed, positive=True)
    return [random_tensor((3, 5), dtype, 10 + seed, positive=True), row[::2]]


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@PROPERTY
@given(options=hyperparameters(), seed=seeds, step=st.integers(0, 10_000), scale=st.none() | st.floats(0.1, 1e3))
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


@pytest.mark.parametrize("way", ["fused", "auto", "autograd", "equations"])
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


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("t", [1, 2, 1000, 100_000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.99999), (0.0, 0.0)], ids=str)
def test_bias_correction_is_exact_to_rounding(way: str, dtype: torch.dtype, t: int, betas: tuple[float, float]) -> None:
    # The parameter is 0, so that the result is the change and nothing hides its digits.
    param = torch.zeros(13, dtype=dtype)
    grad, exp_avg = random_tensor((13,), dtype, 0, positive=True), random_tensor((13,), dtype, 1, positive=True)
    exp_avg_sq = random_tensor((13,), dtype, 2, positive=True)
    hparams = AdamHparams(betas=betas)
    state = adam_init(param, hparams)._replace(step=torch.tensor(t - 1, dtype=torch.float32))
    state = state._replace(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    expected = numpy_adam(param, grad, exp_avg, exp_avg_sq, None, t - 1, betas=betas)
    new_param, new = update(param, grad, state, hparams, way)
    assert_within_roundings(new_param, expected.param, 5)
    assert new.step.item() == t


@every_way
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


def test_corrections_are_precise_where_the_device_can() -> None:
    with FakeTensorMode():
        dtypes = {device: precise(torch.empty((), device=device)).dtype for device in ("cpu", "cuda", "mps")}
    assert dtypes == {"cpu": torch.float64, "cuda": torch.float64, "mps": torch.float32}


@pytest.mark.parametrize(("device", "other"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "mps")])
def test_the_equations_take_scalars_from_any_device(device: str, other: str) -> None:
    with FakeTensorMode():
        row = tuple(torch.empty(3, device=device) for _ in range(4))
        number = torch.empty((), device=other)
        scalars = Scalars(*[number] * 5, amsgrad=True, maximize=False, decoupled_weight_decay=True)
        new = update_leaf(row, torch.empty(3, device=device), number, scalars, number)
    assert [x.device.type for x in new if x is not None] == [device] * 4


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@every_way
@every_step
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_step_is_float32_whatever_the_default_dtype(way: str, per_leaf_step: bool, dtype: torch.dtype) -> None:
    params, grads, _ = make_problem()
    hparams = AdamHparams(**OPTIONS)
    with default_dtype(dtype):
        state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
        assert {x.dtype for x in optree.tree_leaves(state)} == {torch.float32}
        # Half types stop counting at 256 or 2048.
        state = state._replace(step=optree.tree_map(lambda step: step + 2048, state.step))
        new_params, new = update(params, grads, state, hparams, way, grad_scale=2.0, found_inf=0.0)
    assert {x.dtype for x in optree.tree_leaves((new_params, new))} == {torch.float32}
    assert {step.item() for step in optree.tree_leaves(new.step)} == {2049}


@every_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"grad_scale": 1001.0}, {"grad_scale": 7}, {"found_inf": 1e-30}], ids=str)
def test_default_dtype_changes_no_number(way: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params, grads, state = make_problem()
    hparams = AdamHparams(**{**OPTIONS, "lr": torch.tensor(0.01, dtype=torch.float32)})
    expected = update(params, grads, state, hparams, way, **options)
    with default_dtype(dtype):
        actual = update(params, grads, state, hparams, way, **options)
    assert_equal(actual, expected)


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


@every_way
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tensor_hyperparameters_count_at_their_own_value(way: str, name: str, dtype: torch.dtype) -> None:
    params, grads, state = make_problem()
    state = state._replace(max_exp_avg_sq=())

    def as_tensor(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype)

    def as_number(value: float) -> float:
        return float(as_tensor(value))

    expected = update(params, grads, state, AdamHparams(**NUMBERS[name](as_number)), way)
    actual = update(params, grads, state, AdamHparams(**NUMBERS[name](as_tensor)), way)
    compare = assert_close if way in ("autograd", "equations") else assert_equal
    compare(actual, expected)


FOUND: dict[str, Any] = {
    "True": True,
    "1.0": 1.0,
    "2.0": 2.0,
    "-1": -1,
    "nan": math.nan,
    "inf": math.inf,
    "tiny": 1e-300,
    "int_tensor": torch.tensor(3),
    "bool_tensor": torch.tensor(True),
    "float64_tensor": torch.tensor(1e-300, dtype=torch.float64),
    "nan_tensor": torch.tensor(math.nan),
    "half_tensor": torch.tensor(2.0, dtype=torch.float16),
}
NOT_FOUND: dict[str, Any] = {
    "False": False,
    "0": 0,
    "0.0": 0.0,
    "-0.0": -0.0,
    "int_tensor": torch.tensor(0),
    "bool_tensor": torch.tensor(False),
    "float64_tensor": torch.tensor(0.0, dtype=torch.float64),
    "half_tensor": torch.tensor(0.0, dtype=torch.float16),
}


@kernels
@every_donate
@every_step
@pytest.mark.parametrize("count", [-1.0, math.nan, -math.inf])
def test_a_step_that_counts_nothing_is_refused(kernel: str, donate: bool, per_leaf_step: bool, count: float) -> None:
    params, grads, state = make_problem(per_leaf_step=per_leaf_step)
    state = copy_of(state._replace(max_exp_avg_sq=()))
    optree.tree_leaves(state.step)[-1].fill_(count)
    kept = copy_of((params, state))
    with pytest.raises(ValueError, match=r"state.step is (-1|nan|-inf)\. Expected a number of updates >= 0"):
        adam_update(params, grads, state, AdamHparams(), kernel=kernel, donate=donate)
    torch.testing.assert_close((params, state), kept, rtol=0, atol=0, equal_nan=True)


@kernels
@every_donate
@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.999), (0.9, math.nan)])
def test_rebuilt_betas_without_bias_correction_are_refused(
    kernel: str, donate: bool, betas: tuple[float, float]
) -> None:
    params, grads, state = make_problem()
    state = state._replace(max_exp_avg_sq=())
    hparams = AdamHparams()
    rebuilt: Any = optree.tree_unflatten(optree.tree_structure(hparams), (0.1, *betas, 1e-8, 0.0))
    kept = copy_of((params, state))
    with pytest.raises(ValueError, match=r"hparams.betas\[[01]\] is .*\. Expected a number in \[0, 1\)"):
        adam_update(params, grads, state, rebuilt, kernel=kernel, donate=donate)
    assert_equal((params, state), kept)


@every_way
@every_step
@pytest.mark.parametrize("found_inf", FOUND.values(), ids=FOUND.keys())
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_found_inf_changes_nothing_at_all(way: str, per_leaf_step: bool, found_inf: Any, scale: float | None) -> None:
    params, grads, state = make_problem(per_leaf_step=per_leaf_step)
    grads["0"][0, 0], grads["0"][1, 1] = math.inf, math.nan
    kept = copy_of((params, state))
    hparams = AdamHparams(**OPTIONS)
    assert_equal(update(params, grads, state, hparams, way, found_inf=found_inf, grad_scale=scale), kept)
    assert_equal((params, state), kept)


@kernels
@every_step
@pytest.mark.parametrize("found_inf", FOUND.values(), ids=FOUND.keys())
def test_found_inf_changes_nothing_in_donated_buffers(kernel: str, per_leaf_step: bool, found_inf: Any) -> None:
    params, grads, state = make_problem(per_leaf_step=per_leaf_step)
    state = copy_of(state)  # a step of its own for each leaf
    grads["0"][0, 0] = math.inf
    kept = copy_of((params, state))
    hparams = AdamHparams(**OPTIONS)
    assert_equal(update(params, grads, state, hparams, kernel, found_inf=found_inf, donate=True), kept)


@kernels
@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float64)], ids=str)
def test_found_inf_that_is_not_read_decides(
    kernel: str, found: bool, scale: float | None, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    # As on an accelerator, where the kernel is told, and its results are chosen.
    params, columns = make_column(dtypes[0], 0), [make_column(dtypes[1], seed) for seed in (1, 2, 3)]
    grads, before = make_column(dtypes[0], 4), copy_of([params, *columns])
    kept_grads = copy_of(grads)
    buffers = Buffers(params, *columns)
    scalars = Scalars(0.25, 0.75, 0.875, 0.125, 0.5, amsgrad=True, maximize=False, decoupled_weight_decay=False)
    scale_, found_ = None if scale is None else torch.tensor(scale), torch.tensor(found)
    steps = [torch.tensor(4.0)] * 2
    run_kernel(kernel, buffers, grads, steps, [scalars] * 2, grad_scale=scale_, found_inf=found_, is_ready=False)
    assert_equal(grads, kept_grads)
    options = {"lr": 0.25, "betas": (0.75, 0.875), "eps": 0.125, "weight_decay": 0.5, "amsgrad": True}
    for i, row in enumerate(buffers.rows()):
        p, m, v, u = (column[i] for column in before)
        expected = numpy_adam(p, grads[i], m, v, u, 3, **options, grad_scale=scale, found_inf=float(found))
        assert_close(row, expected[:4])
        assert not found or all(torch.equal(new, old) for new, old in zip(row, (p, m, v, u), strict=True))


@every_way
@pytest.mark.parametrize("found_inf", NOT_FOUND.values(), ids=NOT_FOUND.keys())
def test_zero_found_inf_is_as_none(way: str, found_inf: Any) -> None:
    params, grads, state = make_problem()
    hparams = AdamHparams(**OPTIONS)
    expected = update(params, grads, state, hparams, way)
    assert_equal(update(params, grads, state, hparams, way, found_inf=found_inf), expected)


HALF, FLOAT, WIDE = torch.bfloat16, torch.float32, torch.float64


@every_way
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
    "float64_tensor": torch.tensor(65536.0, dtype=torch.float64),
    "float16_tensor": torch.tensor(1000.0, dtype=torch.float16),
    "int_tensor": torch.tensor(5),
}


@every_way
@every_donate
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_grad_scale_divides_the_gradients(way: str, donate: bool, scale: Any) -> None:
    if way in ("autograd", "equations"):
        donate = False  # the old values would be missed
    params, grads, state = make_problem()
    hparams = AdamHparams(**OPTIONS)
    unscaled = optree.tree_map(lambda g: g / float(scale), grads)
    kept_grads = copy_of(grads)
    expected = update(params, unscaled, state, hparams, way)
    given = copy_of((params, state)) if donate else (params, state)
    actual = update(given[0], grads, given[1], hparams, way, grad_scale=scale, donate=donate)
    assert_equal(actual, expected)
    assert_equal(grads, kept_grads)


@every_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_grad_scale_divides_gradients_of_any_dtype(way: str, dtype: torch.dtype, scale: Any) -> None:
    params, grads, state = make_problem(dtype)
    hparams = AdamHparams(**OPTIONS)
    unscaled = optree.tree_map(lambda g: g / float(scale), grads)
    actual = update(params, grads, state, hparams, way, grad_scale=scale)
    assert_close(actual, update(params, unscaled, state, hparams, way))


@every_way
@pytest.mark.parametrize("scale", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "float64_tensor"])
def test_grad_scale_counts_in_float32(way: str, scale: Any) -> None:
    params, grads, state = make_problem(torch.float64)
    hparams = AdamHparams(**OPTIONS)
    in_float32 = float(torch.tensor(0.1, dtype=torch.float32))
    unscaled = optree.tree_map(lambda g: g / in_float32, grads)
    actual = update(params, grads, state, hparams, way, grad_scale=scale)
    assert_close(actual, update(params, unscaled, state, hparams, way))


@every_way
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_grad_scale_and_found_inf_together(way: str, found: float) -> None:
    params, grads, state = make_problem()
    hparams = AdamHparams(**OPTIONS)
    scale, found_inf = torch.tensor(1024.0), torch.tensor(found)
    unscaled = optree.tree_map(lambda g: g / 1024, grads)
    expected = (params, state) if found else update(params, unscaled, state, hparams, way)
    assert_equal(update(params, grads, state, hparams, way, grad_scale=scale, found_inf=found_inf), expected)


@every_way
@pytest.mark.parametrize("missing", [["0"], ["1", "2"], ["0", "1", "2"]], ids=str)
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
def test_leaf_without_gradient_stands_still(way: str, missing: list[str], found: float | None) -> None:
    params, full_grads, state = make_problem(per_leaf_step=True)
    grads = {key: None if key in missing else grad for key, grad in full_grads.items()}
    hparams = AdamHparams(**OPTIONS)
    moved = (params, state) if found else update(params, full_grads, state, hparams, way)
    new_params, new = update(params, grads, state, hparams, way, found_inf=found)
    for key in params:
        source_params, source = (params, state) if key in missing else moved
        actual, expected = [tree[key] for tree in new[:4]], [tree[key] for tree in source[:4]]
        assert_equal((new_params[key], actual), (source_params[key], expected))


@every_way
def test_bare_parameter_without_gradient_stands_still(way: str) -> None:
    param = random_tensor((3,), torch.float32, 0)
    hparams = AdamHparams(**OPTIONS)
    state = adam_init(param, hparams)
    assert_equal(update(param, None, state, hparams, way), (param, state))


@every_way
def test_missing_gradient_with_a_shared_step_is_an_error(way: str) -> None:
    params, grads, state = make_problem()
    with pytest.raises(ValueError, match=r"grads\['1'\] is None, but all leaves share one step.*per_leaf_step=True"):
        update(params, {**grads, "1": None}, state, AdamHparams(**OPTIONS), way)
