"""Which ops the CUDA path calls, with which dtypes and devices, and that none of them waits for the host.

FakeTensorMode makes CUDA tensors without a GPU: they have everything but values.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import tensors_of
from tests.oracles import KERNELS

FUSED = ("_fused_adam_", "_fused_adamw_")
SYNCS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_assert_async", "unique")

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_donate = pytest.mark.parametrize("donate", [False, True])


class Recorder(TorchDispatchMode):
    """Notes every op that reaches a device: its name, arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        # The fused kernels return nothing, and for tensor lr they have no fake implementation.
        result = None if name in FUSED else func(*args, **kwargs)
        self.calls.append((name, args, kwargs, result))
        return result

    def named(self, *names: str) -> list[tuple[str, tuple[Any, ...], dict[str, Any], Any]]:
        return [call for call in self.calls if call[0] in names]

    @property
    def counts(self) -> Counter[str]:
        return Counter(name for name, *_ in self.calls)


class CopyByOp(TorchFunctionMode):
    """`Tensor.copy_` asks for a CUDA build before it reaches FakeTensorMode; the op below it does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.ops.aten.copy_.default if func is Tensor.copy_ else func)(*args, **(kwargs or {}))


def assert_no_sync(recorder: Recorder) -> None:
    """No op reads a value, and no tensor travels from an accelerator to the CPU."""
    assert recorder.calls
    for name, args, kwargs, result in recorder.calls:
        assert name not in SYNCS, name
        types = {x.device.type for x in tensors_of((args, kwargs))}
        if "cuda" in types:
            assert all(x.device.type == "cuda" for x in tensors_of(result)), name
        if name == "copy_":
            target, source = args[:2]
            assert not (source.device.type == "cuda" and target.device.type == "cpu")


@pytest.fixture(autouse=True)
def fake_tensors() -> Iterator[FakeTensorMode]:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # donating tensors without memory must not warn either
    with FakeTensorMode() as mode, CopyByOp():
        yield mode
    torch.set_warn_always(before)


def make(
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    devices: tuple[str, ...] = ("cuda",),
    *,
    hparams: AdamHparams | None = None,
    per_leaf_step: bool = False,
) -> tuple[Any, Any, AdamState, AdamHparams]:
    """Two leaves for each dtype and device."""
    hparams = hparams or AdamHparams()
    kinds = itertools.product(dtypes, devices, ((3, 4), (5,)))
    params = [torch.empty(shape, dtype=dtype, device=device) for dtype, device, shape in kinds]
    grads = [torch.empty_like(x) for x in params]
    return params, grads, adam_init(params, hparams, per_leaf_step=per_leaf_step), hparams


def run(call: tuple[Any, Any, AdamState, AdamHparams], **options: Any) -> tuple[Recorder, Any]:
    """Update, record, and check what holds for every update."""
    before = [(x.shape, x.dtype, x.device) for x in tensors_of((call[0], call[2]))]
    with Recorder() as recorder:
        result = adam_update(*call, **options)
    assert [(x.shape, x.dtype, x.device) for x in tensors_of(result)] == before
    assert_no_sync(recorder)
    return recorder, result


def on_cuda(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((), value, dtype=dtype, device="cuda")


def memory_of(tree: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in tensors_of(tree)}


# Each kernel name means the kernel of that name.


@pytest.mark.parametrize("kernel", ["auto", "fused"])
@pytest.mark.parametrize(("decoupled", "name"), [(False, "_fused_adam_"), (True, "_fused_adamw_")])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_auto_and_fused_make_one_fused_call(kernel: str, decoupled: bool, name: str, amsgrad: bool) -> None:
    options = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.2, "amsgrad": amsgrad, "maximize": True}
    hparams = AdamHparams(betas=(0.8, 0.9), decoupled_weight_decay=decoupled, **options)
    recorder, _ = run(make(hparams=hparams), kernel=kernel)
    [(called, args, kwargs, _)] = recorder.named(*FUSED)
    assert called == name
    assert [len(column) for column in args] == [2, 2, 2, 2, 2 if amsgrad else 0, 2]
    for step in args[5]:
        assert (step.dtype, step.device.type, step.shape) == (torch.float32, "cuda", ())
    assert kwargs == {**options, "beta1": 0.8, "beta2": 0.9}


@each_donate
def test_foreach_and_single_call_ops_of_their_kind_alone(donate: bool) -> None:
    names = {}
    for kernel in ("foreach", "single"):
        call = make(hparams=AdamHparams(amsgrad=True, weight_decay=0.1))
        names[kernel] = {*run(call, kernel=kernel, donate=donate)[0].counts}
    assert sum(name.startswith("_foreach_") for name in names["foreach"]) >= 5
    assert "_foreach_sqrt_" in names["foreach"]
    assert names["foreach"].isdisjoint({*FUSED, "lerp_", "addcdiv_", "addcmul_", "sqrt_"})
    assert not [name for name in names["single"] if name.startswith(("_foreach_", "_fused_"))]


def test_number_of_ops_does_not_grow_with_the_tree_when_donated() -> None:
    few, many = (run(make((torch.float32,) * repeat), kernel="fused", donate=True)[0] for repeat in (1, 8))
    assert few.counts == many.counts


@pytest.mark.parametrize(("device", "is_wide"), [("cpu", True), ("cuda", True), ("mps", False)])
def test_corrections_are_precise_where_the_device_can(device: str, is_wide: bool) -> None:
    with Recorder() as recorder:
        adam_update(*make(devices=(device,)), kernel="single")
    dtypes = {x.dtype for call in recorder.calls for x in tensors_of(call) if x.device.type == device}
    assert (torch.float64 in dtypes) == is_wide


# Nothing waits for the host.

SYNC_FREE: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "lr": lambda: {"hparams": AdamHparams(lr=on_cuda(0.1))},
    "float64_lr": lambda: {"hparams": AdamHparams(lr=on_cuda(0.1, torch.float64))},
    "bfloat16_lr": lambda: {"hparams": AdamHparams(lr=on_cuda(0.1, torch.bfloat16))},
    "grad_scale": lambda: {"grad_scale": on_cuda(8.0)},
    "float16_grad_scale": lambda: {"grad_scale": on_cuda(8.0, torch.float16)},
    "float64_grad_scale": lambda: {"grad_scale": on_cuda(8.0, torch.float64)},
    "number_grad_scale": lambda: {"grad_scale": 8.0},
    "found_inf": lambda: {"found_inf": on_cuda(1.0)},
    "bool_found_inf": lambda: {"found_inf": on_cuda(True, torch.bool)},
    "int_found_inf": lambda: {"found_inf": on_cuda(1, torch.int64)},
    "number_found_inf": lambda: {"found_inf": 0.0},
    "all": lambda: {
        "hparams": AdamHparams(lr=on_cuda(0.1), weight_decay=0.1, amsgrad=True, decoupled_weight_decay=True),
        "grad_scale": on_cuda(8.0),
        "found_inf": on_cuda(1.0),
    },
    "all_coupled": lambda: {
        "hparams": AdamHparams(lr=on_cuda(0.1), weight_decay=0.1, maximize=True),
        "grad_scale": on_cuda(8.0),
        "found_inf": on_cuda(1.0),
        "per_leaf_step": True,
    },
}


@each_kernel
@pytest.mark.parametrize("case", SYNC_FREE)
def test_no_op_waits_for_the_host(kernel: str, case: str) -> None:
    for donate in (False, True):
        options = SYNC_FREE[case]()
        call = make(**{key: options.pop(key) for key in ("hparams", "per_leaf_step") if key in options})
        gradients = memory_of(call[1])
        recorder, _ = run(call, kernel=kernel, donate=donate, **options)
        assert len(recorder.named(*FUSED)) == (kernel == "fused")
        for _, args, kwargs, _ in recorder.named(*FUSED):
            # The CUDA kernel reads them as float32, whatever they are.
            tensors = {name: x for name, x in kwargs.items() if isinstance(x, Tensor)}
            assert {*tensors} == {*options, *(["lr"] if isinstance(call[3].lr, Tensor) else [])}
            for x in tensors.values():
                assert (x.dtype, x.device.type, x.shape) == (torch.float32, "cuda", ())
            # It would write the unscaled gradients back into the caller's.
            assert gradients.isdisjoint(memory_of(args[1])) == ("grad_scale" in options)


@each_kernel
@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128], ids=str
)
def test_every_dtype_runs_without_waiting(kernel: str, case: str, dtype: torch.dtype) -> None:
    options = SYNC_FREE[case]()
    params, grads, state, hparams = make((dtype,), hparams=options.pop("hparams", None))
    for given in (grads, [torch.empty_like(g, dtype=torch.float32) for g in grads]):
        recorder, _ = run((params, given, state, hparams), kernel=kernel, **options)
        for _, args, _, _ in recorder.named(*FUSED):
            assert {x.dtype for x in tensors_of(args[:5])} == {dtype.to_real()}


def test_fused_writes_into_donated_buffers_and_pure_ones_are_fresh() -> None:
    call = make(hparams=AdamHparams(amsgrad=True))
    buffers = memory_of((call[0], call[2][1:]))
    for donate in (False, True):
        recorder, result = run(call, kernel="fused", donate=donate)
        [(_, args, _, _)] = recorder.named(*FUSED)
        written = memory_of((args[0], args[2:5]))
        assert written == memory_of((result[0], result[1][1:]))
        assert written == buffers if donate else written.isdisjoint(buffers)


@each_donate
def test_the_donated_step_stays_in_its_memory(donate: bool) -> None:
    params, grads, state, hparams = make()
    memory = memory_of(state.step)
    _, (_, new_state) = run((params, grads, state, hparams), donate=donate)
    assert (memory_of(new_state.step) == memory) is donate
    assert new_state.step is not state.step
    assert state.step.shape == ((0,) if donate else ())


@each_kernel
@each_donate
def test_leaves_without_gradient_are_skipped_on_the_device(kernel: str, donate: bool) -> None:
    params, grads, state, hparams = make((torch.float32, torch.float32), per_leaf_step=True)
    recorder, _ = run((params, [None, *grads[1:]], state, hparams), kernel=kernel, donate=donate)
    for _, args, _, _ in recorder.named(*FUSED):
        assert len(args[0]) == 3


class FillByFake(TorchFunctionMode):
    """`torch.full` on a device that is not there, where no FakeTensorMode is on."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.values: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.full:
            return func(*args, **(kwargs or {}))
        self.values.append(args[1])
        with self.mode:
            return func(*args, **(kwargs or {}))


def test_fused_fills_a_number_grad_scale_on_the_device(fake_tensors: FakeTensorMode) -> None:
    call = make()
    # A fake number cannot be read.
    with unset_fake_temporarily(), FillByFake(fake_tensors) as fills, Recorder() as recorder:
        adam_update(*call, kernel="fused", grad_scale=8.0)
    [(_, _, kwargs, _)] = recorder.named(*FUSED)
    assert fills.values == [8.0]
    assert (kwargs["grad_scale"].dtype, kwargs["grad_scale"].device.type) == (torch.float32, "cuda")
    for _, args, _, result in recorder.named("_to_copy", "copy_"):
        assert len({x.device.type for x in tensors_of((args, result))}) == 1


# Device tensors as betas, eps or weight decay.

NUMBERS: dict[str, Callable[[], dict[str, Any]]] = {
    "beta1": lambda: {"betas": (on_cuda(0.9), 0.99)},
    "beta2": lambda: {"betas": (0.9, on_cuda(0.99))},
    "eps": lambda: {"eps": on_cuda(1e-6)},
    "weight_decay": lambda: {"weight_decay": on_cuda(0.1)},
}
each_number = pytest.mark.parametrize("name", NUMBERS)


@each_number
def test_fused_says_why_it_cannot_take_a_device_tensor(name: str) -> None:
    call = make(hparams=AdamHparams(**NUMBERS[name]()))
    with pytest.raises(RuntimeError, match=rf"kernel='fused' cannot run.*{name} is a tensor.*kernel='auto'"):
        adam_update(*call, kernel="fused")


@each_number
@pytest.mark.parametrize("kernel", ["auto", "foreach", "single"])
def test_other_kernels_take_device_tensors_and_auto_is_foreach(name: str, kernel: str) -> None:
    for tensor_dtype, decoupled in ((torch.float32, False), (torch.float64, True)):
        numbers = torch_pytree.tree_map_only(Tensor, lambda x, to=tensor_dtype: x.to(to), NUMBERS[name]())
        hparams = AdamHparams(**numbers, decoupled_weight_decay=decoupled)
        call = make((torch.float32, torch.bfloat16, torch.complex64), hparams=hparams)
        recorder, _ = run(call, kernel=kernel, donate=decoupled)
        assert ("_foreach_sqrt_" in recorder.counts) == (kernel != "single")
        assert not recorder.named(*FUSED)


@each_number
def test_numbers_on_the_cpu_do_not_move_data_to_it(name: str) -> None:
    numbers = torch_pytree.tree_map_only(Tensor, Tensor.cpu, NUMBERS[name]())
    run(make(hparams=AdamHparams(**numbers)))


# Mixed trees: one call for each device and dtype.

DEVICES = ("cpu", "cuda:0", "cuda:1")


@each_donate
@pytest.mark.parametrize("decoupled", [False, True])
def test_mixed_devices_and_dtypes_make_one_fused_call_each(donate: bool, decoupled: bool) -> None:
    hparams = AdamHparams(decoupled_weight_decay=decoupled, weight_decay=0.1)
    call = make((torch.float32, torch.bfloat16), DEVICES, per_leaf_step=True, hparams=hparams)
    recorder, _ = run(call, kernel="fused", donate=donate)
    calls = recorder.named(FUSED[decoupled])
    seen = set()
    for _, args, _, _ in calls:
        assert [len(column) for column in args] == [2, 2, 2, 2, 0, 2]
        [key] = {(x.device, x.dtype) for x in tensors_of(args[:5])}
        assert {x.device for x in args[5]} == {key[0]}
        seen.add(key)
    assert len(calls) == len(seen) == 6


@each_donate
def test_mixed_devices_are_grouped_for_foreach(donate: bool) -> None:
    call = make((torch.float32, torch.bfloat16), DEVICES[1:], per_leaf_step=True)
    roots = run(call, kernel="foreach", donate=donate)[0].named("_foreach_sqrt_")
    assert len(roots) == 4
    for _, args, _, _ in roots:
        assert len({(x.device, x.dtype) for x in args[0]}) == 1


@each_kernel
def test_mixed_devices_run_on_every_kernel_with_device_options(kernel: str) -> None:
    call = make((torch.float32,), DEVICES, per_leaf_step=True, hparams=AdamHparams(lr=on_cuda(0.1)))
    with Recorder() as recorder:
        adam_update(*call, kernel=kernel, grad_scale=on_cuda(2.0), found_inf=on_cuda(0.0))
    assert len(recorder.named(*FUSED)) == (3 if kernel == "fused" else 0)
    for _, args, kwargs, _ in recorder.named(*FUSED):
        assert len({x.device for x in tensors_of((args, kwargs))}) == 1


def test_shared_step_with_mixed_dtypes_makes_one_fused_call_each() -> None:
    recorder, _ = run(make((torch.float32, torch.float16, torch.complex64)))
    assert {args[0][0].dtype for _, args, _, _ in recorder.named(*FUSED)} == {torch.float32, torch.float16}


def test_shared_step_with_mixed_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"params\[2\] is on cuda:0.*params\[0\] is on cpu.*per_leaf_step=True"):
        make((torch.float32,), DEVICES)
    params, grads, state, hparams = make((torch.float32,), DEVICES, per_leaf_step=True)
    with pytest.raises(ValueError, match=r"state\.step is on cpu.*is on cuda:0.*per_leaf_step=True"):
        adam_update(params, grads, state._replace(step=state.step[0]), hparams)


def test_initial_state_lives_on_the_devices_of_its_leaves() -> None:
    params, _, state, _ = make((torch.float32, torch.bfloat16), DEVICES, per_leaf_step=True)
    for tree in (state.step, state.exp_avg, state.exp_avg_sq):
        assert [x.device for x in tree] == [x.device for x in params]
    assert {x.dtype for x in state.step} == {torch.float32}
