"""AdamHparams: the numbers and flags of an Adam update, as a pytree."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from functional_adam.tracking import is_readable

Scalar: TypeAlias = float | Tensor


@dataclass(frozen=True, kw_only=True)
class AdamHparams:
    """The hyperparameters of :func:`adam_update`, with the names, defaults and messages of `torch.optim.Adam`.

    Numbers are pytree leaves: each is a Python number or a 0-dim tensor. A tensor can be mapped, differentiated,
    or changed between the calls of a compiled update without recompiling it; it counts at its own value, so that
    a float32 tensor 1e-3 is not the Python 1e-3. To map over several values with `torch.func.vmap`, give them
    stacked, as a 1-dim tensor. Flags are part of the tree's structure.

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

    lr: Scalar = 1e-3
    betas: tuple[Scalar, Scalar] = (0.9, 0.999)
    eps: Scalar = 1e-8
    weight_decay: Scalar = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled_weight_decay: bool = False

    def __post_init__(self) -> None:
        betas: Any = self.betas
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:  # pyright: ignore[reportUnknownArgumentType]
            raise ValueError(f"Invalid betas: {betas!r}. Expected a pair of numbers (beta1, beta2).")
        object.__setattr__(self, "betas", tuple(betas))  # pyright: ignore[reportUnknownArgumentType]
        _check_range(self.lr, "hparams.lr", "learning rate")
        _check_range(self.betas[0], "hparams.betas[0]", "beta parameter at index 0", below=1.0)
        _check_range(self.betas[1], "hparams.betas[1]", "beta parameter at index 1", below=1.0)
        _check_range(self.eps, "hparams.eps", "epsilon value")
        _check_range(self.weight_decay, "hparams.weight_decay", "weight_decay value")
        for name in _FLAGS:
            flag: Any = getattr(self, name)
            if not isinstance(flag, bool):
                raise TypeError(f"hparams.{name} is {flag!r}. Expected True or False: flags are structure, not data.")

    def numbers(self) -> tuple[Scalar, Scalar, Scalar, Scalar, Scalar]:
        """lr, beta1, beta2, eps, weight_decay."""
        return self.lr, *self.betas, self.eps, self.weight_decay


_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")
_NUMBERS = ("lr", "betas", "eps", "weight_decay")


def check_scalar(value: Any, where: str) -> None:
    """Raise TypeError unless `value` can stand for a number: real, and not a flag."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype is torch.bool:
            raise TypeError(f"{where} is a tensor of {value.dtype}. Expected a real tensor: convert it first.")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where} is {value!r} ({type(value).__name__}). Expected a number or a 0-dim tensor.")


def check_hparams_type(hparams: Any) -> None:
    """Raise TypeError unless `hparams` is an AdamHparams."""
    if not isinstance(hparams, AdamHparams):
        raise TypeError(
            f"hparams is of type {type(hparams).__name__}, expected AdamHparams. "
            "The order is adam_update(params, grads, state, hparams) and adam_init(params, hparams)."
        )


def check_hparams(hparams: Any) -> None:
    """Raise unless `hparams` holds single numbers: stacked or rebuilt hyperparameters may not."""
    check_hparams_type(hparams)
    for name, value in zip(("lr", "betas[0]", "betas[1]", "eps", "weight_decay"), hparams.numbers(), strict=True):
        if type(value) is not float:
            check_scalar(value, f"hparams.{name}")
            if isinstance(value, Tensor) and value.shape:
                raise ValueError(
                    f"hparams.{name} has shape {tuple(value.shape)}. Expected a number or a 0-dim tensor: "
                    "map over stacked values with torch.func.vmap."
                )


def _check_range(value: Any, where: str, what: str, *, below: float = math.inf) -> None:
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
