"""Which ops the CUDA path calls, with which dtypes and devices, and that none of them waits for the host.

FakeTensorMode makes CUDA tensors without a GPU: they have everything but values.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from functional_adam.adam.planning import run_kernel
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from functional_adam.adam.equations import Scalars
from functional_adam.tensors.leaves import Buffers

KERNELS = ("auto", "single", "foreach", "fused")
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


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


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
def fake_tensors() -> Iterator[None]:
    with FakeTensorMode(), CopyByOp():
        yield


def make(
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    devices: tuple[str, ...] = ("cuda",),
    *,
    hparams: AdamHparams | None = None,
    per_leaf_step: bool = False,
) -> tuple[Any, Any, AdamState, AdamHparams]:
    """Two leaves for each dtype and device."""
    hparams = hparams or AdamHparams()
    params = [
        torch.empty(shape, dtype=dtype, device=device)
        for dtype in dtypes
        for device in devices
        for shape in ((3, 4), (5,))
    ]
    grads = [torch.empty_like(x) for x in params]
    return params, grads, adam_init(params, hparams, per_leaf_step=per_leaf_step), hparams


def run(call: tuple[Any, Any, AdamState, AdamHparams], **options: Any) -> tuple[Recorder, Any]:
    """Update, record, and check what holds for every update."""
    before = [(x.shape, x.dtype, x.device) for x in tensors_of((call[0], call[2]))]
    with Recorder() as recorder:
        result = adam_update(*call, **options)
    assert [(x.shape, x.dtype, x.device) for x in tensors_of(result)] == before
    return recorder, result


def on_cuda(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((), value, dtype=dtype, device="cuda")


# Each kernel name means the kernel of that name.


@each_donate
@pytest.mark.parametrize("kernel", ["auto", "fused"])
@pytest.mark.parametrize(("decoupled", "name"), [(False, "_fused_adam_"), (True, "_fused_adamw_")])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_auto_and_fused_make_one_fused_call(
    kernel: str, decoupled: bool, name: str, amsgrad: bool, donate: bool
) -> None:
    hparams = AdamHparams(
        lr=0.1,
        betas=(0.8, 0.9),
        eps=1e-6,
        weight_decay=0.2,
        amsgrad=amsgrad,
        maximize=True,
        decoupled_weight_decay=decoupled,
    )
    recorder, _ = run(make(hparams=hparams), kernel=kernel, donate=donate)
    [(called, args, kwargs, _)] = recorder.named(*FUSED)
    assert called == name
    assert [len(column) for column in args] == [2, 2, 2, 2, 2 if amsgrad else 0, 2]
    for step in args[5]:
        assert (step.dtype, step.device.type, step.shape) == (torch.float32, "cuda", ())
    assert kwargs["lr"] == 0.1
    assert (kwargs["beta1"], kwargs["beta2"], kwargs["eps"], kwargs["weight_decay"]) == (0.8, 0.9, 1e-6, 0.2)
    assert kwargs["amsgrad"] is amsgrad
    assert kwargs["maximize"] is True
    assert_no_sync(recorder)


@each_donate
def test_foreach_calls_foreach_ops_alone(donate: bool) -> None:
    recorder, _ = run(make(hparams=AdamHparams(amsgrad=True, weight_decay=0.1)), kernel="foreach", donate=donate)
    counts = recorder.counts
    assert sum(n for name, n in counts.items() if name.startswith("_foreach_")) >= 5
    assert "_foreach_sqrt_" in counts
    assert not recorder.named(*FUSED, "lerp_", "addcdiv_", "addcmul_", "sqrt_")
    assert_no_sync(recorder)


@each_donate
def test_single_calls_neither_foreach_nor_fused_ops(donate: bool) -> None:
    recorder, _ = run(make(hparams=AdamHparams(amsgrad=True, weight_decay=0.1)), kernel="single", donate=donate)
    assert not [name for name in recorder.counts if name.startswith(("_foreach_", "_fused_"))]
    assert_no_sync(recorder)


@pytest.mark.parametrize("kernel", ["auto", "fused"])
def test_number_of_ops_does_not_grow_with_the_tree_when_donated(kernel: str) -> None:
    def count(repeat: int) -> Counter[str]:
        recorder, _ = run(make((torch.float32,) * repeat), kernel=kernel, donate=True)
        return recorder.counts

    assert count(1) == count(8)


# Nothing waits for the host.

SYNC_FREE: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "tensor_lr": lambda: {"hparams": AdamHparams(lr=on_cuda(0.1))},
    "float64_tensor_lr": lambda: {"hparams": AdamHparams(lr=on_cuda(0.1, torch.float64))},
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
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


@each_kernel
@each_donate
@pytest.mark.parametrize("case", SYNC_FREE)
def test_no_op_waits_for_the_host(kernel: str, donate: bool, case: str) -> None:
    options = SYNC_FREE[case]()
    made = {key: options.pop(key) for key in ("hparams", "per_leaf_step") if key in options}
    recorder, _ = run(make(**made), kernel=kernel, donate=donate, **options)
    assert_no_sync(recorder)
    assert bool(recorder.named(*FUSED)) == (kernel in ("auto", "fused"))


@each_kernel
@each_donate
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "all", "tensor_lr"])
def test_every_dtype_runs_without_waiting(kernel: str, donate: bool, dtype: torch.dtype, case: str) -> None:
    options = SYNC_FREE[case]()
    hparams = options.pop("hparams", AdamHparams())
    recorder, _ = run(make((dtype,), hparams=hparams), kernel=kernel, donate=donate, **options)
    assert_no_sync(recorder)
    for _, args, _, _ in recorder.named(*FUSED):
        real = {x.dtype for column in args[:5] for x in column}
        assert real == {dtype.to_real()}


@each_kernel
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_another_dtype_are_cast_on_the_device(kernel: str, grad_dtype: torch.dtype) -> None:
    params, grads, state, hparams = make()
    recorder, _ = run((params, [g.to(grad_dtype) for g in grads], state, hparams), kernel=kernel)
    assert_no_sync(recorder)
    for _, args, _, _ in recorder.named(*FUSED):
        assert {x.dtype for column in args[:5] for x in column} == {torch.float32}


@pytest.mark.parametrize("kernel", ["auto", "fused"])
@pytest.mark.parametrize("case", ["found_inf", "bool_found_inf", "int_found_inf", "all"])
def test_fused_is_given_found_inf_and_scale_as_float32_on_the_device(kernel: str, case: str) -> None:
    options = SYNC_FREE[case]()
    recorder, _ = run(make(hparams=options.pop("hparams", None)), kernel=kernel, **options)
    [(_, _, kwargs, _)] = recorder.named(*FUSED)
    for name in ("found_inf", "grad_scale"):
        if name in options:
            assert (kwargs[name].dtype, kwargs[name].device.type) == (torch.float32, "cuda")
        else:
            assert kwargs.get(name) is None


@pytest.mark.parametrize("kernel", ["auto", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
def test_fused_is_given_tensor_lr_as_float32_on_the_device(kernel: str, dtype: torch.dtype, decoupled: bool) -> None:
    # The CUDA kernel reads it as float32, whatever it is.
    hparams = AdamHparams(lr=on_cuda(0.1, dtype), decoupled_weight_decay=decoupled)
    recorder, _ = run(make(hparams=hparams), kernel=kernel)
    [(_, _, kwargs, _)] = recorder.named(*FUSED)
    assert (kwargs["lr"].dtype, kwargs["lr"].device.type, kwargs["lr"].shape) == (torch.float32, "cuda", ())


@pytest.mark.parametrize("case", ["grad_scale", "all"])
@each_donate
def test_fused_is_not_given_the_callers_gradients_with_a_scale(case: str, donate: bool) -> None:
    # It would write the unscaled gradients back into them.
    options = SYNC_FREE[case]()
    call = make(hparams=options.pop("hparams", None))
    recorder, _ = run(call, kernel="fused", donate=donate, **options)
    [(_, args, _, _)] = recorder.named(*FUSED)
    given = {x.untyped_storage()._cdata for x in call[1]}
    assert given.isdisjoint({x.untyped_storage()._cdata for x in args[1]})


def test_fused_writes_into_donated_buffers_and_pure_ones_are_fresh() -> None:
    call = make(hparams=AdamHparams(amsgrad=True))
    buffers = {x.untyped_storage()._cdata for x in tensors_of((call[0], call[2][1:]))}
    for donate in (False, True):
        recorder, result = run(call, kernel="fused", donate=donate)
        [(_, args, _, _)] = recorder.named(*FUSED)
        written = {x.untyped_storage()._cdata for column in (args[0], *args[2:5]) for x in column}
        assert written == {x.untyped_storage()._cdata for x in tensors_of((result[0], result[1][1:]))}
        assert written == buffers if donate else written.isdisjoint(buffers)


@each_kernel
def test_step_stays_on_the_device(kernel: str) -> None:
    _, (_, state) = run(make(), kernel=kernel)
    assert (state.step.device.type, state.step.dtype, state.step.shape) == ("cuda", torch.float32, ())


@each_donate
def test_the_donated_step_stays_in_its_memory(donate: bool) -> None:
    params, grads, state, hparams = make()
    memory = state.step.untyped_storage()._cdata
    _, (_, new_state) = run((params, grads, state, hparams), donate=donate)
    assert (new_state.step.untyped_storage()._cdata == memory) is donate
    assert new_state.step is not state.step
    assert state.step.shape == ((0,) if donate else ())


@each_kernel
def test_donating_tensors_without_memory_warns_about_nothing(kernel: str) -> None:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        run(make(), kernel=kernel, donate=True)
    finally:
        torch.set_warn_always(before)


@each_kernel
@each_donate
def test_leaves_without_gradient_are_skipped_on_the_device(kernel: str, donate: bool) -> None:
    params, grads, state, hparams = make((torch.float32, torch.float32), per_leaf_step=True)
    recorder, _ = run((params, [None, *grads[1:]], state, hparams), kernel=kernel, donate=donate)
    assert_no_sync(recorder)
    for _, args, _, _ in recorder.named(*FUSED):
        assert len(args[0]) == 3


# Device tensors as betas, eps or weight decay.

NUMBERS: dict[str, Callable[[], AdamHparams]] = {
    "beta1": lambda: AdamHparams(betas=(on_cuda(0.9), 0.99)),
    "beta2": lambda: AdamHparams(betas=(0.9, on_cuda(0.99))),
    "eps": lambda: AdamHparams(eps=on_cuda(1e-6)),
    "weight_decay": lambda: AdamHparams(weight_decay=on_cuda(0.1)),
}


@pytest.mark.parametrize("name", NUMBERS)
@each_donate
def test_fused_says_why_it_cannot_take_a_device_tensor(name: str, donate: bool) -> None:
    call = make(hparams=NUMBERS[name]())
    with pytest.raises(RuntimeError, match=rf"kernel='fused' cannot run.*{name} is a tensor.*kernel='auto'"):
        adam_update(*call, kernel="fused", donate=donate)


@pytest.mark.parametrize("name", NUMBERS)
@each_donate
@pytest.mark.parametrize("decoupled", [False, True])
def test_auto_takes_foreach_for_a_device_tensor(name: str, donate: bool, decoupled: bool) -> None:
    hparams = NUMBERS[name]()
    hparams = AdamHparams(
        betas=hparams.betas, eps=hparams.eps, weight_decay=hparams.weight_decay, decoupled_weight_decay=decoupled
    )
    recorder, _ = run(make(hparams=hparams), donate=donate)
    assert "_foreach_sqrt_" in recorder.counts
    assert not recorder.named(*FUSED)
    assert_no_sync(recorder)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kernel", ["single", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("tensor_dtype", [torch.float32, torch.float64], ids=str)
def test_single_and_foreach_take_device_tensors(
    name: str, kernel: str, dtype: torch.dtype, tensor_dtype: torch.dtype
) -> None:
    hparams = torch_pytree.tree_map(lambda x: x.to(tensor_dtype) if isinstance(x, Tensor) else x, NUMBERS[name]())
    recorder, _ = run(make((dtype,), hparams=hparams), kernel=kernel)
    assert_no_sync(recorder)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_on_the_cpu_do_not_move_data_to_it(name: str) -> None:
    hparams = torch_pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, NUMBERS[name]())
    recorder, _ = run(make(hparams=hparams))
    assert_no_sync(recorder)


# Mixed trees: one call for each device and dtype.

DEVICES = ("cpu", "cuda:0", "cuda:1")


@pytest.mark.parametrize("kernel", ["auto", "fused"])
@each_donate
@pytest.mark.parametrize("decoupled", [False, True])
def test_mixed_devices_and_dtypes_make_one_fused_call_each(kernel: str, donate: bool, decoupled: bool) -> None:
    hparams = AdamHparams(decoupled_weight_decay=decoupled, weight_decay=0.1)
    call = make((torch.float32, torch.bfloat16), DEVICES, per_leaf_step=True, hparams=hparams)
    recorder, _ = run(call, kernel=kernel, donate=donate)
    calls = recorder.named(FUSED[decoupled])
    assert len(calls) == 6
    seen = set()
    for _, args, _, _ in calls:
        assert [len(column) for column in args] == [2, 2, 2, 2, 0, 2]
        [key] = {(x.device, x.dtype) for column in args[:5] for x in column}
        assert {x.device for x in args[5]} == {key[0]}
        seen.add(key)
    assert len(seen) == 6
    assert_no_sync(recorder)


@each_donate
def test_mixed_devices_are_grouped_for_foreach(donate: bool) -> None:
    call = make((torch.float32, torch.bfloat16), DEVICES[1:], per_leaf_step=True)
    recorder, _ = run(call, kernel="foreach", donate=donate)
    roots = recorder.named("_foreach_sqrt_")
    assert len(roots) == 4
    for _, args, _, _ in roots:
        assert len({(x.device, x.dtype) for x in args[0]}) == 1
    assert_no_sync(recorder)


@each_kernel
@each_donate
def test_mixed_devices_run_on_every_kernel_with_device_options(kernel: str, donate: bool) -> None:
    call = make((torch.float32,), DEVICES, per_leaf_step=True, hparams=AdamHparams(lr=on_cuda(0.1)))
    recorder, _ = run(call, kernel=kernel, donate=donate, grad_scale=on_cuda(2.0), found_inf=on_cuda(0.0))
    for _, args, kwargs, _ in recorder.named(*FUSED):
        device = args[0][0].device
        assert {x.device for x in tensors_of((args, kwargs))} == {device}


@pytest.mark.parametrize("kernel", ["auto", "fused"])
def test_shared_step_with_mixed_dtypes_makes_one_fused_call_each(kernel: str) -> None:
    recorder, _ = run(make((torch.float32, torch.float16, torch.complex64)), kernel=kernel)
    dtypes = Counter(args[0][0].dtype for _, args, _, _ in recorder.named(*FUSED))
    assert set(dtypes) == {torch.float32, torch.float16}
    assert_no_sync(recorder)


def test_shared_step_with_mixed_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"params\[2\] is on cuda:0.*params\[0\] is on cpu.*per_leaf_step=True"):
        make((torch.float32,), DEVICES)


@each_kernel
def test_shared_step_on_another_device_than_a_leaf_is_refused(kernel: str) -> None:
    params, grads, state, hparams = make((torch.float32,), DEVICES, per_leaf_step=True)
    with pytest.raises(ValueError, match=r"state\.step is on cpu.*is on cuda:0.*per_leaf_step=True"):
        adam_update(params, grads, state._replace(step=state.step[0]), hparams, kernel=kernel)


def test_initial_state_lives_on_the_devices_of_its_leaves() -> None:
    params, _, state, _ = make((torch.float32, torch.bfloat16), DEVICES, per_leaf_step=True)
    for tree in (state.step, state.exp_avg, state.exp_avg_sq):
        assert [x.device for x in tree] == [x.device for x in params]
    assert {x.dtype for x in state.step} == {torch.float32}


def test_fused_fills_a_number_grad_scale_on_the_device() -> None:
    x = [torch.empty(3, device="cuda") for _ in range(4)]
    scalars = Scalars(0.1, 0.9, 0.999, 1e-8, 0.0, False, False, False)
    with Recorder() as recorder:  # what adam_update calls with real tensors: a fake number cannot be read
        run_kernel("fused", Buffers(x[:1], x[1:2], x[2:3], []), x[3:], [on_cuda(1.0)], [scalars], grad_scale=8.0)
    assert recorder.named("full")
    assert not recorder.named("_to_copy")
