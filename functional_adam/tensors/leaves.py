"""The leaves of an update as parallel lists, and what makes a tensor fit to be one."""

from collections.abc import Callable, Iterator, MappingView, Sequence
from typing import Any, NamedTuple, cast

import torch
from optree import PyTreeSpec
from torch import Tensor

from functional_adam.adam.equations import Row
from functional_adam.tensors.layouts import foreign_layout
from functional_adam.tensors.tracking import class_fault
from functional_adam.tensors.trees import path_of

DTYPES = frozenset(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128)
)

MASTER_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
"""Of parameters that can have a copy of more precision, and of that."""


class Buffers(NamedTuple):
    """What an update replaces, as parallel lists with one tensor a leaf."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty without amsgrad

    @property
    def flat(self) -> list[Tensor]:
        """All of them, list after list."""
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.max_exp_avg_sqs]

    def with_flat(self, flat: Sequence[Tensor]) -> "Buffers":
        """As many of them, out of one list."""
        columns = [list(flat[i : i + len(self.params)]) for i in range(0, len(flat), max(len(self.params), 1))]
        return Buffers(*columns, *([[]] * (4 - len(columns))))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Buffers":
        """`function` of each tensor."""
        return Buffers(*([function(x) for x in column] for column in self))

    def take(self, indices: Sequence[int]) -> "Buffers":
        """The leaves at `indices` only."""
        return Buffers(*([column[i] for i in indices] if column else [] for column in self))

    def rows(self) -> Iterator[Row]:
        """The buffers leaf by leaf."""
        maxima = self.max_exp_avg_sqs or [None] * len(self.params)
        return zip(self.params, self.exp_avgs, self.exp_avg_sqs, maxima, strict=True)


BUFFER_NAMES = ("params", "state.exp_avg", "state.exp_avg_sq", "state.max_exp_avg_sq")


_PLAIN = {Tensor, torch.nn.Parameter}
_HOLDERS: Any = (torch.nn.Module, Iterator, MappingView)  # of parameters, but no pytree of them


def local_shard(x: Tensor) -> Tensor:
    """What lies in this process of a DTensor, on the same memory; any other tensor as it is. Call under no_grad."""
    if not _is_dtensor(x):
        return x
    to_local: Any = getattr(x, "to_local")  # noqa: B009 (no attribute of Tensor)
    return to_local()


@torch.no_grad()
def local_shards(buffers: Buffers, grads: list[Tensor]) -> tuple[Buffers, list[Tensor]]:
    """The local shards of all leaves; gradients are first brought to the placements of their parameters.

    Adam is elementwise, so the update of the shards is the update. Without a DTensor both come back as they are.
    """
    if _PLAIN.issuperset(map(type, buffers.params)):
        return buffers, grads
    placed: list[Any] = []
    for grad, param in zip(grads, buffers.params, strict=True):
        to, here = placement_change(grad, param), cast("Any", grad)
        placed.append(grad if to is None else here.redistribute(placements=to))
    return buffers.map(local_shard), [*map(local_shard, placed)]


def placement_change(grad: Any, param: Any) -> Any:
    """The placements that `grad` is to be brought to, those of its parameter, or None if it is placed like it."""
    return None if not _is_dtensor(param) or grad.placements == param.placements else param.placements


def full_value(x: Any) -> Any:
    """A DTensor as a plain tensor of its full value, the same in each process; anything else as it is."""
    if not _is_dtensor(x):
        return x
    with torch.no_grad():
        return x.full_tensor()


def check_unsharded(buffers: Buffers, watcher: str, treespec: PyTreeSpec) -> None:
    """Raise RuntimeError if a parameter is a DTensor: its update is not differentiable."""
    for index, param in enumerate(buffers.params):
        if _is_dtensor(param):
            raise RuntimeError(
                f"{path_of(treespec, index, 'params')} is a DTensor, and the update is watched by {watcher}. "
                "DTensors are updated shard by shard, without derivatives: use torch.no_grad(), or detach, or update "
                "plain tensors (full_tensor())."
            )


def _is_dtensor(x: Any) -> bool:
    # By capability: importing torch.distributed.tensor costs time, and not every build has it.
    return type(x) not in _PLAIN and hasattr(x, "device_mesh")


def check_params(params: Sequence[Any], treespec: PyTreeSpec) -> None:
    """Raise TypeError unless every leaf of `params` is a dense floating or complex tensor."""
    for index, param in enumerate(params):
        fault = tensor_fault(param)
        if fault:
            if isinstance(param, _HOLDERS):
                expected = "Expected tensors: pass {name: p.detach() for name, p in model.named_parameters()}."
                fault = f"is of type {type(param).__name__}. {expected}"
            raise TypeError(f"{path_of(treespec, index, 'params')} {fault}")


def check_masters(params: Sequence[Tensor], masters: Sequence[Any], treespec: PyTreeSpec) -> None:
    """Raise unless each of `masters` is () or a wider copy of its parameter."""
    for index, (param, master) in enumerate(zip(params, masters, strict=True)):
        if type(master) is tuple and not master:
            continue
        error, fault = _master_fault(master, param)
        if error:
            path, param_path = path_of(treespec, index, "state.master_params"), path_of(treespec, index, "params")
            raise error(fault.format(path=path, param_path=param_path))


def _master_fault(master: Any, param: Tensor) -> tuple[type[Exception] | None, str]:
    expected = MASTER_DTYPES.get(param.dtype)
    if expected is None:
        return TypeError, f"{{path}} is given, but {{param_path}} is of {param.dtype} and needs no copy. Put () there."
    if isinstance(master, Tensor) and master.dtype is not expected:
        return TypeError, f"{{path}} is of {master.dtype}, expected {expected}: convert it with .to()."
    return _misfit(master, param, is_grad=False)


@torch.no_grad()
def check_leaves(buffers: Buffers, grads: Sequence[Any], treespec: PyTreeSpec) -> None:
    """Raise unless moments, and gradients where they are not None, fit the parameters leaf by leaf."""
    check_params(buffers.params, treespec)
    for name, column in zip((*BUFFER_NAMES, "grads"), (*buffers, grads), strict=True):
        for index, tensor in enumerate(column):
            if tensor is None and name == "grads":
                continue
            error, fault = _misfit(tensor, buffers.params[index], is_grad=name == "grads")
            if error:
                path, param_path = path_of(treespec, index, name), path_of(treespec, index, "params")
                raise error(fault.format(path=path, param_path=param_path))


def tensor_fault(tensor: Any) -> str | None:
    """Why `tensor` cannot be a leaf, or None."""
    if not isinstance(tensor, Tensor):
        return f"is of type {type(tensor).__name__}. Expected a tensor."
    layout = foreign_layout(tensor)
    if layout:
        return f"has the layout {layout}. Expected a dense tensor: convert it with .to_dense() or take it out."
    if tensor.dtype not in DTYPES:
        return f"is of {tensor.dtype}. Expected a floating or complex dtype: convert it or take it out."
    return class_fault(tensor)


def _misfit(tensor: Any, param: Tensor, *, is_grad: bool) -> tuple[type[Exception] | None, str]:
    """The error class and its text, with places for the paths; no class if `tensor` fits `param`."""
    fault = tensor_fault(tensor)
    if fault:
        return TypeError, f"{{path}} {fault}"
    advice = ("Gradients" if is_grad else "The moments, made by adam_init,") + " must match params leaf by leaf."
    if tensor.shape != param.shape:
        got, expected = f"has shape {tuple(tensor.shape)}", f"has shape {tuple(param.shape)}"
        return ValueError, f"{{path}} {got}, but {{param_path}} {expected}. {advice}"
    if tensor.device != param.device:
        return ValueError, f"{{path}} is on {tensor.device}, but {{param_path}} is on {param.device}. {advice}"
    fault = _placement_fault(tensor, param, is_grad=is_grad)
    if fault:
        return ValueError, f"{{path}} {fault} {advice}"
    # A real gradient may meet a complex parameter; nothing else may change its kind.
    if tensor.is_complex() != param.is_complex() and not (is_grad and param.is_complex()):
        return TypeError, f"{{path}} is of {tensor.dtype}, but {{param_path}} is of {param.dtype}. {advice}"
    return None, ""


def _placement_fault(tensor: Any, param: Any, *, is_grad: bool) -> str | None:
    """Why a DTensor cannot be updated shard by shard, or None. Gradients may be placed differently."""
    if _is_dtensor(tensor) != _is_dtensor(param):
        a, b = (f"a DTensor on {x.device_mesh}" if _is_dtensor(x) else "no DTensor" for x in (tensor, param))
        return f"is {a}, but {{param_path}} is {b}. Convert it with distribute_tensor() or full_tensor()."
    if not _is_dtensor(param):
        return None
    got, expected = tensor.placements, param.placements
    if tensor is param:
        if any(placement.is_partial() for placement in got):
            return f"is placed as {got}, a sum that is still to be made. Convert it with redistribute()."
        return None
    if tensor.device_mesh != param.device_mesh:
        return f"is on {tensor.device_mesh}, but {{param_path}} is on {param.device_mesh}. Put both on one mesh."
    if got != expected:
        problem = f"is placed as {got}, but {{param_path}} as {expected}. Convert it with redistribute()."
        return None if is_grad else problem
    got, expected = (tuple(local_shard(x).shape) for x in (tensor, param))
    if got != expected:
        return f"has a local shard of shape {got}, but {{param_path}} has {expected}. Split both alike."
    return None
