"""Kernels and equations compute Adam as the float64 formula says, for all values of what steers an update."""

import itertools
import math
from typing import Any

import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import assert_unchanged, clone, make_call, snapshot, tensors_of
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
        leaf, *rest = (torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in expected)
        expected = numpy_adam(leaf, grad, *rest, **options, grad_scale=scale)
        param, state = update(param, grad, state, hparams, way, grad_scale=scale)
    assert_close([param, *tensors_of(state[1:4])], [x for x in expected[:4] if x is not None])
    assert state.step.item() == expected.step


@pytest.mark.parametrize("way", ["fused", "autograd", "equations"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@PROPERTY
@given(options=hyperparameters(), seed=seeds, step=st.integers(0, 10_000))
def test_half_types_are_computed_in_float32_and_rounded_once(
    way: str, dtype: torch.dtype, options: dict[str, Any], seed: int, step: int
) -> None:
    leaves = [random_tensor((3, 7), dtype, seed + i, positive=i > 2) for i in range(5 if options["amsgrad"] else 4)]
    state = AdamState(torch.tensor(step, dtype=torch.float32), *leaves[2:])
    expected = numpy_adam(*leaves, step=step, **options)
    new_param, new = update(*leaves[:2], state, AdamHparams(**options), way)
    assert_rounded_once([new_param, *tensors_of(new[1:4])], [x for x in expected[:4] if x is not None])


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
def test_bias_correction_is_exact_to_rounding(way: str, dtype: torch.dtype) -> None:
    # The parameter is 0, so that the result is the change and nothing hides its digits.
    param, given = torch.zeros(13, dtype=dtype), [random_tensor((13,), dtype, seed, positive=True) for seed in range(3)]
    # New second moments of 0, 1 and 2.
    simple = torch.tensor([[0.0, 1.0, -1.0, 0.0], [0.5, 1.0, 2.0, -1.0], [0.0, 1.0, 1.0, 4.0]], dtype=dtype)
    all_betas, counts = ((0.9, 0.999), (0.99, 0.99999), (0.0, 0.0)), (0, 1, 999, 99_999)
    cases = [*itertools.product(all_betas, [1e-8], [given], counts), ((0.5, 0.5), 0.125, simple, 0)]
    for betas, eps, (grad, *moments), count in cases:
        zeros = param[: len(grad)]
        expected = numpy_adam(zeros, grad, *moments, None, count, betas=betas, eps=eps)
        state = AdamState(torch.tensor(count, dtype=torch.float32), *moments)
        new_param, new = update(zeros, grad, state, AdamHparams(betas=betas, eps=eps), way)
        assert_within_roundings(new_param, expected.param, 5)
        assert new.step.item() == count + 1


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


@each_way
@each_step
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(way: str, per_leaf_step: bool, dtype: torch.dtype) -> None:
    # Half types stop counting at 256 or 2048.
    hparams = AdamHparams(**{**OPTIONS, "lr": torch.tensor(0.01, dtype=torch.float32)})
    call = make_call(hparams=hparams, step=2048.0, per_leaf_step=per_leaf_step)
    options: list[dict[str, float]] = [
        {"grad_scale": 1001.0},
        {"grad_scale": 7},
        {"found_inf": 0.0},
        {"found_inf": 1e-30},
    ]
    expected = [update(*call, way, **option) for option in options]
    torch.set_default_dtype(dtype)
    try:
        actual = [update(*call, way, **option) for option in options]
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(actual, expected)
    assert {x.dtype for x in tensors_of(actual)} == {torch.float32}
    for (_, state), count in zip(actual, (2049, 2049, 2049, 2048), strict=True):
        assert {step.item() for step in tensors_of(state.step)} == {count}


@each_way
@pytest.mark.parametrize("name", ["lr", "beta1", "beta2", "eps", "weight_decay", "all", "zeros"])
def test_tensor_hyperparameters_count_at_their_own_value(way: str, name: str) -> None:
    params, grads, state, _ = make_call()
    compare = assert_close if way in ("autograd", "equations") else assert_equal
    numbers = {"lr": 0.003, "beta1": 0.8, "beta2": 0.99, "eps": 0.03, "weight_decay": 0.3}
    if name == "zeros":
        numbers = {key: 0.03 if key == "eps" else 0.0 for key in numbers}
    for dtype, is_decoupled in itertools.product((torch.float32, torch.float64, torch.bfloat16), (False, True)):

        def run(numbers: dict[str, Any], is_decoupled: bool = is_decoupled) -> Any:
            rest = {key: x for key, x in numbers.items() if "beta" not in key}
            betas = numbers["beta1"], numbers["beta2"]
            hparams = AdamHparams(betas=betas, **rest, decoupled_weight_decay=is_decoupled)
            return update(params, grads, state, hparams, way)

        are_tensors = {key: name in (key, "all", "zeros") for key in numbers}
        given = {key: torch.tensor(x, dtype=dtype) if are_tensors[key] else x for key, x in numbers.items()}
        compare(run(given), run({key: float(x) for key, x in given.items()}))


@each_donate
@pytest.mark.parametrize("count", [-1.0, math.nan, -math.inf])
@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.999), (0.9, math.nan)])
def test_what_leaves_no_bias_correction_is_refused(donate: bool, count: float, betas: tuple[float, float]) -> None:
    for per_leaf_step in (False, True):
        params, grads, state, hparams = make_call(per_leaf_step=per_leaf_step)
        # As a tree map makes them, which checks nothing.
        rebuilt: Any = optree.tree_unflatten(optree.tree_structure(hparams), (0.1, *betas, 1e-8, 0.0))
        before = snapshot((params, state))
        with pytest.raises(ValueError, match=r"hparams.betas\[[01]\] is .*\. Expected a number in \[0, 1\)"):
            adam_update(params, grads, state, rebuilt, donate=donate)
        assert_unchanged((params, state), before)
        tensors_of(state.step)[-1].fill_(count)
        before = snapshot((params, state))
        with pytest.raises(ValueError, match=r"state.step is (-1|nan|-inf)\. Expected a number of updates >= 0"):
            adam_update(params, grads, state, hparams, donate=donate)
        assert_unchanged((params, state), before)


WIDE_TINY = torch.tensor(1e-300, dtype=torch.float64)
FOUND: list[Any] = [True, 1.0, 2.0, -1, math.nan, math.inf, 1e-300, *map(torch.tensor, (3, True, math.nan)), WIDE_TINY]
FOUND.append(torch.tensor(2.0, dtype=torch.float16))
NOT_FOUND: list[Any] = [False, 0, 0.0, -0.0, *map(torch.tensor, (0, False))]
NOT_FOUND += [torch.tensor(0.0, dtype=dtype) for dtype in (torch.float64, torch.float16)]


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


HALF, FLOAT, WIDE, COMPLEX = torch.bfloat16, torch.float32, torch.float64, torch.complex64


@each_way
@pytest.mark.parametrize(
    ("dtype", "moment_dtype", "grad_dtype"),
    [
        (torch.float16, torch.float16, FLOAT),
        *((HALF, HALF, torch.float16), (HALF, HALF, FLOAT), (HALF, FLOAT, WIDE)),
        *((FLOAT, FLOAT, torch.float16), (FLOAT, FLOAT, HALF), (FLOAT, FLOAT, WIDE)),
        *((FLOAT, HALF, FLOAT), (FLOAT, WIDE, FLOAT), (WIDE, WIDE, FLOAT), (WIDE, FLOAT, WIDE)),
        *((COMPLEX, COMPLEX, FLOAT), (COMPLEX, COMPLEX, torch.complex128), (COMPLEX, torch.complex128, COMPLEX)),
        (torch.complex128, torch.complex128, FLOAT),
    ],
    ids=str,
)
def test_an_update_is_computed_in_the_widest_dtype_of_parameter_and_moments(
    way: str, dtype: torch.dtype, moment_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """Gradients are cast to that."""
    options = {**OPTIONS, "eps": 1e-3}
    hparams = AdamHparams(**options)
    wide = torch.promote_types(dtype, moment_dtype)
    param, grad = random_tensor((3, 5), dtype, 0), random_tensor((3, 5), grad_dtype, 1)
    moments = [random_tensor((3, 5), moment_dtype, seed, positive=seed > 2) for seed in (2, 3, 4)]
    state = AdamState(torch.tensor(3.0), *moments)
    expected = numpy_adam(param, grad.to(wide), *moments, 3, **options)
    for how in ({}, {"donate": True}) if way in KERNELS else ({},):
        results = [update(*clone((param, g, state)), hparams, way, **how) for g in (grad, grad.to(wide))]
        assert_equal(*results)
        if wide not in (HALF, torch.float16):
            new_param, new = results[0]
            assert_close([new_param, *new[1:4]], [*expected[:4]])


@each_kernel
def test_gradients_are_cast_before_they_are_unscaled(kernel: str) -> None:
    # In float16, 1e-6 / 1e3 is 0.
    param, grad = torch.zeros(2), torch.tensor([1e-6, 6e4], dtype=torch.float16)
    _, new = adam_update(param, grad, adam_init(param, HPARAMS), HPARAMS, kernel=kernel, grad_scale=1e3)
    assert_close(new.exp_avg, grad.float() / -1e3 * 0.1)


SCALES: list[Any] = [3.0, 7, 0.1, torch.tensor(5), torch.tensor(1000.0, dtype=torch.float16)]
SCALES += [torch.tensor(x, dtype=torch.float64) for x in (0.1, 65536.0)]


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_grad_scale_divides_the_gradients_in_float32(way: str, dtype: torch.dtype) -> None:
    compare = assert_equal if dtype is torch.float32 else assert_close
    for scale, donate in itertools.product(SCALES, (False, True) if way in KERNELS else (False,)):
        params, grads, state, hparams = make_call(hparams=HPARAMS, dtype=dtype)
        in_float32 = torch.as_tensor(scale).float().item()
        unscaled = optree.tree_map(lambda g, scale=in_float32: g / scale, grads)
        expected, before = update(params, unscaled, state, hparams, way), snapshot(grads)
        compare(update(params, grads, state, hparams, way, grad_scale=scale, donate=donate), expected)
        assert_unchanged(grads, before)


@each_way
@pytest.mark.parametrize("found", [None, 1.0])
def test_leaf_without_gradient_stands_still(way: str, found: float | None) -> None:
    params, full_grads, state, hparams = make_call(hparams=HPARAMS, per_leaf_step=True)
    moved = (params, state) if found else update(params, full_grads, state, hparams, way)
    for missing in (["leaf0"], ["leaf1", "leaf2"], ["leaf0", "leaf1", "leaf2"]):
        new = update(params, full_grads | dict.fromkeys(missing), state, hparams, way, found_inf=found)
        for key in params:
            source = (params, state) if key in missing else moved
            assert_equal(*([p[key], *(tree[key] for tree in s[:4])] for p, s in (new, source)))
    bare = params["leaf0"], adam_init(params["leaf0"], HPARAMS)
    assert_equal(update(bare[0], None, bare[1], HPARAMS, way, found_inf=found), bare)
