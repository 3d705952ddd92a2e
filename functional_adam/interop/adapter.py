"""_FunctionalAdam and _FunctionalAdamW: the pure update behind the stateful interface that torch.distributed calls."""

from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from functional_adam.adam.kernels import KernelName
from functional_adam.adam.pytrees import AdamHparams, adam_init
from functional_adam.call.arguments import Arguments, numbers_of
from functional_adam.call.plan import plan_update
from functional_adam.call.update import run_plan
from functional_adam.tensors.batch import Batch
from functional_adam.tensors.leaves import number_fault
from functional_adam.tensors.overlap import check_apart

__all__ = ["_FunctionalAdam", "_FunctionalAdamW"]

Group: TypeAlias = Mapping[str, Any]
"""A parameter group, or another dict of an optimizer, whose values torch gives no type."""

_BETAS = ("beta1", "beta2")  # the names in torch's functional classes
_HPARAMS = tuple(field.name for field in fields(AdamHparams))


class _Defaults(UserDict[str, Any]):
    """Default hyperparameters; what is set here is set in every group, as torch's class reads its `defaults`."""

    def __init__(self, defaults: Group, groups: list[dict[str, Any]]) -> None:
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


class _Call(NamedTuple):
    """The update of one group."""

    group: Group
    params: list[Tensor]
    grads: list[Tensor]
    rows: list[dict[str, Any]]  # the state of each parameter, updated in place
    places: list[int]  # in the list that the caller gave, for errors

    def read(self) -> Arguments:
        """The columns of the update. They are lists from the beginning: no tree is made."""
        hparams, count = _hparams_of_group(self.group), len(self.params)
        batch = Batch(
            self.params,
            self._column("exp_avg"),
            self._column("exp_avg_sq"),
            self._column("max_exp_avg_sq") if hparams.amsgrad else [],
            self.grads,
            # A donated step object is emptied, but its memory has the new value: an alias is given away.
            [row["step"].detach() for row in self.rows],
        )
        sets, places, others = numbers_of(hparams, self.params, count)

        def label(root: str, index: int) -> str:
            return f"{root}[{self.places[index]}]"

        return Arguments(batch, {}, sets, places, None, None, others, True, label)

    def _column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self.rows]


def _row_of(param: Tensor, row: Group | None, group: Group) -> dict[str, Any]:
    """The state of `param`, to be updated in place; a fresh one if it has none."""
    if row:
        # torch keeps steps on the CPU, in the default dtype, or, long ago, as numbers.
        return {**row, "step": torch.as_tensor(row["step"], dtype=torch.float32, device=param.device)}
    fresh = adam_init(param, _hparams_of_group(group))._asdict()
    return {name: value for name, value in fresh.items() if isinstance(value, Tensor)}


def _check_apart(calls: Sequence[Arguments]) -> None:
    """Raise RuntimeError if a group writes what another reads or writes; what is in one group, its plan checks."""
    written = [(call, owned) for call in calls for owned in call.written()]
    read = [(call, owned) for call in calls for owned in call.read()]
    everything = written + read

    def name(place: int) -> str:
        call, (root, index, _) = everything[place]
        return call.name(root, index)

    check_apart([x for _, (*_, x) in written], [x for _, (*_, x) in read], name)


def _flag(name: str) -> Any:
    """A property: the flag of the first group. Setting it sets that of all groups."""

    def get(optimizer: "_FunctionalAdam") -> bool:
        return optimizer.param_group[name]

    def set_all(optimizer: "_FunctionalAdam", value: bool) -> None:
        optimizer.defaults[name] = value

    return property(
        get, set_all, doc=f"`{name}` of the first group. Setting it sets all groups, from the next step on."
    )


class _FunctionalAdam(torch.optim.Optimizer):
    """Adam as an object: `torch.distributed.optim.functional_adam._FunctionalAdam` without TorchScript.

    Every step is one donated :func:`adam_update` a parameter group: parameters and moments are updated in place,
    whatever grad mode is on. Being a `torch.optim.Optimizer` too, it takes parameter groups, learning rate schedulers
    and hooks, and its `state_dict` is that of `torch.optim.Adam`. Hyperparameters are read from `param_groups` at each
    step. What is set in `defaults` is set in every group; so is what is set as `amsgrad`, `maximize`, `foreach` or
    `fused` on the optimizer, which torch's class has too.

    Each parameter has its own `step`, a float32 tensor on the parameter's device. A call that raises changes nothing.
    Threads may call `step_param` at once on different parameters of one instance.

    Args:
        params: parameters, pairs of name and parameter, or dicts with "params" and hyperparameters of their own.
        lr: learning rate, in units U of the parameters. This and the following numbers may be tensors of one element.
        betas: decay rates of the running means of g and of g * g.
        eps: added to the denominator, in L/U (L is the unit of the loss).
        weight_decay: L2 penalty in L/U^2; for `_FunctionalAdamW` decoupled, in 1/U.
        amsgrad: divide by the largest exp_avg_sq so far.
        maximize: ascend instead of descend.
        foreach, fused: compute by the kernel of that name; if neither is set, by torch's single-tensor one.
        _allow_empty_param_list: accept no parameters: `step_param` takes any, with the hyperparameters given here.

    Raises:
        TypeError: a hyperparameter is of the wrong type.
        ValueError: a hyperparameter is out of its range, or a tensor of several elements; there are no parameters.
        RuntimeError: both `foreach` and `fused` are set.

    Example:
        >>> weight = torch.tensor([1.0, -2.0])
        >>> optimizer = _FunctionalAdam([weight], lr=0.1)
        >>> optimizer.step([2 * weight])
        >>> optimizer.step_param(weight, 2 * weight)
        >>> weight, optimizer.state[weight]["step"]
        (tensor([ 0.8004, -1.8002]), tensor(2.))

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980, Algorithm 1, in the order of `torch.optim.Adam`.
    """

    _is_decoupled = False
    amsgrad: bool = _flag("amsgrad")
    maximize: bool = _flag("maximize")
    foreach: bool = _flag("foreach")
    fused: bool = _flag("fused")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool = False,
        fused: bool = False,
        _allow_empty_param_list: bool = False,
    ) -> None:
        if not isinstance(params, Tensor):  # which Optimizer refuses
            params = list(params)
            if not params and not _allow_empty_param_list:
                raise ValueError("optimizer got an empty parameter list")
            params = params or [{"params": []}]
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        flags = {"amsgrad": amsgrad, "maximize": maximize, "decoupled_weight_decay": self._is_decoupled}
        defaults: dict[str, Any] = {**numbers, **flags, "foreach": foreach, "fused": fused}
        super().__init__(params, defaults)
        self._bind_defaults()

    @property
    def param_group(self) -> dict[str, Any]:
        """The first group, which is the only one that torch's class has."""
        return self.param_groups[0]

    def step(  # pyright: ignore[reportIncompatibleMethodOverride] (torch's functional classes put gradients first)
        self,
        gradients: Sequence[Tensor | None] | Callable[[], Any] | None = None,
        closure: Callable[[], Any] | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            gradients: one for each parameter, group after group, in the parameters' shapes, in L/U. A parameter whose
                gradient is None is skipped. Without the argument, the parameters' `.grad`. A function here is the
                closure, as in `torch.optim.Optimizer.step`.
            closure: recomputes the loss, which is returned, and with it `.grad`, first.

        Raises:
            TypeError: `gradients` is not a list, or a gradient is sparse or of the wrong kind.
            ValueError: there are more or fewer gradients than parameters, or a shape or device does not match.
            RuntimeError: the kernel cannot run here, or tensors share memory. Nothing is changed by any of these.
        """
        loss = None
        if callable(gradients) and closure is None:
            gradients, closure = None, gradients
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if gradients is not None and not isinstance(gradients, (list, tuple)):
            raise TypeError(
                f"gradients is of type {type(gradients).__name__}. Expected a list of tensors and None, one for each "
                "parameter, or a closure."
            )
        params: list[Tensor] = [param for group in self.param_groups for param in group["params"]]
        grads = [x.grad for x in params] if gradients is None else cast("Sequence[Tensor | None]", gradients)
        if len(params) != len(grads):
            raise ValueError(
                f"gradients has length {len(grads)}, but the optimizer has {len(params)} parameters. Give one for "
                "each, in the order of param_groups, and None for a parameter that is to be skipped."
            )
        self.step_params(params, grads)
        return loss

    def step_param(self, param: Tensor, grad: Tensor | None) -> None:
        """Update one parameter, which the constructor need not have seen.

        Args:
            param: any floating or complex tensor. Its hyperparameters are those of its group, or else of the first.
            grad: its gradient, of the same shape, in L/U. If None, nothing happens. Errors are those of `step`.
        """
        self.step_params([param], [grad])

    def step_params(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Do as `step_param` for each pair of `params` and `grads`, but for all or, if one is at fault, for none."""
        _check_pairs(params, grads)
        groups = self.param_groups
        owners = {id(p): i for i, group in enumerate(groups) for p in group["params"]} if len(groups) > 1 else {}
        places: list[list[int]] = [[] for _ in groups]
        for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is not None:
                places[owners.get(id(param), 0)].append(place)
        # Hooks call with grad mode on.
        with torch.no_grad():
            calls = [self._call(group, own, params, grads) for group, own in zip(groups, places, strict=True) if own]
            # A failure in a later group must leave the earlier ones as they were.
            plans = [plan_update(call.read(), _kernel_of(call.group), donate=True) for call in calls]
            if len(plans) > 1:
                _check_apart([given for _, given in plans])
            for plan, given in plans:
                run_plan(plan, given, donate=True)
        for call in calls:
            for param, row in zip(call.params, call.rows, strict=True):
                self.state[param].update(row)
        self._opt_called = True  # what lr_scheduler looks at before it warns that no step came before its own

    def _call(self, group: Group, places: list[int], params: Sequence[Tensor], grads: Sequence[Any]) -> _Call:
        own = [params[i] for i in places]
        # Only read: other threads may be at other parameters.
        rows = [_row_of(param, self.state.get(param), group) for param in own]
        return _Call(group, own, [grads[i] for i in places], rows, places)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`; the hyperparameters are checked first."""
        group = {**self.defaults, **param_group}
        _hparams_of_group(group)
        _kernel_of(group)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As in `torch.optim.Optimizer`, whose format counts parameters through the groups."""
        known = {id(param) for group in self.param_groups for param in group["params"]}
        strangers = [param for param in self.state if id(param) not in known]
        if strangers:
            raise RuntimeError(
                f"There is state for {len(strangers)} parameters that are in no group, so that a state_dict cannot "
                "number them. Add them, in the order of model.parameters(), with add_param_group."
            )
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "defaults": dict(self.defaults)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind_defaults()
        for group in self.param_groups:
            # What a state_dict of an older torch lacks.
            for name in ("amsgrad", "maximize", "foreach", "fused", "decoupled_weight_decay"):
                group.setdefault(name, False)
            group["decoupled_weight_decay"] |= self._is_decoupled

    def _bind_defaults(self) -> None:
        self.defaults: MutableMapping[str, Any] = _Defaults(self.defaults, self.param_groups)


class _FunctionalAdamW(_FunctionalAdam):
    """AdamW as an object: :class:`_FunctionalAdam` with decoupled weight decay, by default 1e-2.

    Example:
        >>> weight = torch.ones(2)
        >>> _FunctionalAdamW([weight], lr=0.5, weight_decay=0.2).step([torch.ones(2)])
        >>> weight
        tensor([0.4000, 0.4000])

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, Algorithm 2, in the order of `torch.optim.AdamW`.
    """

    _is_decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool = False,
        fused: bool = False,
        _allow_empty_param_list: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, fused, _allow_empty_param_list
        )


def check_adapter(optimizer: Any) -> None:
    """Raise TypeError unless `optimizer` is one of these."""
    if not isinstance(optimizer, _FunctionalAdam):
        raise TypeError(f"optimizer is of type {type(optimizer).__name__}, expected a _FunctionalAdam.")


def _check_pairs(params: Any, grads: Any) -> None:
    """Raise unless these are two lists of one length, the first of tensors."""
    for name, given in (("params", params), ("grads", grads)):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name} is of type {type(given).__name__}. Expected a list.")
    if len(params) != len(grads):
        raise ValueError(f"There are {len(params)} params, but {len(grads)} grads. Expected one for each.")
    for place, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(f"params[{place}] is of type {type(param).__name__}. Expected a tensor.")


def _hparams_of_group(group: Group) -> AdamHparams:
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


def _kernel_of(group: Group) -> KernelName:
    """The kernel that a group asks for by torch's flags; single if by none."""
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    return "fused" if group["fused"] else "foreach" if group["foreach"] else "single"
