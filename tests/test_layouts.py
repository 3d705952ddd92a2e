"""Any memory layout of parameters, gradients and moments gives the right numbers, and keeps the strides it can keep."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import optree
import pytest
import torch
from functional_adam.adam.planning import Plan, group_leaves
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from functional_adam.adam.equations import Scalars
from functional_adam.tensors.leaves import Buffers
from tests.oracles import KERNELS, numpy_adam
from tests.strategies import (
    LAYOUTS,
    OVERLAPPING_LAYOUTS,
    PRECISE_DTYPES,
    PROPERTY,
    hyperparameters,
    in_layout,
    is_dense,
    layouts,
    random_tensor,
    seeds,
    shapes,
)
from tests.tolerances import assert_close, assert_equal

# torch.func.jvp, on first use, meets a deprecation within torch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")

kernels = pytest.mark.parametrize("kernel", KERNELS)
every_donate = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])

WRITABLE_LAYOUTS = [layout for layout in LAYOUTS if layout not in OVERLAPPING_LAYOUTS]
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}


def make_state(exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any = (), step: float = 5.0) -> AdamState:
    return AdamState(torch.tensor(step, dtype=torch.float32), exp_avg, exp_avg_sq, max_exp_avg_sq)


def in_order(tree: Any) -> Any:
    """Contiguous copies, without lazy bits and without shared memory."""
    return optree.tree_map(lambda x: x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format), tree)


def kept_strides(x: Tensor, *, donate: bool) -> tuple[int, ...]:
    """Where donated, the memory stays the same, and so do its strides."""
    return x.stride() if donate or is_dense(x) else torch.empty_like(x).stride()


def check_update(params: Any, grads: Any, state: AdamState, hparams: AdamHparams, kernel: str, *, donate: bool) -> None:
    """The update is that of contiguous copies, in the strides of what was given."""
    expected = adam_update(*in_order((params, grads, state)), hparams, kernel=kernel)
    strides = [kept_strides(x, donate=donate) for x in optree.tree_leaves((params, state))]
    kept_grads = in_order(grads)
    actual = adam_update(params, grads, state, hparams, kernel=kernel, donate=donate)
    assert [x.stride() for x in optree.tree_leaves(actual)] == strides
    # The fused kernel rounds the body and the rest of a block of memory differently.
    compare = assert_close if kernel == "fused" else assert_equal
    compare(actual, expected)
    assert_equal(in_order(grads), kept_grads)


@kernels
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 1, 7, 1)], ids=str)
@pytest.mark.parametrize(("layout", "donate"), [*product(LAYOUTS, [False]), *product(WRITABLE_LAYOUTS, [True])])
def test_every_combination_of_layouts_gives_the_contiguous_update(
    kernel: str, shape: tuple[int, ...], layout: str, donate: bool
) -> None:
    """The parametrised layout is the parameter's; gradient and moments take all others."""
    of_buffers = WRITABLE_LAYOUTS if donate else LAYOUTS
    params, grads, exp_avgs, exp_avg_sqs, maxima = [], [], [], [], []
    combinations = product(LAYOUTS, of_buffers, ["contiguous", "transposed", "channels_last", "strided"])
    for seed, (of_grad, of_exp_avg, of_exp_avg_sq) in enumerate(combinations):
        params.append(in_layout(random_tensor(shape, torch.float32, seed), layout))
        grads.append(in_layout(random_tensor(shape, torch.float32, seed + 1), of_grad))
        exp_avgs.append(in_layout(random_tensor(shape, torch.float32, seed + 2), of_exp_avg))
        exp_avg_sqs.append(in_layout(random_tensor(shape, torch.float32, seed + 3, positive=True), of_exp_avg_sq))
        maxima.append(in_layout(random_tensor(shape, torch.float32, seed + 4, positive=True), of_exp_avg))
    state = make_state(exp_avgs, exp_avg_sqs, maxima)
    check_update(params, grads, state, AdamHparams(**OPTIONS), kernel, donate=donate)


@kernels
@every_donate
@PROPERTY
@given(
    shape=shapes(),
    dtype=st.sampled_from(PRECISE_DTYPES),
    drawn=st.tuples(*[layouts()] * 5),
    options=hyperparameters(),
    step=st.integers(0, 50),
    seed=seeds,
)
def test_random_layouts_agree_with_the_formula(
    kernel: str,
    donate: bool,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    drawn: tuple[str, ...],
    options: dict[str, Any],
    step: int,
    seed: int,
) -> None:
    def make(index: int, *, positive: bool = False) -> Tensor:
        layout = drawn[index]
        if donate and index != 1 and layout in OVERLAPPING_LAYOUTS:
            layout = "gaps"
        return in_layout(random_tensor(shape, dtype, seed + index, positive=positive), layout)

    param, grad, exp_avg, exp_avg_sq = make(0), make(1), make(2), make(3, positive=True)
    maximum = make(4, positive=True) if options["amsgrad"] else None
    expected = numpy_adam(param, grad, exp_avg, exp_avg_sq, maximum, step, **options)
    state = make_state(exp_avg, exp_avg_sq, () if maximum is None else maximum, step)
    strides = [kept_strides(x, donate=donate) for x in (param, exp_avg, exp_avg_sq)]

    new_param, new = adam_update(param, grad, state, AdamHparams(**options), kernel=kernel, donate=donate)

    assert_close(new_param, expected.param)
    assert_close(new.exp_avg, expected.exp_avg)
    assert_close(new.exp_avg_sq, expected.exp_avg_sq)
    if maximum is not None:
        assert_close(new.max_exp_avg_sq, expected.max_exp_avg_sq)
    assert new.step.item() == expected.step
    assert [x.stride() for x in (new_param, new.exp_avg, new.exp_avg_sq)] == strides


def update_by_autograd(param: Tensor, grad: Tensor, state: AdamState, hparams: AdamHparams) -> Any:
    updated = adam_update(param.requires_grad_(), grad, state, hparams)
    assert updated[0].requires_grad
    return updated


def update_by_equations(param: Tensor, grad: Tensor, state: AdamState, hparams: AdamHparams) -> Any:
    """Two levels of forward mode call for the equations."""
    zero = (torch.zeros(()),)

    def inner(_: Tensor) -> Any:
        return torch.func.jvp(lambda _: adam_update(param, grad, state, hparams), zero, zero)[0]

    return torch.func.jvp(inner, zero, zero)[0]


every_watched_update = pytest.mark.parametrize("update", [update_by_autograd, update_by_equations])


def cases(shape: tuple[int, ...], layout: str) -> Iterator[tuple[Tensor, Tensor, AdamState]]:
    """A parameter in `layout`, and gradient and moments in all others."""
    for seed, (of_grad, of_moments) in enumerate(product(LAYOUTS, LAYOUTS)):
        param = in_layout(random_tensor(shape, torch.float32, seed), layout)
        grad = in_layout(random_tensor(shape, torch.float32, seed + 1), of_grad)
        moments = (random_tensor(shape, torch.float32, seed + i, positive=i > 2) for i in (2, 3, 4))
        yield param, grad, make_state(*(in_layout(moment, of_moments) for moment in moments))


@every_watched_update
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 1, 7, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_watched_update_gives_the_contiguous_one(update: Any, shape: tuple[int, ...], layout: str) -> None:
    hparams = AdamHparams(**OPTIONS)
    for param, grad, state in cases(shape, layout):
        expected = adam_update(*in_order((param, grad, state)), hparams)
        assert_close(update(param, grad, state, hparams), expected)


@every_watched_update
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 1, 7, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_watched_update_keeps_strides(update: Any, shape: tuple[int, ...], layout: str) -> None:
    hparams = AdamHparams(**OPTIONS)
    for param, grad, state in cases(shape, layout):
        strides = [kept_strides(x, donate=False) for x in optree.tree_leaves((param, state))]
        updated = optree.tree_leaves(update(param, grad, state, hparams))
        # Equations keep the order of elements in memory; the stride of a dimension of size 1 says nothing of it.
        exact = update is not update_by_equations
        for tensor, expected in zip(updated, strides, strict=True):
            pairs = zip(tensor.stride(), expected, tensor.shape, strict=True)
            assert all(a == b for a, b, n in pairs if exact or n != 1)


@every_watched_update
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_watched_update_keeps_strides_of_a_state_from_init(update: Any, layout: str, of_grad: str) -> None:
    param = in_layout(random_tensor((2, 3, 4, 5), torch.float32, 0), layout)
    grad = in_layout(random_tensor((2, 3, 4, 5), torch.float32, 1), of_grad)
    hparams = AdamHparams(**OPTIONS)
    state = adam_init(param, hparams)
    strides = [kept_strides(x, donate=False) for x in optree.tree_leaves((param, state))]
    assert [x.stride() for x in optree.tree_leaves(update(param, grad, state, hparams))] == strides


@kernels
@every_donate
def test_gradient_of_a_sum_under_torch_func(kernel: str, donate: bool) -> None:
    param = random_tensor((5, 7), torch.float32, 0)
    grad = torch.func.grad(lambda w: w.sum())(param)
    assert grad.stride() == (0, 0)
    hparams = AdamHparams(**OPTIONS)
    check_update(param, grad, adam_init(param, hparams), hparams, kernel, donate=donate)


@kernels
@every_donate
def test_channels_last_parameters_with_gradients_of_torch_func(kernel: str, donate: bool) -> None:
    weight = random_tensor((4, 3, 3, 3), torch.float32, 0).to(memory_format=torch.channels_last)
    images = random_tensor((2, 3, 8, 8), torch.float32, 1)
    grad = torch.func.grad(lambda w: torch.nn.functional.conv2d(images, w).square().mean())(weight)
    hparams = AdamHparams(**OPTIONS)
    state = adam_init(weight, hparams)
    assert state.exp_avg.is_contiguous(memory_format=torch.channels_last)
    for layout in (torch.contiguous_format, torch.channels_last):
        fresh, fresh_state = weight.clone(), optree.tree_map(torch.clone, state)
        check_update(fresh, grad.contiguous(memory_format=layout), fresh_state, hparams, kernel, donate=donate)


def conjugate(x: Tensor) -> Tensor:
    """`x` with the conjugate bit: its memory holds the conjugates."""
    return x.conj().resolve_conj().conj()


def negative(x: Tensor) -> Tensor:
    """`x` with the negative bit: its memory holds the negatives."""
    return torch._neg_view(-x)


def imaginary(x: Tensor) -> Tensor:
    """`x` as the imaginary part of a conjugate: a strided view with the negative bit."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def plain(x: Tensor) -> Tensor:
    return x.clone()


@kernels
@every_donate
@pytest.mark.parametrize(
    ("dtype", "of_param", "of_grad", "of_exp_avg"),
    [
        (torch.complex64, conjugate, plain, plain),
        (torch.complex64, plain, conjugate, plain),
        (torch.complex64, conjugate, conjugate, conjugate),
        (torch.complex64, negative, plain, plain),
        (torch.complex64, plain, negative, plain),
        (torch.float32, negative, plain, plain),
        (torch.float32, plain, negative, plain),
        (torch.float32, negative, negative, negative),
        (torch.float32, imaginary, plain, plain),
        (torch.float32, plain, imaginary, plain),
        (torch.float32, imaginary, imaginary, imaginary),
    ],
)
def test_conjugate_and_negative_bits_give_the_plain_update(
    kernel: str, donate: bool, dtype: torch.dtype, of_param: Any, of_grad: Any, of_exp_avg: Any
) -> None:
    values = [random_tensor((3, 5), dtype, seed, positive=seed > 2) for seed in range(5)]
    hparams = AdamHparams(**OPTIONS)
    expected = adam_update(values[0], values[1], make_state(*values[2:]), hparams, kernel=kernel)
    param, grad, exp_avg = of_param(values[0]), of_grad(values[1]), of_exp_avg(values[2])
    assert_equal((param, grad, exp_avg), tuple(values[:3]))
    state = make_state(exp_avg, values[3].clone(), values[4].clone())
    actual = adam_update(param, grad, state, hparams, kernel=kernel, donate=donate)
    assert_close(actual, expected)
    assert_equal(grad, values[1])


@kernels
@every_donate
@pytest.mark.parametrize("shape", [(), (3,), (64,)], ids=str)
@pytest.mark.parametrize("of", [negative, imaginary])
@pytest.mark.parametrize(
    ("of_param", "of_other"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)
def test_negative_bits_count_between_dtypes(
    kernel: str, donate: bool, shape: tuple[int, ...], of: Any, of_param: torch.dtype, of_other: torch.dtype
) -> None:
    param, grad = random_tensor(shape, of_param, 0), random_tensor(shape, of_other, 1)
    exp_avg, exp_avg_sq = (random_tensor(shape, of_other, seed, positive=True) for seed in (2, 3))
    hparams = AdamHparams(lr=0.1)
    expected = adam_update(param, grad, make_state(exp_avg, exp_avg_sq), hparams, kernel=kernel)
    # The imaginary part of a conjugate is a view; with float16 it would be one of complex32.
    args = [
        of(x) if of is negative or x.dtype is torch.float32 else x.clone() for x in (param, grad, exp_avg, exp_avg_sq)
    ]
    assert any(x.is_neg() for x in args)
    actual = adam_update(args[0], args[1], make_state(*args[2:]), hparams, kernel=kernel, donate=donate)
    assert_close(actual, expected)
    assert_equal(args[1], grad)


every_mix_of_dtypes = pytest.mark.parametrize(
    ("of_param", "of_grad"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.complex64, torch.float32),
        (torch.complex64, torch.complex128),
        (torch.complex128, torch.float32),
    ],
    ids=str,
)


@kernels
@every_donate
@every_mix_of_dtypes
def test_gradients_of_another_dtype_are_cast(
    kernel: str, donate: bool, of_param: torch.dtype, of_grad: torch.dtype
) -> None:
    params = [random_tensor((3, 5), of_param, 0), random_tensor((), of_param, 1)]
    grads = [random_tensor((3, 5), of_grad, 2), random_tensor((), of_grad, 3)]
    hparams = AdamHparams(**OPTIONS)
    state = adam_init(params, hparams)
    expected = adam_update(params, [g.to(of_param) for g in grads], state, hparams, kernel=kernel)
    actual = adam_update(params, grads, state, hparams, kernel=kernel, donate=donate)
    assert_equal(actual, expected)
    assert [g.dtype for g in grads] == [of_grad] * 2


@every_watched_update
@every_mix_of_dtypes
def test_watched_update_casts_gradients_of_another_dtype(
    update: Any, of_param: torch.dtype, of_grad: torch.dtype
) -> None:
    param, grad = random_tensor((3, 5), of_param, 0), random_tensor((3, 5), of_grad, 1)
    hparams = AdamHparams(**OPTIONS)
    state = adam_init(param, hparams)
    assert_equal(update(param, grad, state, hparams), update(param, grad.to(of_param), state, hparams))


@kernels
def test_gradients_are_cast_before_they_are_unscaled(kernel: str) -> None:
    # In float16, 1e-6 / 1e3 is 0.
    param, grad = torch.zeros(2), torch.tensor([1e-6, 6e4], dtype=torch.float16)
    hparams = AdamHparams()
    state = adam_init(param, hparams)
    _, new = adam_update(param, grad, state, hparams, kernel=kernel, grad_scale=1e3)
    assert_close(new.exp_avg, grad.float() / 1e3 * 0.1)


@kernels
def test_complex_gradients_of_real_parameters_are_an_error(kernel: str) -> None:
    param = torch.zeros(3)
    hparams = AdamHparams()
    grad = torch.zeros(3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"grads is of torch\.complex64, but params is of torch\.float32"):
        adam_update(param, grad, adam_init(param, hparams), hparams, kernel=kernel)


@kernels
@every_donate
@pytest.mark.parametrize(
    ("of_param", "of_moments"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.complex64, torch.complex128),
    ],
    ids=str,
)
@pytest.mark.parametrize("of_grad", ["params", "moments"])
def test_moments_of_another_dtype_are_computed_in_the_wider(
    kernel: str, donate: bool, of_param: torch.dtype, of_moments: torch.dtype, of_grad: str
) -> None:
    wide = torch.promote_types(of_param, of_moments)
    hparams = AdamHparams(**OPTIONS)
    params = [random_tensor((3, 5), of_param, 0), random_tensor((), of_param, 1), random_tensor((0,), of_param, 2)]
    grads = [random_tensor(p.shape, of_param if of_grad == "params" else of_moments, 3) for p in params]
    state = adam_init(params, hparams)
    moments = optree.tree_map(lambda x: random_tensor(x.shape, of_moments, 4, positive=True), tuple(state[1:4]))
    state = AdamState(state.step, *moments)

    def widened(tree: Any) -> Any:
        return optree.tree_map(lambda x: x.to(wide), tree)

    wide_state = AdamState(state.step.clone(), *widened(moments))
    expected_params, expected = adam_update(widened(params), widened(grads), wide_state, hparams, kernel=kernel)

    params, state = adam_update(params, grads, state, hparams, kernel=kernel, donate=donate)

    assert_equal(params, [p.to(of_param) for p in expected_params])
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert_equal(getattr(state, name), [x.to(of_moments) for x in getattr(expected, name)])
    assert state.step.item() == 1


PARAM = torch.ones(4, 6)
REASONS: dict[str, tuple[Plan, Tensor, Tensor, bool, str | None]] = {  # plan, tensor, its parameter, is it a gradient
    "as it is": (Plan("fused", torch.float32, True, True), PARAM, PARAM, False, None),
    "a like moment": (Plan("fused", torch.float32, False, True), torch.ones(4, 6), PARAM, False, None),
    "a gradient": (Plan("fused", torch.float32, False, True), torch.ones(4, 6), PARAM, True, None),
    "any layout": (Plan("single", torch.float32, False, False), torch.ones(6, 4).T, PARAM, False, None),
    "dtype": (
        Plan("single", torch.float64, False, False),
        PARAM,
        PARAM,
        False,
        "is of torch.float32 and computed in torch.float64",
    ),
    "conjugation": (
        Plan("single", torch.complex64, False, False),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(2, dtype=torch.complex64),
        False,
        "has a lazy conjugation or negation",
    ),
    "negation": (
        Plan("foreach", torch.float32, False, False),
        torch.ones(2, dtype=torch.complex64).conj().imag,
        torch.ones(2),
        True,
        "has a lazy conjugation or negation",
    ),
    "sparse parameter": (Plan("fused", torch.float32, False, False), *[PARAM[:, ::2]] * 2, False, "is not dense"),
    "other layout": (
        Plan("fused", torch.float32, False, False),
        torch.ones(6, 4).T,
        PARAM,
        False,
        "is not laid out like its parameter",
    ),
    "scaled": (Plan("fused", torch.float32, True, False), PARAM.clone(), PARAM, True, "is divided by grad_scale"),
    "guarded": (
        Plan("foreach", torch.float32, False, True),
        PARAM,
        PARAM,
        False,
        "is chosen by found_inf, whose value is not read",
    ),
    "guarded gradient": (Plan("single", torch.float32, False, True), PARAM.clone(), PARAM, True, None),
}


@pytest.mark.parametrize(("plan", "x", "param", "is_grad", "reason"), REASONS.values(), ids=REASONS)
def test_what_a_kernel_cannot_take_as_it_is_is_copied_for_a_reason(
    plan: Plan, x: Tensor, param: Tensor, is_grad: bool, reason: str | None
) -> None:
    assert plan.why_copied(x, param, is_grad=is_grad) == reason


def test_a_group_is_of_one_device_and_dtype_and_one_set_of_scalars() -> None:
    one, other = (Scalars(lr, 0.9, 0.999, 1e-8, 0.0, False, False, False) for lr in (0.1, 0.2))

    def groups(params: list[Tensor], scalars: list[Scalars]) -> list[tuple[torch.dtype, list[int]]]:
        buffers = Buffers(params, *([torch.zeros_like(p) for p in params] for _ in range(2)), [])
        return [(dtype, [*indices]) for dtype, indices in group_leaves(buffers, scalars)]

    here, there, wide = torch.ones(2), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.float64)
    assert groups([], []) == []
    assert groups([here, here], [one, one]) == [(torch.float32, [0, 1])]
    assert groups([here, there, here], [one] * 3) == [(torch.float32, [0, 2]), (torch.float32, [1])]
    assert groups([here, wide, here], [one] * 3) == [(torch.float32, [0, 2]), (torch.float64, [1])]
    assert groups([here, here, here], [one, other, one]) == [(torch.float32, [0, 2]), (torch.float32, [1])]
