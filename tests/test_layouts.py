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

from functional_adam import AdamHparams, AdamState, adam_update, explain
from tests.builders import negative, strided, tensors_of, transposed
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


def make_state(*moments: Any, step: float = 5.0) -> AdamState:
    return AdamState(torch.tensor(step, dtype=torch.float32), *moments)


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
    leaves: list[Tensor] = []
    for i, layout in enumerate(drawn if options["amsgrad"] else drawn[:4]):
        is_written_over = donate and i != 1 and layout in OVERLAPPING_LAYOUTS
        leaf = random_tensor(shape, dtype, seed + i, positive=i > 2)
        leaves.append(in_layout(leaf, "gaps" if is_written_over else layout))
    expected = numpy_adam(*leaves, step=step, **options)
    strides = [kept_strides(x, donate=donate) for x in (leaves[0], *leaves[2:])]

    hparams, state = AdamHparams(**options), make_state(*leaves[2:], step=step)
    new_param, new = adam_update(*leaves[:2], state, hparams, kernel=kernel, donate=donate)

    got = [new_param, *tensors_of(new[1:4])]
    assert_close(got, [x for x in expected[:4] if x is not None])
    assert new.step.item() == expected.step
    assert [x.stride() for x in got] == strides


def conjugate(x: Tensor) -> Tensor:
    """`x` with the conjugate bit: its memory holds the conjugates."""
    return x.conj().resolve_conj().conj()


def imaginary(x: Tensor) -> Tensor:
    """`x` as the imaginary part of a conjugate: a strided view with the negative bit."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


LAZY_VIEWS: list[tuple[Callable[[Tensor], Tensor], torch.dtype, torch.dtype]] = [
    *((of, torch.complex64, torch.complex64) for of in (conjugate, negative)),
    *((of, torch.float32, torch.float32) for of in (negative, imaginary)),
    *((of, half, torch.float32) for of in (negative, imaginary) for half in (torch.float16, torch.bfloat16)),
    *((of, torch.float32, torch.float16) for of in (negative, imaginary)),
]


@every_way
@pytest.mark.parametrize(("of", "of_param", "of_other"), LAZY_VIEWS)
def test_conjugate_and_negative_bits_give_the_plain_update(
    way: str, of: Callable[[Tensor], Tensor], of_param: torch.dtype, of_other: torch.dtype
) -> None:
    for shape, lazy in product(((), (3,), (64,), (3, 5)), ((0,), (1,), (0, 1, 2, 3))):
        values = [random_tensor(shape, of_other if i else of_param, i, positive=i > 2) for i in range(5)]
        # The imaginary part of a conjugate is a view; with a half type it would be one of complex32.
        can_be = [i in lazy and (of is not imaginary or x.dtype is torch.float32) for i, x in enumerate(values)]
        given = [of(x) if can else x.clone() for x, can in zip(values, can_be, strict=True)]
        assert_equal(given, values)
        check_update(way, *given[:2], make_state(*given[2:]))


@kernels
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize(
    ("of_param", "of_moments"),
    [
        *((half, torch.float32) for half in (torch.bfloat16, torch.float16)),
        *((torch.float32, other) for other in (torch.bfloat16, torch.float16, torch.float64)),
        (torch.complex64, torch.complex128),
    ],
    ids=str,
)
def test_moments_of_another_dtype_are_computed_in_the_wider_and_rounded_once(
    kernel: str, donate: bool, of_param: torch.dtype, of_moments: torch.dtype
) -> None:
    # One gradient of each of the two dtypes, and an empty one.
    leaves = [((3, 5), of_param), ((), of_param), ((3, 5), of_moments), ((), of_moments), ((0,), of_param)]
    params = [random_tensor(shape, of_param, i) for i, (shape, _) in enumerate(leaves)]
    grads = [random_tensor(shape, of_grad, 5 + i) for i, (shape, of_grad) in enumerate(leaves)]
    moments = [[random_tensor(shape, of_moments, 4, positive=True) for shape, _ in leaves] for _ in range(3)]

    def widened(tree: Any) -> Any:
        return optree.tree_map(lambda x: x.to(torch.promote_types(of_param, of_moments)), tree)

    wide = adam_update(widened(params), widened(grads), make_state(*widened(moments)), HPARAMS, kernel=kernel)
    new, state = adam_update(params, grads, make_state(*moments), HPARAMS, kernel=kernel, donate=donate)
    assert_equal(new, [p.to(of_param) for p in wide[0]])
    assert_equal([*state[1:4]], optree.tree_map(lambda x: x.to(of_moments), [*wide[1][1:4]]))
    assert state.step.item() == 6


LAZY, FOREIGN = "has a lazy conjugation or negation", "is not laid out like its parameter"
UNREAD = "is chosen by found_inf, whose value is not read"
NARROW, WIDE = "is of torch.float32 and computed in torch.float64", "is of torch.float64 and computed in torch.float32"
WIDE_MOMENTS: dict[str, Any] = {"exp_avg": Tensor.double, "exp_avg_sq": Tensor.double}
COPIED: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("fused", {}, {}),
    ("single", {"params": transposed, "grads": strided}, {}),
    ("single", WIDE_MOMENTS, {"params": NARROW, "grads": NARROW}),
    ("fused", {"grads": Tensor.double}, {"grads": WIDE}),
    ("single", {"dtype": torch.complex64, "params": conjugate}, {"params": LAZY}),
    ("foreach", {"grads": negative}, {"grads": LAZY}),
    ("fused", {"params": strided}, {"params": "is not dense"}),
    ("fused", {"grads": transposed, "exp_avg": transposed}, {"grads": FOREIGN, "state.exp_avg": FOREIGN}),
    ("fused", {"grad_scale": 2.0}, {"grads": "is divided by grad_scale"}),
    ("fused", {"found_inf": 0.0}, {}),
    ("foreach", {"found_inf": 0.0}, dict.fromkeys(("params", "state.exp_avg", "state.exp_avg_sq"), UNREAD)),
]


@pytest.mark.parametrize(("kernel", "given", "copied"), COPIED)
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
