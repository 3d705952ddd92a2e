"""AdamHparams: the numbers and flags of an Adam update, as a pytree."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, TypeAlias

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from functional_adam.tensors.layouts import foreign_layout
from functional_adam.tensors.tracking import class_fault, is_readable, is_tracing
from functional_adam.tensors.trees import flatten, leaves_of

ScalarTree: TypeAlias = Any
"""A `Scalar`, or a pytree of them that is a prefix of params. optree sets no bound on what a node is."""

_STRUCTURE = {"pytree_node": False}  # to optree, a field that is no child


@dataclass(frozen=True, kw_only=True)
class AdamHparams:
    """The hyperparameters of :func:`adam_update`, with the names, defaults and messages of `torch.optim.Adam`.

    Each number is a Python number or a 0-dim tensor, or a pytree of them that is a prefix of `params`: what stands at
    a node of it holds for all leaves below, as in `lr={"backbone": 1e-5, "head": 1e-3}`, and where `params` have None
    it may have None. A tensor can be mapped,
    differentiated, or changed between the calls of a compiled update without recompiling it; it counts at its own
    value, so that a float32 tensor 1e-3 is not the Python 1e-3. To map over several values with `torch.func.vmap`, give
    them stacked, as a 1-dim tensor. Numbers are the leaves of this pytree, flags are part of its structure.

    Values are checked here, once. Rebuilding from leaves (`vmap`, `grad`, `tree_map`) checks nothing, because the
    leaves may then be gradients or placeholders. A tensor on an accelerator, or one that is traced, mapped or
    differentiated, is not read, so its value is not checked.

    Args:
        lr: learning rate, in units U of the parameters.
        betas: decay rates of the running means of g and of g * g; each in [0, 1), without unit.
        eps: added to the denominator, in units L/U of the gradients (L is the unit of the loss).
        weight_decay: L2 penalty in units L/U^2 if coupled; a rate in units 1/U (of 1/lr) if decoupled.
        amsgrad: divide by the largest exp_avg_sq so far, https://openreview.net/forum?id=ryQu7f-RZ.
        maximize: ascend instead of descend.
        decoupled_weight_decay: shrink the parameters directly instead of adding to the gradients (AdamW),
            https://arxiv.org/abs/1711.05101.

    Raises:
        TypeError: a number is neither a real number nor a real tensor, or a flag is not a bool.
        ValueError: a number is out of its range, or NaN; `betas` is not a pair.

    Example:
        >>> hparams = AdamHparams(lr=3e-4, weight_decay=0.01, decoupled_weight_decay=True)
        >>> optree.tree_leaves(hparams)
        [0.0003, 0.9, 0.999, 1e-08, 0.01]
        >>> AdamHparams(betas=(0.9, 1.0))
        Traceback (most recent call last):
        ValueError: Invalid beta parameter at index 1: 1.0. Expected a number in [0, 1).

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980.
    """

    lr: ScalarTree = 1e-3
    betas: tuple[ScalarTree, ScalarTree] = (0.9, 0.999)
    eps: ScalarTree = 1e-8
    weight_decay: ScalarTree = 0.0
    amsgrad: bool = field(default=False, metadata=_STRUCTURE)
    maximize: bool = field(default=False, metadata=_STRUCTURE)
    decoupled_weight_decay: bool = field(default=False, metadata=_STRUCTURE)

    def __post_init__(self) -> None:
        betas: Any = self.betas
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:  # pyright: ignore[reportUnknownArgumentType]
            raise ValueError(f"Invalid betas: {betas!r}. Expected a pair of numbers (beta1, beta2).")
        object.__setattr__(self, "betas", tuple(betas))  # pyright: ignore[reportUnknownArgumentType]
        _check_range(self.lr, NUMBER_NAMES[0], "learning rate")
        _check_range(self.betas[0], NUMBER_NAMES[1], "beta parameter at index 0", below=1.0)
        _check_range(self.betas[1], NUMBER_NAMES[2], "beta parameter at index 1", below=1.0)
        _check_range(self.eps, NUMBER_NAMES[3], "epsilon value")
        _check_range(self.weight_decay, NUMBER_NAMES[4], "weight_decay value")
        self._check_flags()

    def __setstate__(self, saved: Any) -> None:
        """Rebuild a copy, or what a file holds: values are not checked, fields that an older file lacks are added."""
        defaults: dict[str, Any] = {x.name: x.default for x in fields(self)}
        if not isinstance(saved, dict) or not saved.keys() <= defaults.keys():
            got = list(saved) if isinstance(saved, dict) else type(saved).__name__  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            raise TypeError(
                f"A saved AdamHparams holds {got}. Expected a dict with the keys {list(defaults)}: load it with the "
                "version of functional_adam that saved it, or a later one."
            )
        vars(self).update(defaults | saved)
        self._check_flags()

    def _check_flags(self) -> None:
        for name in _FLAGS:
            flag: Any = getattr(self, name)
            if not isinstance(flag, bool):
                raise TypeError(f"hparams.{name} is {flag!r}. Expected True or False: flags are structure, not data.")

    def numbers(self) -> tuple[ScalarTree, ScalarTree, ScalarTree, ScalarTree, ScalarTree]:
        """lr, beta1, beta2, eps, weight_decay."""
        return self.lr, *self.betas, self.eps, self.weight_decay


NUMBER_NAMES = ("hparams.lr", "hparams.betas[0]", "hparams.betas[1]", "hparams.eps", "hparams.weight_decay")
_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBER_DTYPES = {*_FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_NUMBERS = ("lr", "betas", "eps", "weight_decay")


def check_scalar(value: Any, where: str) -> None:
    """Raise unless `value` can stand for a number: real, not a flag, and not too large."""
    if isinstance(value, AdamHparams):
        raise TypeError(f"{where} is an AdamHparams. Expected a number or a 0-dim tensor: give one of its numbers.")
    if isinstance(value, Tensor):
        fault = number_fault(value)
        if fault or value.dtype is torch.bool:
            raise TypeError(
                f"{where} {fault or 'is a tensor of torch.bool. Expected a real tensor: convert it first.'}"
            )
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where} is {value!r} ({type(value).__name__}). Expected a number or a 0-dim tensor.")
    else:
        to_float(value, where)


def number_fault(tensor: Tensor) -> str | None:
    """Why `tensor` holds no numbers to compute with, or None."""
    layout = foreign_layout(tensor)
    if layout:
        return f"has the layout {layout}. Expected a number or a dense tensor."
    if tensor.dtype not in _NUMBER_DTYPES:
        return f"is a tensor of {tensor.dtype}. Expected a real tensor: convert it first."
    return class_fault(tensor)


def to_float(value: Real, where: str) -> float:
    """`value` as the float that kernels compute with."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where} is too large for a float. Expected a number below 1.8e308.") from None


def check_flag(value: Any, where: str) -> None:
    """Raise TypeError unless `value` is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{where} is of type {type(value).__name__}. Expected True or False.")


def check_hparams_type(hparams: Any) -> None:
    """Raise TypeError unless `hparams` is an AdamHparams."""
    if not isinstance(hparams, AdamHparams):
        raise TypeError(
            f"hparams is of type {type(hparams).__name__}, expected AdamHparams. "
            "The order is adam_update(params, grads, state, hparams) and adam_init(params, hparams)."
        )


def check_hparams(hparams: Any) -> None:
    """Raise unless `hparams` holds single numbers or trees of them: stacked or rebuilt hyperparameters may not."""
    check_hparams_type(hparams)
    for name, number in zip(NUMBER_NAMES, hparams.numbers(), strict=True):
        if type(number) is float:
            continue
        for where, value in _leaves(number, name):
            check_scalar(value, where)
            if isinstance(value, Tensor) and value.shape:
                raise ValueError(
                    f"{where} has shape {tuple(value.shape)}. Expected a number or a 0-dim tensor: "
                    "map over stacked values with torch.func.vmap."
                )


def _leaves(number: ScalarTree, name: str) -> list[tuple[str, Any]]:
    """The scalars of `number` and where they are. None within a tree stands where params have None."""
    if number is None or isinstance(number, (Tensor, Real)):
        return [(name, number)]
    if is_tracing():  # where an error's path is not worth a treespec, which dynamo makes of no dict of constants
        return [(name, leaf) for leaf in leaves_of(number, _is_hparams)]
    leaves, treespec = flatten(number, _is_hparams)
    return [(path.codify(name), leaf) for path, leaf in zip(treespec.accessors(), leaves, strict=True)]


def _is_hparams(x: Any) -> bool:
    """A pytree too, but of no parameters."""
    return isinstance(x, AdamHparams)


def _check_range(number: ScalarTree, where: str, what: str, *, below: float = math.inf) -> None:
    for place, value in _leaves(number, where):
        _check_one(value, place, what if place == where else f"{what} at {place}", below)


def _check_one(value: Any, where: str, what: str, below: float) -> None:
    check_scalar(value, where)
    if isinstance(value, Tensor):
        if not is_readable(value):
            return
        in_range = bool(((value >= 0.0) & ((value < below) | (below == math.inf))).all())
    else:
        in_range = value >= 0.0 and (value < below or below == math.inf)
    if not in_range:
        expected = "a number >= 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ValueError(f"Invalid {what}: {value}. Expected {expected}.")


def _flatten(hparams: Any) -> tuple[list[Any], tuple[bool, ...]]:
    return [getattr(hparams, name) for name in _NUMBERS], tuple(getattr(hparams, name) for name in _FLAGS)


def _unflatten(numbers: Iterable[Any], flags: Any) -> AdamHparams:
    hparams = object.__new__(AdamHparams)
    for name, value in zip(_NUMBERS + _FLAGS, (*numbers, *flags), strict=True):
        object.__setattr__(hparams, name, value)
    return hparams


def _flatten_with_keys(hparams: Any) -> tuple[list[tuple[Any, Any]], tuple[bool, ...]]:
    numbers, flags = _flatten(hparams)
    return [(torch_pytree.GetAttrKey(name), number) for name, number in zip(_NUMBERS, numbers, strict=True)], flags


def _flatten_with_entries(hparams: Any) -> tuple[list[Any], tuple[bool, ...], tuple[str, ...]]:
    return *_flatten(hparams), _NUMBERS


def _register() -> None:
    # optree's public names cannot do both: its global namespace, and one's own way to rebuild.
    namespace: Any = getattr(importlib.import_module("optree.registry"), "__GLOBAL_NAMESPACE", None)
    if namespace is None:
        # Then optree rebuilds through __init__, which checks values once more: a tree_map to negative numbers raises.
        importlib.import_module("optree.dataclasses").register_node(AdamHparams, namespace="")
    else:
        register: Any = getattr(optree, "register_pytree_node")  # noqa: B009 (optree's types want a collection)
        register(
            AdamHparams,
            _flatten_with_entries,
            lambda flags, numbers: _unflatten(numbers, flags),  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
            path_entry_type=optree.GetAttrEntry,
            namespace=namespace,
        )
    # torch.func flattens with torch's own pytree, not with optree.
    torch_pytree.register_pytree_node(
        AdamHparams,
        _flatten,
        _unflatten,
        serialized_type_name="functional_adam.AdamHparams",
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=_flatten_with_keys,
    )


_register()
