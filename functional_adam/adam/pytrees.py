"""The two pytrees of Adam: AdamHparams, the numbers and flags of an update, and AdamState, what Adam remembers."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import NamedTuple, TypeAlias, cast

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from functional_adam.tensors.leaves import (
    DTYPES,
    MASTER_DTYPES,
    check_flag,
    check_params,
    number_fault,
    to_float,
    wrong_type,
)
from functional_adam.tensors.tracking import is_readable, is_tracing
from functional_adam.tensors.trees import TensorTree, Tree, flatten, labels_of, leaves_of, shown, unflatten

ScalarTree: TypeAlias = Tree
"""A `Scalar`, or a pytree of them that is a prefix of params."""

_STRUCTURE = {"pytree_node": False}  # to optree, a field that is no child


@dataclass(frozen=True, kw_only=True)
class AdamHparams:
    """The hyperparameters of :func:`adam_update`, with the names, defaults and messages of `torch.optim.Adam`.

    Each number is a Python number or a 0-dim tensor, or a pytree of them that is a prefix of `params`: what stands at
    a node holds for all leaves below, as in `lr={"backbone": 1e-5, "head": 1e-3}`; None may stand where `params` have
    None. A tensor can be mapped, differentiated, or changed between calls of a compiled update without recompiling it;
    it counts at its own value, so that a float32 tensor 1e-3 is not the Python 1e-3. To map over several values with
    `torch.func.vmap`, stack them in a 1-dim tensor. Numbers are the leaves of this pytree, flags are its structure.

    Values are checked here, once. Rebuilding from leaves (`vmap`, `grad`, `tree_map`) checks nothing: the leaves may be
    gradients or placeholders. A tensor on an accelerator, or a traced, mapped or differentiated one, is not checked.

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
        betas = cast("Sequence[ScalarTree]", self.betas)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"Invalid betas: {betas!r}. Expected a pair of numbers (beta1, beta2).")
        object.__setattr__(self, "betas", tuple(betas))
        for (where, (what, below)), number in zip(_RANGES.items(), self.numbers(), strict=True):
            for place, value in _leaves(number, where):
                _check_range(value, place, what if place == where else f"{what} at {place}", below)
        self._check_flags()

    def __setstate__(self, saved: Mapping[str, object]) -> None:
        """Rebuild a copy, or what a file holds: values are not checked, fields that an older file lacks are added."""
        defaults: dict[str, object] = {x.name: x.default for x in fields(self)}
        if not isinstance(saved, dict) or not saved.keys() <= defaults.keys():
            got = [*saved] if isinstance(saved, dict) else type(saved).__name__
            raise TypeError(
                f"A saved AdamHparams holds {got}. Expected a dict with the keys {[*defaults]}: load it with the "
                "version of functional_adam that saved it, or a later one."
            )
        vars(self).update(defaults | saved)
        self._check_flags()

    def _check_flags(self) -> None:
        for name in _FLAGS:
            flag = getattr(self, name)
            if not isinstance(flag, bool):
                raise TypeError(f"hparams.{name} is {flag!r}. Expected True or False: flags are structure, not data.")

    def numbers(self) -> tuple[ScalarTree, ScalarTree, ScalarTree, ScalarTree, ScalarTree]:
        """lr, beta1, beta2, eps, weight_decay."""
        return self.lr, *self.betas, self.eps, self.weight_decay


_RANGES = {  # of each number: what torch.optim.Adam calls it, and the bound below which it is
    "hparams.lr": ("learning rate", math.inf),
    "hparams.betas[0]": ("beta parameter at index 0", 1.0),
    "hparams.betas[1]": ("beta parameter at index 1", 1.0),
    "hparams.eps": ("epsilon value", math.inf),
    "hparams.weight_decay": ("weight_decay value", math.inf),
}
NUMBER_NAMES = tuple(_RANGES)
_CHILDREN = ("lr", "betas", "eps", "weight_decay")
_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")


def check_scalar(value: object, where: str) -> None:
    """Raise unless `value` can stand for a number: real, not a flag, and not too large."""
    if isinstance(value, AdamHparams):
        raise TypeError(f"{where} is an AdamHparams. Expected a number or a 0-dim tensor: give one of its numbers.")
    if isinstance(value, Tensor):
        fault = number_fault(value)
        if not fault and value.dtype is torch.bool:
            fault = "is a tensor of torch.bool. Expected a real tensor: convert it first."
        if fault:
            raise TypeError(f"{where} {fault}")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where} is {value!r} ({type(value).__name__}). Expected a number or a 0-dim tensor.")
    else:
        to_float(value, where)


def check_hparams_type(hparams: object) -> None:
    """Raise TypeError unless `hparams` is an AdamHparams."""
    if not isinstance(hparams, AdamHparams):
        order = "The order is adam_update(params, grads, state, hparams) and adam_init(params, hparams)"
        raise wrong_type("hparams", hparams, f"an AdamHparams. {order}")


def check_hparams(hparams: AdamHparams) -> None:
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


def _leaves(number: ScalarTree, name: str) -> list[tuple[str, ScalarTree]]:
    """The scalars of `number` and where they are. None within a tree stands where params have None."""
    if number is None or isinstance(number, (Tensor, Real)):
        return [(name, number)]
    if is_tracing():  # where an error's path is not worth a treespec, which dynamo makes of no dict of constants
        return [(name, leaf) for leaf in leaves_of(number, _is_hparams)]
    leaves, treespec = flatten(number, _is_hparams)
    return [(path.codify(name), leaf) for path, leaf in zip(treespec.accessors(), leaves, strict=True)]


def _is_hparams(x: object) -> bool:
    """A pytree too, but of no parameters."""
    return isinstance(x, AdamHparams)


def _check_range(value: ScalarTree, where: str, what: str, below: float) -> None:
    check_scalar(value, where)
    if isinstance(value, Tensor) and not is_readable(value):
        return
    in_range = (value >= 0.0) & ((value < below) | (below == math.inf))
    if not (in_range.all() if isinstance(in_range, Tensor) else in_range):
        expected = "a number >= 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ValueError(f"Invalid {what}: {value}. Expected {expected}.")


def _flatten(hparams: AdamHparams) -> tuple[list[ScalarTree], tuple[bool, ...]]:
    return [getattr(hparams, name) for name in _CHILDREN], tuple(getattr(hparams, name) for name in _FLAGS)


def _unflatten(numbers: Iterable[ScalarTree], flags: Iterable[bool]) -> AdamHparams:
    hparams = object.__new__(AdamHparams)
    for name, value in zip(_CHILDREN + _FLAGS, (*numbers, *flags), strict=True):
        object.__setattr__(hparams, name, value)
    return hparams


def _flatten_with_keys(hparams: AdamHparams) -> tuple[list[tuple[ScalarTree, ScalarTree]], tuple[bool, ...]]:
    numbers, flags = _flatten(hparams)
    return [(torch_pytree.GetAttrKey(name), number) for name, number in zip(_CHILDREN, numbers, strict=True)], flags


def _flatten_with_entries(hparams: AdamHparams) -> tuple[list[ScalarTree], tuple[bool, ...], tuple[str, ...]]:
    return *_flatten(hparams), _CHILDREN


# optree's public names cannot do both: its global namespace, and one's own way to rebuild.
_namespace = getattr(importlib.import_module("optree.registry"), "__GLOBAL_NAMESPACE", None)
if _namespace is None:
    # Then optree rebuilds through __init__, which checks values once more: a tree_map to negative numbers raises.
    importlib.import_module("optree.dataclasses").register_node(AdamHparams, namespace="")
else:
    getattr(optree, "register_pytree_node")(  # noqa: B009 (optree's types want a collection)
        AdamHparams,
        _flatten_with_entries,
        lambda flags, numbers: _unflatten(numbers, flags),  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
        path_entry_type=optree.GetAttrEntry,
        namespace=_namespace,
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


class AdamState(NamedTuple):
    """What Adam remembers between two updates: an immutable pytree, made by :func:`adam_init`.

    Absent is `()`, since `torch.func.vmap` rejects None. The parameters have the unit U, the loss has L. Printing a
    state shows the dtypes and shapes of its tensors; print a tensor of it for values.

    Example:
        >>> state = adam_init(torch.ones(2, 3), AdamHparams())
        >>> state
        AdamState(step=f32[], exp_avg=f32[2, 3], exp_avg_sq=f32[2, 3], max_exp_avg_sq=(), master_params=())
        >>> state._replace(step=torch.tensor(7.0)).step
        tensor(7.)

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980, Algorithm 1; `max_exp_avg_sq` is AMSGrad's,
    https://openreview.net/forum?id=ryQu7f-RZ.
    """

    step: TensorTree
    """(), float32, on the device of its leaf: updates applied so far. One for all leaves, or a tree like params."""
    exp_avg: TensorTree
    """Like params: running mean of the gradients g, in L/U."""
    exp_avg_sq: TensorTree
    """Like params: running mean of g * g, in L^2/U^2."""
    max_exp_avg_sq: TensorTree = ()
    """Like params: largest exp_avg_sq so far, in L^2/U^2. () without amsgrad."""
    master_params: TensorTree = ()
    """Like params: float32 copies of parameters of less precision, in U; () for any other leaf. () without copies."""

    def __repr__(self) -> str:
        # The memory of a donated state holds the values of another one.
        is_donated = any(map(is_spent, leaves_of(self.step)))
        texts = ["donated" if is_donated and text != "()" else text for text in map(shown, self)]
        return f"AdamState({', '.join(f'{name}={text}' for name, text in zip(self._fields, texts, strict=True))})"


for _class, _old_home in ((AdamHparams, "functional_adam.hparams"), (AdamState, "functional_adam.state")):
    # A pickle names the module of a class. Those of version 0.1.0 name these.
    sys.modules.setdefault(_old_home, sys.modules[__name__])
    # For torch.load(..., weights_only=True).
    getattr(torch.serialization, "add_safe_globals")(  # noqa: B009 (torch gives it no type)
        [_class, (_class, f"{_old_home}.{_class.__name__}")]
    )


def is_spent(step: object) -> bool:
    """Whether `step` belongs to a state that was donated: `replace_steps_` has emptied it."""
    return isinstance(step, Tensor) and step.shape == (0,)


def adam_init(
    params: TensorTree,
    hparams: AdamHparams,
    *,
    per_leaf_step: bool = False,
    moment_dtype: torch.dtype | None = None,
    master_params: bool = False,
) -> AdamState:
    """The state before the first update: step 0, all moments 0.

    Moments have the shape, device, layout (and DTensor placement) of their parameters, and the dtype of the parameter,
    or of its master copy, unless `moment_dtype` is given. An update computes in the wider of both.

    Args:
        params: pytree of floating or complex tensors of any shape, in units U.
        hparams: decides, by `amsgrad`, whether the largest exp_avg_sq is kept.
        per_leaf_step: count updates leaf by leaf. Needed when leaves live on several devices, and for gradients
            that are None, whose leaves are then skipped.
        moment_dtype: floating dtype of all moments; those of complex parameters have its complex form.
        master_params: keep float32 copies of parameters of less precision. The copies are updated, and the parameters
            are the copies, rounded: changes too small for the parameters add up.

    Returns:
        An `AdamState`; `step` is a float32 tensor of shape (), or a tree of them with `per_leaf_step`.

    Raises:
        TypeError: a leaf is not a dense floating or complex tensor, `hparams` is not `AdamHparams`, or `moment_dtype`
            is no floating dtype.
        ValueError: leaves live on several devices and `per_leaf_step` is False.

    Example:
        >>> state = adam_init({"w": torch.ones(2, 3)}, AdamHparams())
        >>> state.step, state.exp_avg["w"].shape
        (tensor(0.), torch.Size([2, 3]))
        >>> state = adam_init({"w": torch.ones(2, dtype=torch.bfloat16)}, AdamHparams(), master_params=True)
        >>> state.master_params
        {'w': tensor([1., 1.])}

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980, Algorithm 1.
    """
    check_hparams_type(hparams)
    check_flag(per_leaf_step, "per_leaf_step")
    check_flag(master_params, "master_params")
    leaves, treespec = flatten(params)
    label = labels_of(treespec)
    check_params(leaves, label)
    devices = [leaf.device for leaf in leaves]
    if not per_leaf_step:
        for index, device in enumerate(devices):
            if device != devices[0]:
                raise ValueError(
                    f"{label('params', index)} is on {device}, but {label('params', 0)} is on {devices[0]}. "
                    "A shared step has one device: pass per_leaf_step=True."
                )
        devices = devices[:1] or [torch.device("cpu")]
    dtypes = [_moment_dtype(leaf, moment_dtype, has_master=master_params) for leaf in leaves]
    with torch.no_grad():
        steps = [torch.zeros((), dtype=torch.float32, device=device) for device in devices]

        def zeros() -> TensorTree:
            return treespec.unflatten([torch.zeros_like(x, dtype=d) for x, d in zip(leaves, dtypes, strict=True)])

        return AdamState(
            step=unflatten(treespec, steps, params) if per_leaf_step else steps[0],
            exp_avg=zeros(),
            exp_avg_sq=zeros(),
            max_exp_avg_sq=zeros() if hparams.amsgrad else (),
            master_params=unflatten(treespec, map(_master_of, leaves), params) if master_params else (),
        )


def _moment_dtype(param: Tensor, chosen: object, *, has_master: bool) -> torch.dtype:
    if chosen is None:
        return MASTER_DTYPES.get(param.dtype, param.dtype) if has_master else param.dtype
    if not isinstance(chosen, torch.dtype) or chosen not in DTYPES or chosen.is_complex:
        raise TypeError(f"moment_dtype is {chosen!r}. Expected a floating dtype, such as torch.float32, or None.")
    if not param.is_complex():
        return chosen
    if chosen is torch.bfloat16:
        raise TypeError("moment_dtype is torch.bfloat16, which has no complex form for complex parameters.")
    return chosen.to_complex()


def _master_of(param: Tensor) -> Tensor | tuple[()]:
    wide = MASTER_DTYPES.get(param.dtype)
    return () if wide is None else param.detach().to(wide)
