"""The leaves of an update as parallel lists, and what makes a tensor fit to be one."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from optree import PyTreeSpec
from torch import Tensor

from functional_adam.tracking import is_tracing
from functional_adam.trees import path_of

DTYPES = frozenset(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128)
)


class Leaves(NamedTuple):
    """What one update works on, leaf by leaf."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty without amsgrad
    grads: list[Tensor]  # only read

    @property
    def buffers(self) -> list[Tensor]:
        """What an update replaces: parameters and moments."""
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.max_exp_avg_sqs]

    def take(self, indices: Sequence[int]) -> "Leaves":
        """The leaves at `indices` only."""
        return Leaves(*([column[i] for i in indices] if column else [] for column in self))


def check_params(params: Sequence[Any], treespec: PyTreeSpec) -> None:
    """Raise TypeError unless every leaf of `params` is a dense floating or complex tensor."""
    for index, param in enumerate(params):
        fault = _tensor_fault(param)
        if fault:
            raise TypeError(f"{path_of(treespec, index, 'params')} {fault}")


def check_leaves(leaves: Leaves, treespec: PyTreeSpec) -> None:
    """Raise unless moments and gradients (those that are not None) fit the parameters leaf by leaf."""
    if _are_uniform(leaves):
        return
    check_params(leaves.params, treespec)
    names = ("params", "state.exp_avg", "state.exp_avg_sq", "state.max_exp_avg_sq", "grads")
    for name, column in zip(names, leaves, strict=True):
        for index, tensor in enumerate(column):
            if name == "grads" and tensor is None:  # pyright: ignore[reportUnnecessaryComparison] (not yet checked)
                continue
            fault = _tensor_fault(tensor)
            if fault:
                raise TypeError(f"{path_of(treespec, index, name)} {fault}")
            error, got, expected = _misfit(tensor, leaves.params[index], is_grad=name == "grads")
            if error:
                raise error(
                    f"{path_of(treespec, index, name)} {got}, but {path_of(treespec, index, 'params')} {expected}. "
                    f"{name} must match params leaf by leaf."
                )


def _are_uniform(leaves: Leaves) -> bool:
    """Whether all leaves are alike and fit, which is most often so and quick to see."""
    if is_tracing():
        return False
    everything: Iterable[Any] = [x for column in leaves for x in column if x is not None]  # pyright: ignore
    if not {*map(type, everything)} <= {Tensor, torch.nn.Parameter} or any(map(attrgetter("is_nested"), everything)):
        return False
    dtypes = {*map(attrgetter("dtype"), everything)}
    shapes = [*map(attrgetter("shape"), leaves.params)]
    return (
        len(dtypes) == 1
        and dtypes <= DTYPES
        and {*map(attrgetter("layout"), everything)} == {torch.strided}
        and len({*map(attrgetter("device"), everything)}) == 1
        and all([*map(attrgetter("shape"), column)] == shapes for column in leaves[1:4] if column)
        and all(g is None or g.shape == shape for g, shape in zip(leaves.grads, shapes, strict=True))  # pyright: ignore
    )


def _tensor_fault(tensor: Any) -> str | None:
    """Why `tensor` cannot be a leaf, or None."""
    if not isinstance(tensor, Tensor):
        return f"is of type {type(tensor).__name__}. Expected a tensor."
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        return f"has the layout {layout}. Expected a dense tensor: convert it with .to_dense() or take it out."
    if tensor.dtype not in DTYPES:
        return f"is of {tensor.dtype}. Expected a floating or complex dtype: convert it or take it out."
    return None


def _misfit(tensor: Tensor, param: Tensor, *, is_grad: bool) -> tuple[type[Exception] | None, str, str]:
    """The error class, what came and what was expected; no class if `tensor` fits `param`."""
    if tensor.shape != param.shape:
        return ValueError, f"has shape {tuple(tensor.shape)}", f"has shape {tuple(param.shape)}"
    if tensor.device != param.device:
        return ValueError, f"is on {tensor.device}", f"is on {param.device}"
    # A real gradient may meet a complex parameter; nothing else may change its kind.
    if tensor.is_complex() != param.is_complex() and not (is_grad and param.is_complex()):
        return TypeError, f"is of {tensor.dtype}", f"is of {param.dtype}"
    return None, "", ""
