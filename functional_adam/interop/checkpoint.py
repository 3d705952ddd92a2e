"""The state as a flat dict of tensors, for torch.save, torch.distributed.checkpoint and safetensors, both ways."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import cast

import torch
from torch import Tensor

from functional_adam.adam.pytrees import AdamHparams, AdamState, adam_init, check_scalar, is_spent
from functional_adam.tensors.leaves import check_fit, number_fault, tensor_fault, to_float, wrong_type
from functional_adam.tensors.trees import TensorTree, flatten

_FORMAT = 1  # A change of keys or values is a new number, and the old formats stay readable.


def state_to_dict(state: AdamState) -> dict[str, Tensor]:
    """The state as a flat dict of contiguous tensors, for `torch.save`, torch.distributed.checkpoint or safetensors.

    A key is the path of its tensor as Python code: `"exp_avg['layer'][0]"`; a shared step is `"step"`. `"format"` holds
    the number of this format. Hyperparameters are not included.

    Args:
        state: any state, also a stacked one.

    Returns:
        A dict of tensors that share no memory with `state`, nor with each other.

    Raises:
        TypeError: `state` is no AdamState.
        ValueError: two keys of a tree have the same `repr`.
        RuntimeError: the state was donated.

    Example:
        >>> state = adam_init({"w": torch.ones(2)}, AdamHparams())
        >>> list(state_to_dict(state))
        ['format', 'step', "exp_avg['w']", "exp_avg_sq['w']"]
    """
    if not isinstance(state, AdamState):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise wrong_type("state", state, "an AdamState")
    flat = {"format": torch.tensor(_FORMAT, device="cpu")}
    for field, path, tensor in _fields_and_paths(state):
        fault = tensor_fault(tensor)
        if fault:
            raise TypeError(f"state.{field}{path} {fault}")
        if field == "step" and is_spent(tensor):
            raise RuntimeError(f"state.step{path} is empty: this state was donated. Use the state that came back.")
        if field + path in flat:
            raise ValueError(f"Two leaves of state.{field} have the path {path}. Use keys that differ in their repr.")
        # safetensors refuses what shares memory or is strided; a bit for negation is lost on the way.
        flat[field + path] = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return flat


def state_from_dict(flat: Mapping[str, Tensor], params: TensorTree, hparams: AdamHparams) -> AdamState:
    """The state that :func:`state_to_dict` took apart; its inverse.

    Args:
        flat: the dict.
        params: pytree of tensors that the state belongs to, in units U. A stacked state needs its stacked params.
        hparams: decides, by `amsgrad`, which moments there are.

    Returns:
        A state of copies with the devices and layouts of `params`, of the dtypes in `flat`.

    Raises:
        TypeError: `flat` is no mapping, or something in it no tensor of a fitting dtype.
        ValueError: it is of an unknown format; a key is missing or superfluous; a shape or step is wrong.

    Example:
        >>> params, hparams = {"w": torch.ones(2)}, AdamHparams()
        >>> state_from_dict(state_to_dict(adam_init(params, hparams)), params, hparams).exp_avg
        {'w': tensor([0., 0.])}
    """
    _check_format(flat)
    has_masters = any(isinstance(key, str) and key.startswith("master_params") for key in flat)  # pyright: ignore[reportUnnecessaryIsInstance]
    template = adam_init(params, hparams, per_leaf_step="step" not in flat, master_params=has_masters)
    places = {field + path: (field, path, leaf) for field, path, leaf in _fields_and_paths(template)}
    missing = [key for key in places if key not in flat]
    extra = [key for key in flat if key not in places and key != "format"]
    faults = differences({"lacks": missing, "has the extra": extra})
    if faults:
        raise ValueError(f"flat {faults}. Give the params that the state was made with, and hparams with its amsgrad.")
    moments = [leaf for field, _, leaf in places.values() if field == "exp_avg"]
    values: list[Tensor] = []
    for key, (field, path, place) in places.items():
        where = f"flat[{key!r}]"
        if field == "step":
            counted = [places[f"exp_avg{path}"][2]] if path else moments
            values.append(_step_like(place, flat[key], where, counted))
        else:
            values.append(copy_into(place, flat[key], where, f"params{path}"))
    return cast("AdamState", flatten(template)[1].unflatten(values))


def _fields_and_paths(state: AdamState) -> list[tuple[str, str, Tensor]]:
    """The tensors of `state`, each with its field and its path in that."""
    leaves, treespec = flatten(state)
    return [
        (AdamState._fields[accessor[0].entry], accessor[1:].codify(""), leaf)
        for accessor, leaf in zip(treespec.accessors(), leaves, strict=True)
    ]


def _check_format(flat: object) -> None:
    if not isinstance(flat, Mapping):
        raise wrong_type("flat", flat, "a dict of tensors, as state_to_dict makes")
    number = cast("Mapping[object, object]", flat).get("format")
    if not isinstance(number, Tensor) or number_fault(number) or number.is_meta or number.numel() != 1:
        raise ValueError("flat has no number under 'format'. Expected a dict that state_to_dict has made.")
    if number.item() != _FORMAT:
        got = f"flat is of format {number.item()}, but this version reads format {_FORMAT}."
        raise ValueError(f"{got} Load it with the version that wrote it, or a later one.")


def copy_into(place: Tensor, value: Tensor, where: str, like: str) -> Tensor:
    """A copy of `value` with the device and layout of `place`, and its own dtype."""
    advice = "Give the params that the state was made with, in the same order."
    check_fit(value, place, lambda root, _: like if root == "params" else where, "", 0, advice, any_device=True)
    if not place.is_meta:
        check_has_values(value, where)
    return torch.empty_like(place, dtype=value.dtype).copy_(value.detach())


def check_has_values(value: object, where: str) -> None:
    """Raise ValueError if `value` is a tensor on meta."""
    if isinstance(value, Tensor) and value.is_meta:
        raise ValueError(f"{where} is on meta, where there are no values. Load it to a device.")


def read_step(value: Real | Tensor, where: str) -> Tensor:
    """`value` as a float32 tensor, if it counts something."""
    check_scalar(value, where)
    check_has_values(value, where)
    if not isinstance(value, Tensor):
        value = torch.tensor(to_float(value, where), dtype=torch.float64, device="cpu")
    step = value.detach().to(torch.float32)
    if not bool(((step >= 0) & (step == step.floor()) & step.isfinite()).all()):
        raise ValueError(f"{where} is {value}. Expected a whole number of updates, 0 or more.")
    return step


def _step_like(place: Tensor, value: Tensor, where: str, moments: Sequence[Tensor]) -> Tensor:
    """A copy of `value` on the device of `place`; it is stacked only if the `moments` that it counts for are."""
    step = read_step(value, where)
    is_prefix = all(moment.shape[: step.dim()] == step.shape for moment in moments)
    if not is_prefix or not step.numel() or (step.dim() and not moments):
        raise ValueError(f"{where} has shape {tuple(step.shape)}. Expected () or the leading dimensions of params.")
    # Members that agree share one number, as after vmap(adam_init): one kernel call then serves them all.
    agree = bool((step == step.flatten()[0]).all())
    return (step.flatten()[0] if agree else step).to(place.device, copy=True).expand(step.shape)


def differences(keys_by_verb: Mapping[str, Sequence[object]]) -> str:
    """What is wrong with some keys, for an error: `lacks 'a' and has the extra 'b'`, or nothing."""
    return " and ".join(f"{verb} {listed(keys)}" for verb, keys in keys_by_verb.items() if keys)


def listed(items: Sequence[object]) -> str:
    """The first few of `items`, for an error."""
    return ", ".join(map(repr, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
