"""Derivatives and batching by hand around every kernel: right to second order, finite, and no more than is needed."""

import math
import weakref
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import functional_adam.autodiff.batching
import functional_adam.autodiff.function
import functional_adam.autodiff.mapping
import functional_adam.autodiff.packing
import functional_adam.call.update
from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from functional_adam.adam.equations import Scalars, update_leaf
from tests.tolerances import assert_close, assert_equal, assert_rounded_once

DOUBLE = torch.float64
KERNELS = ("single", "foreach", "fused")
VARIANTS: dict[str, dict[str, bool]] = {
    "coupled": {},
    "decoupled": {"decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "all_flags": {"amsgrad": True, "maximize": True, "decoupled_weight_decay": True},
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


class Point(NamedTuple):
    """Everything that an update can be differentiated by, but for step: lists of leaves, and 0-dim numbers."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    max_exp_avg_sq: list[Tensor]
    lr: Any
    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any


def make_point(*shapes: tuple[int, ...], dtype: torch.dtype = DOUBLE, amsgrad: bool = True, seed: int = 0) -> Point:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]

    def positive() -> list[Tensor]:
        real = dtype.to_real()
        parts = [0.5 + torch.rand(2, *shape, generator=generator, dtype=real) for shape in shapes]
        return [torch.complex(*x) if dtype.is_complex else x[0] for x in parts]

    leaves = normal(), normal(), normal(), positive(), positive() if amsgrad else []
    return Point(*leaves, *(torch.tensor(x, dtype=DOUBLE) for x in (0.1, 0.8, 0.9, 0.01, 0.2)))


def make_hparams(at: Point, **flags: bool) -> AdamHparams:
    return AdamHparams(lr=at.lr, betas=(at.beta1, at.beta2), eps=at.eps, weight_decay=at.weight_decay, **flags)


def updated(at: Point, kernel: str, *, per_leaf_step: bool = False, step: float = 3.0, **flags: bool) -> list[Any]:
    """New parameters, moments and maxima, by the package."""
    steps: Any = torch.tensor(step)
    if per_leaf_step:
        steps = [torch.tensor(step + index) for index in range(len(at.params))]
    state = AdamState(steps, at.exp_avg, at.exp_avg_sq, at.max_exp_avg_sq if flags.get("amsgrad") else ())
    params, state = adam_update(at.params, at.grads, state, make_hparams(at, **flags), kernel=kernel)
    return optree.tree_leaves((params, state[1:]))


def by_equations(at: Point, *, per_leaf_step: bool = False, step: float = 3.0, **flags: bool) -> list[Tensor]:
    """The same, leaf by leaf, as torch differentiates the equations."""
    on = [flags.get(name, False) for name in ("amsgrad", "maximize", "decoupled_weight_decay")]
    scalars = Scalars(at.lr, at.beta1, at.beta2, at.eps, at.weight_decay, *on)
    columns: list[list[Tensor]] = [[], [], [], []]
    for index, (p, g, m, v) in enumerate(zip(at.params, at.grads, at.exp_avg, at.exp_avg_sq, strict=True)):
        t = torch.tensor(step + 1 + index * per_leaf_step)
        u = at.max_exp_avg_sq[index] if flags.get("amsgrad") else None
        for column, value in zip(columns, update_leaf((p, m, v, u), g, t, scalars), strict=True):
            if value is not None:
                column.append(value)
    return [value for column in columns for value in column]


def weighted(outputs: Any) -> Tensor:
    """One number that depends on every element of every output, each in its own way."""
    total = torch.zeros((), dtype=DOUBLE)
    for index, output in enumerate(outputs):
        weights = torch.linspace(0.5, 1.5, output.numel(), dtype=DOUBLE).view(output.shape)
        total = total + ((index + 1) * weights * output.double()).cos().sum()
    return total


def fixed(tree: Any, seed: int = 1) -> Any:
    """Random tensors like those of `tree`."""
    generator = torch.Generator().manual_seed(seed)
    return torch_pytree.tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), tree)


# First and second derivatives agree with finite differences.


def of_leaves(at: Point, function: Callable[[Point], list[Tensor]]) -> tuple[Callable[..., Any], list[Tensor]]:
    """`function` of the tensors of `at`, and these, as gradcheck wants them."""
    leaves, treespec = optree.tree_flatten(at)

    def of_flat(*flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(treespec.unflatten(flat)))

    return of_flat, [leaf.requires_grad_() for leaf in leaves]


@each_kernel
@each_variant
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_first_derivatives_agree_with_finite_differences(kernel: str, variant: str, per_leaf_step: bool) -> None:
    flags = VARIANTS[variant]
    at = make_point((2,), (1, 1), amsgrad=flags.get("amsgrad", False))
    function, leaves = of_leaves(at, lambda at: updated(at, kernel, per_leaf_step=per_leaf_step, **flags))
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@each_kernel
@each_variant
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_second_derivatives_agree_with_finite_differences(kernel: str, variant: str, per_leaf_step: bool) -> None:
    flags = VARIANTS[variant]
    at = make_point((1,), (1, 1), amsgrad=flags.get("amsgrad", False))
    function, leaves = of_leaves(at, lambda at: updated(at, kernel, per_leaf_step=per_leaf_step, **flags))
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@each_kernel
@pytest.mark.parametrize("numbers", [0.0, 0.2])
@pytest.mark.parametrize("decoupled", [False, True])
def test_derivatives_of_tensors_alone_agree_with_finite_differences(
    kernel: str, numbers: float, decoupled: bool
) -> None:
    at = make_point((2,), (1, 1), amsgrad=False)
    kept = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.01, "weight_decay": numbers}
    leaves = at._replace(**dict.fromkeys(kept, ()))

    def run(at: Point) -> list[Tensor]:
        return updated(at._replace(**kept), kernel, decoupled_weight_decay=decoupled)

    function, inputs = of_leaves(leaves, run)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@each_kernel
@pytest.mark.parametrize("variant", ["coupled", "all_flags"])
def test_derivatives_of_complex_leaves_agree_with_finite_differences(kernel: str, variant: str) -> None:
    flags = VARIANTS[variant]
    at = make_point((1,), (1, 1), dtype=torch.complex128, amsgrad=flags.get("amsgrad", False))
    function, leaves = of_leaves(at, lambda at: updated(at, kernel, **flags))
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


# Large leaves are cut and small ones joined; neither may be seen.

CUT = 2**17
SIZES = ((5,), (CUT,), (CUT + 1,), (), (0,), (3, CUT // 2), (2 * CUT + 3,), (2, 3))


@each_kernel
@each_variant
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_derivatives_of_large_and_small_leaves_agree_with_autograd(
    kernel: str, variant: str, per_leaf_step: bool
) -> None:
    flags = VARIANTS[variant]
    at = make_point(*SIZES, amsgrad=flags.get("amsgrad", False))
    ours = partial(updated, kernel=kernel, per_leaf_step=per_leaf_step, **flags)
    theirs = partial(by_equations, per_leaf_step=per_leaf_step, **flags)

    (values, pull), (expected, expected_pull) = vjp(ours, at), vjp(theirs, at)
    assert_close(values, expected)
    cotangents = fixed(expected)
    assert_close(pull(cotangents), expected_pull(cotangents))

    directions = fixed(at)
    assert_close(jvp(ours, (at,), (directions,)), jvp(theirs, (at,), (directions,)))


@each_kernel
def test_derivatives_of_large_float32_leaves_are_summed_without_loss(kernel: str) -> None:
    at = make_point(*SIZES, dtype=torch.float32)
    wide = torch_pytree.tree_map(torch.Tensor.double, at)
    cotangents = fixed(by_equations(at, amsgrad=True))
    got = vjp(lambda at: updated(at, kernel, amsgrad=True), at)[1](cotangents)[0]
    expected = vjp(lambda at: by_equations(at, amsgrad=True), wide)[1]([x.double() for x in cotangents])[0]
    assert_close(got, expected, torch.float32)


@each_kernel
def test_second_derivatives_of_large_leaves_agree_with_autograd(kernel: str) -> None:
    at = make_point((CUT + 1,), (3,), (CUT // 2,))
    direction = fixed(at)

    def slope(function: Callable[[Point], list[Tensor]]) -> Callable[[Point], Tensor]:
        return lambda at: jvp(lambda at: weighted(function(at)), (at,), (direction,))[1]

    def pulled(function: Callable[[Point], list[Tensor]]) -> Callable[[Point], Any]:
        return grad(lambda at: weighted(function(at)))

    ours, theirs = partial(updated, kernel=kernel, amsgrad=True), partial(by_equations, amsgrad=True)
    expected = grad(slope(theirs))(at)
    assert_close(grad(slope(ours))(at), expected)
    assert_close(jvp(pulled(ours), (at,), (direction,))[1], expected)


@each_kernel
def test_many_cotangents_at_once_agree_with_one_after_another(kernel: str) -> None:
    at = make_point((CUT + 1,), (3,), (2, 2))
    outputs, pull = vjp(lambda at: updated(at, kernel, amsgrad=True), at)
    rows = [fixed(outputs, seed) for seed in (1, 2, 3)]
    got = vmap(pull)(torch_pytree.tree_map(lambda *xs: torch.stack(xs), *rows))
    assert_close(got, torch_pytree.tree_map(lambda *xs: torch.stack(xs), *map(pull, rows)))


NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")


def without_numbers(at: Point, weight_decay: float = 0.2) -> Point:
    """`at` with numbers that nobody differentiates by."""
    numbers = {name: getattr(at, name).item() for name in NUMBERS}
    return at._replace(**{**numbers, "weight_decay": weight_decay})


@each_kernel
@each_variant
@pytest.mark.parametrize("numbers", ["tensors", "floats", "no_weight_decay"])
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_a_first_derivative_is_the_same_whether_or_not_a_second_may_follow(
    kernel: str, variant: str, numbers: str, per_leaf_step: bool
) -> None:
    flags = {**VARIANTS[variant], "per_leaf_step": per_leaf_step}
    at = make_point((CUT + 1,), (3,), (2, 2), amsgrad=flags.get("amsgrad", False))
    if numbers != "tensors":
        at = without_numbers(at, weight_decay=0.2 if numbers == "floats" else 0.0)
    leaves = [x.requires_grad_() for x in optree.tree_leaves(at) if isinstance(x, Tensor)]
    outputs, expected = updated(at, kernel, **flags), by_equations(at, **flags)
    cotangents = fixed(outputs)
    before = torch_pytree.tree_map(torch.clone, (cotangents, leaves))
    once = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    assert_equal((cotangents, leaves), before)
    again = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    assert not any(x.requires_grad for x in once)
    assert all(x.requires_grad or numbers != "tensors" for x in again)
    assert_close(once, again)
    assert_close(once, torch.autograd.grad(expected, leaves, cotangents))


@each_kernel
@pytest.mark.parametrize("numbers", ["tensors", "floats"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("batch", [partial(torch.autograd.grad, is_grads_batched=True), None], ids=["engine", "vmap"])
def test_cotangents_in_a_batch_are_pulled_back_as_one_after_another(
    kernel: str, numbers: str, create_graph: bool, batch: Callable[..., Any] | None
) -> None:
    at = make_point((CUT + 1,), (3,), (2, 2), amsgrad=False)
    at = at if numbers == "tensors" else without_numbers(at)
    leaves = [x.requires_grad_() for x in optree.tree_leaves(at) if isinstance(x, Tensor)]
    outputs = updated(at, kernel)

    def pull(cotangents: list[Tensor], by: Callable[..., Any] = torch.autograd.grad) -> Any:
        return by(outputs, leaves, cotangents, retain_graph=True, create_graph=create_graph)

    rows = [fixed(outputs, seed) for seed in (1, 2, 3)]
    expected = torch_pytree.tree_map(lambda *xs: torch.stack(xs), *map(pull, rows))
    stacked = torch_pytree.tree_map(lambda *xs: torch.stack(xs), *rows)
    assert_close(pull(stacked, batch) if batch else vmap(pull)(stacked), expected)


@each_kernel
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("step", [0.0, 1000.0])
def test_derivatives_of_float32_leaves_hold_over_the_whole_range(kernel: str, maximize: bool, step: float) -> None:
    sizes = torch.tensor([0.0, 1e-30, 1e-20, 1e-12, 1e-8, 1e-4, 1.0, 1e4, 1e12, 1e15])
    g, m = sizes.clone(), -0.5 * sizes
    at = Point([torch.ones(10)], [g], [m], [m * m], [], 0.1, 0.9, 0.99, 1e-8, 0.0)
    at_wide = at._replace(**{name: [getattr(at, name)[0].double()] for name in Point._fields[:4]})
    # float64 holds every square, so that its derivatives are those to expect.
    results = []
    for point, function in ((at, partial(updated, kernel=kernel)), (at_wide, by_equations)):
        leaves = [column[0].requires_grad_() for column in point[:4]]
        outputs = function(point, maximize=maximize, step=step)
        results.append(torch.autograd.grad([x.sum() for x in outputs], leaves))
    for name, got, expected in zip(Point._fields, *results, strict=False):
        for size, x, y in zip(sizes.tolist(), got.tolist(), expected.tolist(), strict=True):
            # Below 1e-20 the square is nothing in float32, and the derivative of its root is taken as 0.
            if size >= 1e-18:
                assert x == pytest.approx(y, rel=1e-4, abs=1e-30), (name, size)
            assert math.isfinite(x), (name, size)


class Arithmetic(TorchDispatchMode):
    """The operations that run under it and give a tensor that is no number, with how many elements it has."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[Any, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim():
            self.ran.append((func.overloadpacket, result.numel()))
        return result


def operations(*shapes: tuple[int, ...], numbers: str, mode: str) -> list[tuple[Any, int]]:
    """The operations in one derivative of an update of leaves of `shapes`."""
    at = make_point(*shapes, amsgrad=False)
    at = at if numbers == "tensors" else without_numbers(at)
    counted = Arithmetic()
    if mode != "forward":
        leaves = [x.requires_grad_() for x in optree.tree_leaves(at) if isinstance(x, Tensor)]
        outputs = updated(at, "fused")
        cotangents = fixed(outputs)
        with counted:
            torch.autograd.grad(outputs, leaves, cotangents, create_graph=mode == "reverse_twice")
        return counted.ran
    with forward_ad.dual_level():
        duals = torch_pytree.tree_map_only(Tensor, lambda x: forward_ad.make_dual(x, torch.ones_like(x)), at)
        with counted:
            updated(duals, "fused")
    return counted.ran


def products(*shapes: tuple[int, ...], numbers: str, mode: str) -> list[int]:
    """The sizes of all products in one derivative of an update of leaves of `shapes`."""
    multiply = torch.ops.aten.mul, torch.ops.aten.mul_
    return [size for func, size in operations(*shapes, numbers=numbers, mode=mode) if func in multiply]


@pytest.mark.parametrize("numbers", ["tensors", "floats"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_small_leaves_are_joined_and_large_ones_cut(numbers: str, mode: str) -> None:
    few, many = (products(*[(2, 3)] * count, numbers=numbers, mode=mode) for count in (2, 20))
    assert [10 * size for size in few] == many
    assert products((CUT // 2,), (CUT // 2,), numbers=numbers, mode=mode) == [CUT] * len(few)
    three = products((CUT // 2,), (CUT // 2,), (CUT // 2,), numbers=numbers, mode=mode)
    assert three == [CUT] * len(few) + [CUT // 2] * len(few)
    too_many = products((CUT // 2,), (CUT // 2 + 1,), numbers=numbers, mode=mode)
    assert too_many == [CUT // 2] * len(few) + [CUT // 2 + 1] * len(few)
    assert products((2 * CUT + 1,), numbers=numbers, mode=mode) == [CUT] * 2 * len(few) + [1] * len(few)


@pytest.mark.parametrize("numbers", ["tensors", "floats"])
def test_the_parts_of_a_leaf_that_is_cut_evenly_are_each_in_their_place(numbers: str) -> None:
    at = make_point((3, CUT), amsgrad=False)
    at = at if numbers == "tensors" else without_numbers(at)
    leaves = [x.requires_grad_() for x in optree.tree_leaves(at) if isinstance(x, Tensor)]
    outputs, expected = updated(at, "fused"), by_equations(at)
    cotangents = fixed(outputs)
    assert_close(torch.autograd.grad(outputs, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents))


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shapes", [((3,),), ((3,), (2, 2))], ids=["alone", "joined"])
def test_derivatives_have_the_dtypes_of_what_they_belong_to(
    kernel: str, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]
) -> None:
    at = without_numbers(make_point(*shapes, dtype=torch.promote_types(dtype, torch.float32), amsgrad=False))
    tensors = [[x.to(dtype) for x in column] for column in at[:4]]

    def run(*columns: list[Tensor]) -> list[Tensor]:
        return updated(at._replace(**dict(zip(Point._fields, columns, strict=False))), kernel)

    outputs, pull = vjp(run, *tensors)
    assert {x.dtype for x in optree.tree_leaves(pull(outputs))} == {dtype}
    assert {x.dtype for x in jvp(run, tuple(tensors), tuple(tensors))[1]} == {dtype}


@each_kernel
def test_tangents_have_the_dtypes_of_leaves_that_differ_in_theirs(kernel: str) -> None:
    dtypes = torch.bfloat16, torch.float16, torch.float16, torch.float16
    at = without_numbers(make_point((3,), dtype=torch.float32, amsgrad=False))
    columns = [[column[0].to(dtype)] for column, dtype in zip(at[:4], dtypes, strict=True)]

    def run(*columns: list[Tensor]) -> list[Tensor]:
        return updated(at._replace(**dict(zip(Point._fields, columns, strict=False))), kernel)

    outputs, tangents = jvp(run, tuple(columns), tuple(columns))
    assert [x.dtype for x in tangents] == [x.dtype for x in outputs] == [*dtypes[:3]]


@each_kernel
@pytest.mark.parametrize("variant", ["coupled", "all_flags"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", [((40,),), ((3,), (6, 6))], ids=["alone", "joined"])
@pytest.mark.parametrize("numbers", ["tensors", "floats"])
def test_derivatives_of_half_leaves_are_rounded_once(
    kernel: str, variant: str, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], numbers: str
) -> None:
    flags = VARIANTS[variant]
    at = make_point(*shapes, dtype=torch.float32, amsgrad=flags.get("amsgrad", False))
    at = at if numbers == "tensors" else without_numbers(at)
    half, rest = [[x.to(dtype) for x in column] for column in at[:5]], at[5:]
    wide = [[x.double() for x in column] for column in half]
    cotangents = fixed(updated(Point(*half, *rest), kernel, **flags))

    leaves = [x.requires_grad_() for x in optree.tree_leaves(half)]
    got = torch.autograd.grad(updated(Point(*half, *rest), kernel, **flags), leaves, cotangents)
    _, pull = vjp(lambda *columns: by_equations(Point(*columns, *rest), **flags), *wide)
    assert_rounded_once(got, tuple(optree.tree_leaves(pull([x.double() for x in cotangents]))))


@pytest.mark.parametrize("numbers", ["tensors", "floats"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_leaf_alone_is_neither_copied_nor_cut(numbers: str, mode: str) -> None:
    ran = {func for func, _ in operations((CUT,), numbers=numbers, mode=mode)}
    assert ran
    assert not ran & {torch.ops.aten.cat, torch.ops.aten.slice, torch.ops.aten.clone, torch.ops.aten._to_copy}


def test_a_derivative_that_none_may_follow_takes_half_the_products() -> None:
    last, full = (products((2, 3), numbers="floats", mode=mode) for mode in ("reverse", "reverse_twice"))
    assert 0 < 2 * len(last) <= len(full)


def test_what_a_large_leaf_is_cut_into_is_written_to_its_place_at_once() -> None:
    ran = {func for func, _ in operations((2 * CUT + 1,), numbers="floats", mode="reverse")}
    assert torch.ops.aten.slice in ran
    assert torch.ops.aten.cat not in ran


@each_kernel
@pytest.mark.parametrize("shapes", [((5,),), ((CUT + 1,),), ((3,), (2, 2))], ids=["alone", "cut", "joined"])
def test_without_a_weight_decay_the_cotangent_of_a_parameter_is_handed_on(
    kernel: str, shapes: tuple[tuple[int, ...], ...]
) -> None:
    at = without_numbers(make_point(*shapes, amsgrad=False), weight_decay=0.0)
    params = [p.requires_grad_() for p in at.params]
    new = updated(at, kernel)[: len(params)]
    cotangents = fixed(new)
    got = torch.autograd.grad(new, params, cotangents)
    assert_equal(got, tuple(cotangents))
    assert [x.data_ptr() for x in got] == [x.data_ptr() for x in cotangents]


@each_kernel
@pytest.mark.parametrize("per_leaf_step", [False, True])
@pytest.mark.parametrize("shapes", [((3,), (2, 2)), ((CUT + 1,), (3,))], ids=["joined", "cut"])
def test_steps_alone_are_differentiated_twice(
    kernel: str, per_leaf_step: bool, shapes: tuple[tuple[int, ...], ...]
) -> None:
    at = without_numbers(make_point(*shapes, amsgrad=False))
    scalars = Scalars(*at[5:], amsgrad=False, maximize=False, decoupled_weight_decay=False)
    steps = [torch.tensor(3.0 + i, requires_grad=True) for i in range(1 + per_leaf_step)]

    def ours() -> list[Tensor]:
        state = AdamState(steps if per_leaf_step else steps[0], at.exp_avg, at.exp_avg_sq)
        return adam_update(at.params, at.grads, state, make_hparams(at), kernel=kernel)[0]

    def theirs() -> list[Tensor]:
        rows = zip(at.params, at.exp_avg, at.exp_avg_sq, [None] * 2, strict=True)
        pairs = zip(rows, at.grads, steps * (2 - per_leaf_step), strict=True)
        return [update_leaf(row, g, step + 1, scalars)[0] for row, g, step in pairs]

    results = []
    for function in (ours, theirs):
        first = torch.autograd.grad(weighted(function()), steps, create_graph=True)
        results.append((first, torch.autograd.grad(sum(first), steps)))
    assert all(x != 0 for x in optree.tree_leaves(results[0]))
    assert_close(*results)


@each_kernel
@pytest.mark.parametrize("name", ["lr", "weight_decay", "exp_avg", "grads"])
def test_what_was_written_to_before_the_backward_pass_is_noticed(kernel: str, name: str) -> None:
    at = make_point((3,), amsgrad=False)
    leaves = [x.requires_grad_() for x in optree.tree_leaves(at)]
    outputs = updated(at, kernel)
    with torch.no_grad():
        optree.tree_leaves(getattr(at, name))[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, leaves, fixed(outputs))


@each_kernel
def test_a_number_is_let_go_with_the_graph(kernel: str) -> None:
    at = make_point((3,), amsgrad=False)
    lr = at.lr.clone()
    number = weakref.ref(lr)
    leaf = at.params[0].requires_grad_()
    outputs = updated(at._replace(lr=lr), kernel)
    del lr
    assert number() is not None
    torch.autograd.grad(outputs[0].sum(), leaf)
    assert number() is None


@pytest.mark.parametrize("kernel", ["single", "foreach"])
def test_derivatives_of_leaves_without_values_read_no_number(kernel: str) -> None:
    param = torch.ones(3, device="meta", requires_grad=True)
    hparams = AdamHparams(lr=torch.tensor(0.1, device="meta", requires_grad=True))
    new, _ = adam_update(param, param.detach(), adam_init(param, hparams), hparams, kernel=kernel)
    got = torch.autograd.grad(new, (param, hparams.lr), torch.empty_like(new))
    assert [(x.device.type, x.shape) for x in got] == [("meta", (3,)), ("meta", ())]


# Training runs as differentiable functions.

HYPER = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 0.01, "weight_decay": 0.1}


def regression(seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Parameters of a small network, inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator, dtype=DOUBLE)
    params = {"0.weight": randn(4, 2), "0.bias": randn(4), "2.weight": randn(1, 4), "2.bias": randn(1)}
    return params, randn(8, 2), randn(8, 1)


def network_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    hidden = torch.tanh(x @ params["0.weight"].T + params["0.bias"])
    return ((hidden @ params["2.weight"].T + params["2.bias"] - y) ** 2).mean()


def gradients(loss: Callable[..., Tensor], params: dict[str, Tensor], *, by: str) -> dict[str, Tensor]:
    """Differentiable gradients of `loss`, by torch.func or by torch.autograd."""
    if by == "func":
        return grad(loss)(params)
    tracked = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
    values = torch.autograd.grad(loss(tracked), [*tracked.values()], create_graph=True)
    return dict(zip(tracked, values, strict=True))


def unrolled(
    params: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    numbers: dict[str, Any],
    *,
    kernel: str,
    steps: int,
    by: str = "func",
    **flags: bool,
) -> dict[str, Tensor]:
    """Parameters after training for `steps`."""
    rest = {name: numbers[name] for name in ("lr", "eps", "weight_decay")}
    hparams = AdamHparams(betas=(numbers["beta1"], numbers["beta2"]), **rest, **flags)
    state = adam_init(params, hparams)
    for _ in range(steps):
        grads = gradients(lambda p: network_loss(p, x, y), params, by=by)
        params, state = adam_update(params, grads, state, hparams, kernel=kernel)
    return params


@each_kernel
@pytest.mark.parametrize("variant", ["coupled", "decoupled", "amsgrad"])
@pytest.mark.parametrize("by", ["func", "autograd"])
def test_hypergradients_through_a_run_agree_with_finite_differences(kernel: str, variant: str, by: str) -> None:
    params, x, y = regression()
    flags = VARIANTS[variant]

    def final_loss(numbers: dict[str, Any], by: str = by) -> Tensor:
        trained = unrolled(params, x, y, numbers, kernel=kernel, steps=15, by=by, **flags)
        return network_loss(trained, x, y)

    at = {name: torch.tensor(value, dtype=DOUBLE) for name, value in HYPER.items()}
    if by == "func":
        got = grad(final_loss)(at)
    else:
        leaves = {name: value.requires_grad_() for name, value in at.items()}
        values = torch.autograd.grad(final_loss(leaves), [*leaves.values()])
        got = dict(zip(leaves, values, strict=True))
    for name, value in HYPER.items():
        width = 1e-6
        high, low = (final_loss({**HYPER, name: value + sign * width}, by="func").detach() for sign in (1, -1))
        expected = (high - low) / (2 * width)
        assert abs(expected) > 1e-4, name
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def handwritten_inner_loop(params: dict[str, Tensor], x: Tensor, y: Tensor, lr: Any, steps: int) -> dict[str, Tensor]:
    """The textbook's Adam in plain differentiable operations."""
    m = {name: torch.zeros_like(p) for name, p in params.items()}
    v = {name: torch.zeros_like(p) for name, p in params.items()}
    for t in range(1, steps + 1):
        grads = torch.autograd.grad(network_loss(params, x, y), [*params.values()], create_graph=True)
        for name, g in zip([*params], grads, strict=True):
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            direction = (m[name] / (1 - 0.8**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 0.01)
            params = {**params, name: params[name] - lr * direction}
    return params


@each_kernel
@pytest.mark.parametrize("by", ["func", "autograd", "vmap"])
def test_a_second_order_meta_gradient_agrees_with_a_handwritten_adam(kernel: str, by: str) -> None:
    start, x, y = regression()
    tasks = [(x, y), (x.flip(0) * 0.7, y + 1.0), (x + 0.3, -y)]
    numbers = {**HYPER, "weight_decay": 0.0}
    learn = partial(unrolled, kernel=kernel, steps=6, by="autograd" if by == "autograd" else "func")

    def meta_loss(start: dict[str, Tensor], lr: Tensor) -> Tensor:
        def of_task(x: Tensor, y: Tensor) -> Tensor:
            return network_loss(learn(start, x, y, {**numbers, "lr": lr}), x, y)

        if by == "vmap":
            return vmap(of_task)(*map(torch.stack, zip(*tasks, strict=True))).sum()
        return torch.stack([of_task(*task) for task in tasks]).sum()

    lr = torch.tensor(HYPER["lr"], dtype=DOUBLE, requires_grad=True)
    tracked = {name: p.clone().requires_grad_() for name, p in start.items()}
    losses = [network_loss(handwritten_inner_loop(tracked, *task, lr, 6), *task) for task in tasks]
    expected = torch.autograd.grad(torch.stack(losses).sum(), [*tracked.values(), lr])
    if by == "autograd":
        got = torch.autograd.grad(meta_loss(tracked, lr), [*tracked.values(), lr])
    else:
        by_name, of_lr = grad(meta_loss, argnums=(0, 1))(start, lr.detach())
        got = (*by_name.values(), of_lr)
    assert max(float(x.abs().max()) for x in expected) > 1e-3
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# Where the equations have no derivative, or two.


@each_kernel
@each_variant
@pytest.mark.parametrize("gradient", [[0.0, 0.0, 0.0], [0.0, 1e-3, -1.0], [1e-200, -1e-200, 0.0]])
@pytest.mark.parametrize("lr", [0.1, 0.0])
@pytest.mark.parametrize("numbers", ["tensors", "floats"])
def test_a_first_step_has_finite_derivatives_and_the_value_of_its_kernel(
    kernel: str, variant: str, gradient: list[float], lr: float, numbers: str
) -> None:
    flags = VARIANTS[variant]
    zeros = [torch.zeros(3, dtype=DOUBLE)]
    values: Any = (lr, 0.9, 0.999, 1e-8, 0.0)
    values = [torch.tensor(x, dtype=DOUBLE) for x in values] if numbers == "tensors" else values
    maxima = zeros if flags.get("amsgrad") else []
    p, g = (torch.tensor(x, dtype=DOUBLE) for x in ([1.0, -2.0, 3.0], gradient))
    leaves, treespec = optree.tree_flatten(Point([p], [g], zeros, zeros, maxima, *values))
    leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]

    def run(*leaves: Any) -> list[Tensor]:
        return updated(treespec.unflatten(leaves), kernel, step=0.0, **flags)

    expected = run(*leaves)
    tensors = [x.requires_grad_() for x in leaves if isinstance(x, Tensor)]
    outputs = run(*leaves)
    assert_equal(outputs, expected)
    once = torch.autograd.grad(outputs, tensors, fixed(outputs), retain_graph=True)
    first = torch.autograd.grad(outputs, tensors, fixed(outputs), create_graph=True)
    assert all(x.isfinite().all() for x in first)
    assert_close(once, first)
    second = torch.autograd.grad(
        [x for x in first if x.requires_grad], tensors, fixed([x for x in first if x.requires_grad]), allow_unused=True
    )
    assert all(x is None or x.isfinite().all() for x in second)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) if isinstance(x, Tensor) else x for x in leaves]
        assert all(forward_ad.unpack_dual(x).tangent.isfinite().all() for x in run(*duals))


@each_kernel
def test_amsgrad_ties_share_the_derivative_evenly(kernel: str) -> None:
    # v' = 0.5 * 2 + 0.5 * 2 * 2 = 3 exactly: below, at and above the maximum so far.
    def tensor(*values: float) -> list[Tensor]:
        return [torch.tensor(values, dtype=DOUBLE)]

    numbers = [torch.tensor(x, dtype=DOUBLE) for x in (0.1, 0.5, 0.5, 0.25, 0.0)]
    leaves = tensor(1, 1, 1), tensor(2, 2, 2), tensor(1, 1, 1), tensor(2, 2, 2), tensor(4, 3, 2)
    at = Point(*leaves, *numbers)
    ours, theirs = partial(updated, kernel=kernel, amsgrad=True), partial(by_equations, amsgrad=True)
    outputs, pull = vjp(ours, at)
    assert_equal(outputs[-1], *tensor(4, 3, 3))

    # Only the maximum is pulled back: u gets 1, 1/2 and 0 of it, and dv'/dv = 1/2 of the rest goes to v.
    cotangents = [*map(torch.zeros_like, outputs[:-1]), torch.ones_like(outputs[-1])]
    [got] = pull(cotangents)
    assert_equal(got.max_exp_avg_sq, tensor(1, 0.5, 0))
    assert_equal(got.exp_avg_sq, tensor(0, 0.25, 0.5))
    assert_equal(got.grads, tensor(0, 1, 2))

    # And through the parameter, both ways, as torch.maximum does.
    cotangents, directions = fixed(outputs), fixed(at)
    assert_close(pull(cotangents), vjp(theirs, at)[1](cotangents))
    assert_close(jvp(ours, (at,), (directions,)), jvp(theirs, (at,), (directions,)))


# Hyperparameters as one tree.


def numbers_as_tree(**flags: bool) -> AdamHparams:
    numbers = {name: torch.tensor(value, dtype=DOUBLE) for name, value in HYPER.items()}
    betas = (numbers.pop("beta1"), numbers.pop("beta2"))
    return AdamHparams(betas=betas, **numbers, **flags)


@each_kernel
@each_variant
def test_the_gradient_of_hyperparameters_is_a_tree_of_hyperparameters(kernel: str, variant: str) -> None:
    flags = VARIANTS[variant]
    at = make_point((3,), (2, 2), amsgrad=flags.get("amsgrad", False))

    def filled(h: AdamHparams) -> Point:
        return at._replace(lr=h.lr, beta1=h.betas[0], beta2=h.betas[1], eps=h.eps, weight_decay=h.weight_decay)

    hparams = numbers_as_tree(**flags)
    got = grad(lambda h: weighted(updated(filled(h), kernel, **flags)))(hparams)
    expected = grad(lambda h: weighted(by_equations(filled(h), **flags)))(hparams)
    assert type(got) is AdamHparams
    assert {name: getattr(got, name) for name in flags} == flags
    assert all(x.dtype == DOUBLE and x.shape == () and x != 0 for x in optree.tree_leaves(got))
    assert_close(got, expected)


@each_kernel
@each_variant
def test_a_sweep_over_hyperparameters_is_a_loop_over_them(kernel: str, variant: str) -> None:
    flags = VARIANTS[variant]
    params, x, y = regression()
    factors = torch.tensor([1.0, 0.5, 0.1], dtype=DOUBLE)
    stacked = torch_pytree.tree_map(lambda number: number * factors, numbers_as_tree(**flags))

    def train(hparams: AdamHparams) -> Any:
        trained, state = params, adam_init(params, hparams)
        for _ in range(3):
            grads = grad(network_loss)(trained, x, y)
            trained, state = adam_update(trained, grads, state, hparams, kernel=kernel)
        return network_loss(trained, x, y), (trained, state)

    members = [torch_pytree.tree_map(lambda number, i=i: number[i], stacked) for i in range(3)]
    for run in (train, grad(train, has_aux=True)):
        loop = [run(member) for member in members]
        assert_close(vmap(run)(stacked), torch_pytree.tree_map(lambda *xs: torch.stack(xs), *loop))


# What runs, and what is kept.


def under(transform: str, run: Callable[..., Tensor], x: Tensor) -> Any:
    """Run `run` once at `x`, or at members that are all `x`, under a transform."""
    if transform == "none":
        return run(x)
    if transform == "no_grad":
        with torch.no_grad():
            return run(x.clone().requires_grad_())
    if transform == "autograd":
        return run(x.clone().requires_grad_())
    if transform == "dual":
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(forward_ad.make_dual(x, x))).primal
    transforms: dict[str, Callable[[], Any]] = {
        "vjp": lambda: vjp(run, x),
        "jvp": lambda: jvp(run, (x,), (x,)),
        "vmap": lambda: vmap(run)(torch.stack([x, x])),
        "vmap_with_own_numbers": lambda: vmap(run)(torch.stack([x, x]), torch.tensor([0.1, 0.2])),
        "vmap_of_grad": lambda: vmap(grad(lambda x: run(x).sum()))(torch.stack([x, x])),
        "hessian": lambda: hessian(lambda x: run(x).sum())(x),
    }
    return transforms[transform]()


TRANSFORMS = ("autograd", "dual", "vjp", "jvp", "vmap", "vmap_with_own_numbers", "vmap_of_grad", "hessian")


@each_kernel
@pytest.mark.parametrize("transform", ["none", "no_grad"])
def test_an_update_that_nobody_watches_enters_no_function(
    kernel: str, transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("nobody watches")

    monkeypatch.setattr(functional_adam.autodiff.function, "_apply", forbidden)
    monkeypatch.setattr(functional_adam.call.update, "differentiable_update", forbidden)
    at = make_point((3,))
    state = AdamState(torch.tensor(3.0), at.exp_avg[0], at.exp_avg_sq[0])

    def run(p: Tensor) -> Tensor:
        return adam_update(p, at.grads[0], state, AdamHparams(), kernel=kernel)[0]

    assert not under(transform, run, at.params[0]).requires_grad


@each_kernel
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_kernel_computes_an_update_that_is_watched(
    kernel: str, transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, ran = [], []
    apply, run_kernel = functional_adam.autodiff.function._apply, functional_adam.autodiff.packing.run_kernel

    def spied_apply(*arguments: Any) -> Any:
        entered.append(arguments[0].kernel)
        return apply(*arguments)

    def spied_kernel(name: str, *arguments: Any, **options: Any) -> None:
        ran.append(name)
        run_kernel(name, *arguments, **options)

    monkeypatch.setattr(functional_adam.autodiff.function, "_apply", spied_apply)
    for module in (functional_adam.autodiff.packing, functional_adam.autodiff.batching):
        monkeypatch.setattr(module, "run_kernel", spied_kernel)
    at = make_point((3,))
    state = AdamState(torch.tensor(3.0), at.exp_avg[0], at.exp_avg_sq[0])

    def run(p: Tensor, lr: Any = 0.1) -> Tensor:
        return adam_update(p, at.grads[0], state, AdamHparams(lr=lr), kernel=kernel)[0]

    under(transform, run, at.params[0])
    assert set(entered) == {kernel}
    assert set(ran) == {kernel}


def saved_bytes(at: Point, kernel: str, *, weight_decay: Any, lr: Any = 0.1, **flags: bool) -> int:
    """How much an update keeps for the backward pass, scalars left out."""
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel() * x.element_size() if x.dim() else 0)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        at = at._replace(lr=lr, beta1=0.9, beta2=0.99, eps=0.01, weight_decay=weight_decay)
        outputs = updated(at, kernel, **flags)
    assert all(x.requires_grad for x in outputs)
    return sum(sizes)


@each_kernel
def test_no_more_is_kept_for_backward_than_it_reads(kernel: str) -> None:
    at = make_point((100,), (10, 10), amsgrad=True)
    at.grads[0].requires_grad_()
    at.grads[1].requires_grad_()
    column = sum(p.numel() * p.element_size() for p in at.params)
    lr = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)
    rate = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)
    measure = partial(saved_bytes, at, kernel)
    # The gradient and the two moments; the maximum with amsgrad.
    assert measure(weight_decay=0.0) <= 3 * column
    assert measure(weight_decay=0.0, lr=lr) <= 3 * column
    assert measure(weight_decay=0.0, maximize=True) <= 3 * column
    assert measure(weight_decay=0.0, amsgrad=True) <= 4 * column
    # Parameters only where a weight decay needs them.
    assert measure(weight_decay=0.2, decoupled_weight_decay=True) <= 3 * column
    assert measure(weight_decay=0.2, lr=lr, decoupled_weight_decay=True) <= 4 * column
    assert measure(weight_decay=0.2) <= 4 * column
    assert measure(weight_decay=rate) <= 4 * column


@each_kernel
def test_checkpoints_and_hooks_on_saved_tensors_change_no_gradient(kernel: str) -> None:
    start, x, y = regression()
    names = [*start]
    leaves = [p.requires_grad_() for p in start.values()]
    lr = torch.tensor(0.05, dtype=DOUBLE, requires_grad=True)

    def step(lr: Tensor, state: AdamState, *values: Tensor) -> Any:
        params = dict(zip(names, values, strict=True))
        hparams = AdamHparams(lr=lr, weight_decay=0.1)
        grads = gradients(lambda p: network_loss(p, x, y), params, by="autograd")
        params, state = adam_update(params, grads, state, hparams, kernel=kernel)
        return state, *params.values()

    def final_loss(call: Callable[..., Any]) -> Tensor:
        state, values = adam_init(dict(zip(names, leaves, strict=True)), AdamHparams()), leaves
        for _ in range(3):
            state, *values = call(step, lr, state, *values)
        return network_loss(dict(zip(names, values, strict=True)), x, y)

    def plain(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    expected = torch.autograd.grad(final_loss(plain), [lr, *leaves])
    assert expected[0] != 0
    assert_equal(torch.autograd.grad(final_loss(partial(checkpoint, use_reentrant=False)), [lr, *leaves]), expected)
    packed = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x.shape)
        return x.clone()

    for hooks in (save_on_cpu(), saved_tensors_hooks(pack, torch.clone)):
        with hooks:
            loss = final_loss(plain)
        assert_equal(torch.autograd.grad(loss, [lr, *leaves]), expected)
        with hooks:
            [once] = torch.autograd.grad(final_loss(plain), lr, create_graph=True)
            second = torch.autograd.grad(once, [lr, *leaves])
        [once] = torch.autograd.grad(final_loss(plain), lr, create_graph=True)
        assert_close(second, torch.autograd.grad(once, [lr, *leaves]))
    assert packed


# torch.func.vmap is a loop.

SIZE = 3
SHAPES = ((2, 2), (4,))
MEMBERS = ("params", "grads", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
BATCHED: dict[str, tuple[str, ...]] = {
    "members": MEMBERS,
    "grads_alone": ("grads",),
    "params_alone": ("params",),
    "moments_alone": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "step": (*MEMBERS, "step"),
    "step_alone": ("step",),
    "equal_steps": (*MEMBERS, "equal_steps"),
    "lr": (*MEMBERS, "lr"),
    "lr_alone": ("lr",),
    "betas": (*MEMBERS, "beta1", "beta2"),
    "eps": (*MEMBERS, "eps"),
    "weight_decay": (*MEMBERS, "weight_decay"),
    "numbers": (*MEMBERS, *NUMBERS),
    "numbers_alone": NUMBERS,
    "numbers_and_step": (*MEMBERS, "step", *NUMBERS),
    "found_inf": (*MEMBERS, "found_inf"),
    "grad_scale": (*MEMBERS, "grad_scale"),
    "everything": (*MEMBERS, "step", *NUMBERS, "found_inf", "grad_scale"),
}
MEMBER_SCALARS = {
    "step": [0.0, 2.0, 500.0],
    "equal_steps": [7.0, 7.0, 7.0],
    "lr": [0.1, 0.0, 0.2],
    "beta1": [0.9, 0.0, 0.5],
    "beta2": [0.99, 0.5, 0.0],
    "eps": [1e-8, 0.1, 1.0],
    "weight_decay": [0.0, 0.1, 0.3],
    "found_inf": [0.0, float("nan"), 0.0],
    "grad_scale": [1.0, 2.0, 64.0],
}


def make_batch(batched: tuple[str, ...], *, per_leaf_step: bool = False, **flags: bool) -> tuple[Any, Any]:
    """Arguments of `update_member`, and the dimensions that `batched` names, as trees of one structure."""
    stacked = make_point(*((SIZE, *shape) for shape in SHAPES), amsgrad=flags.get("amsgrad", False))
    values, dims = {}, {}
    for name in MEMBERS:
        is_batched, column = name in batched, getattr(stacked, name)
        values[name] = column if is_batched else [x[0] for x in column]
        dims[name] = [0 if is_batched else None] * len(column)
    for name, options in MEMBER_SCALARS.items():
        dtype = torch.float32 if "step" in name else DOUBLE
        tensor = torch.tensor(options, dtype=dtype)
        values[name], dims[name] = (tensor, 0) if name in batched else (tensor[0], None)
    if "equal_steps" in batched:
        values["step"], dims["step"] = values["equal_steps"], 0
    if per_leaf_step:
        values["step"], dims["step"] = [values["step"] + i for i in range(len(SHAPES))], [dims["step"]] * len(SHAPES)

    def arguments(of: dict[str, Any], numbers: dict[str, Any]) -> Any:
        maxima = of["max_exp_avg_sq"] if flags.get("amsgrad") else ()
        state = AdamState(of["step"], of["exp_avg"], of["exp_avg_sq"], maxima)
        given = {name: of[name] for name in ("found_inf", "grad_scale") if name in batched}
        return of["params"], of["grads"], state, numbers, given

    plain = {name: 0.0 if name == "weight_decay" and name not in batched else values[name] for name in NUMBERS}
    return arguments(values, plain), arguments(dims, {name: dims[name] for name in NUMBERS})


def update_member(
    params: Any, grads: Any, state: AdamState, numbers: dict[str, Any], options: Any, *, kernel: str, **flags: bool
) -> Any:
    rest = {name: numbers[name] for name in ("lr", "eps", "weight_decay")}
    hparams = AdamHparams(betas=(numbers["beta1"], numbers["beta2"]), **rest, **flags)
    return adam_update(params, grads, state, hparams, kernel=kernel, **options)


def looped(run: Callable[..., Any], arguments: Any, dims: Any, size: int = SIZE) -> Any:
    """`vmap(run, in_dims=dims)(*arguments)` as a Python loop."""
    results = []
    for index in range(size):
        pick = partial(lambda x, dim, index: x if dim is None else x.select(dim, index), index=index)
        results.append(run(*torch_pytree.tree_map(pick, arguments, dims)))
    return torch_pytree.tree_map(lambda *xs: torch.stack(xs), *results)


@pytest.fixture
def _large_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of few elements are treated as those of many, which would take long."""
    monkeypatch.setattr(functional_adam.autodiff.batching, "SMALL_MEMBER", 0)


@pytest.fixture(params=["small", "large"])
def _any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "large":
        monkeypatch.setattr(functional_adam.autodiff.batching, "SMALL_MEMBER", 0)


each_size = pytest.mark.usefixtures("_any_size")


@each_kernel
@each_size
@pytest.mark.parametrize("case", BATCHED)
@pytest.mark.parametrize("variant", ["coupled", "all_flags"])
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_vmap_equals_a_loop(kernel: str, case: str, variant: str, per_leaf_step: bool) -> None:
    flags = VARIANTS[variant]
    arguments, dims = make_batch(BATCHED[case], per_leaf_step=per_leaf_step, **flags)
    run = partial(update_member, kernel=kernel, **flags)
    before = torch_pytree.tree_map(torch.clone, arguments[:3])
    assert_close(vmap(run, in_dims=dims)(*arguments), looped(run, arguments, dims))
    assert_equal(arguments[:3], before)


@each_kernel
@pytest.mark.parametrize("case", BATCHED)
@pytest.mark.parametrize("mode", ["reverse", "forward", "reverse_outside", "autograd_outside"])
def test_derivatives_of_members_equal_those_of_a_loop(kernel: str, case: str, mode: str) -> None:
    arguments, dims = make_batch(BATCHED[case], amsgrad=True)

    # Only what stands first is differentiated: step passes through float32, and found_inf may be NaN.
    def loss(params: Any, grads: Any, moments: Any, numbers: Any, step: Any, options: Any) -> Tensor:
        state = AdamState(step, *moments)
        new = update_member(params, grads, state, numbers, options, kernel=kernel, amsgrad=True)
        return weighted(optree.tree_leaves((new[0], new[1][1:])))

    def arrange(given: Any) -> tuple[Any, ...]:
        params, grads, state, numbers, options = given
        return params, grads, tuple(state[1:4]), numbers, state.step, options

    given, given_dims = arrange(arguments), arrange(dims)
    given = (*given[:3], {name: torch.as_tensor(x, dtype=DOUBLE) for name, x in given[3].items()}, *given[4:])
    argnums = (0, 1, 2, 3)

    def tangent(*given: Any) -> Tensor:
        rest, at = given[4:], given[:4]
        directions = torch_pytree.tree_map(torch.ones_like, at)
        return jvp(lambda *at: loss(*at, *rest), at, directions)[1]

    if mode == "forward":
        assert_close(vmap(tangent, in_dims=given_dims)(*given), looped(tangent, given, given_dims))
    elif mode == "reverse":
        slope = grad(loss, argnums=argnums)
        assert_close(vmap(slope, in_dims=given_dims)(*given), looped(slope, given, given_dims))
    else:
        totals = [
            lambda *given: vmap(loss, in_dims=given_dims)(*given).sum(),
            lambda *given: looped(loss, given, given_dims).sum(),
        ]
        if mode == "reverse_outside":
            assert_close(*(grad(total, argnums=argnums)(*given) for total in totals))
        else:
            leaves = [x.requires_grad_() for x in torch_pytree.tree_leaves(given[:4])]
            assert_close(*(torch.autograd.grad(total(*given), leaves) for total in totals))


@each_kernel
@each_size
@pytest.mark.parametrize("case", ["lr", "weight_decay", "everything"])
@pytest.mark.parametrize("weight_decay", [0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
def test_members_that_maximize_and_decay_equal_a_loop(
    kernel: str, case: str, weight_decay: float, dtype: torch.dtype, decoupled: bool
) -> None:
    flags = {"maximize": True, "decoupled_weight_decay": decoupled}
    (*leaves, state, numbers, options), dims = make_batch(BATCHED[case])
    numbers = {**numbers, "weight_decay": numbers["weight_decay"] + weight_decay}
    leaves, moments = torch_pytree.tree_map(lambda x: x.to(dtype), (leaves, state[1:3]))
    arguments = (*leaves, AdamState(state.step, *moments), numbers, options)
    run = partial(update_member, kernel=kernel, **flags)
    got, expected = vmap(run, in_dims=dims)(*arguments), looped(run, arguments, dims)
    assert_close(got, expected)
    assert {x.dtype for x in optree.tree_leaves((got[0], got[1][1:]))} == {dtype}


@each_kernel
@pytest.mark.parametrize("case", ["step", "everything"])
def test_derivatives_of_members_with_a_step_a_leaf_equal_those_of_a_loop(kernel: str, case: str) -> None:
    arguments, dims = make_batch(BATCHED[case], per_leaf_step=True)

    def loss(grads: Any, params: Any, state: AdamState, numbers: Any, options: Any) -> Tensor:
        new = update_member(params, grads, state, numbers, options, kernel=kernel)
        return weighted(optree.tree_leaves((new[0], new[1][1:])))

    (params, grads, *rest), (params_dims, grads_dims, *rest_dims) = arguments, dims
    given, given_dims = (grads, params, *rest), (grads_dims, params_dims, *rest_dims)
    expected = looped(grad(loss), given, given_dims)
    assert_close(vmap(grad(loss), in_dims=given_dims)(*given), expected)
    assert_close(grad(lambda *given: vmap(loss, in_dims=given_dims)(*given).sum())(*given), expected)


@each_kernel
@pytest.mark.usefixtures("_large_members")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("case", "count"),
    [("equal_steps", 1), ("lr", 1), ("weight_decay", 1), ("step", SIZE), ("eps", SIZE), ("everything", SIZE)],
)
def test_members_are_taken_apart_only_where_a_kernel_cannot_take_them_together(
    kernel: str, dtype: torch.dtype, case: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run_kernel = functional_adam.autodiff.packing.run_kernel

    def spied(name: str, buffers: Any, *arguments: Any, **options: Any) -> None:
        calls.append((name, len(buffers.params)))
        run_kernel(name, buffers, *arguments, **options)

    for module in (functional_adam.autodiff.packing, functional_adam.autodiff.batching):
        monkeypatch.setattr(module, "run_kernel", spied)
    (*leaves, state, numbers, options), dims = make_batch(BATCHED[case])
    leaves, moments = torch_pytree.tree_map(lambda x: x.to(dtype), (leaves, state[1:3]))
    arguments = (*leaves, AdamState(state.step, *moments), numbers, options)
    vmap(partial(update_member, kernel=kernel), in_dims=dims)(*arguments)
    # A direction in a half type would be rounded before its length is applied.
    is_apart = dtype is torch.bfloat16 and case in ("lr", "weight_decay")
    assert calls == [(kernel, len(SHAPES) * (SIZE if is_apart else count))]


@each_kernel
@pytest.mark.parametrize(
    ("case", "dtype", "count"),
    [("step", torch.float32, 1), ("eps", DOUBLE, 1), ("everything", torch.float32, 1), ("eps", torch.bfloat16, 0)],
)
def test_small_members_are_computed_on_stacked_leaves(
    kernel: str, case: str, dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run_foreach = functional_adam.autodiff.batching.run_foreach

    def spied(batch: Any) -> Any:
        calls.append([x.shape[0] for x in batch.buffers.params])
        return run_foreach(batch)

    monkeypatch.setattr(functional_adam.autodiff.batching, "run_foreach", spied)
    (*leaves, state, numbers, options), dims = make_batch(BATCHED[case])
    leaves, moments = torch_pytree.tree_map(lambda x: x.to(dtype), (leaves, state[1:3]))
    vmap(partial(update_member, kernel=kernel), in_dims=dims)(
        *leaves, AdamState(state.step, *moments), numbers, options
    )
    assert calls == [[SIZE] * len(SHAPES)] * count


@pytest.mark.parametrize("case", ["members", "step", "everything"])
def test_a_single_vmap_is_as_without_the_private_names_of_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, dims = make_batch(BATCHED[case])
    run = partial(update_member, kernel="auto")
    direct = vmap(run, in_dims=dims)(*arguments)
    monkeypatch.setattr(functional_adam.autodiff.mapping, "_functorch", None)
    assert_equal(vmap(run, in_dims=dims)(*arguments), direct)


@each_kernel
def test_members_of_one_step_are_together_within_a_derivative(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run_kernel = functional_adam.autodiff.packing.run_kernel

    def spied(name: str, buffers: Any, *arguments: Any, **options: Any) -> None:
        calls.append(len(buffers.params))
        run_kernel(name, buffers, *arguments, **options)

    monkeypatch.setattr(functional_adam.autodiff.packing, "run_kernel", spied)
    hparams = AdamHparams(lr=0.1)

    def trained(params: list[Tensor]) -> Tensor:
        state = vmap(lambda p: adam_init(p, hparams))(params)
        for _ in range(2):
            params, state = vmap(lambda p, s: adam_update(p, p, s, hparams, kernel=kernel))(params, state)
        return weighted(params)

    grad(trained)(make_point(*((SIZE, *shape) for shape in SHAPES)).params)
    assert calls == [len(SHAPES)] * 2


@each_kernel
@pytest.mark.parametrize("case", ["members", "step", "numbers", "everything"])
def test_second_derivatives_of_members_equal_those_of_a_loop(kernel: str, case: str) -> None:
    arguments, dims = make_batch(BATCHED[case])

    def loss(grads: Any, lr: Tensor, params: Any, state: AdamState, numbers: Any, options: Any) -> Tensor:
        new = update_member(params, grads, state, {**numbers, "lr": lr}, options, kernel=kernel)
        return weighted(optree.tree_leaves((new[0], new[1][1:])))

    def arrange(given: Any) -> tuple[Any, ...]:
        params, grads, state, numbers, options = given
        return grads, numbers["lr"], params, state, numbers, options

    given, given_dims = arrange(arguments), arrange(dims)
    second = hessian(loss, argnums=(0, 1))
    assert_close(vmap(second, in_dims=given_dims)(*given), looped(second, given, given_dims))


@each_kernel
def test_members_may_lie_along_different_dimensions(kernel: str) -> None:
    arguments, dims = make_batch(BATCHED["everything"])
    (params, grads, state, *rest), (_, _, state_dims, *rest_dims) = arguments, dims
    moved = (
        [x.movedim(0, -1).contiguous() for x in params],
        [x.movedim(0, 1) for x in grads],
        state._replace(exp_avg=[x.movedim(0, -1) for x in state.exp_avg]),
        *rest,
    )
    moved_dims = (-1, 1, state_dims._replace(exp_avg=[-1, -1]), *rest_dims)
    run = partial(update_member, kernel=kernel)
    expected_params, expected_state = looped(run, arguments, dims)
    out_dims = (1, AdamState(0, [-1, 0], [0, 1], (), ()))
    got_params, got_state = vmap(run, in_dims=moved_dims, out_dims=out_dims)(*moved)
    assert_close([x.movedim(1, 0) for x in got_params], expected_params)
    assert_close(got_state.exp_avg[0].movedim(-1, 0), expected_state.exp_avg[0])
    assert_close(got_state.exp_avg_sq[1].movedim(1, 0), expected_state.exp_avg_sq[1])
    assert_close(got_state.step, expected_state.step)


@each_kernel
@pytest.mark.parametrize("inner", ["members", "step", "numbers", "everything"])
@pytest.mark.parametrize("differentiate", [False, True])
def test_nested_maps_equal_a_double_loop(kernel: str, inner: str, differentiate: bool) -> None:
    arguments, dims = make_batch(BATCHED[inner])

    def loss(lr: Tensor, grads: Any, rest: Any) -> Tensor:
        params, state, numbers, options = rest
        new = update_member(params, grads, state, {**numbers, "lr": lr}, options, kernel=kernel)
        return weighted(optree.tree_leaves((new[0], new[1][1:])))

    def arrange(given: Any) -> tuple[Any, ...]:
        params, grads, state, numbers, options = given
        return numbers["lr"], grads, (params, state, numbers, options)

    run = grad(loss, argnums=(0, 1)) if differentiate else loss
    (lr, grads, rest), given_dims = arrange(arguments), arrange(dims)
    lrs = torch.stack([lr, lr * 0.5])  # the outer map: learning rates, and other gradients
    outer = torch_pytree.tree_map(lambda x: torch.stack([x, x.flip(0)]), grads)
    nested = vmap(vmap(run, in_dims=given_dims), in_dims=(0, 0, None))
    expected = [looped(run, (lrs[i], [x[i] for x in outer], rest), given_dims) for i in range(2)]
    assert_close(nested(lrs, outer, rest), torch_pytree.tree_map(lambda *xs: torch.stack(xs), *expected))


@each_kernel
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_members_that_started_together_keep_one_step_in_memory(
    kernel: str, per_leaf_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run_kernel = functional_adam.autodiff.packing.run_kernel

    def spied(name: str, buffers: Any, *arguments: Any, **options: Any) -> None:
        calls.append(len(buffers.params))
        run_kernel(name, buffers, *arguments, **options)

    monkeypatch.setattr(functional_adam.autodiff.packing, "run_kernel", spied)
    stacked = make_point(*((SIZE, *shape) for shape in SHAPES))
    params, hparams = stacked.params, AdamHparams(lr=0.1)
    state = vmap(lambda p: adam_init(p, hparams, per_leaf_step=per_leaf_step))(params)
    loop = [[p[i] for p in params] for i in range(SIZE)]
    states = [adam_init(p, hparams, per_leaf_step=per_leaf_step) for p in loop]
    for count in range(1, 5):
        calls.clear()
        grads = fixed(params, seed=count)
        params, state = vmap(partial(adam_update, kernel=kernel), in_dims=(0, 0, 0, None))(
            params, grads, state, hparams
        )
        # One call on the stacked leaves: the members are not taken apart.
        assert calls == [len(SHAPES)]
        steps = torch_pytree.tree_leaves(state.step)
        assert all(step.stride() == (0,) and step.tolist() == [float(count)] * SIZE for step in steps)
        for i in range(SIZE):
            loop[i], states[i] = adam_update(loop[i], [g[i] for g in grads], states[i], hparams, kernel=kernel)
    assert_close((params, state), torch_pytree.tree_map(lambda *xs: torch.stack(xs), *zip(loop, states, strict=True)))


@each_kernel
def test_scales_of_members_may_be_beyond_their_half_type(kernel: str) -> None:
    param, gradient = torch.linspace(-1, 1, 5).half(), torch.linspace(1e4, 6e4, 5).half()
    state, scales = adam_init(param, AdamHparams()), torch.tensor([2.0**16, 2.0**17])

    def run(scale: Tensor) -> Tensor:
        return adam_update(param, gradient, state, AdamHparams(), kernel=kernel, grad_scale=scale)[1].exp_avg

    expected = torch.stack([run(scale) for scale in scales])
    assert (expected > 0).all()
    assert_equal(vmap(run)(scales), expected)


@each_kernel
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_an_ensemble_of_one_is_its_member(kernel: str, per_leaf_step: bool) -> None:
    at, hparams = make_point((1, 3), (1, 2, 2)), AdamHparams(lr=0.1)
    state = vmap(lambda p: adam_init(p, hparams, per_leaf_step=per_leaf_step))(at.params)
    new, state = vmap(partial(adam_update, hparams=hparams, kernel=kernel))(at.params, at.grads, state)
    alone = [p[0] for p in at.params]
    expected = adam_init(alone, hparams, per_leaf_step=per_leaf_step)
    expected = adam_update(alone, [g[0] for g in at.grads], expected, hparams, kernel=kernel)
    assert_close((new, state), torch_pytree.tree_map(lambda x: x.unsqueeze(0), expected))


@each_kernel
def test_an_ensemble_is_trained_and_differentiated_as_its_members_are(kernel: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    members = [regression(seed)[0] for seed in range(SIZE)]
    _, x, y = regression()
    lrs = torch.tensor([0.01, 0.05, 0.1], dtype=DOUBLE)

    def final_loss(params: dict[str, Tensor], lr: Tensor) -> Tensor:
        hparams = AdamHparams(lr=lr)
        state = adam_init(params, hparams)
        for _ in range(3):
            grads = grad(lambda p: ((functional_call(model, p, (x,)) - y) ** 2).mean())(params)
            params, state = adam_update(params, grads, state, hparams, kernel=kernel)
        return ((functional_call(model, params, (x,)) - y) ** 2).mean()

    stacked = torch_pytree.tree_map(lambda *xs: torch.stack(xs), *members)
    loop = [grad(final_loss, argnums=(0, 1))(member, lr) for member, lr in zip(members, lrs, strict=True)]
    expected = torch_pytree.tree_map(lambda *xs: torch.stack(xs), *loop)
    assert_close(vmap(grad(final_loss, argnums=(0, 1)))(stacked, lrs), expected)
    assert_close(grad(lambda p, lr: vmap(final_loss)(p, lr).sum(), argnums=(0, 1))(stacked, lrs), expected)
    assert all(math.isfinite(x) and x != 0 for x in expected[1].tolist())


def test_a_step_that_members_share_in_memory_is_differentiated_member_by_member() -> None:
    params, weights = torch.ones(3, 2), torch.tensor([1.0, 2.0, 3.0])
    state = vmap(lambda p: adam_init(p, AdamHparams()))(params)
    assert state.step.stride() == (0,)

    def weighted_steps(step: Tensor) -> Tensor:
        new = vmap(lambda p, s: adam_update(p, p, s, AdamHparams())[1].step)(params, state._replace(step=step))
        return (new * weights).sum()

    assert_equal(grad(weighted_steps)(state.step), weights)


@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_an_empty_leaf_may_follow_one_that_is_cut(per_leaf_step: bool) -> None:
    params = [torch.ones(CUT + 5, requires_grad=True), torch.ones(0, requires_grad=True)]
    state = adam_init(params, AdamHparams(), per_leaf_step=per_leaf_step)
    new, _ = adam_update(params, [torch.ones_like(p) for p in params], state, AdamHparams())
    new[0].sum().backward()
    assert_equal(params[0].grad, torch.ones(CUT + 5))


@pytest.mark.parametrize("donate", [False, True])
@each_kernel
def test_any_real_number_counts_at_its_value(kernel: str, donate: bool) -> None:
    given = AdamHparams(lr=Fraction(1, 1000), eps=Fraction(1, 1000), weight_decay=np.float32(0.1))
    plain = AdamHparams(lr=1e-3, eps=1e-3, weight_decay=float(np.float32(0.1)))
    param = torch.full((2,), 1e3, dtype=torch.float64)
    expected = adam_update(param, param.clone(), adam_init(param, plain), plain, kernel=kernel)
    state = adam_init(param, given)
    assert_equal(adam_update(param, param.clone(), state, given, kernel=kernel, donate=donate), expected)


@pytest.mark.parametrize("outer_dim", [0, 1])
def test_states_of_nested_maps_go_on(outer_dim: int) -> None:
    """A state made under two maps, and one made under the inner map and then shared or stacked, take several steps."""
    params, hparams = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), AdamHparams(lr=0.1)
    made = vmap(vmap(lambda p: adam_init(p, hparams)))(params)
    assert made.step.stride() == (0, 0)
    step = torch.zeros(3).expand(2, 3) if outer_dim == 0 else torch.zeros(2, 1).expand(2, 3)
    expected = adam_init(params, hparams)
    for state, flat in ((made, expected), (made._replace(step=step), expected)):
        new, reference = params, params
        for _ in range(3):
            new, state = vmap(vmap(lambda p, s: adam_update(p, p, s, hparams)))(new, state)
            reference, flat = adam_update(reference, reference, flat, hparams)
        assert_close((new, state.exp_avg), (reference, flat.exp_avg))
        assert_equal(state.step, torch.full((2, 3), 3.0))


# Empty leaves, and no members.


def real_results(p: Tensor, variant: str = "all_flags", kernel: Any = "auto") -> Tensor:
    """Real elements of a new parameter and moment, whose gradient is the parameter."""
    hparams = AdamHparams(lr=0.1, weight_decay=0.1, **VARIANTS[variant])
    new, state = adam_update(p, p, adam_init(p, hparams), hparams, kernel=kernel)
    return new.real + state.exp_avg.imag if p.is_complex() else new + state.exp_avg


JACOBIANS: dict[str, Any] = {
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "reverse twice": lambda f: jacrev(jacrev(f)),
    "forward twice": lambda f: jacfwd(jacfwd(f)),
}
two_variants = pytest.mark.parametrize("variant", ["coupled", "all_flags"])


@each_kernel
@two_variants
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("derivative", JACOBIANS.values(), ids=JACOBIANS)
def test_jacobians_of_empty_leaves_are_empty(
    kernel: str, variant: str, shape: tuple[int, ...], dtype: torch.dtype, derivative: Any
) -> None:
    leaf = torch.zeros(shape, dtype=dtype)
    got = derivative(lambda p: real_results(p, variant, kernel))(leaf)
    assert_equal(got, derivative(lambda p: p * p)(leaf))


def test_jacobians_beside_empty_leaves_are_those_without_them() -> None:
    def update(tree: dict[str, Tensor]) -> Any:
        hparams = AdamHparams(lr=0.1, eps=0.1)
        return adam_update(tree, tree, adam_init(tree, hparams), hparams)[0]

    full, empty = torch.tensor([1.0, -2.0], dtype=DOUBLE), torch.zeros(0, 3, dtype=DOUBLE)
    alone = jacrev(update)({"b": full})["b"]["b"]
    for derivative in (jacrev, jacfwd):
        beside = derivative(update)({"a": empty, "b": full, "c": empty})
        assert_close(beside["b"]["b"], alone)
        shapes = {(out, x): tuple(beside[out][x].shape) for out in "abc" for x in "abc" if out + x != "bb"}
        sizes: dict[str, tuple[int, ...]] = {"a": (0, 3), "b": (2,), "c": (0, 3)}
        assert shapes == {(out, x): sizes[out] + sizes[x] for out, x in shapes}


MEMBERWISE: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]]] = {
    "update": lambda f: f,
    "grad": lambda f: grad(lambda p: f(p).sum()),
    "second order": lambda f: grad(lambda p: (grad(lambda q: f(q).sum())(p) * p).real.sum()),
    "jvp": lambda f: lambda p: jvp(f, (p,), (p,)),
    "jvp of grad": lambda f: lambda p: jvp(grad(lambda q: f(q).sum()), (p,), (p,)),
    "nested map": lambda f: lambda p: vmap(grad(lambda q: f(q).sum()))(torch.stack([p, 2 * p])),
}


@each_kernel
@two_variants
@pytest.mark.parametrize("member", MEMBERWISE)
@pytest.mark.parametrize("shape", [(3,), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_no_members_give_none(
    kernel: str, variant: str, member: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    function = vmap(MEMBERWISE[member](lambda p: real_results(p, variant, kernel)))
    members = torch.ones((2, *shape), dtype=dtype)
    assert_equal(function(members[:0]), optree.tree_map(lambda x: x[:0], function(members)))


@each_kernel
def test_no_members_take_several_steps_with_states_of_their_own(kernel: Any) -> None:
    hparams = AdamHparams(lr=0.1, amsgrad=True)
    params = torch.ones(0, 3)
    made = vmap(lambda p: adam_init(p, hparams))(params)
    for state in (made, made._replace(step=torch.zeros(0))):
        for _ in range(2):
            params, state = vmap(lambda p, s: adam_update(p, p, s, hparams, kernel=kernel))(params, state)
        assert_equal(optree.tree_leaves((params, state)), [torch.zeros(0, 3), torch.zeros(0), *[torch.zeros(0, 3)] * 3])


@each_kernel
def test_no_members_have_numbers_of_their_own(kernel: Any) -> None:
    def update(p: Tensor, lr: Tensor, found_inf: Tensor) -> Any:
        hparams = AdamHparams(lr=lr, betas=(lr, 0.9), weight_decay=lr)
        return adam_update(p, p, adam_init(p, hparams), hparams, kernel=kernel, found_inf=found_inf, grad_scale=2.0)

    params, numbers = torch.ones(2, 3), torch.full((2,), 0.5)
    for in_dims in ((0, 0, 0), (None, 0, None), (0, None, 0)):
        all_given = (params, numbers, numbers)
        given = [x if dim == 0 else x[0] for x, dim in zip(all_given, in_dims, strict=True)]
        none = [x[:0] if dim == 0 else x for x, dim in zip(given, in_dims, strict=True)]
        run = vmap(update, in_dims=in_dims)
        assert_equal(run(*none), optree.tree_map(lambda x: x[:0], run(*given)))
