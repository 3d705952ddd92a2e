"""What makes a tensor fit to be a leaf of an update, and to stand beside another one; how DTensors are placed."""

from collections.abc import Callable, Collection, Iterator, Mapping, MappingView, Sequence
from numbers import Real
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functional_adam.tensors.batch import BUFFERS, Batch
from functional_adam.tensors.layouts import foreign_layout
from functional_adam.tensors.tracking import class_fault, is_tracing

PLAIN = frozenset((Tensor, torch.nn.Parameter))

DTYPES = frozenset(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128)
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBER_DTYPES = {*_FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}

MASTER_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
"""Of parameters that can have a copy of more precision, and of that."""

DTensor: TypeAlias = Any
"""As a type: torch.distributed.tensor is slow to import, and not in every build."""

Label: TypeAlias = Callable[[str, int], str]
"""The name of leaf `index` of the tree `root`, such as `grads['w']`."""

ADVICE = "The state, made by adam_init, must match params leaf by leaf."
_HOLDERS: tuple[type[object], ...] = (torch.nn.Module, Iterator, MappingView)  # of parameters, but no pytree of them


def check_params(params: Sequence[object], label: Label) -> None:
    """Raise TypeError unless every leaf of `params` is a dense floating or complex tensor."""
    for index, param in enumerate(params):
        fault = tensor_fault(param)
        if fault:
            if isinstance(param, _HOLDERS):
                fault += " You can pass {name: p.detach() for name, p in model.named_parameters()}."
            raise TypeError(f"{label('params', index)} {fault}")


def check_masters(params: Mapping[int, Tensor], masters: Sequence[object], label: Label) -> None:
    """Raise unless the master of each of `params`, which are those that have one, is a wider copy of it."""
    for index, param in params.items():
        master, expected = masters[index], MASTER_DTYPES.get(param.dtype)
        path = label("state.master_params", index)
        if expected is None:
            what = f"{label('params', index)} is of {param.dtype} and needs no copy"
            raise TypeError(f"{path} is given, but {what}. Put () there.")
        if isinstance(master, Tensor) and master.dtype is not expected:
            raise TypeError(f"{path} is of {master.dtype}. Expected {expected}: convert it with .to().")
        check_fit(master, param, label, "state.master_params", index, ADVICE)


@torch.no_grad()
def check_leaves(batch: Batch, label: Label) -> None:
    """Raise unless moments, and gradients where they are not None, fit the parameters leaf by leaf."""
    for root, column in zip(BUFFERS, batch, strict=False):
        for index, (x, param) in enumerate(zip(column, batch.params, strict=False)):
            check_fit(x, param, label, root, index, ADVICE)
    for index, (x, param) in enumerate(zip(batch.grads, batch.params, strict=True)):
        if x is not None:  # pyright: ignore[reportUnnecessaryComparison]
            check_fit(x, param, label, "grads", index, "Gradients must match params leaf by leaf.", is_grad=True)


def are_surely_fit(batch: Batch) -> bool:
    """Whether one look shows that all leaves are plain tensors of one dtype and device, in the shapes of parameters."""
    columns = [column for column in batch[:4] if column]
    columns.append([x if x is not None else p for x, p in zip(batch.grads, batch.params, strict=True)])  # pyright: ignore[reportUnnecessaryComparison]
    leaves = [x for column in columns for x in column]
    if is_tracing() or not {*map(type, leaves)} <= PLAIN or any(map(attrgetter("is_nested"), leaves)):
        return False
    dtypes = {*map(attrgetter("dtype"), leaves)}
    if len(dtypes) != 1 or not dtypes <= DTYPES or {*map(attrgetter("layout"), leaves)} != {torch.strided}:
        return False
    shapes = [x.shape for x in batch.params]
    return len({x.device for x in leaves}) == 1 and all([x.shape for x in column] == shapes for column in columns[1:])


def check_fit(
    x: object,
    model: Tensor,
    label: Label,
    root: str,
    index: int,
    advice: str,
    *,
    is_grad: bool = False,
    any_device: bool = False,
) -> None:
    """Raise unless leaf `index` of `root`, which is `x`, fits that of params, which is `model`.

    `is_grad`: `x` may be real where `model` is complex, and a DTensor placed in another way.
    """
    fault, error = tensor_fault(x), TypeError
    if not fault and isinstance(x, Tensor):
        error, fault = ValueError, _place_fault(x, model, is_grad=is_grad, any_device=any_device)
        if not fault and x.is_complex() != model.is_complex() and not (is_grad and model.is_complex()):
            error, fault = TypeError, f"is of {x.dtype}, but {{param}} is of {model.dtype}."
    if fault:
        hint = f" {advice}" if "{param}" in fault else ""
        raise error(f"{label(root, index)} {fault}{hint}".replace("{param}", label("params", index)))


def _place_fault(x: Tensor, model: Tensor, *, is_grad: bool, any_device: bool) -> str | None:
    """Why `x` has not the shape or place of `model`, which the text calls `{param}`."""
    if x.shape != model.shape:
        return f"has shape {tuple(x.shape)}, but {{param}} has shape {tuple(model.shape)}."
    if any_device:
        return None
    if x.device != model.device:
        return f"is on {x.device}, but {{param}} is on {model.device}."
    return _placement_fault(x, model, is_grad=is_grad)


def tensor_fault(x: object) -> str | None:
    """Why `x` cannot be a leaf, or None."""
    if not isinstance(x, Tensor):
        return f"is of type {type(x).__name__}. Expected a tensor."
    return _fault(x, DTYPES, "is of {}. Expected a floating or complex dtype: convert it first.")


def number_fault(tensor: Tensor) -> str | None:
    """Why `tensor` holds no numbers to compute with, or None."""
    return _fault(tensor, _NUMBER_DTYPES, "is a tensor of {}. Expected a real tensor: convert it first.")


def _fault(x: Tensor, dtypes: Collection[torch.dtype], text: str) -> str | None:
    layout = foreign_layout(x)
    if layout:
        return f"has the layout {layout}. Expected a dense tensor: convert it with .to_dense()."
    return class_fault(x) if x.dtype in dtypes else text.format(x.dtype)


def wrong_type(where: str, x: object, expected: str) -> TypeError:
    """The error where `x` is of another type than `expected`."""
    return TypeError(f"{where} is of type {type(x).__name__}. Expected {expected}.")


def to_float(value: Real, where: str) -> float:
    """`value` as the float that kernels compute with."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where} is too large for a float. Expected a number below 1.8e308.") from None


def check_flag(value: object, where: str) -> None:
    """Raise TypeError unless `value` is True or False."""
    if value is not True and value is not False:
        raise wrong_type(where, value, "True or False")


def is_dtensor(x: object) -> bool:
    """Whether `x` is a DTensor."""
    return type(x) not in PLAIN and hasattr(x, "device_mesh")


def local_shard(x: DTensor) -> Tensor:
    """What lies in this process of a DTensor, on the same memory; any other tensor as it is. Call under no_grad."""
    return x.to_local() if is_dtensor(x) else x


def placed_like(grad: DTensor, param: Tensor) -> Tensor:
    """`grad`, brought to the placements of `param`."""
    placements = placement_change(grad, param)
    return grad if placements is None else grad.redistribute(placements=placements)


def placement_change(grad: DTensor, param: DTensor) -> tuple[object, ...] | None:
    """The placements that `grad` is to be brought to, those of its parameter, or None if it is placed like it."""
    return None if not is_dtensor(param) or grad.placements == param.placements else param.placements


def full_value(x: DTensor) -> DTensor:
    """A DTensor as a plain tensor of its full value, the same in each process; anything else as it is."""
    if not is_dtensor(x):
        return x
    with torch.no_grad():
        return x.full_tensor()


def _placement_fault(tensor: DTensor, param: DTensor, *, is_grad: bool) -> str | None:
    """Why a DTensor cannot be updated shard by shard, or None. Gradients may be placed differently."""
    if is_dtensor(tensor) != is_dtensor(param):
        a, b = (f"a DTensor on {x.device_mesh}" if is_dtensor(x) else "no DTensor" for x in (tensor, param))
        return f"is {a}, but {{param}} is {b}. Convert it with distribute_tensor() or full_tensor()."
    if not is_dtensor(param):
        return None
    got, expected = tensor.placements, param.placements
    if tensor is param:
        if any(placement.is_partial() for placement in got):
            return f"is placed as {got}, a sum that is still to be made. Convert it with redistribute()."
        return None
    if tensor.device_mesh != param.device_mesh:
        return f"is on {tensor.device_mesh}, but {{param}} is on {param.device_mesh}. Put both on one mesh."
    if got != expected:
        return None if is_grad else f"is placed as {got}, but {{param}} as {expected}. Convert it with redistribute()."
    got, expected = (tuple(local_shard(x).shape) for x in (tensor, param))
    if got != expected:
        return f"has a local shard of shape {got}, but {{param}} has {expected}. Split both alike."
    return None
