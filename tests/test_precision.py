"""Moments in a dtype of their own and float32 masters of low-precision parameters: the numbers are those of float32."""

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
from tests.oracles import KERNELS, numpy_adam, torch_adam
from tests.strategies import random_tensor
from tests.tolerances import assert_close, assert_equal, assert_rounded_once

# torch warns once in a process, in whichever test comes first.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

HALVES = (torch.bfloat16, torch.float16)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "coupled_amsgrad": {"weight_decay": 0.1, "amsgrad": True},
    "decoupled_maximize": {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    "all": {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True, "amsgrad": True},
}
NONE: Any = ()

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_donate = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
each_half = pytest.mark.parametrize("half", HALVES, ids=["bfloat16", "float16"])
each_option = pytest.mark.parametrize("options", OPTIONS)


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


def clone(tree: Any) -> Any:
    return optree.tree_map(torch.clone, tree)


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


def snapshot(tree: Any) -> list[tuple[Any, ...]]:
    return [(x.data_ptr(), x._version, x.dtype, x.clone()) for x in optree.tree_leaves(tree)]


def assert_unchanged(tree: Any, before: list[tuple[Any, ...]]) -> None:
    for (*now, value), (*then, old) in zip(snapshot(tree), before, strict=True):
        assert now == then
        assert torch.equal(value, old)


# What is kept in which dtype.


@each_half
def test_moments_have_the_dtype_of_their_parameters_unless_chosen(half: torch.dtype):
    params, hparams = make_mixed() | {"hf": random_tensor((2,), half, 1)}, AdamHparams(amsgrad=True)
    for moment in moments(adam_init(params, hparams)):
        assert {name: x.dtype for name, x in moment.items()} == {name: x.dtype for name, x in params.items()}
    for chosen, complex_form in ((torch.float32, torch.complex64), (torch.float64, torch.complex128)):
        for moment in moments(adam_init(params, hparams, moment_dtype=chosen)):
            assert [moment[name].dtype for name in ("bf", "cp", "fp", "hf")] == [chosen, complex_form, chosen, chosen]
            assert_equal(moment, optree.tree_map(torch.zeros_like, moment))
            assert [x.shape for x in moment.values()] == [x.shape for x in params.values()]


# torch warns that complex32 is experimental.
def test_masters_are_float32_copies_of_what_is_less_precise():
    params = make_mixed() | {"ch": random_tensor((3,), torch.complex64, 9).to(torch.complex32)}
    params["db"] = random_tensor((3,), torch.float64, 8)
    state = adam_init(params, AdamHparams(), master_params=True)
    assert [state.master_params[name] for name in ("cp", "db", "fp")] == [(), (), ()]
    for name, wide in (("bf", torch.float32), ("hf", torch.float32), ("ch", torch.complex64)):
        assert_equal(state.master_params[name], params[name].to(wide))
        assert state.master_params[name].data_ptr() != params[name].data_ptr()
    assert adam_init(params, AdamHparams()).master_params == ()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_of_a_master_have_its_dtype_unless_chosen(amsgrad: bool):
    params = make_mixed() | {"ch": random_tensor((3,), torch.complex64, 9).to(torch.complex32)}
    state = adam_init(params, AdamHparams(amsgrad=amsgrad), master_params=True)
    for moment in moments(state)[: 2 + amsgrad]:
        assert [moment[name].dtype for name in ("bf", "hf", "fp")] == [torch.float32] * 3
        assert [moment[name].dtype for name in ("ch", "cp")] == [torch.complex64] * 2
    chosen = adam_init(params, AdamHparams(amsgrad=amsgrad), master_params=True, moment_dtype=torch.float16)
    for moment in moments(chosen)[: 2 + amsgrad]:
        assert [moment[name].dtype for name in ("bf", "hf", "fp")] == [torch.float16] * 3


@each_kernel
@each_donate
@pytest.mark.parametrize("master_params", [False, True])
@pytest.mark.parametrize("moment_dtype", [None, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_state_is_a_fixed_point(kernel: str, donate: bool, master_params: bool, moment_dtype: torch.dtype | None):
    params = {name: x for name, x in make_mixed().items() if name != "cp" or moment_dtype is not torch.bfloat16}
    hparams = AdamHparams(lr=0.1, amsgrad=True)
    init: dict[str, Any] = {"moment_dtype": moment_dtype, "master_params": master_params}
    before = (params, adam_init(params, hparams, **init))
    after = train(params, [params] * 2, hparams, init, kernel=kernel, donate=donate)
    assert optree.tree_structure(after) == optree.tree_structure(before)
    for x, y in zip(optree.tree_leaves(after), optree.tree_leaves(before), strict=True):
        assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        assert x.isfinite().all()


# The numbers are those of float32, rounded.


@each_kernel
@each_donate
@each_half
@each_option
def test_float32_moments_of_low_precision_parameters(kernel: str, donate: bool, half: torch.dtype, options: str):
    hparams, how = AdamHparams(lr=0.01, **OPTIONS[options]), {"kernel": kernel, "donate": donate}
    params = make_tree(half)
    state, wide_state = (
        adam_init(params, hparams, moment_dtype=torch.float32),
        adam_init(to(params, torch.float32), hparams),
    )
    for seed in (1, 2, 3):
        grads = make_tree(half, seed)
        wide = to(params, torch.float32)  # each step begins at the rounded parameters
        params, state = adam_update(params, grads, state, hparams, **how)
        wide, wide_state = adam_update(wide, to(grads, torch.float32), wide_state, hparams, kernel=kernel)
        assert_equal(params, to(wide, half))
        assert_equal(moments(state), moments(wide_state))


@each_kernel
@each_donate
@each_half
@each_option
def test_masters_train_as_float32_parameters_do(kernel: str, donate: bool, half: torch.dtype, options: str):
    hparams, how = AdamHparams(lr=0.01, **OPTIONS[options]), {"kernel": kernel, "donate": donate}
    init, gradients = make_tree(half), [make_tree(half, seed) for seed in (1, 2, 3)]
    for moment_dtype in (None, half):
        given = {"moment_dtype": moment_dtype, "master_params": True}
        wide_given = {"moment_dtype": moment_dtype}
        params, state = train(init, gradients, hparams, given, **how)
        wide_gradients = [to(grads, torch.float32) for grads in gradients]
        wide, wide_state = train(to(init, torch.float32), wide_gradients, hparams, wide_given, kernel=kernel)
        assert_equal(state.master_params, wide)
        assert_equal(moments(state), moments(wide_state))
        assert_equal(state.step, wide_state.step)
        assert_equal(params, to(wide, half))


@each_kernel
@each_donate
def test_masters_have_the_bits_of_torch_in_float32(kernel: str, donate: bool):
    options = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}
    init, gradients = make_tree(torch.bfloat16), [make_tree(torch.bfloat16, seed) for seed in (1, 2, 3)]
    given = {"moment_dtype": torch.float32, "master_params": True}
    params, state = train(init, gradients, AdamHparams(**options), given, kernel=kernel, donate=donate)
    wide_gradients = [optree.tree_leaves(to(grads, torch.float32)) for grads in gradients]
    expected = torch_adam(optree.tree_leaves(to(init, torch.float32)), wide_gradients, options, kernel)
    assert_equal(optree.tree_leaves(state.master_params), expected.params)
    assert_equal(optree.tree_leaves(state.exp_avg), expected.exp_avg)
    assert_equal(optree.tree_leaves(params), [x.bfloat16() for x in expected.params])


@each_kernel
@each_donate
@each_half
@each_option
def test_low_precision_moments_of_float32_parameters(kernel: str, donate: bool, half: torch.dtype, options: str):
    # A beta2 at which float16 needs no subnormal numbers.
    numbers: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.9), **OPTIONS[options]}
    hparams = AdamHparams(**numbers)
    param = random_tensor((3, 7), torch.float32, 0)
    state = adam_init(param, hparams, moment_dtype=half)
    for step, seed in enumerate((1, 2, 3)):
        gradient = random_tensor((3, 7), torch.float32, seed)
        old = [x.clone() for x in (state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq) if isinstance(x, Tensor)]
        expected = numpy_adam(param, gradient, *old, step=step, **numbers)
        param, state = adam_update(param, gradient, state, hparams, kernel=kernel, donate=donate)
        # The parameter moves by the moments before they are rounded, which happens once.
        assert_close(param, expected.param)
        for moment, name in zip(moments(state), ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), strict=True):
            if moment is not NONE:
                assert moment.dtype is half
                assert_rounded_once(moment, getattr(expected, name))


@each_kernel
@each_donate
@each_half
def test_masters_keep_what_low_precision_loses(kernel: str, donate: bool, half: torch.dtype):
    params, gradients = {"w": torch.ones(5, dtype=half)}, [{"w": torch.ones(5, dtype=half)}] * 100
    hparams, how = AdamHparams(lr=1e-4), {"kernel": kernel, "donate": donate}
    lost, _ = train(params, gradients, hparams, {"moment_dtype": torch.float32}, **how)
    assert torch.equal(lost["w"], params["w"])  # no update reaches half of the spacing below 1
    kept, state = train(params, gradients, hparams, {"moment_dtype": torch.float32, "master_params": True}, **how)
    assert_close(state.master_params["w"], torch.full((5,), 0.99, dtype=torch.float64))
    assert torch.equal(kept["w"], torch.full((5,), 0.99, dtype=torch.float32).to(half))


@each_kernel
@each_donate
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_leaves_of_a_mixed_tree_are_as_if_alone(kernel: str, donate: bool, per_leaf_step: bool):
    hparams = AdamHparams(lr=0.01, weight_decay=0.1, amsgrad=True)
    init, gradients = make_mixed(), [make_mixed(seed) for seed in (1, 2, 3)]
    given = {"moment_dtype": torch.float32, "master_params": True, "per_leaf_step": per_leaf_step}
    params, state = train(init, gradients, hparams, given, kernel=kernel, donate=donate)
    for name in init:
        alone = [{name: grads[name]} for grads in gradients]
        one, one_state = train({name: init[name]}, alone, hparams, given, kernel=kernel)
        assert_equal(params[name], one[name])
        assert_equal([moment[name] for moment in moments(state)], [moment[name] for moment in moments(one_state)])
        if init[name].dtype in HALVES:
            assert_equal(state.master_params[name], one_state.master_params[name])
            assert_equal(params[name], state.master_params[name].to(init[name].dtype))
        else:
            assert state.master_params[name] == ()


@each_kernel
@each_donate
@each_half
def test_gradients_of_float32_reach_the_masters_unrounded(kernel: str, donate: bool, half: torch.dtype):
    hparams, init = AdamHparams(lr=0.01), make_tree(half)
    gradients = [make_tree(torch.float32, seed) for seed in (1, 2)]
    given: dict[str, Any] = {"moment_dtype": torch.float32, "master_params": True}
    _, state = train(init, gradients, hparams, given, kernel=kernel, donate=donate)
    wide, _ = train(to(init, torch.float32), gradients, hparams, {}, kernel=kernel)
    assert_equal(state.master_params, wide)


@each_kernel
@each_donate
def test_given_parameters_count_only_through_their_masters(kernel: str, donate: bool):
    params, grads, hparams = make_tree(torch.bfloat16), make_tree(torch.bfloat16, 1), AdamHparams(weight_decay=0.1)
    state = adam_init(params, hparams, master_params=True)
    expected = adam_update(params, grads, state, hparams, kernel=kernel)
    other = optree.tree_map(lambda x: torch.full_like(x, torch.nan), params)
    assert_equal(adam_update(other, grads, state, hparams, kernel=kernel, donate=donate), expected)


# Bits in half types.

ALL_HALVES = (*HALVES, torch.complex32)
FULL = (torch.float32, torch.float64, torch.complex64, torch.complex128)
DECAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "coupled": {"weight_decay": 0.3},
    "coupled_amsgrad_maximize": {"weight_decay": 0.3, "amsgrad": True, "maximize": True},
    "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
}


def lying(x: Tensor, layout: str) -> Tensor:
    """The values of the matrix `x` in fresh memory of a layout."""
    if layout == "transposed":
        return x.T.clone(memory_format=torch.contiguous_format).T
    return torch.stack([x, x], dim=-1)[..., 0] if layout == "gaps" else x.clone()


def two_steps(
    dtype: torch.dtype, decay: str, kernel: Any, of_param: str = "plain", of_rest: str = "plain", **how: Any
) -> Any:
    hparams = AdamHparams(lr=0.25, betas=(0.85, how.pop("beta2", 0.93)), eps=1e-3, **DECAYS[decay])
    params = lying(random_tensor((50, 67), dtype, 0), of_param)
    state = adam_init(params, hparams)
    state = state._replace(exp_avg=lying(state.exp_avg, of_rest), exp_avg_sq=lying(state.exp_avg_sq, of_rest))
    for seed in (1, 2):
        grads = lying(random_tensor((50, 67), dtype, seed), of_rest)
        params, state = adam_update(params, grads, state, hparams, kernel=kernel, **how)
    return params, state


def same_bits(a: Any, b: Any) -> bool:
    # torch compares no complex32, and wider numbers hold what it holds.
    wide = [[x.to(torch.promote_types(x.dtype, torch.float64)) for x in optree.tree_leaves(tree)] for tree in (a, b)]
    return all(map(torch.equal, *wide))


@pytest.mark.parametrize("dtype", [*FULL, *ALL_HALVES], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("beta2", [0.93, 0.75])
def test_foreach_has_the_bits_of_single_where_its_factors_are_numbers_of_the_dtype(
    dtype: torch.dtype, decay: str, beta2: float
):
    for layout in ("plain", "transposed", "gaps"):
        single, foreach = (two_steps(dtype, decay, k, layout, layout, beta2=beta2) for k in ("single", "foreach"))
        # 1 - lr * weight_decay is 0.925.
        assert same_bits(single, foreach) == (dtype in FULL or (beta2 == 0.75 and decay != "decoupled"))


@each_kernel
@pytest.mark.parametrize("dtype", [*FULL, *ALL_HALVES], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("of_param", ["plain", "transposed", "gaps"])
@pytest.mark.parametrize("of_rest", ["plain", "transposed"])
def test_a_donated_update_has_the_bits_of_a_pure_one_but_for_half_parameters_with_gaps(
    kernel: str, dtype: torch.dtype, decay: str, of_param: str, of_rest: str
):
    pure, donated = (two_steps(dtype, decay, kernel, of_param, of_rest, donate=x) for x in (False, True))
    if dtype in ALL_HALVES and kernel != "fused" and decay.startswith("coupled") and of_param == "gaps":
        assert same_bits(pure, donated) == (not sum_depends_on_gaps(dtype.to_real(), of_rest))
    else:
        assert same_bits(pure, donated)


def sum_depends_on_gaps(dtype: torch.dtype, of_grad: str) -> bool:
    """Whether torch rounds `grad + 0.3 * param` differently where the parameter has gaps."""
    param, grad = random_tensor((50, 67), dtype, 0), lying(random_tensor((50, 67), dtype, 1), of_grad)
    return not torch.equal(grad.add(param, alpha=0.3), grad.add(lying(param, "gaps"), alpha=0.3))


# What stands still.


@each_kernel
@each_donate
def test_a_leaf_without_gradient_keeps_parameter_and_master(kernel: str, donate: bool):
    params, hparams = make_mixed(), AdamHparams(lr=0.1, weight_decay=0.1)
    init: dict[str, Any] = {"per_leaf_step": True, "moment_dtype": torch.float32, "master_params": True}
    state = adam_init(params, hparams, **init)
    # A parameter that is not its rounded master shows whether it is touched.
    state = state._replace(master_params={**state.master_params, "bf": state.master_params["bf"] + 1})
    before, grads = clone((params, state)), make_mixed(1)
    params, state = adam_update(params, grads | {"bf": None}, state, hparams, kernel=kernel, donate=donate)
    for name, is_same in (("bf", True), ("hf", False)):
        pairs = ((params, before[0]), (state.master_params, before[1].master_params), (state.step, before[1].step))
        assert [torch.equal(new[name], old[name]) for new, old in pairs] == [is_same] * 3


@each_kernel
@each_donate
@pytest.mark.parametrize("found", [1.0, torch.nan])
def test_found_inf_keeps_parameters_and_masters(kernel: str, donate: bool, found: float):
    params, grads, state, hparams = make_unrounded()
    before = clone((params, state))
    got = adam_update(params, grads, state, hparams, kernel=kernel, donate=donate, found_inf=torch.tensor(found))
    assert_equal(got, before)


@each_kernel
def test_found_inf_keeps_parameters_and_masters_member_by_member(kernel: str):
    params, grads, state, hparams = make_unrounded()

    def update(found_inf: Tensor) -> Any:
        return adam_update(params, grads, state, hparams, kernel=kernel, found_inf=found_inf)

    stood, moved = vmap(update)(torch.tensor([torch.nan, 0.0])), vmap(update)(torch.tensor([1.0, 0.0]))
    assert_equal(optree.tree_map(lambda x: x[0], stood), (params, state))
    expected = update(torch.tensor(0.0))
    for name in ("fp", "hf"):
        assert_equal(moved[0][name][1], expected[0][name])
    assert_equal(moved[1].master_params["hf"][1], expected[1].master_params["hf"])
    assert not torch.equal(expected[0]["hf"], params["hf"])


def make_unrounded() -> tuple[Any, Any, AdamState, AdamHparams]:
    """A parameter that is not its rounded master, to show whether it is touched, and an infinite gradient for it."""
    params, grads, hparams = make_mixed(), make_mixed(1), AdamHparams(lr=0.1)
    state = adam_init(params, hparams, moment_dtype=torch.float32, master_params=True)
    grads["bf"][0] = torch.inf
    return params, grads, state._replace(master_params=state.master_params | {"bf": torch.full((4, 3), 5.0)}), hparams


# Layouts of masters.


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of the values of `x`, of shape (2, 3, 1, 4), that lies in memory in another way."""
    if layout == "reversed":
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "odd":  # the stride of a dimension of one element says nothing
        return x.clone(memory_format=torch.contiguous_format).as_strided(x.shape, (12, 4, 7, 1))
    if layout == "gaps":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x.clone(memory_format=torch.contiguous_format)


LAYOUTS = ("contiguous", "reversed", "channels_last", "odd", "gaps")
GIVEN: dict[str, dict[str, Any]] = {
    "moving": {},
    "no gradient": {},
    "found nothing": {"found_inf": torch.tensor(0.0)},
    "found": {"found_inf": torch.tensor(1.0)},
}


@each_kernel
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex32], ids=str)
@pytest.mark.parametrize("of_param", LAYOUTS)
@pytest.mark.parametrize("of_master", LAYOUTS)
def test_a_parameter_keeps_its_strides_whatever_those_of_its_master(
    kernel: str, given: str, dtype: torch.dtype, of_param: str, of_master: str
):
    values, hparams = random_tensor((2, 3, 1, 4), dtype, 0), AdamHparams(lr=0.1)
    param = laid_out(values, of_param)
    grad = None if given == "no gradient" else random_tensor((2, 3, 1, 4), dtype, 1)
    state = adam_init(param, hparams, master_params=True)
    state = state._replace(master_params=laid_out(state.master_params, of_master))
    expected = adam_update(values, grad, adam_init(values, hparams, master_params=True), hparams, kernel=kernel)
    new, new_state = adam_update(param, grad, state, hparams, kernel=kernel, **GIVEN[given])
    assert new.stride() == torch.empty_like(param).stride()
    assert new_state.master_params.stride() == torch.empty_like(state.master_params).stride()
    if given in ("moving", "found nothing"):
        assert_close((new, new_state.master_params), (expected[0], expected[1].master_params))
        assert_equal(new, new_state.master_params.to(dtype))
    else:
        assert_equal(new, values)
    donated = laid_out(values, of_param)
    strides = donated.stride()
    result, _ = adam_update(donated, grad, clone(state), hparams, kernel=kernel, donate=True, **GIVEN[given])
    assert result.stride() == strides


@each_kernel
@pytest.mark.parametrize("given", ["moving", "no gradient", "found nothing"])
@pytest.mark.parametrize("of_param", [name for name in LAYOUTS if name != "odd"])
@pytest.mark.parametrize("of_master", LAYOUTS)
def test_a_watched_parameter_keeps_its_strides_whatever_those_of_its_master(
    kernel: str, given: str, of_param: str, of_master: str
):
    values, hparams = random_tensor((2, 3, 1, 4), torch.bfloat16, 0), AdamHparams(lr=0.1)
    param, grad = laid_out(values, of_param), random_tensor((2, 3, 1, 4), torch.bfloat16, 1)
    state = adam_init(param, hparams, master_params=True)
    state = state._replace(master_params=laid_out(state.master_params, of_master))

    def update(param: Tensor, state: AdamState, scale: Tensor) -> tuple[Tensor, AdamState]:
        g = None if given == "no gradient" else grad * scale
        return adam_update(param, g, state, hparams, kernel=kernel, **GIVEN[given])

    one = torch.ones((), dtype=torch.bfloat16)
    plain = update(param, state, one)[0]
    recorded = update(param, state, one.clone().requires_grad_())[0].detach()
    seen: list[tuple[int, ...]] = []

    def loss(scale: Tensor) -> Tensor:
        new = update(param, state, scale)[0]
        seen.append(new.stride())
        return new.sum()

    torch.func.grad(loss)(one)
    vmap(loss)(one.expand(2))
    assert_equal(recorded, plain)
    assert {recorded.stride(), *seen} == {torch.empty_like(param).stride()}


# Under transforms.


@each_kernel
@pytest.mark.parametrize("own_lr", [False, True])
@each_option
def test_vmap_is_a_loop(kernel: str, own_lr: bool, options: str):
    names = ("bf", "fp", "hf")
    params = {name: torch.stack([make_mixed(seed)[name] for seed in (1, 2, 3)]) for name in names}
    gradients = {name: torch.stack([make_mixed(seed)[name] for seed in (4, 5, 6)]) for name in names}
    lrs = torch.tensor([0.1, 0.01, 0.001])

    def run(params: Any, grads: Any, lr: Tensor) -> Any:
        hparams = AdamHparams(lr=lr if own_lr else 0.01, **OPTIONS[options])
        init: dict[str, Any] = {"moment_dtype": torch.float32, "master_params": True}
        return train(params, [grads] * 2, hparams, init, kernel=kernel)

    got = vmap(run)(params, gradients, lrs)
    for i in range(3):
        mine = optree.tree_map(lambda x, i=i: x[i], (params, gradients, lrs, got))
        expected = run(*mine[:3])
        assert_close(mine[3], expected)
        for name in ("bf", "hf"):
            assert_equal(mine[3][0][name], mine[3][1].master_params[name].to(params[name].dtype))


def hand_written(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, wd: float) -> tuple[Tensor, Tensor, Tensor]:
    """The second step, in float64: lr 0.1, betas 0.9 and 0.99, eps 1e-3, coupled weight decay."""
    g = g + wd * p
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    return p - 0.1 * (m / (1 - 0.9**2)) / ((v / (1 - 0.99**2)).sqrt() + 1e-3), m, v


@each_kernel
@each_half
@pytest.mark.parametrize("is_master", [False, True])
def test_derivatives_are_those_of_the_equations(kernel: str, half: torch.dtype, is_master: bool):
    hparams = AdamHparams(lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
    dtypes = (torch.float32 if is_master else half, half, torch.float32, torch.float32)
    given = [random_tensor((6,), dtype, i, positive=i == 3) for i, dtype in enumerate(dtypes)]
    # The derivative that reaches a rounded parameter has its dtype: weights that bfloat16 and float16 can hold.
    weights = [random_tensor((6,), torch.bfloat16, 10 + i).double() for i in range(3)]

    def loss(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        masters = {"w": p} if is_master else ()
        state = AdamState(torch.tensor(1.0), {"w": m}, {"w": v}, master_params=masters)
        param = torch.zeros(6, dtype=half) if is_master else p
        params, state = adam_update({"w": param}, {"w": g}, state, hparams, kernel=kernel)
        new = state.master_params if is_master else params
        return sum((x["w"] * w).sum() for x, w in zip((new, *state[1:3]), weights, strict=True))

    def expected_loss(*given: Tensor) -> Tensor:
        return sum((x * w).sum() for x, w in zip(hand_written(*given, wd=0.1), weights, strict=True))

    got = grad(loss, argnums=(0, 1, 2, 3))(*given)
    expected = grad(expected_loss, argnums=(0, 1, 2, 3))(*[x.double() for x in given])
    assert [x.dtype for x in got] == list(dtypes)
    assert_close(got, expected)


@each_kernel
def test_a_parameter_passes_its_derivative_to_its_master(kernel: str):
    hparams = AdamHparams(lr=0.1, weight_decay=0.5, decoupled_weight_decay=True)
    param = random_tensor((6,), torch.bfloat16, 0)
    state = adam_init(param, hparams, master_params=True)

    def loss(master: Tensor, param: Tensor) -> Tensor:
        return adam_update(param, param, state._replace(master_params=master), hparams, kernel=kernel)[0].sum()

    to_master = grad(loss)(state.master_params, param)
    assert_close(to_master, torch.full((6,), 1 - 0.1 * 0.5, dtype=torch.float64))


@each_kernel
def test_derivatives_of_members_are_those_of_a_loop(kernel: str):
    hparams = AdamHparams(lr=0.1, weight_decay=0.1)
    masters, grads = random_tensor((3, 6), torch.float32, 0), random_tensor((3, 6), torch.bfloat16, 1)

    def loss(master: Tensor, gradient: Tensor) -> Tensor:
        param = master.bfloat16()
        state = adam_init(param, hparams, moment_dtype=torch.float32, master_params=True)
        state = state._replace(master_params=master)
        for _ in range(2):
            param, state = adam_update(param, gradient, state, hparams, kernel=kernel)
        return (state.master_params**3).sum() + param.float().sum()

    got = vmap(grad(loss, argnums=(0, 1)))(masters, grads)
    for i in range(3):
        assert_close([x[i] for x in got], [*grad(loss, argnums=(0, 1))(masters[i], grads[i])])


def test_compiled_is_eager():
    hparams = AdamHparams(lr=0.1, weight_decay=0.1)
    params, grads = make_tree(torch.bfloat16), make_tree(torch.bfloat16, 1)
    state = adam_init(params, hparams, moment_dtype=torch.float32, master_params=True)
    torch.compiler.reset()
    compiled = torch.compile(adam_update, fullgraph=True, backend="aot_eager")
    assert_close(compiled(params, grads, state, hparams), adam_update(params, grads, state, hparams))


# Checkpoints.


@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_checkpoints_keep_dtypes_and_masters(per_leaf_step: bool):
    hparams = AdamHparams(lr=0.1, amsgrad=True)
    init: dict[str, Any] = {"moment_dtype": torch.float32, "master_params": True, "per_leaf_step": per_leaf_step}
    params, state = train(make_mixed(), [make_mixed(1)], hparams, init)
    flat = state_to_dict(state)
    assert "master_params['bf']" in flat
    assert "master_params['fp']" not in flat
    again = state_from_dict(safetensors.torch.load(safetensors.torch.save(flat)), params, hparams)
    assert_equal(again, state)
    grads = make_mixed(2)
    assert_equal(adam_update(params, grads, again, hparams), adam_update(params, grads, state, hparams))


def test_a_checkpoint_without_masters_gives_a_state_without_masters():
    hparams = AdamHparams(lr=0.1)
    params, state = train(make_mixed(), [make_mixed(1)], hparams, {})
    assert state_from_dict(state_to_dict(state), params, hparams).master_params == ()


def test_state_dicts_of_torch_have_no_masters():
    hparams = AdamHparams(lr=0.1)
    init: dict[str, Any] = {"moment_dtype": torch.float32, "master_params": True}
    params, state = train(make_mixed(), [make_mixed(1)], hparams, init)
    got = to_torch_state_dict(params, state, hparams)
    assert [*got["state"][0]] == ["step", "exp_avg", "exp_avg_sq"]
    assert from_torch_state_dict(params, got)[0].master_params == ()
    expected = to_torch_state_dict(params, state._replace(master_params=()), hparams)
    assert_equal(got["state"], expected["state"])
    assert got["param_groups"] == expected["param_groups"]


# Purity and donation.


@each_kernel
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("skipped", [(), ("bf", "fp")], ids=["all_move", "some_skipped"])
def test_inputs_are_untouched(kernel: str, found_inf: float | None, skipped: tuple[str, ...]):
    params, hparams = make_mixed(), AdamHparams(lr=0.1, weight_decay=0.1, amsgrad=True)
    init: dict[str, Any] = {"moment_dtype": torch.float32, "master_params": True, "per_leaf_step": True}
    state, grads = adam_init(params, hparams, **init), make_mixed(1) | dict.fromkeys(skipped)
    before = snapshot((params, grads, state))
    new = adam_update(params, grads, state, hparams, kernel=kernel, found_inf=found_inf)
    assert_unchanged((params, grads, state), before)
    old = {x.untyped_storage().data_ptr() for x in optree.tree_leaves((params, grads, state))}
    fresh = [x.untyped_storage().data_ptr() for x in optree.tree_leaves(new)]
    assert old.isdisjoint(fresh)
    assert len(set(fresh)) == len(fresh)


@each_kernel
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_donation_gives_the_same_bits_in_the_same_memory(kernel: str, found_inf: float | None):
    params, grads, hparams = make_mixed(), make_mixed(1), AdamHparams(lr=0.1, weight_decay=0.1, amsgrad=True)
    state = adam_init(params, hparams, moment_dtype=torch.float32, master_params=True)
    how: dict[str, Any] = {"kernel": kernel, "found_inf": found_inf}
    expected = adam_update(params, grads, state, hparams, **how)
    old = optree.tree_leaves((params, state))
    pointers, versions = [x.data_ptr() for x in old], [x._version for x in old]
    before = snapshot(grads)
    got = adam_update(params, grads, state, hparams, donate=True, **how)
    assert_equal(got, expected)
    assert [x.data_ptr() for x in optree.tree_leaves(got)] == pointers
    assert all(x._version > version for x, version in zip(old, versions, strict=True))
    assert_unchanged(grads, before)
    with pytest.raises(RuntimeError, match="this state was donated and cannot be used again"):
        adam_update(params, grads, state, hparams)


def test_donation_refuses_memory_that_overlaps():
    params, hparams = {"w": torch.ones(4, dtype=torch.bfloat16)}, AdamHparams()
    state = adam_init(params, hparams, moment_dtype=torch.float32, master_params=True)
    cases = (
        (params, {"w": state.master_params["w"]}, r"Cannot donate .*state\.master_params\['w'\].*grads\['w'\]"),
        (params, {"w": params["w"]}, r"Cannot donate params\['w'\]: it shares memory with grads\['w'\]"),
        (
            {"w": state.master_params["w"].view(torch.bfloat16)[:4]},
            {"w": torch.ones(4)},
            r"Cannot donate .*state\.master_params\['w'\].*params\['w'\]|Cannot donate params.*state\.master_params",
        ),
    )
    for given, grads, message in cases:
        before = snapshot((given, grads, state))
        with pytest.raises(RuntimeError, match=message):
            adam_update(given, grads, state, hparams, donate=True)
        assert_unchanged((given, grads, state), before)


def test_donation_of_a_master_that_requires_grad_is_refused():
    params, hparams = {"w": torch.ones(4, dtype=torch.bfloat16)}, AdamHparams()
    state = adam_init(params, hparams, master_params=True)
    state.master_params["w"].requires_grad_()
    with pytest.raises(RuntimeError, match="Cannot donate: the update is watched by autograd"):
        adam_update(params, params, state, hparams, donate=True)


# What cannot be.


@pytest.mark.parametrize("wrong", ["float32", 32, float, torch.int64, torch.complex64, torch.bool])
def test_moment_dtype_must_be_a_floating_dtype(wrong: Any):
    with pytest.raises(TypeError, match=rf"^moment_dtype is {re.escape(repr(wrong))}\. Expected a floating dtype"):
        adam_init({"w": torch.ones(2)}, AdamHparams(), moment_dtype=wrong)


def test_complex_moments_need_a_complex_form():
    with pytest.raises(TypeError, match=r"moment_dtype is torch\.bfloat16, which has no complex form"):
        adam_init({"w": torch.ones(2, dtype=torch.complex64)}, AdamHparams(), moment_dtype=torch.bfloat16)


MASTER = torch.ones(2, 3)
WRONG_MASTERS: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": ({"w": torch.ones(3, 2), "x": ()}, ValueError, r"state\.master_params\['w'\] has shape \(3, 2\)"),
    "bfloat16": ({"w": MASTER.bfloat16(), "x": ()}, TypeError, r"state\.master_params\['w'\] is of torch\.bfloat16"),
    "float64": ({"w": MASTER.double(), "x": ()}, TypeError, r"state\.master_params\['w'\] is of torch\.float64"),
    "integer": ({"w": MASTER.long(), "x": ()}, TypeError, r"state\.master_params\['w'\] is of torch\.int64"),
    "number": ({"w": 1.0, "x": ()}, TypeError, r"state\.master_params\['w'\] is of type float"),
    "sparse": ({"w": MASTER.to_sparse(), "x": ()}, TypeError, r"state\.master_params\['w'\] has the layout"),
    "superfluous": (
        {"w": MASTER, "x": torch.ones(2)},
        TypeError,
        r"^state\.master_params\['x'\] is given, but params\['x'\]",
    ),
    "missing_leaf": ({"x": ()}, ValueError, r"state\.master_params.*'w'"),
    "extra_leaf": ({"w": MASTER, "x": (), "y": ()}, ValueError, r"state\.master_params.*'y'"),
    "none": ({"w": None, "x": ()}, TypeError, r"state\.master_params\['w'\]"),
}


@pytest.mark.parametrize("case", WRONG_MASTERS)
@pytest.mark.parametrize("donate", [False, True])
def test_wrong_masters_are_named(case: str, donate: bool):
    masters, error, message = WRONG_MASTERS[case]
    params = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "x": torch.ones(2)}
    hparams = AdamHparams()
    state = adam_init(params, hparams, master_params=True)._replace(master_params=masters)
    before = snapshot((params, state.exp_avg))
    with pytest.raises(error, match=message):
        adam_update(params, params, state, hparams, donate=donate)
    assert_unchanged((params, state.exp_avg), before)


def test_donation_sees_all_of_a_strided_parameter_with_a_master() -> None:
    memory = torch.ones(32, dtype=torch.bfloat16)
    param, grad = memory[::4], memory.view(torch.float32)[4:12]
    state = adam_init(param, AdamHparams(), moment_dtype=torch.float32, master_params=True)
    with pytest.raises(RuntimeError, match="shares memory with"):
        adam_update(param, grad, state, AdamHparams(), donate=True)
