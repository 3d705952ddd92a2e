"""Each kernel gives the numbers of `torch.optim.Adam` with the same flags, to the last bit for real leaves."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import functional_adam.adam.kernels
from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from functional_adam.adam.equations import Scalars
from functional_adam.adam.kernels import Batch, missing_operation, run_foreach, run_fused, run_single
from functional_adam.tensors.leaves import Buffers
from tests.oracles import KERNELS, TorchRun, numpy_adam, torch_adam
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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_step_size_above_the_largest_float16_has_the_bits_of_torch(
    kernel: str, donate: bool, dtype: torch.dtype
) -> None:
    params = [torch.ones(n, dtype=dtype) for n in (1, 3, 64)]
    options = {"lr": 1e4, "eps": 1e4}  # lr / (1 - beta1) is 1e5
    expected = torch_adam(params, [params], options, kernel)
    assert all(x.isfinite().all() for x in expected.params)
    check(*run(params, [params], options, kernel=kernel, donate=donate), expected)


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


@pytest.mark.parametrize(
    ("kernel", "module", "name"),
    [
        ("foreach", torch, "_foreach_addcdiv_"),
        ("fused", functional_adam.adam.kernels, "_fused_adam_"),
        ("fused", functional_adam.adam.kernels, "_fused_adamw_"),
    ],
)
def test_a_kernel_that_this_torch_lacks_is_missed_by_itself_alone(
    kernel: str, module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [missing_operation(other) for other in KERNELS] == [None] * 3
    if module is torch:
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, None)
    expected = {"foreach": "torch._foreach_addcdiv_", "fused": "torch._fused_adam_"}[kernel]
    assert {other: missing_operation(other) for other in KERNELS} == {**dict.fromkeys(KERNELS), kernel: expected}


# Scalars that a kernel cannot read as numbers, which is how they come on an accelerator.

UNREAD = ("lr", "beta1", "beta2", "eps", "weight_decay", "step", "all")


class Unread(Tensor):
    """A tensor whose value may be anywhere: it is not asked for it."""

    def item(self) -> Any:
        raise AssertionError("read")


@pytest.mark.parametrize("run_kernel", [run_single, run_foreach])
@pytest.mark.parametrize("unread", UNREAD)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scalars_that_stay_tensors_give_the_same_update(
    run_kernel: Callable[[Batch], Iterator[None]],
    unread: str,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    dtype: torch.dtype,
) -> None:
    numbers: dict[str, Any] = {"lr": 0.25, "beta1": 0.75, "beta2": 0.875, "eps": 0.125, "weight_decay": 0.5}
    flags = {"amsgrad": amsgrad, "maximize": maximize, "decoupled_weight_decay": decoupled}
    given = {key: torch.tensor(x) if unread in (key, "all") else x for key, x in numbers.items()}
    columns = [
        [random_tensor(shape, dtype, 10 * seed + i, positive=seed > 2) for i, shape in enumerate(((3, 5), (7,)))]
        for seed in (1, 2, 3, 4, 5)
    ]
    betas = (numbers.pop("beta1"), numbers.pop("beta2"))
    expected = [
        numpy_adam(p, g, m, v, u if amsgrad else None, step, betas=betas, **numbers, **flags)
        for p, m, v, u, g, step in zip(*columns, (3, 5), strict=True)
    ]
    *buffers, grads = columns
    maxima = buffers.pop()
    steps = [torch.tensor(step) for step in (4.0, 6.0)]
    steps = [step.as_subclass(Unread) for step in steps] if unread in ("step", "all") else steps
    batch = Batch(Buffers(*buffers, maxima if amsgrad else []), grads, steps, Scalars(**given, **flags))
    [*run_kernel(batch)]
    for row, wanted in zip(batch.buffers.rows(), expected, strict=True):
        assert_close(row, wanted[:4])


def test_the_fused_kernel_is_given_a_number_as_scale_in_float32_where_the_leaves_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(
        functional_adam.adam.kernels, "_fused_adam_", lambda *_, grad_scale, **__: given.append(grad_scale)
    )
    columns = [[torch.ones(2, device="meta")] for _ in range(4)]
    scalars = Scalars(0.1, 0.9, 0.999, 1e-8, 0.0, amsgrad=False, maximize=False, decoupled_weight_decay=False)
    [*run_fused(Batch(Buffers(*columns[:3], []), columns[3], [torch.ones((), device="meta")], scalars), 2.0, None)]
    assert [(x.device.type, x.dtype, x.shape) for x in given] == [("meta", torch.float32, ())]


class ForeachDtypes(TorchDispatchMode):
    """The dtypes of all tensors that reach a `_foreach_*` operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach_" in func.name():
            self.found |= {x.dtype for x in optree.tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_foreach_operation_is_of_one_dtype(decoupled: bool, dtype: torch.dtype) -> None:
    columns = [[random_tensor((3,), dtype, seed, positive=True)] for seed in (1, 2, 3, 4, 5)]
    numbers = [torch.tensor(x) for x in (0.25, 0.75, 0.875, 0.125, 0.5)]
    scalars = Scalars(*numbers, amsgrad=True, maximize=True, decoupled_weight_decay=decoupled)
    dtypes = ForeachDtypes()
    with dtypes:
        [*run_foreach(Batch(Buffers(*columns[:4]), columns[4], [torch.tensor(3.0)], scalars))]
    # The step size of a half type stays in float32, where lr / (1 - beta1) cannot become infinite.
    assert dtypes.found == {dtype, torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_foreach_with_a_step_size_that_is_not_read_is_finite_above_the_largest_float16(dtype: torch.dtype) -> None:
    columns = [[torch.full((3,), value, dtype=dtype)] for value in (1.0, 0.0, 0.0)]
    numbers = [torch.tensor(x) for x in (1e4, 0.9, 0.999, 1e4, 0.0)]
    scalars = Scalars(*numbers, amsgrad=False, maximize=False, decoupled_weight_decay=False)
    [*run_foreach(Batch(Buffers(*columns, []), [torch.ones(3, dtype=dtype)], [torch.tensor(1.0)], scalars))]
    one, zero = torch.ones(3), torch.zeros(3)
    assert_close(columns[0][0], numpy_adam(one, one, zero, zero, lr=1e4, eps=1e4).param)


@pytest.mark.cuda
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
