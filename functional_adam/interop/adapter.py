"""_FunctionalAdam and _FunctionalAdamW: the pure update behind the stateful interface that torch.distributed calls."""

from collections import UserDict
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from functional_adam.adam.pytrees import AdamHparams, AdamState, adam_init
from functional_adam.call.arguments import Arguments, numbers_of
from functional_adam.call.plan import Plan, plan_update
from functional_adam.call.update import run_plan
from functional_adam.tensors.batch import Batch
from functional_adam.tensors.leaves import number_fault, wrong_type
from functional_adam.tensors.overlap import check_apart

__all__ = ["_FunctionalAdam", "_FunctionalAdamW"]

Value: TypeAlias = Any
"""What a dict of an optimizer holds, to which torch gives no type."""
Group: TypeAlias = dict[str, Value]
"""A parameter group, or another dict of an optimizer."""

_BETAS = ("beta1", "beta2")  # the names in torch's functional classes
_HPARAMS = tuple(field.name for field in fields(AdamHparams))


class _Defaults(UserDict[str, Value]):
    """Default hyperparameters; what is set here is set in every group, as torch's class reads its `defaults`."""

    groups: Sequence[Group] = ()

    def __missing__(self, name: str) -> Value:
        if name not in _BETAS:
            raise KeyError(name)
        return self["betas"][_BETAS.index(name)]

    def __setitem__(self, name: str, value: Value) -> None:
        if name in _BETAS:
            betas = list(self["betas"])
            betas[_BETAS.index(name)] = value
            name, value = "betas", tuple(betas)
        super().__setitem__(name, value)
        for group in self.groups:
            group[name] = value


def _row_of(param: Tensor, row: Group | None, hparams: AdamHparams) -> Group:
    """The state of `param`, to be updated in place; a fresh one if it has none."""
    if row:
        # torch keeps steps on the CPU, in the default dtype, or, long ago, as numbers.
        return {**row, "step": torch.as_tensor(row["step"], dtype=torch.float32, device=param.device)}
    fresh = adam_init(param, hparams)._asdict()
    return {name: value for name, value in fresh.items() if isinstance(value, Tensor)}


def _check_apart(calls: Sequence[Arguments]) -> None:
    """Raise RuntimeError if a group writes what another reads or writes; what is in one group, its plan checks."""
    written = [(call, *owned) for call in calls for owned in call.written()]
    read = [(call, *owned) for call in calls for owned in call.read()]

    def name(place: int) -> str:
        call, root, index, _ = (written + read)[place]
        return call.name(root, index)

    check_apart([x for *_, x in written], [x for *_, x in read], name)


def _flag(name: str) -> Value:
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

    Each step is one donated :func:`adam_update` per parameter group: parameters and moments are updated in place,
    in any grad mode. As a `torch.optim.Optimizer` it takes parameter groups, learning rate schedulers and hooks; its
    `state_dict` is that of `torch.optim.Adam`. Hyperparameters are read from `param_groups` at each step. Setting one
    in `defaults`, or `amsgrad`, `maximize`, `foreach` or `fused` on the optimizer, sets it in every group.

    Each parameter has its own `step`, a float32 tensor on its device. A call that raises changes nothing. Threads may
    call `step_param` at once on different parameters of one instance.

    Args:
        params: parameters, pairs of name and parameter, or dicts with "params" and hyperparameters of their own.
        lr: learning rate, in units U of the parameters. This and the following numbers may be tensors of one element.
        betas: decay rates of the running means of g and of g * g.
        eps: added to the denominator, in L/U (L is the unit of the loss).
        weight_decay: L2 penalty in L/U^2; for `_FunctionalAdamW` decoupled, in 1/U.
        amsgrad: divide by the largest exp_avg_sq so far.
        maximize: ascend instead of descend.
        foreach, fused: use the kernel of that name; if neither is set, torch's single-tensor one.
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
        params: Iterable[Value],
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
        super().__init__(params, {**numbers, **flags, "foreach": foreach, "fused": fused})
        self._bind_defaults()

    @property
    def param_group(self) -> Group:
        """The first group, which is the only one that torch's class has."""
        return self.param_groups[0]

    def step(  # pyright: ignore[reportIncompatibleMethodOverride] (torch's functional classes put gradients first)
        self,
        gradients: Sequence[Tensor | None] | Callable[[], object] | None = None,
        closure: Callable[[], object] | None = None,
    ) -> Value:
        """Update every parameter that has a gradient.

        Args:
            gradients: one per parameter, group after group, in the parameters' shapes, in L/U; by default their
                `.grad`. None skips its parameter. A function is the closure, as in `torch.optim.Optimizer.step`.
            closure: called first; recomputes the loss, which is returned, and `.grad`.

        Raises:
            TypeError: `gradients` is not a list, or a gradient is sparse or of the wrong kind.
            ValueError: the number of gradients is not that of parameters, or a shape or device does not match.
            RuntimeError: the kernel cannot run here, or tensors share memory.
        """
        loss = None
        if callable(gradients) and closure is None:
            gradients, closure = None, gradients
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params: list[Tensor] = [param for group in self.param_groups for param in group["params"]]
        grads = [x.grad for x in params] if gradients is None else _checked_list(gradients, "gradients")
        if len(params) != len(grads):
            raise ValueError(
                f"gradients has length {len(grads)}, but the optimizer has {len(params)} parameters. "
                "Give one for each, in the order of param_groups, and None to skip a parameter."
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
            # A failure in a later group must leave the earlier ones as they were.
            plans = [self._plan(group, own, params, grads) for group, own in zip(groups, places, strict=True) if own]
            if len(plans) > 1:
                _check_apart([given for _, given, _ in plans])
            for plan, given, _ in plans:
                run_plan(plan, given, donate=True)
        for _, given, rows in plans:
            for param, row in zip(given.batch.params, rows, strict=True):
                self.state[param].update(row)
        self._opt_called = True  # what lr_scheduler looks at before it warns that no step came before its own

    def _plan(
        self, group: Group, places: list[int], params: Sequence[Tensor], grads: Sequence[Value]
    ) -> tuple[Plan, Arguments, list[Group]]:
        """How to update `params` and `grads` at `places`, and the states of these parameters, updated in place."""
        hparams, own = _hparams_of(group), [params[i] for i in places]
        # Only read: other threads may be at other parameters.
        rows = [_row_of(param, self.state.get(param), hparams) for param in own]
        # The columns are lists from the beginning: no tree is made.
        moments: list[list[Value]] = [[row.get(name) for row in rows] for name in AdamState._fields[1:4]]
        maxima = moments[2] if hparams.amsgrad else []
        # A donated step object is emptied, but its memory has the new value: an alias is given away.
        steps = [row["step"].detach() for row in rows]
        batch = Batch(own, moments[0], moments[1], maxima, [grads[i] for i in places], steps)
        sets, set_of, others = numbers_of(hparams, own, len(own))

        def label(root: str, index: int) -> str:
            return f"{root}[{places[index]}]"

        given = Arguments(batch, {}, sets, set_of, None, None, others, True, label)
        return *plan_update(given, _kernel_of(group), donate=True), rows

    def add_param_group(self, param_group: Group) -> None:
        """As in `torch.optim.Optimizer`; the hyperparameters are checked first."""
        group = {**self.defaults, **param_group}
        _hparams_of(group)
        _kernel_of(group)
        super().add_param_group(param_group)

    def state_dict(self) -> Group:
        """As in `torch.optim.Optimizer`, whose format counts parameters through the groups."""
        known = {id(param) for group in self.param_groups for param in group["params"]}
        strangers = [param for param in self.state if id(param) not in known]
        if strangers:
            raise RuntimeError(
                f"There is state for {len(strangers)} parameters that are in no group, which a state_dict cannot "
                "number. Add them, in the order of model.parameters(), with add_param_group."
            )
        return super().state_dict()

    def __getstate__(self) -> Group:
        return {**super().__getstate__(), "defaults": dict(self.defaults)}

    def __setstate__(self, state: Group) -> None:
        super().__setstate__(state)
        self._bind_defaults()
        for group in self.param_groups:
            # What a state_dict of an older torch lacks.
            for name in ("amsgrad", "maximize", "foreach", "fused", "decoupled_weight_decay"):
                group.setdefault(name, False)
            group["decoupled_weight_decay"] |= self._is_decoupled

    def _bind_defaults(self) -> None:
        defaults = _Defaults(self.defaults)
        defaults.groups = self.param_groups  # after the defaults: groups may have others
        self.defaults: MutableMapping[str, Value] = defaults


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
        params: Iterable[Value],
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


def check_adapter(optimizer: object) -> None:
    """Raise TypeError unless `optimizer` is one of these."""
    if not isinstance(optimizer, _FunctionalAdam):
        raise wrong_type("optimizer", optimizer, "a _FunctionalAdam")


def _checked_list(given: object, name: str) -> Sequence[Value]:
    if not isinstance(given, (list, tuple)):
        raise wrong_type(name, given, "a list, with one entry per parameter")
    return cast("Sequence[Value]", given)


def _check_pairs(params: object, grads: object) -> None:
    """Raise unless these are two lists of one length, the first of tensors."""
    params, grads = _checked_list(params, "params"), _checked_list(grads, "grads")
    if len(params) != len(grads):
        raise ValueError(f"There are {len(params)} params, but {len(grads)} grads. Expected one for each.")
    for place, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise wrong_type(f"params[{place}]", param, "a tensor")


def _hparams_of(group: Group) -> AdamHparams:
    """The hyperparameters of a group; raise if they are none."""
    return AdamHparams(**{name: _without_dimensions(group[name], name) for name in _HPARAMS})


def _without_dimensions(value: Value, name: str) -> Value:
    """`value`, where a tensor of one element may have any shape, as in torch.optim."""
    if isinstance(value, (list, tuple)):
        return [_without_dimensions(x, f"{name}[{i}]") for i, x in enumerate(cast("Sequence[Value]", value))]
    if not isinstance(value, Tensor) or number_fault(value) or not value.shape:
        return value
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, but it has shape {tuple(value.shape)}. Split the group.")
    return value.reshape(())


def _kernel_of(group: Group) -> str:
    """The kernel that a group asks for by torch's flags; single if by none."""
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    return "fused" if group["fused"] else "foreach" if group["foreach"] else "single"
