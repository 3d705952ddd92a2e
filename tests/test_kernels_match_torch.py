"""Each kernel gives the numbers of `torch.optim.Adam` with the same flags, to the last bit for real leaves."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.oracles import KERNELS, TorchRun, torch_adam
from tests.strategies import in_layout, random_tensor
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
STEPS = 4

kernels = pytest.mark.parametrize("kernel", KERNELS)
every_donate = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
real_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
complex_dtypes = pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)


def make_params(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    params = [random_tensor(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    params.append(random_tensor((2, 3, 4, 5), dtype, 100).to(memory_format=torch.channels_last))
    params.append(in_layout(random_tensor((5, 7), dtype, 101), "transposed"))
    return [param.to(device) for param in params]


def make_gradients(params: Sequence[Tensor], count: int = STEPS) -> list[list[Tensor]]:
    """`count` lists of gradients in the layouts of `params`."""
    return [
        [
            torch.empty_like(p).copy_(random_tensor(p.shape, p.dtype, 1000 * (t + 1) + index))
            for index, p in enumerate(params)
        ]
        for t in range(count)
    ]


def run(
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    options: dict[str, Any],
    *,
    per_leaf_step: bool = False,
    **how: Any,
) -> tuple[list[Tensor], AdamState]:
    hparams = AdamHparams(**options)
    params = [param.clone() for param in params]
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
    for grads in gradients:
        params, state = adam_update(params, list(grads), state, hparams, **how)
    return params, state


def check(params: list[Tensor], state: AdamState, expected: TorchRun, compare: Any = assert_equal) -> None:
    """Everything that torch has is what we have."""
    steps = state.step if isinstance(state.step, list) else [state.step] * len(params)
    maxima = state.max_exp_avg_sq or [None] * len(params)
    compare(params, expected.params)
    compare(state.exp_avg, expected.exp_avg)
    compare(state.exp_avg_sq, expected.exp_avg_sq)
    compare(maxima, expected.max_exp_avg_sq)
    assert_equal(steps, expected.step)


@kernels
@every_donate
@real_dtypes
@every_option
def test_update_has_the_bits_of_torch(kernel: str, donate: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = make_params(dtype)
    gradients = make_gradients(params)
    expected = torch_adam(params, gradients, options, kernel)
    check(*run(params, gradients, options, kernel=kernel, donate=donate), expected)


@kernels
@every_donate
@real_dtypes
def test_decoupled_decay_has_the_bits_of_adamw(kernel: str, donate: bool, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    gradients = make_gradients(params)
    expected = torch_adam(params, gradients, {"weight_decay": 0.3}, kernel, optimizer_class=torch.optim.AdamW)
    options = {"weight_decay": 0.3, "decoupled_weight_decay": True}
    check(*run(params, gradients, options, kernel=kernel, donate=donate), expected)


@kernels
@every_option
def test_float16_has_the_bits_of_torch(kernel: str, options: dict[str, Any]) -> None:
    params = make_params(torch.float16)
    gradients = make_gradients(params)
    options = {"eps": 1e-3, **options}  # 1e-8 is 0 in float16
    expected = torch_adam(params, gradients, options, kernel)
    check(*run(params, gradients, options, kernel=kernel), expected)


@kernels
@every_donate
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all_coupled"]], ids=["plain", "all_coupled"])
def test_large_leaf_has_the_bits_of_torch(kernel: str, donate: bool, options: dict[str, Any]) -> None:
    # Large enough to be split between threads, and by no vector length without a rest.
    params = [random_tensor((1_234_567,), torch.float32, 0), random_tensor((3,), torch.float32, 1)]
    gradients = make_gradients(params, 2)
    expected = torch_adam(params, gradients, options, kernel)
    check(*run(params, gradients, options, kernel=kernel, donate=donate), expected)


@kernels
@every_donate
@complex_dtypes
@every_option
def test_complex_leaves_agree_with_torch(
    kernel: str, donate: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    params = make_params(dtype)
    gradients = make_gradients(params)
    # torch's own fused kernel refuses complex leaves.
    expected = torch_adam(params, gradients, options, "foreach" if kernel == "foreach" else "single")
    check(*run(params, gradients, options, kernel=kernel, donate=donate), expected, assert_close)


@kernels
@every_donate
def test_step_per_leaf_has_the_bits_of_torch(kernel: str, donate: bool) -> None:
    params = make_params(torch.float32)
    gradients = make_gradients(params)
    expected = torch_adam(params, gradients, OPTIONS["all_coupled"], kernel)
    ours = run(params, gradients, OPTIONS["all_coupled"], kernel=kernel, donate=donate, per_leaf_step=True)
    check(*ours, expected)


@kernels
@every_donate
def test_missing_gradients_are_skipped_as_by_torch(kernel: str, donate: bool) -> None:
    params = make_params(torch.float32)
    gradients: list[Any] = make_gradients(params)
    for grads in gradients[1:3]:
        grads[4] = grads[7] = None
    expected = torch_adam(params, gradients, OPTIONS["all_coupled"], kernel)
    params, state = run(params, gradients, OPTIONS["all_coupled"], kernel=kernel, donate=donate, per_leaf_step=True)
    check(params, state, expected)
    assert [step.item() for step in state.step] == [2 if index in (4, 7) else 4 for index in range(len(params))]


@every_donate
@real_dtypes
@every_option
def test_auto_has_the_bits_of_fused_on_the_cpu(donate: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = make_params(dtype)
    gradients = make_gradients(params)
    auto = run(params, gradients, options, kernel="auto", donate=donate)
    assert_equal(auto, run(params, gradients, options, kernel="fused", donate=donate))
    check(*auto, torch_adam(params, gradients, options, "fused"))


@every_donate
@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensor_learning_rate_has_the_bits_of_torch(donate: bool, decoupled: bool, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    gradients = make_gradients(params)
    options = {
        "lr": torch.tensor(3e-3, dtype=torch.float32),
        "weight_decay": 0.1,
        "decoupled_weight_decay": decoupled,
    }
    expected = torch_adam(params, gradients, options, "fused")
    check(*run(params, gradients, options, kernel="fused", donate=donate), expected)


@every_donate
@real_dtypes
@every_option
@pytest.mark.parametrize("scale", [3.0, 1024.0])
def test_fused_grad_scale_has_the_bits_of_torch(
    donate: bool, dtype: torch.dtype, options: dict[str, Any], scale: float
) -> None:
    params = make_params(dtype)
    gradients = make_gradients(params)
    expected = torch_adam(params, gradients, options, "fused", grad_scale=torch.tensor(scale))
    check(*run(params, gradients, options, kernel="fused", donate=donate, grad_scale=scale), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    @every_donate
    @real_dtypes
    @every_option
    def test_fused_has_the_bits_of_torch(self, donate: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
        params = make_params(dtype, "cuda")
        gradients = make_gradients(params)
        expected = torch_adam(params, gradients, options, "fused")
        check(*run(params, gradients, options, kernel="fused", donate=donate), expected)

    @every_donate
    @real_dtypes
    @every_option
    def test_auto_has_the_bits_of_fused(self, donate: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
        params = make_params(dtype, "cuda")
        gradients = make_gradients(params)
        expected = torch_adam(params, gradients, options, "fused")
        check(*run(params, gradients, options, kernel="auto", donate=donate), expected)

    @pytest.mark.parametrize("kernel", ["single", "foreach"])
    @every_donate
    @real_dtypes
    @every_option
    def test_single_and_foreach_agree_with_capturable(
        self, kernel: str, donate: bool, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        params = make_params(dtype, "cuda")
        gradients = make_gradients(params)
        expected = torch_adam(params, gradients, options, kernel, capturable=True)
        check(*run(params, gradients, options, kernel=kernel, donate=donate), expected, assert_close)

    @kernels
    @every_donate
    @complex_dtypes
    @every_option
    def test_complex_leaves_agree_with_torch(
        self, kernel: str, donate: bool, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        params = make_params(dtype, "cuda")
        gradients = make_gradients(params)
        expected = torch_adam(params, gradients, options, "single", capturable=True)
        check(*run(params, gradients, options, kernel=kernel, donate=donate), expected, assert_close)

    @every_donate
    def test_large_leaf_has_the_bits_of_torch(self, donate: bool) -> None:
        params = [random_tensor((1_234_567,), torch.float32, 0).cuda(), random_tensor((3,), torch.float32, 1).cuda()]
        gradients = make_gradients(params, 2)
        expected = torch_adam(params, gradients, OPTIONS["all_coupled"], "fused")
        check(*run(params, gradients, OPTIONS["all_coupled"], kernel="fused", donate=donate), expected)

    @every_donate
    def test_tensor_learning_rate_has_the_bits_of_torch(self, donate: bool) -> None:
        params = make_params(torch.float32, "cuda")
        gradients = make_gradients(params)
        options = {"lr": torch.tensor(3e-3, device="cuda"), "weight_decay": 0.1}
        expected = torch_adam(params, gradients, options, "fused", capturable=True)
        check(*run(params, gradients, options, kernel="fused", donate=donate), expected)

    @every_donate
    @every_option
    def test_fused_grad_scale_has_the_bits_of_torch(self, donate: bool, options: dict[str, Any]) -> None:
        params = make_params(torch.float32, "cuda")
        gradients = make_gradients(params)
        scale = torch.tensor(3.0, device="cuda")
        expected = torch_adam(params, gradients, options, "fused", grad_scale=scale)
        check(*run(params, gradients, options, kernel="fused", donate=donate, grad_scale=scale), expected)
