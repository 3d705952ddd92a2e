"""Read: the trees of an update become one batch of columns and the numbers of each leaf."""

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, NamedTuple

import torch
from optree import PyTreeSpec
from torch import Tensor

from functional_adam.adam.equations import LeafHparams
from functional_adam.adam.pytrees import (
    NUMBER_NAMES,
    AdamHparams,
    AdamState,
    check_hparams,
    is_spent,
)
from functional_adam.tensors.batch import BUFFERS, Batch
from functional_adam.tensors.leaves import (
    Label,
    are_surely_fit,
    check_leaves,
    check_masters,
    check_params,
    number_fault,
    to_float,
    wrong_type,
)
from functional_adam.tensors.trees import (
    Scalar,
    TensorTree,
    broadcast_prefix,
    flatten,
    flatten_like,
    is_leaf,
    labels_of,
)


class Arguments(NamedTuple):
    """What an update was given."""

    batch: Batch  # with master parameters in the place of parameters that have one; a gradient may be None
    narrow: dict[int, Tensor]  # those parameters, by leaf
    sets: list[LeafHparams]  # the distinct ones
    places: list[int]  # among them, for each leaf
    grad_scale: Scalar | None  # float32
    found_inf: Tensor | bool | None
    others: list[Tensor]  # the tensors that belong to no leaf
    has_own_steps: bool  # a step for each leaf, so that some may be skipped
    label: Label

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor: buffers, gradients that are not None, steps, narrow parameters, others."""
        batch, grads = self.batch, self.batch.grads
        if type(None) in {*map(type, grads)}:
            grads = [x for x in grads if x is not None]  # pyright: ignore[reportUnnecessaryComparison]
        return [*batch.buffers, *grads, *batch.steps, *self.narrow.values(), *self.others]

    @property
    def moving(self) -> list[int]:
        """The leaves that have a gradient."""
        return [i for i, x in enumerate(self.batch.grads) if x is not None]  # pyright: ignore[reportUnnecessaryComparison]

    def owner(self, root: str, index: int) -> str:
        """The tree that a leaf of the batch comes from: a master stands for its parameter."""
        return "state.master_params" if root == "params" and index in self.narrow else root

    def written(self) -> list[tuple[str, int, Tensor]]:
        """What a donation writes, each with its tree and its leaf; -1 where it belongs to no leaf."""
        columns = zip(BUFFERS, self.batch, strict=False)
        owned = [(self.owner(root, i), i, x) for root, column in columns for i, x in enumerate(column)]
        owned += [("state.step", i if self.has_own_steps else -1, x) for i, x in enumerate(self.batch.steps)]
        return owned + [("params", i, x) for i, x in self.narrow.items()]

    def read(self) -> list[tuple[str, int, Tensor]]:
        """The same for what a donation reads and does not write."""
        grads = [("grads", i, self.batch.grads[i]) for i in self.moving]
        return grads + [("a hyperparameter, grad_scale or found_inf", -1, x) for x in self.others]

    def name(self, root: str, index: int) -> str:
        """The name of a tensor with this tree and leaf."""
        return root if index < 0 else self.label(root, index)

    def map_numbers(self, function: Callable[[Tensor], float | Tensor]) -> "Arguments":
        """The same with `function` of each hyperparameter that is a tensor; sets that are equal then are one."""
        if len(self.others) == (self.grad_scale is not None) + (self.found_inf is not None):
            return self
        places: dict[LeafHparams, int] = {}
        new = [places.setdefault(h.map(function), len(places)) for h in self.sets]
        return self._replace(sets=[*places], places=[new[place] for place in self.places])

    def check(self) -> None:
        """Raise if a tensor does not fit its place."""
        batch, narrow, label = self.batch, self.narrow, self.label
        if narrow or not are_surely_fit(batch):
            check_params([narrow.get(i, x) for i, x in enumerate(batch.params)], label)
            check_masters(narrow, batch.params, label)
            check_leaves(batch, label)
        self._check_steps()
        if self.others and any(x.is_meta for x in self.others) and not all(x.is_meta for x in batch.params):
            raise ValueError(
                "A hyperparameter, grad_scale or found_inf is on meta, where there are no values, but params are not. "
                "Make it where the parameters are."
            )
        if not self.has_own_steps and len(self.moving) < len(batch.grads):
            missing = next(i for i, x in enumerate(batch.grads) if x is None)  # pyright: ignore[reportUnnecessaryComparison]
            raise ValueError(
                f"{label('grads', missing)} is None, but all leaves share one step, which cannot skip one of "
                "them. Give zeros, or make the state with a step per leaf, which skips the leaf: "
                "adam_init(..., per_leaf_step=True) or transformation.adam(..., per_leaf_step=True)."
            )

    def _check_steps(self) -> None:
        steps, params = self.batch.steps, self.batch.params
        is_shared = len(steps) == 1
        for index, param in enumerate(params or [None]):
            if is_shared and index and param is not None and param.device == steps[0].device:
                continue
            fault = _step_fault(steps[0 if is_shared else index], param) if steps else None
            if fault:
                error, text = fault
                raise error(f"{self.name('state.step', index if self.has_own_steps else -1)} {text}")


def read_arguments(
    params: TensorTree,
    grads: TensorTree,
    state: AdamState,
    hparams: AdamHparams,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
) -> tuple[Arguments, PyTreeSpec]:
    """All trees, flattened like `params`, whose structure comes back too; raise if they differ in structure."""
    _check_types(grads, state, hparams)
    scale = None if grad_scale is None else zero_dim(grad_scale, "grad_scale").to(torch.float32)
    found = None if found_inf is None else zero_dim(found_inf, "found_inf") != 0  # NaN != 0 holds
    leaves, treespec = flatten(params)
    has_own_steps = not isinstance(state.step, Tensor)
    steps = _flatten_steps(state, treespec, params) if has_own_steps else [state.step]
    masters: list[Any] = []
    if not _is_absent(state.master_params):
        masters = flatten_like(treespec, state.master_params, "state.master_params", params)
    narrow = {i: leaves[i] for i, master in enumerate(masters) if not _is_absent(master)}
    batch = Batch(
        [masters[i] if i in narrow else x for i, x in enumerate(leaves)] if narrow else leaves,
        flatten_like(treespec, state.exp_avg, "state.exp_avg", params),
        flatten_like(treespec, state.exp_avg_sq, "state.exp_avg_sq", params),
        _flatten_maxima(state, hparams, treespec, params),
        flatten_like(treespec, grads, "grads", params),
        steps,
    )
    sets, places, others = numbers_of(hparams, params, len(leaves))
    others += [x for x in (scale, found) if x is not None]
    # A bare tensor's shared step is its own.
    return Arguments(
        batch, narrow, sets, places, scale, found, others, has_own_steps or treespec.is_leaf(), labels_of(treespec)
    ), treespec


def numbers_of(
    hparams: AdamHparams, params: TensorTree, count: int
) -> tuple[list[LeafHparams], list[int], list[Tensor]]:
    """The distinct sets of numbers, the place among them of that of each leaf, and each tensor among them once.

    Kernels compute in Python's floats, whatever kind of number was given.
    """
    numbers = hparams.numbers()
    flags = hparams.amsgrad, hparams.maximize, hparams.decoupled_weight_decay
    if all(type(x) is float or isinstance(x, (Tensor, Real)) for x in numbers):
        lr, beta1, beta2, eps, weight_decay = (x if isinstance(x, Tensor) else float(x) for x in numbers)
        shared = LeafHparams(lr, beta1, beta2, eps, weight_decay, *flags)
        return [shared], [0] * count, _distinct(x for x in numbers if isinstance(x, Tensor))
    columns = [
        [x if isinstance(x, Tensor) else float(x) for x in broadcast_prefix(number, name, params)]
        for number, name in zip(numbers, NUMBER_NAMES, strict=True)
    ]
    tensors = _distinct(x for column in columns for x in column if isinstance(x, Tensor))
    place_of_tensor = {x: place for place, x in enumerate(tensors)}
    place_of: dict[tuple[object, ...], int] = {}
    sets: list[LeafHparams] = []
    places: list[int] = []
    for row in zip(*columns, strict=True):
        key = tuple(("tensor", place_of_tensor[x]) if isinstance(x, Tensor) else x for x in row)
        if key not in place_of:
            place_of[key] = len(sets)
            lr, beta1, beta2, eps, weight_decay = row
            sets.append(LeafHparams(lr, beta1, beta2, eps, weight_decay, *flags))
        places.append(place_of[key])
    return sets, places, tensors


def zero_dim(value: object, name: str) -> Tensor:
    """A number or 0-dim tensor as a tensor."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Real):
            raise wrong_type(name, value, "a number or a 0-dim tensor")
        return torch.tensor(to_float(value, name), dtype=torch.float64, device="cpu")
    fault = number_fault(value)
    if fault:
        raise TypeError(f"{name} {fault}")
    if value.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}. Expected a number or a 0-dim tensor.")
    return value


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    # A tensor is a key by its identity, without id(), whose value dynamo would guard.
    return [*dict.fromkeys(tensors)]


def _check_types(grads: object, state: object, hparams: AdamHparams) -> None:
    order = "The order is adam_update(params, grads, state, hparams)"
    if isinstance(grads, AdamState):
        raise wrong_type("grads", grads, f"a pytree of gradients. {order}")
    if not isinstance(state, AdamState):
        raise wrong_type("state", state, f"the AdamState of adam_init. {order}")
    check_hparams(hparams)


def _is_absent(tree: object) -> bool:
    return isinstance(tree, tuple) and not tree


def _flatten_maxima(state: AdamState, hparams: AdamHparams, treespec: PyTreeSpec, params: TensorTree) -> list[Tensor]:
    if treespec.num_leaves and _is_absent(state.max_exp_avg_sq) == hparams.amsgrad:
        got, wanted = ("is ()", "True") if hparams.amsgrad else ("is kept", "False")
        raise ValueError(
            f"state.max_exp_avg_sq {got}, but hparams.amsgrad is {wanted}. "
            "Make the state by adam_init(params, hparams) with the same amsgrad."
        )
    return flatten_like(treespec, state.max_exp_avg_sq, "state.max_exp_avg_sq", params) if hparams.amsgrad else []


def _flatten_steps(state: AdamState, treespec: PyTreeSpec, params: TensorTree) -> list[Tensor]:
    if treespec.num_leaves and not treespec.is_leaf() and (state.step is None or is_leaf(state.step)):
        expected = "a 0-dim float32 tensor, or a tree of them like params, as adam_init makes"
        raise wrong_type("state.step", state.step, expected)
    return flatten_like(treespec, state.step, "state.step", params)


def _step_fault(step: object, param: Tensor | None) -> tuple[type[Exception], str] | None:
    """The error class and why `step` cannot count the updates of `param`, or None."""
    if not isinstance(step, Tensor):
        return TypeError, f"is of type {type(step).__name__}. Expected a 0-dim float32 tensor, as adam_init makes."
    fault = number_fault(step)
    if fault:
        return TypeError, fault
    if is_spent(step):
        return RuntimeError, "is empty: this state was donated and cannot be used again. Use the state that came back."
    if step.shape != ():
        return ValueError, f"has shape {tuple(step.shape)}. Expected (). Map over stacked states with torch.func.vmap."
    if step.dtype is not torch.float32:
        return TypeError, f"is of {step.dtype}. Expected torch.float32. Convert it with .float()."
    if param is not None and step.device != param.device:
        return ValueError, (
            f"is on {step.device}, but its parameter is on {param.device}. Move the state with the parameters; for "
            "parameters on several devices make it with adam_init(..., per_leaf_step=True)."
        )
    return None
