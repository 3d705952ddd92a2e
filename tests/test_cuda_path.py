"""Which ops the CUDA path calls, with which dtypes and devices, and that none of them waits for the host.

FakeTensorMode makes CUDA tensors without a GPU: they have everything but values.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import tensors_of
from tests.oracles import KERNELS
from tests.strategies import COMPLEX_DTYPES

FUSED = ("_fused_adam_", "_fused_adamw_")
DEVICES = ("cpu", "cuda:0", "cuda:1")
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


@each_donate
@pytest.mark.parametrize("name", FUSED)
def test_auto_and_fused_make_one_fused_call_per_device_and_dtype(name: str, donate: bool) -> None:
    options = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.2, "maximize": True}
    for kernel, amsgrad, devices in itertools.product(("auto", "fused"), (False, True), (("cuda",), DEVICES)):
        flags = {"amsgrad": amsgrad, "decoupled_weight_decay": name == "_fused_adamw_"}
        hparams = AdamHparams(**options, **flags, betas=(0.8, 0.9))
        dtypes = (torch.float32, torch.bfloat16)
        recorder, _ = run(
            make(dtypes, devices, hparams=hparams, per_leaf_step=len(devices) > 1), kernel=kernel, donate=donate
        )
        seen = set()
        for called, args, kwargs, _ in recorder.named(*FUSED):
            assert called == name
            assert [len(column) for column in args] == [2, 2, 2, 2, 2 if amsgrad else 0, 2]
            [key] = {(x.device, x.dtype) for x in tensors_of(args[:5])}
            assert {(x.device, x.dtype, x.shape) for x in args[5]} == {(key[0], torch.float32, ())}
            assert kwargs == {**options, "amsgrad": amsgrad, "beta1": 0.8, "beta2": 0.9}
            seen.add(key)
        assert len(recorder.named(*FUSED)) == len(seen) == 2 * len(devices)


@each_donate
def test_foreach_and_single_call_ops_of_their_kind_alone_and_foreach_by_device_and_dtype(donate: bool) -> None:
    recorders = {}
    for kernel in ("foreach", "single"):
        hparams = AdamHparams(amsgrad=True, weight_decay=0.1)
        call = make((torch.float32, torch.bfloat16), DEVICES[1:], per_leaf_step=True, hparams=hparams)
        recorders[kernel], _ = run(call, kernel=kernel, donate=donate)
    names = {*recorders["foreach"].counts}
    assert sum(name.startswith("_foreach_") for name in names) >= 5
    assert names.isdisjoint({*FUSED, "lerp_", "addcdiv_", "addcmul_", "sqrt_"})
    assert not [name for name in recorders["single"].counts if name.startswith(("_foreach_", "_fused_"))]
    roots = [{(x.device, x.dtype) for x in args[0]} for _, args, *_ in recorders["foreach"].named("_foreach_sqrt_")]
    assert [len(kinds) for kinds in roots] == [1, 1, 1, 1]


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

ALL = {"lr": (0.1, torch.float32), "grad_scale": (8.0, torch.float32), "found_inf": (1.0, torch.float32)}
# Tensors on the device, by value and dtype, or numbers.
SYNC_FREE: dict[str, dict[str, Any]] = {
    "plain": {},
    "lr": {"lr": (0.1, torch.bfloat16)},
    "grad_scale": {"grad_scale": (8.0, torch.float16)},
    "number_grad_scale": {"grad_scale": 8.0},
    "found_inf": {"found_inf": (True, torch.bool)},
    "number_found_inf": {"found_inf": 0.0},
    "all": ALL,
    "all_wide": {
        "lr": (0.1, torch.float64),
        "grad_scale": (8.0, torch.float64),
        "found_inf": (1, torch.int64),
    },
}


@each_kernel
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in SYNC_FREE),
        *itertools.product(("plain", "all"), (torch.float64, torch.float16, torch.bfloat16, *COMPLEX_DTYPES)),
    ],
    ids=str,
)
def test_no_op_waits_for_the_host(kernel: str, case: str, dtype: torch.dtype) -> None:
    options = {name: on_cuda(*x) if isinstance(x, tuple) else x for name, x in SYNC_FREE[case].items()}
    extras = {name: x for name, x in options.items() if name != "lr"}
    for is_decoupled in (False, True):
        # Where decay is coupled, steps are per leaf, and the first leaf stands still.
        flags = {"weight_decay": 0.1, "amsgrad": is_decoupled, "decoupled_weight_decay": is_decoupled}
        hparams = AdamHparams(lr=options.get("lr", 0.1), maximize=not is_decoupled, **flags)
        params, grads, state, _ = make((dtype, dtype), hparams=hparams, per_leaf_step=not is_decoupled)
        grads = [grads[0] if is_decoupled else None, *(torch.empty_like(g, dtype=torch.float32) for g in grads[1:])]
        memory = memory_of(grads)
        recorder, _ = run((params, grads, state, hparams), kernel=kernel, donate=is_decoupled, **extras)
        assert len(recorder.named(*FUSED)) == (kernel == "fused")
        for _, args, kwargs, _ in recorder.named(*FUSED):
            assert len(args[0]) == (4 if is_decoupled else 3)
            assert {x.dtype for x in tensors_of(args[:5])} == {dtype.to_real()}
            # The CUDA kernel reads them as float32, whatever they are.
            tensors = {name: x for name, x in kwargs.items() if isinstance(x, Tensor)}
            assert {*tensors} == {*options}
            assert {(x.dtype, x.device.type, x.shape) for x in tensors.values()} <= {(torch.float32, "cuda", ())}
            # It would write the unscaled gradients back into the caller's.
            is_copied = memory.isdisjoint(memory_of(args[1]))
            assert is_copied == ("grad_scale" in options) or dtype is not torch.float32


def test_fused_fills_a_number_grad_scale_on_the_device(
    fake_tensors: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*args: Any, full: Any = torch.full, **kwargs: Any) -> Tensor:
        assert args == ((), 8.0)
        with fake_tensors:
            return full(*args, **kwargs)

    call = make()
    monkeypatch.setattr(torch, "full", fill)
    # A fake number cannot be read.
    with unset_fake_temporarily(), Recorder() as recorder:
        adam_update(*call, kernel="fused", grad_scale=8.0)
    [(_, _, kwargs, _)] = recorder.named(*FUSED)
    assert (kwargs["grad_scale"].dtype, kwargs["grad_scale"].device.type) == (torch.float32, "cuda")
    for _, args, _, result in recorder.named("_to_copy", "copy_"):
        assert len({x.device.type for x in tensors_of((args, result))}) == 1


# Tensors as betas, eps or weight decay.


@pytest.mark.parametrize("name", ["beta1", "beta2", "eps", "weight_decay"])
def test_kernels_but_fused_take_tensors_of_any_device_and_auto_is_foreach(name: str) -> None:
    def hparams_with(number: Tensor, **flags: bool) -> AdamHparams:
        betas = {"beta1": (number, 0.99), "beta2": (0.9, number)}
        return AdamHparams(**({"betas": betas[name]} if name in betas else {name: number}), **flags)

    with pytest.raises(RuntimeError, match=rf"kernel='fused' cannot run.*{name} is a tensor.*kernel='auto'"):
        adam_update(*make(hparams=hparams_with(on_cuda(0.9))), kernel="fused")
    run(make(hparams=hparams_with(torch.full((), 0.9))))
    for kernel, decoupled in (("auto", False), ("foreach", True), ("single", False), ("single", True)):
        number = on_cuda(0.9, torch.float64 if decoupled else torch.float32)
        hparams = hparams_with(number, decoupled_weight_decay=decoupled)
        call = make((torch.float32, torch.bfloat16, torch.complex64), hparams=hparams)
        recorder, _ = run(call, kernel=kernel, donate=decoupled)
        assert ("_foreach_sqrt_" in recorder.counts) == (kernel != "single")
        assert not recorder.named(*FUSED)


# Mixed trees.


@each_kernel
def test_mixed_devices_run_on_every_kernel_with_device_options(kernel: str) -> None:
    call = make((torch.float32,), DEVICES, per_leaf_step=True, hparams=AdamHparams(lr=on_cuda(0.1)))
    with Recorder() as recorder:
        adam_update(*call, kernel=kernel, grad_scale=on_cuda(2.0), found_inf=on_cuda(0.0))
    assert len(recorder.named(*FUSED)) == (3 if kernel == "fused" else 0)
    for _, args, kwargs, _ in recorder.named(*FUSED):
        assert len({x.device for x in tensors_of((args, kwargs))}) == 1


def test_a_shared_step_goes_with_mixed_dtypes_but_not_with_mixed_devices() -> None:
    recorder, _ = run(make((torch.float32, torch.float16, torch.complex64)))
    assert {args[0][0].dtype for _, args, _, _ in recorder.named(*FUSED)} == {torch.float32, torch.float16}
    with pytest.raises(ValueError, match=r"params\[2\] is on cuda:0.*params\[0\] is on cpu.*per_leaf_step=True"):
        make((torch.float32,), DEVICES)
    params, grads, state, hparams = make((torch.float32,), DEVICES, per_leaf_step=True)
    for tree in state[:3]:
        assert [x.device for x in tree] == [x.device for x in params]
    with pytest.raises(ValueError, match=r"state\.step is on cpu.*is on cuda:0.*per_leaf_step=True"):
        adam_update(params, grads, state._replace(step=state.step[0]), hparams)
