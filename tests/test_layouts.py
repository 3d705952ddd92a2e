"""Any memory layout of parameters, gradients and moments gives the right numbers, and keeps the strides it can keep."""

from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from functional_adam import AdamHparams, AdamState, adam_init, adam_update, explain
from tests.builders import clone, negative, strided, transposed
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

WRITABLE_LAYOUTS = [layout for layout in LAYOUTS if layout not in OVERLAPPING_LAYOUTS]
HPARAMS = AdamHparams(lr=0.01, weight_decay=0.1, amsgrad=True, maximize=True)


def by_autograd(params: Any, grads: Any, state: AdamState, hparams: AdamHparams) -> Any:
    watched = optree.tree_map(lambda x: x.detach().requires_grad_(), params)
    updated = adam_update(watched, grads, state, hparams)
    assert all(x.requires_grad for x in optree.tree_leaves(updated[0]))
    return updated


def by_equations(*arguments: Any) -> Any:
    """Two levels of forward mode call for the equations."""
    zero = (torch.zeros(()),)

    def inner(_: Tensor) -> Any:
        return torch.func.jvp(lambda _: adam_update(*arguments), zero, zero)[0]

    return torch.func.jvp(inner, zero, zero)[0]


WAYS: dict[str, Callable[..., Any]] = {
    **{kernel: partial(adam_update, kernel=kernel) for kernel in KERNELS},
    **{f"donated_{kernel}": partial(adam_update, kernel=kernel, donate=True) for kernel in KERNELS},
    "autograd": by_autograd,
    "equations": by_equations,
}
kernels = pytest.mark.parametrize("kernel", KERNELS)
every_way = pytest.mark.parametrize("way", WAYS)


def make_state(exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any = (), step: float = 5.0) -> AdamState:
    return AdamState(torch.tensor(step, dtype=torch.float32), exp_avg, exp_avg_sq, max_exp_avg_sq)


def in_order(tree: Any) -> Any:
    """Contiguous copies, without lazy bits and without shared memory."""
    return optree.tree_map(lambda x: x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format), tree)


def kept_strides(x: Tensor, *, donate: bool) -> tuple[int, ...]:
    """Where donated, the memory stays the same, and so do its strides."""
    return x.stride() if donate or is_dense(x) else torch.empty_like(x).stride()


def check_update(way: str, params: Any, grads: Any, state: AdamState, hparams: AdamHparams = HPARAMS) -> None:
    """The update is that of contiguous copies, in the strides of what was given."""
    kernel = way.removeprefix("donated_")
    expected = adam_update(*in_order((params, grads, state)), hparams, kernel=kernel if kernel in KERNELS else "auto")
    strides = [kept_strides(x, donate=kernel != way) for x in optree.tree_leaves((params, state))]
    kept_grads = in_order(grads)
    actual = WAYS[way](params, grads, state, hparams)
    # The fused kernel rounds the body and the rest of a block of memory differently.
    compare = assert_equal if kernel in ("single", "foreach") else assert_close
    compare(optree.tree_map(torch.detach, actual), expected)
    assert_equal(in_order(grads), kept_grads)
    for x, expected_strides in zip(optree.tree_leaves(actual), strides, strict=True):
        # Equations keep the order of elements in memory; the stride of a dimension of size 1 says nothing of it.
        pairs = zip(x.stride(), expected_strides, x.shape, strict=True)
        assert all(a == b for a, b, size in pairs if size != 1 or way != "equations")


@every_way
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 1, 7, 1)], ids=str)
def test_every_combination_of_layouts_gives_the_contiguous_update(way: str, shape: tuple[int, ...]) -> None:
    of_buffers = WRITABLE_LAYOUTS if way.startswith("donated") else LAYOUTS
    of_squares = cycle(["contiguous", "transposed", "channels_last", "strided"])
    for of_param in of_buffers:
        columns: list[list[Tensor]] = [[], [], [], [], []]
        for seed, (of_grad, of_exp_avg) in enumerate(product(LAYOUTS, of_buffers)):
            chosen = (of_param, of_grad, of_exp_avg, next(of_squares), of_exp_avg)
            for i, (column, layout) in enumerate(zip(columns, chosen, strict=True)):
                column.append(in_layout(random_tensor(shape, torch.float32, seed + i, positive=i > 2), layout))
        check_update(way, *columns[:2], make_state(*columns[2:]))


@kernels
@PROPERTY
@given(
    donate=st.booleans(),
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


@every_way
def test_gradients_of_torch_func(way: str) -> None:
    param = random_tensor((5, 7), torch.float32, 0)
    grad = torch.func.grad(lambda w: w.sum())(param)
    assert grad.stride() == (0, 0)
    check_update(way, param, grad, adam_init(param, HPARAMS))

    weight = random_tensor((4, 3, 3, 3), torch.float32, 0).to(memory_format=torch.channels_last)
    images = random_tensor((2, 3, 8, 8), torch.float32, 1)
    grad = torch.func.grad(lambda w: torch.nn.functional.conv2d(images, w).square().mean())(weight)
    state = adam_init(weight, HPARAMS)
    assert state.exp_avg.is_contiguous(memory_format=torch.channels_last)
    for layout in (torch.contiguous_format, torch.channels_last):
        check_update(way, weight.clone(), grad.contiguous(memory_format=layout), clone(state))


def conjugate(x: Tensor) -> Tensor:
    """`x` with the conjugate bit: its memory holds the conjugates."""
    return x.conj().resolve_conj().conj()


def imaginary(x: Tensor) -> Tensor:
    """`x` as the imaginary part of a conjugate: a strided view with the negative bit."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@every_way
@pytest.mark.parametrize(
    ("dtype", "of"),
    [
        (torch.complex64, conjugate),
        (torch.complex64, negative),
        (torch.float32, negative),
        (torch.float32, imaginary),
    ],
)
def test_conjugate_and_negative_bits_give_the_plain_update(
    way: str, dtype: torch.dtype, of: Callable[[Tensor], Tensor]
) -> None:
    for lazy in ((0,), (1,), (0, 1, 2)):
        values = [random_tensor((3, 5), dtype, seed, positive=seed > 2) for seed in range(5)]
        given = [of(x) if i in lazy else x.clone() for i, x in enumerate(values)]
        assert_equal(given, values)
        check_update(way, *given[:2], make_state(*given[2:]))


@every_way
@pytest.mark.parametrize("of", [negative, imaginary])
@pytest.mark.parametrize(
    ("of_param", "of_other"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)
def test_negative_bits_count_between_dtypes(
    way: str, of: Callable[[Tensor], Tensor], of_param: torch.dtype, of_other: torch.dtype
) -> None:
    dtypes = (of_param, *[of_other] * 3)
    for shape in ((), (3,), (64,)):
        values = [random_tensor(shape, dtype, i, positive=i > 1) for i, dtype in enumerate(dtypes)]
        # The imaginary part of a conjugate is a view; with float16 it would be one of complex32.
        given = [of(x) if of is negative or x.dtype is torch.float32 else x.clone() for x in values]
        assert any(x.is_neg() for x in given)
        check_update(way, *given[:2], make_state(*given[2:]), AdamHparams(lr=0.1))


@every_way
@pytest.mark.parametrize(
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
def test_gradients_of_another_dtype_are_cast(way: str, of_param: torch.dtype, of_grad: torch.dtype) -> None:
    params = [random_tensor((3, 5), of_param, 0), random_tensor((), of_param, 1)]
    grads = [random_tensor((3, 5), of_grad, 2), random_tensor((), of_grad, 3)]
    state = adam_init(params, HPARAMS)
    expected = WAYS[way](clone(params), [g.to(of_param) for g in grads], clone(state), HPARAMS)
    assert_equal(WAYS[way](params, grads, state, HPARAMS), expected)
    assert [g.dtype for g in grads] == [of_grad] * 2


@kernels
def test_gradients_are_cast_before_they_are_unscaled(kernel: str) -> None:
    # In float16, 1e-6 / 1e3 is 0.
    param, grad = torch.zeros(2), torch.tensor([1e-6, 6e4], dtype=torch.float16)
    state = adam_init(param, HPARAMS)
    _, new = adam_update(param, grad, state, AdamHparams(amsgrad=True), kernel=kernel, grad_scale=1e3)
    assert_close(new.exp_avg, grad.float() / 1e3 * 0.1)


def test_complex_gradients_of_real_parameters_are_an_error() -> None:
    param, grad = torch.zeros(3), torch.zeros(3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"grads is of torch\.complex64, but params is of torch\.float32"):
        adam_update(param, grad, adam_init(param, HPARAMS), HPARAMS)


@kernels
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
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
def test_moments_of_another_dtype_are_computed_in_the_wider(
    kernel: str, donate: bool, of_param: torch.dtype, of_moments: torch.dtype
) -> None:
    # One gradient of each of the two dtypes, and an empty one.
    leaves = [((3, 5), of_param), ((), of_param), ((3, 5), of_moments), ((), of_moments), ((0,), of_param)]
    params = [random_tensor(shape, of_param, i) for i, (shape, _) in enumerate(leaves)]
    grads = [random_tensor(shape, of_grad, 5 + i) for i, (shape, of_grad) in enumerate(leaves)]
    state = adam_init(params, HPARAMS)
    moments = optree.tree_map(lambda x: random_tensor(x.shape, of_moments, 4, positive=True), tuple(state[1:4]))
    state = AdamState(state.step, *moments)

    def widened(tree: Any) -> Any:
        return optree.tree_map(lambda x: x.to(torch.promote_types(of_param, of_moments)), tree)

    wide = AdamState(state.step.clone(), *widened(moments))
    expected_params, expected = adam_update(widened(params), widened(grads), wide, HPARAMS, kernel=kernel)
    params, state = adam_update(params, grads, state, HPARAMS, kernel=kernel, donate=donate)
    assert_equal(params, [p.to(of_param) for p in expected_params])
    assert_equal(tuple(state[1:4]), optree.tree_map(lambda x: x.to(of_moments), tuple(expected[1:4])))
    assert state.step.item() == 1


LAZY, FOREIGN = "has a lazy conjugation or negation", "is not laid out like its parameter"
UNREAD = "is chosen by found_inf, whose value is not read"
NARROW = "is of torch.float32 and computed in torch.float64"
COPIED: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "as it is": ("fused", {}, {}),
    "any layout": ("single", {"params": transposed, "grads": strided}, {}),
    "narrow leaf": (
        "single",
        {"exp_avg": Tensor.double, "exp_avg_sq": Tensor.double},
        {"params": NARROW, "grads": NARROW},
    ),
    "wide gradient": (
        "fused",
        {"grads": Tensor.double},
        {"grads": "is of torch.float64 and computed in torch.float32"},
    ),
    "conjugation": ("single", {"dtype": torch.complex64, "params": conjugate}, {"params": LAZY}),
    "negation": ("foreach", {"grads": negative}, {"grads": LAZY}),
    "gaps": ("fused", {"params": strided}, {"params": "is not dense"}),
    "other layout": (
        "fused",
        {"grads": transposed, "exp_avg": transposed},
        {"grads": FOREIGN, "state.exp_avg": FOREIGN},
    ),
    "scaled": ("fused", {"grad_scale": 2.0}, {"grads": "is divided by grad_scale"}),
    "guarded by fused": ("fused", {"found_inf": 0.0}, {}),
    "guarded": (
        "foreach",
        {"found_inf": 0.0},
        {"params": UNREAD, "state.exp_avg": UNREAD, "state.exp_avg_sq": UNREAD},
    ),
}


@pytest.mark.parametrize(("kernel", "given", "copied"), COPIED.values(), ids=COPIED)
def test_what_a_kernel_cannot_take_as_it_is_is_copied_for_a_reason(
    kernel: str, given: dict[str, Any], copied: dict[str, str]
) -> None:
    # The value of a fake found_inf cannot be read.
    with FakeTensorMode():
        names = ("params", "grads", "exp_avg", "exp_avg_sq")
        leaves = [given.get(name, Tensor.clone)(torch.ones(6, 4, dtype=given.get("dtype"))) for name in names]
        options = {name: torch.tensor(given[name]) for name in ("grad_scale", "found_inf") if name in given}
        state = make_state(*leaves[2:])
        memory = explain(*leaves[:2], state, AdamHparams(), kernel=kernel, donate=True, **options).new_memory
    assert {path: x.why for x in memory for path in x.tensors} == copied


def test_a_group_is_of_one_device_and_dtype_and_one_set_of_scalars() -> None:
    def groups(params: list[Tensor], lr: Any) -> list[tuple[torch.dtype, list[str]]]:
        hparams = AdamHparams(lr=lr)
        state = adam_init(params, hparams, per_leaf_step=True)
        found = explain(params, [*map(torch.ones_like, params)], state, hparams).groups
        return [(group.dtype, [path.removeprefix("params") for path in group.leaves]) for group in found]

    here, there, wide = torch.ones(2), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.float64)
    assert groups([], 0.1) == []
    assert groups([here, here], 0.1) == [(torch.float32, ["[0]", "[1]"])]
    assert groups([here, there, here], 0.1) == [(torch.float32, ["[0]", "[2]"]), (torch.float32, ["[1]"])]
    assert groups([here, wide, here], 0.1) == [(torch.float32, ["[0]", "[2]"]), (torch.float64, ["[1]"])]
    assert groups([here, here, here], [0.1, 0.2, 0.1]) == [(torch.float32, ["[0]", "[2]"]), (torch.float32, ["[1]"])]
