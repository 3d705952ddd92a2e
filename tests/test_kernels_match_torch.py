"""Each kernel gives the numbers of `torch.optim.Adam` with the same flags, to the last bit for real leaves."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import KERNELS_AND_AUTO, make_call, tensors_of, transposed
from tests.oracles import numpy_adam, torch_adam
from tests.strategies import COMPLEX_DTYPES, random_tensor
from tests.test_cuda_path import Recorder
from tests.tolerances import assert_close, assert_equal

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "all_coupled": {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
    "all_decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "amsgrad": True, "maximize": True},
    "other_numbers": {"lr": 0.3, "betas": (0.0, 0.5), "eps": 0.01, "weight_decay": 1},
    "no_learning": {"lr": 0.0, "betas": (0.5, 0.0), "weight_decay": 0.1, "decoupled_weight_decay": True},
}
SHAPES = ((), (1,), (0,), (3, 0, 2), (7,), (64,), (1, 1), (33, 5), (2, 3, 5, 7))
BIT_EQUAL_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
every_kernel = pytest.mark.parametrize("kernel", KERNELS_AND_AUTO)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def make_params(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    params = [random_tensor(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    params.append(random_tensor((2, 3, 4, 5), dtype, 100).to(memory_format=torch.channels_last))
    params.append(transposed(random_tensor((5, 7), dtype, 101)))
    return [param.to(device) for param in params]


def make_gradients(params: Sequence[Tensor], count: int = 4) -> list[list[Tensor]]:
    """`count` lists of gradients in the layouts of `params`."""
    return [
        [
            torch.empty_like(p).copy_(random_tensor(p.shape, p.dtype, 1000 * (t + 1) + index))
            for index, p in enumerate(params)
        ]
        for t in range(count)
    ]


def check_against_torch(
    params: list[Tensor],
    gradients: Sequence[list[Tensor]],
    options: dict[str, Any],
    kernel: str,
    *,
    grad_scale: Any = None,
) -> AdamState:
    """Pure and donated updates have all that torch has; the last state comes back."""
    is_complex, is_cuda = params[0].is_complex(), params[0].is_cuda
    # The fastest kernel is fused, but torch's own fused kernel refuses complex leaves.
    reference = "fused" if kernel == "auto" else kernel
    reference = "single" if is_complex and (is_cuda or reference == "fused") else reference
    scale = None if grad_scale is None else torch.as_tensor(grad_scale, device=params[0].device)
    expected = torch_adam(params, gradients, options, reference, capturable=is_cuda, grad_scale=scale)
    compare = assert_close if is_complex or (is_cuda and reference != "fused") else assert_equal
    hparams = AdamHparams(**options)
    for donate in (False, True):
        new = [param.clone() for param in params]
        state = adam_init(new, hparams)
        for grads in gradients:
            new, state = adam_update(new, grads, state, hparams, kernel=kernel, donate=donate, grad_scale=grad_scale)
        compare(new, expected.params)
        compare(state.exp_avg, expected.exp_avg)
        compare(state.exp_avg_sq, expected.exp_avg_sq)
        compare(state.max_exp_avg_sq or [None] * len(new), expected.max_exp_avg_sq)
        assert_equal([state.step] * len(new), expected.step)
    return state


@every_kernel
@every_device
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_update_agrees_with_torch(kernel: str, device: str, options: dict[str, Any]) -> None:
    for dtype in (*BIT_EQUAL_DTYPES, *COMPLEX_DTYPES):
        params = make_params(dtype, device)
        check_against_torch(params, make_gradients(params), options, kernel)


@every_kernel
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_update_of_float16_agrees_with_torch_on_the_cpu(kernel: str, options: dict[str, Any]) -> None:
    params = make_params(torch.float16)
    check_against_torch(params, make_gradients(params), {"eps": 1e-3, **options}, kernel)  # 1e-8 is 0 in float16


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_step_size_above_the_largest_float16_has_the_bits_of_torch(kernel: str, dtype: torch.dtype) -> None:
    params = [torch.ones(n, dtype=dtype) for n in (1, 3, 64)]
    state = check_against_torch(params, [params], {"lr": 1e4, "eps": 1e4}, kernel)  # lr / (1 - beta1) is 1e5
    assert all(x.isfinite().all() for x in tensors_of(state))


@pytest.mark.parametrize(
    ("kernel", "device"), [*product(KERNELS_AND_AUTO, ["cpu"]), pytest.param("auto", "cuda", marks=pytest.mark.cuda)]
)
def test_large_leaf_has_the_bits_of_torch(kernel: str, device: str) -> None:
    # Large enough to be split between threads, and by no vector length without a rest.
    params = [random_tensor((n,), torch.float32, seed).to(device) for seed, n in enumerate((1_234_567, 3))]
    check_against_torch(params, make_gradients(params, 2), OPTIONS["all_coupled"], kernel)


@every_device
@pytest.mark.parametrize("name", ["all_coupled", "all_decoupled"])
def test_fused_takes_tensors_as_torch_does(name: str, device: str) -> None:
    for dtype in BIT_EQUAL_DTYPES:
        params = make_params(dtype, device)
        gradients, options = make_gradients(params), OPTIONS[name]
        for scale in (3.0, torch.tensor(3.0, device=device)):
            check_against_torch(params, gradients, options, "fused", grad_scale=scale)
        if dtype is not torch.bfloat16:
            rate = {"lr": torch.tensor(3e-3, device=device)}
            check_against_torch(params, gradients, {**options, **rate}, "fused")


# Scalars that a kernel cannot read as numbers, which is how they come on an accelerator.

NUMBERS = {"lr": 0.25, "beta1": 0.75, "beta2": 0.875, "eps": 0.125, "weight_decay": 0.5}


class Unread(Tensor):
    """A tensor whose value may be anywhere: it is not asked for it."""

    def item(self) -> Any:
        raise AssertionError("read")


def unread(x: float) -> Tensor:
    return torch.tensor(x).as_subclass(Unread)


def make_hparams(given: dict[str, Any], **flags: bool) -> AdamHparams:
    numbers = {**NUMBERS, **given}
    return AdamHparams(betas=(numbers.pop("beta1"), numbers.pop("beta2")), **numbers, **flags)


@pytest.mark.parametrize("kernel", ["single", "foreach"])
@pytest.mark.parametrize("names", [*([name] for name in NUMBERS), ["step"], [*NUMBERS, "step"]], ids=",".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scalars_that_stay_tensors_give_the_same_update(kernel: str, names: list[str], dtype: torch.dtype) -> None:
    make_step = unread if "step" in names else torch.tensor
    numbers: dict[str, Any] = {name: NUMBERS[name] for name in ("lr", "eps", "weight_decay")}
    numbers["betas"] = NUMBERS["beta1"], NUMBERS["beta2"]
    for bits in product((False, True), repeat=3):
        flags = dict(zip(("amsgrad", "maximize", "decoupled_weight_decay"), bits, strict=True))
        given = make_hparams({name: unread(NUMBERS[name]) for name in names if name != "step"}, **flags)
        params, grads, state, _ = make_call(((3, 5), (7,)), hparams=given, dtype=dtype, per_leaf_step=True)
        state = state._replace(step={"leaf0": make_step(3.0), "leaf1": make_step(5.0)})
        new, new_state = adam_update(params, grads, state, given, kernel=kernel)
        for key, step in (("leaf0", 3), ("leaf1", 5)):
            buffers = [tree[key] for tree in (params, grads, *state[1:4]) if tree]
            expected = numpy_adam(*buffers, step=step, **numbers, **flags)
            assert_close((new[key], *(tree[key] if tree else None for tree in new_state[1:4])), expected[:4])


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", BIT_EQUAL_DTYPES, ids=str)
def test_every_foreach_operation_is_of_one_dtype(decoupled: bool, dtype: torch.dtype) -> None:
    flags = {"amsgrad": True, "maximize": True, "decoupled_weight_decay": decoupled}
    hparams = make_hparams({name: unread(x) for name, x in NUMBERS.items()}, **flags)
    with Recorder() as recorder:
        adam_update(*make_call(((3,),), hparams=hparams, dtype=dtype), kernel="foreach")
    calls = [(args, kwargs) for name, args, kwargs, _ in recorder.calls if name.startswith("_foreach_")]
    # The step size of a half type stays in float32, where lr / (1 - beta1) cannot become infinite.
    assert {x.dtype for x in tensors_of(calls)} == {dtype, torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_foreach_with_a_step_size_that_is_not_read_is_finite_above_the_largest_float16(dtype: torch.dtype) -> None:
    hparams = AdamHparams(lr=unread(1e4), betas=(unread(0.9), unread(0.999)), eps=unread(1e4), weight_decay=unread(0))
    param = torch.ones(3, dtype=dtype)
    new, _ = adam_update(param, param, adam_init(param, hparams), hparams, kernel="foreach")
    one, zero = torch.ones(3), torch.zeros(3)
    assert_close(new, numpy_adam(one, one, zero, zero, lr=1e4, eps=1e4).param)
