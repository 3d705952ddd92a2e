"""A parameter group of a stateful optimizer: its defaults, its hyperparameters, its update."""

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from functional_adam.adam.hparams import AdamHparams, number_fault
from functional_adam.adam.planning import KernelName
from functional_adam.adam.state import AdamState, adam_init
from functional_adam.call.arguments import flatten_arguments
from functional_adam.call.dispatch import select_way
from functional_adam.call.donation import find_overlap
from functional_adam.call.update import run_update

_BETAS = ("beta1", "beta2")  # the names in torch's functional classes
_HPARAMS = tuple(field.name for field in fields(AdamHparams))


class Defaults(UserDict[str, Any]):
    """Default hyperparameters; what is set here is set in every group, as torch's class reads its `defaults`."""

    def __init__(self, defaults: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
        self.groups: list[dict[str, Any]] = []
        super().__init__(defaults)
        self.groups = groups

    def __missing__(self, name: str) -> Any:
        if name not in _BETAS:
            raise KeyError(name)
        return self["betas"][_BETAS.index(name)]

    def __setitem__(self, name: str, value: Any) -> None:
        if name in _BETAS:
            betas = list(self["betas"])
            betas[_BETAS.index(name)] = value
            name, value = "betas", tuple(betas)
        super().__setitem__(name, value)
        for group in self.groups:
            group[name] = value


def check_pairs(params: Any, grads: Any) -> None:
    """Raise unless these are two lists of one length, the first of tensors."""
    for name, given in (("params", params), ("grads", grads)):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name} is of type {type(given).__name__}. Expected a list.")
    if len(params) != len(grads):
        raise ValueError(f"There are {len(params)} params, but {len(grads)} grads. Expected one for each.")
    for place, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(f"params[{place}] is of type {type(param).__name__}. Expected a tensor.")


class Call(NamedTuple):
    """One group's update. Keys are places in the list of parameters, as errors name them."""

    params: dict[int, Tensor]
    grads: dict[int, Any]
    rows: dict[int, dict[str, Any]]  # the state of each parameter, updated in place
    hparams: AdamHparams
    kernel: KernelName

    def prepare(self) -> Callable[[], Any]:
        """Check everything and write nothing; what comes back updates parameters and rows."""
        # A donated step object is emptied, but its memory has the new value: an alias is given away.
        state = AdamState(
            step={place: row["step"].detach() for place, row in self.rows.items()},
            exp_avg=self._column("exp_avg"),
            exp_avg_sq=self._column("exp_avg_sq"),
            max_exp_avg_sq=self._column("max_exp_avg_sq") if self.hparams.amsgrad else (),
        )
        given = flatten_arguments(self.params, self.grads, state, self.hparams, None, None)
        way = select_way(given, self.kernel, donate=True)
        return partial(run_update, self.params, given, way, state, donate=True)

    def _column(self, name: str) -> dict[int, Any]:
        return {place: row.get(name) for place, row in self.rows.items()}


def check_apart(calls: Sequence[Call]) -> None:
    """Raise RuntimeError if a call writes what another reads or writes; what is in one call, the update checks."""
    written = [(f"params[{i}]", x) for call in calls for i, x in call.params.items()]
    rows = [(i, name, x) for call in calls for i, row in call.rows.items() for name, x in row.items()]
    written += [(f"state[params[{i}]][{name!r}]", x) for i, name, x in rows if isinstance(x, Tensor)]
    read = [(f"grads[{i}]", x) for call in calls for i, x in call.grads.items() if isinstance(x, Tensor)]
    found = find_overlap([x for _, x in written], [x for _, x in read])
    if found is not None:
        first, second = ((written + read)[place][0] for place in found)
        raise RuntimeError(f"{first} shares memory with {second}: writing one would change the other. Clone it.")


def group_call(
    group: Mapping[str, Any], params: dict[int, Tensor], grads: dict[int, Any], state: Mapping[Tensor, dict[str, Any]]
) -> Call:
    """What has to be done for `params` of `group`. `state` is read only."""
    hparams = hparams_of_group(group)
    rows: dict[int, dict[str, Any]] = {}
    for place, param in params.items():
        row = state.get(param)
        if row:
            # torch keeps steps on the CPU, in the default dtype, or, long ago, as numbers.
            rows[place] = {**row, "step": torch.as_tensor(row["step"], dtype=torch.float32, device=param.device)}
        else:
            fresh = adam_init(param, hparams)._asdict()
            rows[place] = {name: value for name, value in fresh.items() if isinstance(value, Tensor)}
    return Call(params, grads, rows, hparams, kernel_of(group))


def hparams_of_group(group: Mapping[str, Any]) -> AdamHparams:
    """The hyperparameters of a group; raise if they are none."""
    return AdamHparams(**{name: _without_dimensions(group[name], name) for name in _HPARAMS})


def _without_dimensions(value: Any, name: str) -> Any:
    """`value`, where a tensor of one element may have any shape, as in torch.optim."""
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[Any]", value)
        return [_without_dimensions(x, f"{name}[{i}]") for i, x in enumerate(items)]
    if not isinstance(value, Tensor) or number_fault(value) or not value.shape:
        return value
    if value.numel() != 1:
        raise ValueError(
            f"Tensor {name} must be 1-element, but it has shape {tuple(value.shape)}. "
            "Give each parameter group a number of its own."
        )
    return value.reshape(())


def kernel_of(group: Mapping[str, Any]) -> KernelName:
    """The kernel that a group asks for by torch's flags; single if by none."""
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    return "fused" if group["fused"] else "foreach" if group["foreach"] else "single"
