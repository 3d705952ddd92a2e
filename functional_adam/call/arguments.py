"""The arguments of an update, flattened and checked before anything is written."""

from collections.abc import Iterable
from numbers import Real
from typing import Any, NamedTuple

import torch
from optree import PyTreeSpec
from torch import Tensor

from functional_adam.adam.equations import Scalars
from functional_adam.adam.hparams import NUMBER_NAMES, AdamHparams, Scalar, check_hparams, number_fault, to_float
from functional_adam.adam.state import AdamState, TensorTree, is_spent
from functional_adam.call.facts import Traits, find_traits, list_tensors, recall, remember
from functional_adam.tensors.leaves import Buffers, check_leaves, check_masters, check_params
from functional_adam.tensors.trees import broadcast_prefix, flatten_known, flatten_like, is_leaf, learn, path_of


class Arguments(NamedTuple):
    """What `adam_update` was given."""

    treespec: PyTreeSpec
    buffers: Buffers  # with master parameters in the place of parameters that have one
    narrow: dict[int, Tensor]  # those parameters, by leaf
    grads: list[Tensor | None]
    steps: list[Tensor]  # one if shared, else one a leaf
    is_step_shared: bool
    scalars: list[Scalars]  # one a leaf
    scalar_sets: list[Scalars]  # each of them once
    grad_scale: Tensor | None  # float32
    found_inf: Tensor | None  # bool
    others: list[Tensor]  # the tensors that belong to no leaf
    tensors: list[Tensor]  # every tensor given: buffers, gradients, steps, others
    has_all_grads: bool  # no gradient is None
    traits: Traits | None


def flatten_arguments(
    params: TensorTree,
    grads: TensorTree,
    state: AdamState,
    hparams: AdamHparams,
    grad_scale: Scalar | None,
    found_inf: Scalar | None,
) -> Arguments:
    """Flatten all trees like `params` and raise if anything is wrong with them."""
    _check_types(grads, state, hparams)
    try:
        return _flatten(params, grads, state, hparams, grad_scale, found_inf)
    except (TypeError, ValueError):
        # A node that is met for the first time was taken for a leaf, which is no tensor.
        if not learn(flatten_known(params)[0]):
            raise
    return flatten_arguments(params, grads, state, hparams, grad_scale, found_inf)


def _flatten(
    params: TensorTree,
    grads: TensorTree,
    state: AdamState,
    hparams: AdamHparams,
    grad_scale: Scalar | None,
    found_inf: Scalar | None,
) -> Arguments:
    scale = None if grad_scale is None else _zero_dim(grad_scale, "grad_scale").to(torch.float32)
    found = None if found_inf is None else _zero_dim(found_inf, "found_inf") != 0  # NaN != 0 holds
    param_leaves, treespec = flatten_known(params)
    steps = _flatten_steps(state, treespec, params)
    wide_params, narrow = _with_masters(param_leaves, state, treespec, params)
    buffers = Buffers(
        params=wide_params,
        exp_avgs=flatten_like(treespec, state.exp_avg, "state.exp_avg", params),
        exp_avg_sqs=flatten_like(treespec, state.exp_avg_sq, "state.exp_avg_sq", params),
        max_exp_avg_sqs=_flatten_maxima(state, hparams, treespec, params),
    )
    grad_leaves = flatten_like(treespec, grads, "grads", params)
    is_step_shared = isinstance(state.step, Tensor)
    flags = (hparams.amsgrad, hparams.maximize, hparams.decoupled_weight_decay)
    scalars, sets, others = _scalars_of(hparams, params, len(param_leaves), flags)
    others += [x for x in (scale, found) if x is not None]
    listed = list_tensors(buffers, grad_leaves, steps, [*others, *narrow.values()])
    traits = recall(listed)
    if traits is None:
        traits = find_traits(listed, buffers, grad_leaves)
        if traits is None:
            check_leaves(buffers, grad_leaves, treespec)
        _check_steps(steps, buffers.params, is_step_shared, treespec)
        if traits is not None:
            remember(listed, traits)
    _check_others(others, buffers.params)
    # A bare tensor's shared step is its own.
    if is_step_shared and not listed.has_all_grads and not treespec.is_leaf():
        missing = next(index for index, grad in enumerate(grad_leaves) if grad is None)
        raise ValueError(
            f"{path_of(treespec, missing, 'grads')} is None, but all leaves share one step, which cannot skip one of "
            "them. Give zeros, or make the state with a step per leaf, which skips the leaf: "
            "adam_init(..., per_leaf_step=True) or transformation.adam(..., per_leaf_step=True)."
        )
    return Arguments(
        treespec,
        buffers,
        narrow,
        grad_leaves,
        steps,
        is_step_shared,
        scalars,
        sets,
        scale,
        found,
        others,
        listed.tensors,
        listed.has_all_grads,
        traits,
    )


def _scalars_of(
    hparams: AdamHparams, params: TensorTree, count: int, flags: tuple[bool, bool, bool]
) -> tuple[list[Scalars], list[Scalars], list[Tensor]]:
    """The numbers that each leaf meets, each set of them once, and each tensor among them once.

    Kernels compute in Python's floats, whatever kind of number was given.
    """
    numbers = hparams.numbers()
    if all(type(x) is float or isinstance(x, (Tensor, Real)) for x in numbers):
        lr, beta1, beta2, eps, weight_decay = (x if isinstance(x, Tensor) else float(x) for x in numbers)
        shared = Scalars(lr, beta1, beta2, eps, weight_decay, *flags)
        return [shared] * count, [shared], _distinct(x for x in numbers if isinstance(x, Tensor))
    columns = [
        [x if isinstance(x, Tensor) else float(x) for x in broadcast_prefix(number, name, params)]
        for number, name in zip(numbers, NUMBER_NAMES, strict=True)
    ]
    tensors = _distinct(x for column in columns for x in column if isinstance(x, Tensor))
    places = {x: place for place, x in enumerate(tensors)}
    sets: dict[tuple[Any, ...], Scalars] = {}
    scalars: list[Scalars] = []
    for row in zip(*columns, *([flag] * count for flag in flags), strict=True):
        key = tuple(("tensor", places[x]) if isinstance(x, Tensor) else x for x in row)
        scalars.append(sets.setdefault(key, Scalars(*row)))
    return scalars, [*sets.values()], tensors


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    # A tensor is a key by its identity, without id(), whose value dynamo would guard.
    return [*dict.fromkeys(tensors)]


def _check_types(grads: Any, state: Any, hparams: Any) -> None:
    order = "The order is adam_update(params, grads, state, hparams)."
    if isinstance(grads, AdamState):
        raise TypeError(f"grads is an AdamState, expected a pytree of gradients. {order}")
    if not isinstance(state, AdamState):
        raise TypeError(f"state is of type {type(state).__name__}, expected the AdamState of adam_init. {order}")
    check_hparams(hparams)


def _with_masters(
    leaves: list[Any], state: AdamState, treespec: PyTreeSpec, params: TensorTree
) -> tuple[list[Any], dict[int, Tensor]]:
    """`leaves` with masters in the place of those that have one, and these leaves."""
    if _is_absent(state.master_params):
        return leaves, {}
    check_params(leaves, treespec)
    masters = flatten_like(treespec, state.master_params, "state.master_params", params)
    check_masters(leaves, masters, treespec)
    has_master = [not _is_absent(master) for master in masters]
    wide = [m if has else x for x, m, has in zip(leaves, masters, has_master, strict=True)]
    return wide, {i: x for i, (x, has) in enumerate(zip(leaves, has_master, strict=True)) if has}


def _zero_dim(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        if not isinstance(value, Real):
            raise TypeError(f"{name} is of type {type(value).__name__}. Expected a number or a 0-dim tensor.")
        return torch.tensor(to_float(value, name), dtype=torch.float64, device="cpu")
    fault = number_fault(value)
    if fault:
        raise TypeError(f"{name} {fault}")
    if value.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}. Expected a number or a 0-dim tensor.")
    return value


def _check_others(others: list[Tensor], params: list[Tensor]) -> None:
    if others and any(x.is_meta for x in others) and not all(x.is_meta for x in params):
        raise ValueError(
            "A hyperparameter, grad_scale or found_inf is on meta, where there are no values, but params are not. "
            "Make it where the parameters are."
        )


def _is_absent(tree: Any) -> bool:
    return isinstance(tree, tuple) and not tree


def _flatten_maxima(state: AdamState, hparams: AdamHparams, treespec: PyTreeSpec, params: TensorTree) -> list[Any]:
    if treespec.num_leaves and _is_absent(state.max_exp_avg_sq) == hparams.amsgrad:
        got, wanted = ("is ()", "True") if hparams.amsgrad else ("is kept", "False")
        raise ValueError(
            f"state.max_exp_avg_sq {got}, but hparams.amsgrad is {wanted}. "
            "Make the state by adam_init(params, hparams) with the same amsgrad."
        )
    return flatten_like(treespec, state.max_exp_avg_sq, "state.max_exp_avg_sq", params) if hparams.amsgrad else []


def _flatten_steps(state: AdamState, treespec: PyTreeSpec, params: TensorTree) -> list[Any]:
    if isinstance(state.step, Tensor):
        return [state.step]
    if treespec.num_leaves and not treespec.is_leaf() and (state.step is None or is_leaf(state.step)):
        raise TypeError(
            f"state.step is of type {type(state.step).__name__}. Expected a 0-dim float32 tensor, or a tree of them "
            "like params, as adam_init makes."
        )
    return flatten_like(treespec, state.step, "state.step", params)


def _check_steps(steps: list[Any], params: list[Tensor], is_shared: bool, treespec: PyTreeSpec) -> None:
    for index, param in enumerate(params or [None]):
        if is_shared and index and param is not None and param.device == steps[0].device:
            continue
        fault = _step_fault(steps[0 if is_shared else index], param) if steps else None
        if fault:
            error, text = fault
            where = "state.step" if is_shared else path_of(treespec, index, "state.step")
            raise error(f"{where} {text}")


def _step_fault(step: Any, param: Tensor | None) -> tuple[type[Exception], str] | None:
    """The error class and why `step` cannot count the updates of `param`, or None."""
    if not isinstance(step, Tensor):
        return TypeError, f"is of type {type(step).__name__}. Expected a 0-dim float32 tensor, as adam_init makes."
    fault = number_fault(step)
    if fault:
        return TypeError, fault
    if is_spent(step):
        return RuntimeError, "is empty: this state was donated and cannot be used again. Use the state that came back."
    if step.shape != ():
        return ValueError, f"has shape {tuple(step.shape)}, expected (). Map over stacked states with torch.func.vmap."
    if step.dtype is not torch.float32:
        return TypeError, f"is of {step.dtype}, expected torch.float32. Convert it with .float()."
    if param is not None and step.device != param.device:
        return ValueError, (
            f"is on {step.device}, but its parameter is on {param.device}. Move the state with the parameters; for "
            "parameters on several devices make it with adam_init(..., per_leaf_step=True)."
        )
    return None
