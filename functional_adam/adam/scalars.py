"""The scalars that a leaf meets as functions of the numbers that an update is given, and their derivatives, by hand."""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from functional_adam.adam.equations import Scalars, corrections, precise
from functional_adam.adam.hparams import Scalar


class Local(NamedTuple):
    """The scalars that a leaf meets, or their tangents or cotangents, where None stands for 0."""

    decay: Scalar | None
    weight_decay: Scalar | None
    beta1: Scalar | None
    beta2: Scalar | None
    eps: Scalar | None
    step_size: Scalar | None
    root_correction: Scalar | None


class Numbers(NamedTuple):
    """The scalars that an update is given, in float64, or their tangents or cotangents, where None stands for 0."""

    lr: Scalar | None
    beta1: Scalar | None
    beta2: Scalar | None
    eps: Scalar | None
    weight_decay: Scalar | None
    step: Scalar | None  # counts this update


def local_scalars(h: Scalars, step: Scalar) -> Local:
    """The scalars of a leaf from those of the update, in float64."""
    lr, weight_decay = precise(h.lr), precise(h.weight_decay)
    return Local(
        1 - lr * weight_decay if h.decoupled_weight_decay else 1.0,
        0.0 if h.decoupled_weight_decay else weight_decay,
        precise(h.beta1),
        precise(h.beta2),
        precise(h.eps),
        *corrections(step, h),
    )


def numbers_vjp(h: Scalars, step: Scalar, local: Local, wanted: Collection[str]) -> Numbers:
    """Cotangents of the `wanted` numbers that an update is given, from those of the scalars that they reach."""
    slopes = _slopes(h, step, wanted)

    def pull(name: str, direct: Scalar | None) -> Scalar | None:
        if name not in wanted:
            return None
        total = direct
        for target, slope in slopes[name].items():
            change = slope * getattr(local, target)
            total = change if total is None else total + change
        return total

    return Numbers(
        pull("lr", None),
        pull("beta1", local.beta1),
        pull("beta2", local.beta2),
        pull("eps", local.eps),
        pull("weight_decay", None if h.decoupled_weight_decay else local.weight_decay),
        pull("step", None),
    )


def numbers_jvp(h: Scalars, step: Scalar, tangents: Numbers) -> Local:
    """Tangents of a leaf's scalars, from those of the numbers that an update is given."""
    moving = [name for name, tangent in zip(Numbers._fields, tangents, strict=True) if tangent is not None]
    slopes = _slopes(h, step, moving)

    def push(target: str, direct: Scalar | None) -> Scalar | None:
        total = direct
        for name in moving:
            if target in slopes[name]:
                change = slopes[name][target] * getattr(tangents, name)
                total = change if total is None else total + change
        return total

    return Local(
        push("decay", None),
        None if h.decoupled_weight_decay else tangents.weight_decay,
        tangents.beta1,
        tangents.beta2,
        tangents.eps,
        push("step_size", None),
        push("root_correction", None),
    )


def reached_by(name: str, *, decoupled: bool) -> tuple[str, ...]:
    """Which of a leaf's scalars depend on the number `name`."""
    return {
        "lr": ("step_size", *(["decay"] * decoupled)),
        "beta1": ("beta1", "step_size"),
        "beta2": ("beta2", "root_correction"),
        "eps": ("eps",),
        "weight_decay": ("decay" if decoupled else "weight_decay",),
        "step": ("step_size", "root_correction"),
    }[name]


def _slopes(h: Scalars, step: Scalar, wanted: Collection[str]) -> dict[str, dict[str, Scalar]]:
    """D local / d number for the scalars of a leaf that are not themselves given."""
    t = precise(step)
    lr, b1, b2, _, weight_decay = (precise(x) for x in h[:5])
    remainder = 1 - b1**t
    root_correction = (1 - b2**t) ** 0.5
    slopes: dict[str, dict[str, Scalar]] = {name: {} for name in Numbers._fields}
    if "lr" in wanted:
        slopes["lr"] = {"step_size": 1 / remainder}
    if "beta1" in wanted:
        slopes["beta1"] = {"step_size": lr * t * b1 ** (t - 1) / (remainder * remainder)}
    if "beta2" in wanted:
        slopes["beta2"] = {"root_correction": -0.5 * t * b2 ** (t - 1) / root_correction}
    if "step" in wanted:
        slopes["step"] = {
            "step_size": lr * _power_slope(b1, t) / (remainder * remainder),
            "root_correction": -0.5 * _power_slope(b2, t) / root_correction,
        }
    if h.decoupled_weight_decay:
        slopes["lr"]["decay"] = -weight_decay
        slopes["weight_decay"]["decay"] = -lr
    return slopes


def _power_slope(base: Scalar, t: Scalar) -> Scalar:
    """D base^t / dt = base^t log(base), which is 0 at base 0."""
    if isinstance(base, Tensor):
        return base**t * torch.where(base == 0, 1.0, base).log()
    return base**t * math.log(base) if base else 0.0
