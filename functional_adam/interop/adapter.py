"""_FunctionalAdam and _FunctionalAdamW: the pure update behind the stateful interface that torch.distributed calls."""

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from functional_adam.interop.param_groups import (
    Defaults,
    check_apart,
    check_pairs,
    group_call,
    hparams_of_group,
    kernel_of,
)

__all__ = ["_FunctionalAdam", "_FunctionalAdamW"]


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
        check_pairs(params, grads)
        groups = self.param_groups
        owners = {id(p): i for i, group in enumerate(groups) for p in group["params"]} if len(groups) > 1 else {}
        places: list[list[int]] = [[] for _ in groups]
        for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is not None:
                places[owners.get(id(param), 0)].append(place)
        # Hooks call with grad mode on.
        with torch.no_grad():
            calls = [
                group_call(group, {i: params[i] for i in own}, {i: grads[i] for i in own}, self.state)
                for group, own in zip(groups, places, strict=True)
                if own
            ]
            # A failure in a later group must leave the earlier ones as they were.
            updates = [call.prepare() for call in calls]
            if len(calls) > 1:
                check_apart(calls)
            for update in updates:
                update()
        for call in calls:
            for place, row in call.rows.items():
                self.state[params[place]].update(row)
        self._opt_called = True  # what lr_scheduler looks at before it warns that no step came before its own

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`; the hyperparameters are checked first."""
        group = {**self.defaults, **param_group}
        hparams_of_group(group)
        kernel_of(group)
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
        self.defaults: MutableMapping[str, Any] = Defaults(self.defaults, self.param_groups)


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
