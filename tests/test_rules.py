"""Derivatives and batching by hand around every kernel: right to second order, finite, and no more than is needed."""

import weakref
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from functional_adam import AdamHparams, AdamState, adam_init, adam_update, explain
from tests.builders import assert_same_bits, assert_unchanged, snapshot, strided, tensors_of, transposed
from tests.equations_oracle import DOUBLE, LEAVES, NUMBERS, Point, fixed, make_point, reference, stacked, weighted
from tests.oracles import KERNELS
from tests.tolerances import assert_close, assert_equal, assert_rounded_once

VARIANTS: dict[str, dict[str, bool]] = {
    "coupled": {},
    "decoupled": {"decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "all_flags": {"amsgrad": True, "maximize": True, "decoupled_weight_decay": True},
}
BFLOAT16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def hparams_from(numbers: Mapping[str, Any], **flags: bool) -> AdamHparams:
    lr, beta1, beta2, eps, weight_decay = (numbers[name] for name in NUMBERS)
    return AdamHparams(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, **flags)


def updated(at: Point, kernel: Any = "auto", *, step: Any = 3.0, grad_scale: Any = None, **flags: bool) -> list[Tensor]:
    """New parameters, moments and maxima, by the package; `step` may be a list of one a leaf."""
    steps = [torch.as_tensor(x).float() for x in step] if isinstance(step, list) else torch.as_tensor(step).float()
    state = AdamState(steps, at.exp_avg, at.exp_avg_sq, at.max_exp_avg_sq if flags.get("amsgrad") else ())
    hparams = hparams_from(at._asdict(), **flags)
    params, state = adam_update(at.params, at.grads, state, hparams, kernel=kernel, grad_scale=grad_scale)
    return tensors_of((params, state[1:]))


def point_with(numbers: str, *shapes: tuple[int, ...], **options: Any) -> Point:
    """A point with its numbers as tensors, or as numbers that nobody differentiates by."""
    at = make_point(*shapes, **options)
    if numbers == "tensors":
        return at
    floats = {name: getattr(at, name).item() for name in NUMBERS}
    return at._replace(**{**floats, "weight_decay": 0.2 if numbers == "floats" else 0.0})


def tracked(at: Any) -> list[Tensor]:
    return [x.requires_grad_() for x in tensors_of(at)]


def of_tensors(function: Callable[[Point], list[Tensor]], at: Point) -> tuple[Callable[..., Any], list[Tensor]]:
    """`function` of the tensors of `at`, and these, as gradcheck wants them."""
    leaves, treespec = optree.tree_flatten(at)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def of_flat(*flat: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, flat, strict=True))
        return tuple(function(treespec.unflatten([given.get(place, leaf) for place, leaf in enumerate(leaves)])))

    return of_flat, tracked(at)


# First and second derivatives agree with finite differences and with autograd.

# The derivatives do not depend on the kernel.
CASES = [
    ("coupled", "tensors", False, "single"),
    ("decoupled", "tensors", False, "foreach"),
    ("amsgrad", "tensors", False, "fused"),
    ("maximize", "tensors", False, "single"),
    ("all_flags", "tensors", True, "foreach"),
    ("coupled", "floats", False, "fused"),
    ("decoupled", "floats", True, "single"),
    ("maximize", "floats", False, "foreach"),
    ("amsgrad", "floats", False, "single"),
    ("coupled", "no_weight_decay", False, "fused"),
    ("coupled", "steps", False, "single"),
    ("maximize", "steps", True, "foreach"),
]


@pytest.mark.parametrize(
    ("variant", "numbers", "dtype"),
    [(v, "tensors", DOUBLE) for v in VARIANTS]
    + [("decoupled", "floats", DOUBLE), ("all_flags", "tensors", torch.complex128)],
)
def test_first_and_second_derivatives_agree_with_finite_differences(
    variant: str, numbers: str, dtype: torch.dtype
) -> None:
    flags, is_complex = VARIANTS[variant], dtype.is_complex  # for which all differences would take long
    at = point_with(numbers, (2,), *[] if is_complex else [(1, 1)], dtype=dtype, amsgrad=flags.get("amsgrad", False))
    given = of_tensors(partial(updated, **flags), at)
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    gradcheck(*given, check_batched_grad=True, **forward, fast_mode=is_complex)
    orders = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
    gradgradcheck(*given, check_batched_grad=True, **orders, fast_mode=is_complex)


# Large leaves are cut into pieces and small ones joined; neither may be seen.
PIECE = 8
# The first is cut into three, with a rest, the empty one follows a leaf that is cut, and the last is cut evenly.
SIZES = ((2 * PIECE + 3,), (0,), (5,), (PIECE,), (), (3, PIECE // 2), (2, 3), (2, PIECE))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of more than `PIECE` elements are large."""
    monkeypatch.setattr("functional_adam.autodiff.function._PIECE", PIECE)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("variant", "numbers", "per_leaf_step", "kernel"), CASES)
def test_derivatives_of_large_and_small_leaves_agree_with_autograd(
    variant: str, numbers: str, per_leaf_step: bool, kernel: str
) -> None:
    """Where a second derivative may follow and where none may, for cotangents in a batch, and in forward mode."""
    flags, steps = VARIANTS[variant], [3.0 + i for i in range(len(SIZES))]
    steps = [*map(torch.tensor, steps)] if numbers in ("steps", "tensors") else steps
    at = point_with(numbers, *SIZES, amsgrad=flags.get("amsgrad", False))
    at = at._replace(grads=[*map(strided, at.grads)], exp_avg_sq=[*map(transposed, at.exp_avg_sq)])
    given = at, steps if per_leaf_step else steps[0]
    (ours, leaves), (theirs, _) = (
        of_tensors(lambda given, f=f: f(given[0], step=given[1], **flags), given)
        for f in (partial(updated, kernel=kernel), reference)
    )
    outputs, expected = ours(*leaves), theirs(*leaves)
    assert_close(outputs, expected)
    rows = [fixed(outputs, seed) for seed in (1, 2)]
    before = snapshot((rows, leaves))

    def pull(cotangents: Any, outputs: Any = outputs, **options: bool) -> Any:
        return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, **options)

    exact = [pull(row, expected, create_graph=True) for row in rows]
    once, again = pull(rows[0]), pull(rows[0], create_graph=True)
    assert not any(x.requires_grad for x in once)
    if numbers == "no_weight_decay":  # the cotangents of parameters are handed on
        assert [x.data_ptr() for x in once[: len(SIZES)]] == [x.data_ptr() for x in rows[0][: len(SIZES)]]
    assert all(x.requires_grad or numbers != "tensors" for x in again)
    assert_close((once, again), (exact[0], exact[0]))
    values, directions = tuple(x.detach() for x in leaves), tuple(fixed(leaves))
    by_func = vmap(vjp(ours, *values)[1])
    mapped = [partial(pull, is_grads_batched=True, create_graph=x) for x in (False, True)]
    for pull_batch in (*mapped, vmap(pull), vmap(partial(pull, create_graph=True)), by_func):
        assert_close(pull_batch(stacked(rows)), stacked(exact))
    assert_close(jvp(ours, values, directions), jvp(theirs, values, directions))
    assert_unchanged((rows, leaves), before)

    # Second derivatives, in which large terms cancel; those by the steps pass through float32.
    precise = [i for i, x in enumerate(leaves) if x.dtype is DOUBLE]
    slopes = (weighted([x[i] for i in precise]) for x in (again, exact[0]))
    second, expected = (torch.autograd.grad(slope, leaves, materialize_grads=True) for slope in slopes)
    assert_close(second, expected, FLOAT)
    second, expected = ([x[i] for i in precise] for x in (second, expected))
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-10)
    tangents = [partial(jvp, f, tangents=directions) for f in (ours, theirs)]
    second, expected = (grad(lambda *at, f=f: weighted(f(at)[1]), argnums=tuple(precise))(*values) for f in tangents)
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-10)


def test_derivatives_of_large_float32_leaves_are_summed_without_loss() -> None:
    at = make_point((2**18 + 3,), (3,), (2, 2**17), dtype=FLOAT)
    wide = torch_pytree.tree_map(torch.Tensor.double, at)
    outputs, pull = vjp(lambda at: updated(at, amsgrad=True), at)
    cotangents = fixed(outputs)
    expected = vjp(lambda at: reference(at, amsgrad=True), wide)[1]([x.double() for x in cotangents])[0]
    assert_close(pull(cotangents)[0], expected, FLOAT)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("step", [0.0, 1000.0])
def test_derivatives_of_float32_leaves_hold_over_the_whole_range(maximize: bool, step: float) -> None:
    sizes = torch.tensor([0.0, 1e-30, 1e-20, 1e-12, 1e-8, 1e-4, 1.0, 1e4, 1e12, 1e15])
    g, m = sizes.clone(), -0.5 * sizes
    at = Point([torch.ones(10)], [g], [m], [m * m], [], 0.1, 0.9, 0.99, 1e-8, 0.0)
    at_wide = at._replace(**{name: [getattr(at, name)[0].double()] for name in LEAVES[:4]})
    # float64 holds every square, so that its derivatives are those to expect.
    results = []
    for point, function in ((at, updated), (at_wide, reference)):
        leaves = tracked(point)
        outputs = function(point, maximize=maximize, step=step)
        results.append(torch.autograd.grad([x.sum() for x in outputs], leaves))
    for name, got, expected in zip(LEAVES[:4], *results, strict=True):
        assert got.isfinite().all(), name
        # Below 1e-20 the square is nothing in float32, and the derivative of its root is taken as 0.
        is_large = sizes >= 1e-18
        torch.testing.assert_close(got[is_large].double(), expected[is_large], rtol=1e-4, atol=1e-30)


# What runs in a derivative.


class Operations(TorchDispatchMode):
    """The operations that run under it, with their arguments and what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ran.append((func.overloadpacket, args, result))
        return result


def operations(*shapes: tuple[int, ...], numbers: str, mode: str) -> list[tuple[Any, int]]:
    """The operations on leaves in one derivative of an update of `shapes`, with the sizes of their results."""
    at = point_with(numbers, *shapes, amsgrad=False)
    seen = Operations()
    if mode == "forward":
        with forward_ad.dual_level():
            duals = torch_pytree.tree_map_only(Tensor, lambda x: forward_ad.make_dual(x, torch.ones_like(x)), at)
            with seen:
                updated(duals, "fused")
    else:
        leaves, outputs = tracked(at), updated(at, "fused")
        with seen:
            torch.autograd.grad(outputs, leaves, fixed(outputs), create_graph=mode == "reverse_twice")
    return [(func, x.numel()) for func, _, x in seen.ran if isinstance(x, Tensor) and x.dim()]


def products(*shapes: tuple[int, ...], numbers: str, mode: str) -> list[int]:
    """The sizes of all products in one derivative of an update of leaves of `shapes`."""
    multiply = torch.ops.aten.mul, torch.ops.aten.mul_
    return [size for func, size in operations(*shapes, numbers=numbers, mode=mode) if func in multiply]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("numbers", ["tensors", "floats"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_small_leaves_are_joined_and_large_ones_cut(numbers: str, mode: str) -> None:
    few, many = (products(*[(1,)] * count, numbers=numbers, mode=mode) for count in (2, PIECE))
    assert [PIECE // 2 * size for size in few] == many
    half = PIECE // 2
    for sizes, expected in (
        ([half, half, half], [PIECE, half]),
        ([half, half + 1], [half, half + 1]),
        ([2 * PIECE + 1], [PIECE, PIECE, 1]),
    ):
        got = products(*((size,) for size in sizes), numbers=numbers, mode=mode)
        assert got == [size for size in expected for _ in few]
    alone = {func for func, _ in operations((PIECE,), numbers=numbers, mode=mode)}
    assert alone
    assert not alone & {torch.ops.aten.cat, torch.ops.aten.slice, torch.ops.aten._to_copy}
    assert torch.ops.aten.clone not in alone or mode == "forward"  # in which the kernel gets copies


@pytest.mark.usefixtures("small_pieces")
def test_a_derivative_that_none_may_follow_takes_half_the_products_and_writes_to_its_place() -> None:
    last, full = (products((2, 3), numbers="floats", mode=mode) for mode in ("reverse", "reverse_twice"))
    assert 0 < 2 * len(last) <= len(full)
    cut = {func for func, _ in operations((2 * PIECE + 1,), numbers="floats", mode="reverse")}
    assert cut & {torch.ops.aten.slice, torch.ops.aten.cat} == {torch.ops.aten.slice}


@pytest.mark.parametrize(
    "dtypes",  # of parameters, gradients, first moments and second moments
    [(x,) * 4 for x in (BFLOAT16, HALF, FLOAT)] + [(BFLOAT16, HALF, HALF, HALF), (BFLOAT16, DOUBLE, FLOAT, FLOAT)],
    ids=str,
)
@pytest.mark.parametrize(("variant", "numbers"), [("coupled", "floats"), ("all_flags", "tensors")])
@pytest.mark.parametrize("shapes", [((40,),), ((3,), (6, 6))], ids=["alone", "joined"])
def test_derivatives_have_the_dtypes_of_their_leaves_and_are_rounded_once(
    variant: str, numbers: str, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]
) -> None:
    flags = VARIANTS[variant]
    at = point_with(numbers, *shapes, amsgrad=flags.get("amsgrad", False))
    columns = [[x.to(d) for x in column] for column, d in zip(at[:5], (*dtypes, dtypes[3]), strict=True)]
    of_columns, leaves = of_tensors(lambda columns: updated(Point(*columns, *at[5:]), **flags), columns)
    exactly, _ = of_tensors(lambda columns: reference(Point(*columns, *at[5:]), **flags), columns)
    values, directions = tuple(x.detach() for x in leaves), tuple(fixed(leaves))
    wide, wide_directions = ([x.double() for x in tensors] for tensors in (values, directions))

    outputs, cotangents = of_columns(*leaves), fixed(of_columns(*leaves))
    assert [x.dtype for x in outputs] == [x.dtype for i, x in enumerate(leaves) if i // len(shapes) != 1]
    expected = vjp(exactly, *wide)[1](tuple(x.double() for x in cotangents))
    for got in (torch.autograd.grad(outputs, leaves, cotangents), vjp(of_columns, *values)[1](cotangents)):
        assert [x.dtype for x in got] == [x.dtype for x in leaves]
        assert_rounded_once(got, expected)
    tangents = jvp(of_columns, values, directions)[1]
    assert [x.dtype for x in tangents] == [x.dtype for x in outputs]
    assert_rounded_once(tangents, jvp(exactly, tuple(wide), tuple(wide_directions))[1])


@pytest.mark.parametrize("by", ["number", "tensor", "differentiated"])
@pytest.mark.parametrize("t", [0.0, 3.0])
def test_a_beta_of_zero_lets_the_step_move_nothing(by: str, t: float) -> None:
    """The correction is then 1 at every step: the derivatives of 0^t count as 0, where they hold log(0)."""
    zero: Any = 0.0 if by == "number" else torch.tensor(0.0, dtype=DOUBLE, requires_grad=by == "differentiated")
    step = torch.tensor(t, requires_grad=True)
    moved = updated(make_point((3,), amsgrad=False)._replace(beta1=zero, beta2=zero), step=step)[0].sum()
    [first] = torch.autograd.grad(moved, step, create_graph=True)
    assert first.item() == 0.0
    if by == "differentiated":
        second = torch.autograd.grad(first + 0 * step + 0 * zero.float(), (step, zero))
        assert all(x.isfinite() for x in second)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "exp_avg", "grads"])
def test_what_was_written_to_before_the_backward_pass_is_noticed(name: str) -> None:
    at = make_point((3,), amsgrad=False)
    leaves, outputs = tracked(at), updated(at)
    with torch.no_grad():
        tensors_of(getattr(at, name))[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, leaves, fixed(outputs))


def test_a_number_is_let_go_with_the_graph() -> None:
    at = make_point((3,), amsgrad=False)
    lr = at.lr.clone().requires_grad_()
    number = weakref.ref(lr)
    [leaf] = tracked(at.params)
    outputs = updated(at._replace(lr=lr))
    del lr
    assert number() is not None
    torch.autograd.grad(outputs[0].sum(), leaf)
    del outputs
    assert number() is None


@pytest.mark.parametrize("kernel", ["single", "foreach"])
def test_derivatives_of_leaves_without_values_read_no_number(kernel: Any) -> None:
    param = torch.ones(3, device="meta", requires_grad=True)
    hparams = AdamHparams(lr=torch.tensor(0.1, device="meta", requires_grad=True))
    new, _ = adam_update(param, param.detach(), adam_init(param, hparams), hparams, kernel=kernel)
    got = torch.autograd.grad(new, (param, hparams.lr), torch.empty_like(new))
    assert [(x.device.type, x.shape) for x in got] == [("meta", (3,)), ("meta", ())]


# Training runs as differentiable functions, of hyperparameters that are one tree.


def our_step(p: Tensor, g: Tensor, state: Any, hparams: AdamHparams, _: int) -> Any:
    return adam_update(p, g, state or adam_init(p, hparams), hparams)


def textbook_step(p: Tensor, g: Tensor, state: Any, h: AdamHparams, step: int) -> Any:
    m, v, u = state or [torch.zeros_like(p)] * 3
    at = Point([p], [g], [m], [v], [u], h.lr, *h.betas, h.eps, h.weight_decay)
    p, *state = reference(at, step=float(step), amsgrad=True, decoupled_weight_decay=True)
    return p, state


def final_loss(update: Callable[..., Any], by: str, p: Tensor, hparams: AdamHparams, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a regression after training."""

    def loss(p: Tensor) -> Tensor:
        return ((torch.tanh(x @ p) - y) ** 2).mean()

    state = None
    for step in range(6):
        g = torch.autograd.grad(loss(p), p, create_graph=True)[0] if by == "autograd" else grad(loss)(p)
        p, state = update(p, g, state, hparams, step)
    return loss(p)


@pytest.mark.parametrize("by", ["func", "autograd", "vmap"])
def test_hypergradients_and_meta_gradients_through_a_run_agree_with_the_textbook(by: str) -> None:
    start, x, y = make_point((4, 2), (8, 4), (8, 2)).params
    tasks = [(x, y), (x.flip(0) * 0.7, y + 1.0), (x + 0.3, -y)]
    lr, beta1, beta2, eps, weight_decay = torch.tensor([0.05, 0.8, 0.95, 0.01, 0.1], dtype=DOUBLE).unbind()
    options = {"eps": eps, "weight_decay": weight_decay, "amsgrad": True, "decoupled_weight_decay": True}
    at = start, AdamHparams(lr=lr, betas=(beta1, beta2), **options)

    def total(update: Callable[..., Any], by: str, start: Tensor, hparams: AdamHparams) -> Tensor:
        if by == "vmap":
            run = partial(final_loss, update, "func", start, hparams)
            return vmap(run)(*map(torch.stack, zip(*tasks, strict=True))).sum()
        return torch.stack([final_loss(update, by, start, hparams, *task) for task in tasks]).sum()

    got: Any = None if by == "autograd" else grad(partial(total, our_step, by), argnums=(0, 1))(*at)
    assert got is None or (type(got[1]) is AdamHparams and got[1].amsgrad and not got[1].maximize)
    at = torch_pytree.tree_map(lambda x: x.clone().requires_grad_(), at)
    leaves = tensors_of(at)
    got = tensors_of(got) if got else [*torch.autograd.grad(total(our_step, by, *at), leaves)]
    expected = torch.autograd.grad(total(textbook_step, "autograd", *at), leaves)
    assert min(float(x.abs().max()) for x in expected) > 1e-3
    torch.testing.assert_close(got, [*expected], rtol=1e-9, atol=1e-12)


# Where the equations have no derivative, or two.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("numbers", "lr"), [("tensors", 0.1), ("tensors", 0.0), ("floats", 0.1)])
def test_a_first_step_has_finite_derivatives_and_the_value_of_its_kernel(variant: str, numbers: str, lr: float) -> None:
    flags = VARIANTS[variant]
    number = partial(torch.tensor, dtype=DOUBLE) if numbers == "tensors" else float
    at = point_with(numbers, (5,), amsgrad=flags.get("amsgrad", False))._replace(lr=number(lr), eps=number(1e-8))
    zeros = {name: [torch.zeros_like(x) for x in getattr(at, name)] for name in LEAVES[2:]}
    at = at._replace(grads=[torch.tensor([0.0, 1e-3, -1.0, 1e-200, -1e-200], dtype=DOUBLE)], **zeros)
    run, tensors = of_tensors(partial(updated, step=0.0, **flags), at)
    with torch.no_grad():
        expected = run(*tensors)
    outputs = run(*tensors)
    assert_equal(outputs, expected)
    once = torch.autograd.grad(outputs, tensors, fixed(outputs), retain_graph=True)
    first = torch.autograd.grad(outputs, tensors, fixed(outputs), create_graph=True)
    assert all(x.isfinite().all() for x in first)
    assert_close(once, first)
    again = [x for x in first if x.requires_grad]
    second = torch.autograd.grad(again, tensors, fixed(again), allow_unused=True)
    assert all(x is None or x.isfinite().all() for x in second)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in tensors]
        assert all(forward_ad.unpack_dual(x).tangent.isfinite().all() for x in run(*duals))


def test_amsgrad_ties_share_the_derivative_evenly() -> None:
    # v' = 0.5 * 2 + 0.5 * 2 * 2 = 3 exactly: below, at and above the maximum so far.
    def tensor(*values: float) -> list[Tensor]:
        return [torch.tensor(values, dtype=DOUBLE)]

    numbers = [torch.tensor(x, dtype=DOUBLE) for x in (0.1, 0.5, 0.5, 0.25, 0.0)]
    at = Point(tensor(1, 1, 1), tensor(2, 2, 2), tensor(1, 1, 1), tensor(2, 2, 2), tensor(4, 3, 2), *numbers)
    ours, theirs = partial(updated, amsgrad=True), partial(reference, amsgrad=True)
    outputs, pull = vjp(ours, at)
    assert_equal(outputs[-1], *tensor(4, 3, 3))

    # Only the maximum is pulled back: u gets 1, 1/2 and 0 of it, and dv'/dv = 1/2 of the rest goes to v.
    [got] = pull([*map(torch.zeros_like, outputs[:-1]), torch.ones_like(outputs[-1])])
    assert_equal(got.max_exp_avg_sq, tensor(1, 0.5, 0))
    assert_equal(got.exp_avg_sq, tensor(0, 0.25, 0.5))
    assert_equal(got.grads, tensor(0, 1, 2))

    # And through the parameter, both ways, as torch.maximum does.
    cotangents, directions = fixed(outputs), fixed(at)
    assert_close(pull(cotangents), vjp(theirs, at)[1](cotangents))
    assert_close(jvp(ours, (at,), (directions,)), jvp(theirs, (at,), (directions,)))


# What runs, and what is kept.

# Operations that each kernel has and no other, nor a derivative.
OPERATIONS = {
    torch.ops.aten._fused_adam_: "fused",
    torch.ops.aten._fused_adamw_: "fused",
    torch.ops.aten._foreach_sqrt_: "foreach",
    torch.ops.aten.lerp_: "single",
}


def kernel_calls(run: Callable[[], Any]) -> tuple[Any, list[tuple[str, list[tuple[int, ...]]]]]:
    """What `run` returns, and the kernels that it calls, with the shapes of leaves: the single one takes one by one."""
    with Operations() as seen:
        result = run()
    calls = [(OPERATIONS[func], args[0]) for func, args, _ in seen.ran if func in OPERATIONS]
    return result, [(name, [(*x.shape,) for x in tensors_of(leaves)]) for name, leaves in calls]


@each_kernel
def test_the_kernel_computes_an_update_and_its_value_whoever_watches(kernel: Any) -> None:
    at = make_point((37,), dtype=FLOAT)
    state, param = AdamState(torch.tensor(3.0), at.exp_avg[0], at.exp_avg_sq[0]), at.params[0]
    pair, explained = torch.stack([param, param]), []

    def run(p: Tensor, lr: Any = 0.1) -> Tensor:
        arguments = (p, at.grads[0], state, AdamHparams(lr=lr, weight_decay=0.1))
        explained.append(explain(*arguments, kernel=kernel).computed_by)
        return adam_update(*arguments, kernel=kernel)[0]

    slope_and_value = grad(lambda x: (run(x).sum(), run(x)), has_aux=True)
    for watched, compare in (
        (lambda: torch.no_grad()(run)(param.clone().requires_grad_()), assert_same_bits),
        (lambda: run(param.clone().requires_grad_()), assert_same_bits),
        (lambda: jvp(run, (param,), (param,))[0], assert_same_bits),
        (lambda: jvp(slope_and_value, (param,), (param,))[0][1], assert_same_bits),
        # The fused kernel rounds by the position of an element in memory.
        (lambda: vmap(run)(pair)[1], assert_close),
        (lambda: vmap(run)(pair, torch.tensor([0.2, 0.1]))[1], assert_close),
        (lambda: vmap(slope_and_value)(pair)[1][1], assert_close),
    ):
        value, calls = kernel_calls(watched)
        assert {name for name, _ in calls} == {kernel}
        compare(value, run(param))
    assert {*explained} == {kernel}


def test_no_more_is_kept_for_backward_than_it_reads() -> None:
    at = make_point((100,), (10, 10), amsgrad=True)._replace(lr=0.1, beta1=0.9, beta2=0.99, eps=0.01)
    leaves = tracked(at.grads)
    lr, rate = (torch.tensor(x, dtype=DOUBLE, requires_grad=True) for x in (0.1, 0.2))
    for column_count, variant, numbers in (
        # The gradient and the two moments; the maximum with amsgrad.
        (3, "coupled", {"weight_decay": 0.0}),
        (3, "coupled", {"weight_decay": 0.0, "lr": lr}),
        (3, "maximize", {"weight_decay": 0.0}),
        (4, "amsgrad", {"weight_decay": 0.0}),
        # Parameters only where a weight decay needs them.
        (3, "decoupled", {"weight_decay": 0.2}),
        (4, "decoupled", {"weight_decay": 0.2, "lr": lr}),
        (4, "coupled", {"weight_decay": 0.2}),
        (4, "coupled", {"weight_decay": rate}),
    ):
        saved: list[Tensor] = []
        with saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            outputs = updated(at._replace(**numbers), **VARIANTS[variant])
        assert all(x.requires_grad for x in outputs)
        assert sum(x.nbytes for x in saved if x.dim()) <= column_count * sum(x.nbytes for x in leaves)


def test_checkpoints_and_hooks_on_saved_tensors_change_no_gradient() -> None:
    function, leaves = of_tensors(partial(updated, amsgrad=True), make_point((3,), (2, 2)))

    def second(loss: Tensor) -> Any:
        once = torch.autograd.grad(loss, leaves, create_graph=True)
        return once, torch.autograd.grad(weighted(once), leaves)

    expected = second(weighted(function(*leaves)))
    checkpointed = weighted(checkpoint(function, *leaves, use_reentrant=False))
    assert_equal(torch.autograd.grad(checkpointed, leaves), expected[0])
    packed = []
    for hooks in (save_on_cpu(), saved_tensors_hooks(lambda x: packed.append(x.shape) or x.clone(), torch.clone)):
        with hooks:
            hooked, in_hooks = weighted(function(*leaves)), second(weighted(function(*leaves)))
        assert_equal(torch.autograd.grad(hooked, leaves), expected[0])
        assert_close(in_hooks, expected)
    assert packed


# torch.func.vmap is a loop.

SIZE = 3
SMALL = ((2, 2), (4,))
MANY = ((2, 2**12), (2**13,))  # so many elements that members are worth a place each in a list of leaves
BATCHED: dict[str, tuple[str, ...]] = {
    "members": LEAVES,
    "grads_alone": ("grads",),
    "moments_alone": LEAVES[2:],
    "step_alone": ("step",),
    "lr_alone": ("lr",),
    "numbers_alone": NUMBERS,
    **{x: (*LEAVES, x) for x in ("step", "lr", "eps", "weight_decay", "found_inf", "grad_scale")},
    "equal_steps": (*LEAVES, "step"),
    "numbers": (*LEAVES, *NUMBERS),
    "numbers_and_step": (*LEAVES, "step", *NUMBERS),
    "everything": (*LEAVES, "step", *NUMBERS, "found_inf", "grad_scale"),
}
DIMS = {"params": -1, "grads": 1, "exp_avg": -1, "exp_avg_sq": 0, "max_exp_avg_sq": 0}
MEMBER_SCALARS = {
    "lr": [0.1, 0.0, 0.2],
    "beta1": [0.9, 0.0, 0.5],
    "beta2": [0.99, 0.5, 0.0],
    "eps": [1e-8, 0.1, 1.0],
    "weight_decay": [0.0, 0.1, 0.3],
    "found_inf": [0.0, float("nan"), 0.0],
    "grad_scale": [1.0, 2.0, 64.0],
}


def make_batch(
    case: str, shapes: tuple[tuple[int, ...], ...] = SMALL, *, per_leaf_step: bool = False, **flags: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `update_member` by name, and the dimensions that members lie along, each another."""
    at = make_point(*((SIZE, *shape) for shape in shapes), amsgrad=flags.get("amsgrad", False))
    columns: dict[str, Any] = {**dict(zip(LEAVES, at, strict=False)), "step": torch.tensor([0.0, 2.0, 500.0])}
    columns |= {name: torch.tensor(values, dtype=DOUBLE) for name, values in MEMBER_SCALARS.items()}
    if "found_inf" in BATCHED[case]:
        # A member that is skipped stands still and has finite derivatives.
        columns["grads"][0][1] = torch.tensor([float("inf"), float("nan")]).repeat(shapes[0][-1] // 2)
    if case == "equal_steps":
        columns["step"] = torch.full((SIZE,), 7.0)
    if per_leaf_step:
        columns["step"] = [columns["step"] + i for i in range(len(shapes))]
    given: dict[str, Any] = {"weight_decay": 0.0}
    dims: dict[str, Any] = {"weight_decay": None}
    for name, column in columns.items():
        dim = DIMS.get(name, 0) if name in BATCHED[case] else None
        if dim is not None or name not in ("weight_decay", "found_inf", "grad_scale"):
            members = [x[0] if dim is None else x.movedim(0, dim).contiguous() for x in tensors_of(column)]
            is_list = isinstance(column, list)
            given[name], dims[name] = (members, [dim] * len(members)) if is_list else (members[0], dim)
    return given, dims


def update_member(given: dict[str, Any], kernel: Any = "auto", **flags: bool) -> Any:
    options = {name: given[name] for name in ("found_inf", "grad_scale") if name in given}
    maxima = given["max_exp_avg_sq"] if flags.get("amsgrad") else ()
    state = AdamState(given["step"], given["exp_avg"], given["exp_avg_sq"], maxima)
    return adam_update(given["params"], given["grads"], state, hparams_from(given, **flags), kernel=kernel, **options)


def in_dtype(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: [x.to(dtype) for x in value] if name in LEAVES else value for name, value in given.items()}


def looped(run: Callable[..., Any], *arguments: Any, in_dims: tuple[Any, ...]) -> Any:
    """`vmap(run, in_dims)(*arguments)` as a Python loop."""

    def member(index: int) -> Any:
        pick = partial(lambda x, dim, index: x if dim is None else x.select(dim, index), index=index)
        return torch_pytree.tree_map(pick, arguments, in_dims)

    return stacked([run(*member(index)) for index in range(SIZE)])


@pytest.mark.parametrize("case", BATCHED)
@pytest.mark.parametrize(
    ("variant", "per_leaf_step", "kernel", "shapes", "dtype", "weight_decay"),
    [
        ("coupled", False, "fused", SMALL, DOUBLE, 0.0),
        ("all_flags", True, "single", SMALL, DOUBLE, 0.0),
        ("maximize", False, "foreach", SMALL, FLOAT, 0.2),
        ("coupled", True, "foreach", MANY, DOUBLE, 1.0),
        ("all_flags", False, "fused", MANY, FLOAT, 0.2),
        ("maximize", False, "single", MANY, FLOAT, 1.0),
    ],
)
def test_vmap_equals_a_loop(
    case: str, variant: str, per_leaf_step: bool, kernel: str, shapes: Any, dtype: torch.dtype, weight_decay: float
) -> None:
    flags = VARIANTS[variant]
    given, dims = make_batch(case, shapes, per_leaf_step=per_leaf_step, **flags)
    given = in_dtype({**given, "weight_decay": given["weight_decay"] + weight_decay}, dtype)
    run = partial(update_member, kernel=kernel, **flags)
    before = snapshot(given)
    got = vmap(run, in_dims=(dims,))(given)
    assert_close(got, looped(run, given, in_dims=(dims,)))
    assert {x.dtype for x in tensors_of((got[0], got[1][1:]))} == {dtype}
    assert_unchanged(given, before)
    without_members = torch_pytree.tree_map(lambda x, dim: x if dim is None else x.narrow(dim, 0, 0), given, dims)
    assert_equal(vmap(run, in_dims=(dims,))(without_members), torch_pytree.tree_map(lambda x: x[:0], got))


def loss(at: dict[str, Any], rest: dict[str, Any], **flags: bool) -> Tensor:
    """A number of a member, to be differentiated by `at`."""
    params, state = update_member({**at, **rest}, **flags)
    return weighted(tensors_of((params, state[1:])))


def parted(tree: dict[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {name: tree[name] for name in names}, {name: x for name, x in tree.items() if name not in names}


def along_ones(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The derivative of `function` of (at, rest) in forward mode."""
    return lambda at, rest: jvp(lambda x: function(x, rest), (at,), (torch_pytree.tree_map(torch.ones_like, at),))[1]


# Without members that differ in one number only: derivatives of them take one way.
DIFFERENTIATED = [case for case in BATCHED if case not in ("lr", "eps", "weight_decay")]


@pytest.mark.parametrize("case", DIFFERENTIATED)
@pytest.mark.parametrize("mode", [grad, along_ones, hessian, "outside"])
def test_derivatives_of_members_equal_those_of_a_loop(case: str, mode: Any) -> None:
    given, dims = make_batch(case, per_leaf_step=case in ("step", "numbers_and_step"), amsgrad=True)
    given["weight_decay"] = torch.as_tensor(given["weight_decay"], dtype=DOUBLE)
    # Not by step, which passes through float32, nor by found_inf, which may be NaN.
    names = ("grads", *NUMBERS) if mode is hessian else (*LEAVES, *NUMBERS)
    (at, rest), in_dims = parted(given, names), parted(dims, names)
    function = partial(loss, amsgrad=True)
    if mode != "outside":
        run = mode(function)
        assert_close(vmap(run, in_dims=in_dims)(at, rest), looped(run, at, rest, in_dims=in_dims))
        return
    ways = (vmap(function, in_dims=in_dims), partial(looped, function, in_dims=in_dims))
    totals = [lambda at, way=way: way(at, rest).sum() for way in ways]
    assert_close(*(grad(total)(at) for total in totals))
    leaves = tracked(at)
    assert_close(*(torch.autograd.grad(total(at), leaves) for total in totals))


TOGETHER, APART, BY_FOREACH = "together", "apart", "by foreach"


@each_kernel
@pytest.mark.parametrize(
    ("case", "dtype", "shapes", "way", "sets"),
    [
        ("equal_steps", FLOAT, MANY, TOGETHER, 1),
        ("lr", FLOAT, MANY, TOGETHER, 1),
        ("weight_decay", FLOAT, MANY, TOGETHER, 1),
        ("step", FLOAT, MANY, APART, 1),
        ("eps", FLOAT, MANY, APART, SIZE),
        ("everything", FLOAT, MANY, APART, SIZE),
        # A direction in a half type would be rounded before its length is applied.
        ("lr", BFLOAT16, MANY, APART, SIZE),
        ("step", FLOAT, SMALL, BY_FOREACH, 1),
        ("eps", DOUBLE, SMALL, BY_FOREACH, 1),
        ("everything", FLOAT, SMALL, BY_FOREACH, 1),
        ("eps", BFLOAT16, SMALL, APART, SIZE),
    ],
)
def test_members_are_taken_apart_only_where_a_kernel_cannot_take_them_together(
    kernel: str, case: str, dtype: torch.dtype, shapes: Any, way: str, sets: int
) -> None:
    """Where they are, those with an equal set of numbers are together."""
    given, dims = make_batch(case, shapes)
    run = vmap(partial(update_member, kernel=kernel), in_dims=(dims,))
    _, calls = kernel_calls(lambda: run(in_dtype(given, dtype)))
    expected = [*shapes] * SIZE if way == APART else [(SIZE, *shape) for shape in shapes]
    kernel = "foreach" if way == BY_FOREACH else kernel
    assert {name for name, _ in calls} == {kernel}
    assert [shape for _, leaves in calls for shape in leaves] == expected
    assert len(calls) == (len(expected) if kernel == "single" else sets)


@pytest.mark.parametrize(
    ("dtype", "per_leaf_step", "size", "is_differentiated"),
    [
        *((DOUBLE, *case) for case in ((False, SIZE, False), (False, SIZE, True), (True, SIZE, True))),
        (DOUBLE, True, 1, False),
        (DOUBLE, False, 1, True),
        (BFLOAT16, False, SIZE, False),
        (torch.complex64, True, SIZE, False),
    ],
)
def test_members_that_start_together_are_trained_together(
    dtype: torch.dtype, per_leaf_step: bool, size: int, is_differentiated: bool
) -> None:
    """One call of the kernel a step, and one step in memory, also within a derivative through the run."""
    shapes, hparams = [(size, *shape) for shape in SMALL], AdamHparams(lr=0.1, weight_decay=0.1, amsgrad=True)
    start, *gradients = (make_point(*shapes, dtype=dtype, seed=seed).params for seed in range(4))
    init = partial(adam_init, hparams=hparams, per_leaf_step=per_leaf_step)

    def trained(init: Any, step: Any, params: Any, gradients: Any) -> Any:
        state = init(params)
        for grads in gradients:
            params, state = step(params, [g * p for g, p in zip(grads, params, strict=True)], state)
        return sum(p.abs().square().sum() for p in params), (params, state)

    update = partial(adam_update, hparams=hparams)
    together, alone = partial(trained, vmap(init), vmap(update)), partial(trained, init, update)
    if is_differentiated:
        together, alone = (grad(run, has_aux=True) for run in (together, alone))
    (total, got), calls = kernel_calls(lambda: together(start, gradients))
    assert calls == [("fused", [(*x, 2) if dtype.is_complex else x for x in shapes])] * 3
    steps = tensors_of(got[1].step)
    assert all(x.tolist() == [3.0] * size and (x.stride() == (0,) or size == 1) for x in steps)
    members = [torch_pytree.tree_map(lambda x, i=i: x[i], (start, gradients)) for i in range(size)]
    totals, expected = zip(*(alone(*member) for member in members), strict=True)
    assert_close(got, stacked(expected))
    assert_close(total, stacked(totals) if is_differentiated else sum(totals), dtype)


def test_a_step_that_members_share_in_memory_is_differentiated_member_by_member() -> None:
    params, weights = torch.ones(3, 2), torch.tensor([1.0, 2.0, 3.0])
    state = vmap(lambda p: adam_init(p, AdamHparams()))(params)
    assert state.step.stride() == (0,)

    def weighted_steps(step: Tensor) -> Tensor:
        new = vmap(lambda p, s: adam_update(p, p, s, AdamHparams())[1].step)(params, state._replace(step=step))
        return (new * weights).sum()

    assert_equal(grad(weighted_steps)(state.step), weights)


@pytest.mark.parametrize("inner", ["members", "step", "numbers", "everything"])
@pytest.mark.parametrize("run", [loss, grad(loss)], ids=["value", "grad"])
def test_nested_maps_equal_a_double_loop(inner: str, run: Callable[..., Any]) -> None:
    given, dims = make_batch(inner)
    names = ("lr", "grads")
    (at, rest), in_dims = parted(given, names), parted(dims, names)
    # The outer map: learning rates, and other gradients.
    outer = {"lr": torch.stack([at["lr"], at["lr"] * 0.5]), "grads": [torch.stack([x, x.flip(1)]) for x in at["grads"]]}
    got = vmap(vmap(run, in_dims=in_dims), in_dims=(0, None))(outer, rest)
    members = [torch_pytree.tree_map(lambda x, i=i: x[i], outer) for i in range(2)]
    assert_close(got, stacked([looped(run, member, rest, in_dims=in_dims) for member in members]))


def test_states_of_nested_maps_continue() -> None:
    """A state made under two maps, and one made under the inner map and then shared or stacked, take several steps."""
    params, hparams = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), AdamHparams(lr=0.1)
    made = vmap(vmap(lambda p: adam_init(p, hparams)))(params)
    assert made.step.stride() == (0, 0)
    for step in (made.step, torch.zeros(3).expand(2, 3), torch.zeros(2, 1).expand(2, 3)):
        new, state = params, made._replace(step=step)
        expected, flat = params, adam_init(params, hparams)
        for _ in range(3):
            new, state = vmap(vmap(lambda p, s: adam_update(p, p, s, hparams)))(new, state)
            expected, flat = adam_update(expected, expected, flat, hparams)
        assert_close((new, state.exp_avg), (expected, flat.exp_avg))
        assert_equal(state.step, torch.full((2, 3), 3.0))


def test_scales_of_members_may_be_beyond_their_half_type() -> None:
    param, gradient = torch.linspace(-1, 1, 5).half(), torch.linspace(1e4, 6e4, 5).half()
    state, scales = adam_init(param, AdamHparams()), torch.tensor([2.0**16, 2.0**17])

    def run(scale: Tensor) -> Tensor:
        return adam_update(param, gradient, state, AdamHparams(), grad_scale=scale)[1].exp_avg

    expected = torch.stack([run(scale) for scale in scales])
    assert (expected > 0).all()
    assert_equal(vmap(run)(scales), expected)


@each_kernel
def test_any_real_number_counts_at_its_value(kernel: Any) -> None:
    given = AdamHparams(lr=Fraction(1, 1000), eps=Fraction(1, 1000), weight_decay=np.float32(0.1))
    plain = AdamHparams(lr=1e-3, eps=1e-3, weight_decay=float(np.float32(0.1)))
    param = torch.full((2,), 1e3, dtype=DOUBLE)
    expected = adam_update(param, param.clone(), adam_init(param, plain), plain, kernel=kernel)
    for donate in (False, True):
        state = adam_init(param, given)
        assert_equal(adam_update(param, param.clone(), state, given, kernel=kernel, donate=donate), expected)


# Empty leaves, and no members.


@pytest.mark.parametrize("shapes", [((0,),), ((2, 0),), ((0, 3), (2,), (0,))], ids=str)
def test_jacobians_of_and_beside_empty_leaves_are_those_of_the_textbook(shapes: tuple[tuple[int, ...], ...]) -> None:
    at = make_point(*shapes)
    ours, theirs = (lambda p, f=f: f(at._replace(params=p), amsgrad=True) for f in (updated, reference))
    for derivative in (jacrev, jacfwd, hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        assert_close(derivative(ours)(at.params), derivative(theirs)(at.params))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT16, torch.complex64], ids=str)
def test_derivatives_of_no_members_are_none(dtype: torch.dtype) -> None:
    def total(p: Tensor) -> Tensor:
        hparams = AdamHparams(lr=0.1, weight_decay=0.1, amsgrad=True)
        return adam_update(p, p, adam_init(p, hparams), hparams)[0].abs().square().sum()

    members = torch.ones((2, 3), dtype=dtype)
    for member in (
        grad(total),
        grad(lambda p: grad(total)(p).abs().square().sum()),
        lambda p: jvp(grad(total), (p,), (p,)),
        lambda p: vmap(grad(total))(torch.stack([p, 2 * p])),
    ):
        none, some = vmap(member)(members[:0]), vmap(member)(members)
        assert_equal(none, optree.tree_map(lambda x: x[:0], some))
