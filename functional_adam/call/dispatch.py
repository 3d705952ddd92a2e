"""What computes an update: a kernel, a kernel within an autograd.Function, or the equations."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_adam.adam.equations import Scalars
from functional_adam.adam.hparams import Scalar, check_flag
from functional_adam.adam.planning import check_kernel_name, check_numbers, select_kernel
from functional_adam.call.arguments import Arguments
from functional_adam.call.donation import check_donation, is_surely_safe
from functional_adam.tensors.leaves import check_unsharded, full_value
from functional_adam.tensors.tracking import (
    forward_levels,
    is_compiled_here,
    is_readable,
    is_tracing,
    is_transformed,
    readable,
    requires_grad,
)

EQUATIONS = "equations"
_TRACER = "a compiler or tracer"
_TRANSFORM = "a torch.func transform or a forward-mode dual level"
_NESTED = "forward mode within forward mode"
_AUTOGRAD = "autograd (an input requires grad and grad mode is on)"


class Way(NamedTuple):
    """How an update is computed. Where nobody watches, numbers are read if that is free."""

    watched_by: str | None  # who needs differentiable, mappable, traceable operations
    kernel: str  # or EQUATIONS
    scalars: list[Scalars]  # one a leaf; equal ones are one object
    grad_scale: Scalar | None
    found_inf: Tensor | bool | None


def select_way(given: Arguments, kernel: str, *, donate: bool) -> Way:
    """What will compute the update of the arguments `given`; raise if nothing can as asked."""
    check_kernel_name(kernel)
    check_flag(donate, "donate")
    watched_by = _watcher(given)
    if donate:
        _check_donation(given, watched_by)
    if watched_by == _TRACER:
        return Way(watched_by, EQUATIONS, given.scalars, given.grad_scale, given.found_inf)
    traits = given.traits
    devices = {traits.device} if traits else {param.device for param in given.buffers.params}
    if watched_by is None:
        scalars = _read_scalars(given)
        sets = scalars[:1] if len(given.scalar_sets) == 1 else [*{id(h): h for h in scalars}.values()]
        chosen = select_kernel(kernel, devices, sets)
        # Nobody watches, so that what lies in the host's memory can be read.
        is_host = traits is not None and traits.device.type == "cpu" and not traits.requires_grad
        check_numbers(sets, given.steps if is_host else readable(given.steps))
        return Way(None, chosen, scalars, _read(given.grad_scale), _read(given.found_inf))
    check_unsharded(given.buffers, watched_by, given.treespec)
    # torch has a silent zero for forward over forward mode through any autograd.Function.
    chosen = EQUATIONS if watched_by == _NESTED else select_kernel(kernel, devices, given.scalar_sets)
    return Way(watched_by, chosen, given.scalars, given.grad_scale, given.found_inf)


def _watcher(given: Arguments) -> str | None:
    if is_tracing():
        return _TRACER
    if is_transformed():
        return _NESTED if forward_levels() > 1 else _TRANSFORM
    return _AUTOGRAD if _requires_grad(given) else None


def _requires_grad(given: Arguments) -> bool:
    if given.traits is None:
        return requires_grad(given.tensors)
    return given.traits.requires_grad and torch.is_grad_enabled()


def _check_donation(given: Arguments, watched_by: str | None) -> None:
    if watched_by not in (None, _TRACER) or _requires_grad(given):
        watcher = _AUTOGRAD if watched_by == _TRACER else watched_by  # a tracer may donate
        raise RuntimeError(
            f"Cannot donate: the update is watched by {watcher}, which would miss the old values. "
            "Update without donate, or detach, or leave the transform, or use torch.no_grad()."
        )
    if watched_by == _TRACER and not is_compiled_here():
        raise RuntimeError(
            "Cannot donate in a graph that is exported or traced (torch.export, make_fx, torch.jit.trace): it cannot "
            "check whether the tensors that it is run on share memory. Update without donate, and copy the results."
        )
    if watched_by is None and not is_surely_safe(given.tensors, given.traits):
        check_donation(given.buffers, given.steps, given.grads, given.others, given.narrow, given.treespec)


def _read_scalars(given: Arguments) -> list[Scalars]:
    """One set a leaf, with the values of tensors; sets that are equal then are one object."""
    if len(given.scalar_sets) == 1:
        return [given.scalar_sets[0].map(_read)] * len(given.scalars)
    distinct: dict[Scalars, Scalars] = {}
    values = [h.map(_read) for h in given.scalar_sets]
    read = {id(h): distinct.setdefault(x, x) for h, x in zip(given.scalar_sets, values, strict=True)}
    return [read[id(h)] for h in given.scalars]


def _read(x: Any) -> Any:
    """`x` as a Python number where that costs nothing and hides nothing."""
    x = full_value(x)
    return x.item() if isinstance(x, Tensor) and is_readable(x) else x
