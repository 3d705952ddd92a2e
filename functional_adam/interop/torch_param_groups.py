"""The parameter groups in a state dict of torch.optim: checked, and as hyperparameters."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

from optree import PyTreeSpec
from torch import Tensor

from functional_adam.adam.hparams import AdamHparams, check_scalar
from functional_adam.interop.checkpoint import listed
from functional_adam.tensors.trees import unflatten

FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")


def parts_of(state_dict: Any) -> tuple[list[dict[str, Any]], dict[Hashable, dict[str, Any]]]:
    """The groups and the entries of `state_dict`, if it looks like one of torch.optim."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is of type {type(state_dict).__name__}, expected the dict of state_dict().")
    found: dict[str, Any] = dict(state_dict)  # pyright: ignore[reportUnknownArgumentType]
    if not {"state", "param_groups"} <= found.keys():
        raise ValueError(
            f"state_dict has the keys {listed(list(found))}, expected 'state' and 'param_groups'. "
            "Give what state_dict() of an optimizer returned."
        )
    entries, groups = found["state"], found["param_groups"]
    if not isinstance(entries, Mapping) or not isinstance(groups, (list, tuple)):
        got = f"{type(entries).__name__} and {type(groups).__name__}"  # pyright: ignore[reportUnknownArgumentType]
        raise TypeError(f"state_dict has a 'state' and 'param_groups' of types {got}, expected a dict and a list.")
    parts: list[tuple[str, Any]] = [(f"['param_groups'][{i}]", x) for i, x in enumerate(groups)]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    parts += [(f"['state'][{key!r}]", x) for key, x in entries.items()]  # pyright: ignore[reportUnknownVariableType]
    for where, part in parts:
        if not isinstance(part, Mapping):
            raise TypeError(f"state_dict{where} is of type {type(part).__name__}, expected a dict.")
    if not groups:
        raise ValueError("state_dict['param_groups'] is empty, expected a list with at least one group.")
    for index, group in enumerate(groups):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        ids = group.get("params")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        if not isinstance(ids, (list, tuple)) or not all(isinstance(x, (int, str)) for x in ids):  # pyright: ignore[reportUnknownVariableType]
            raise TypeError(f"state_dict['param_groups'][{index}]['params'] is {ids!r}, expected a list of indices.")
        names = group.get("param_names")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(x, str) for x in names)):  # pyright: ignore[reportUnknownVariableType]
            got = type(names).__name__  # pyright: ignore[reportUnknownArgumentType]
            raise TypeError(f"state_dict['param_groups'][{index}]['param_names'] is of type {got}, expected names.")
        if names is not None and len(names) != len(ids):  # pyright: ignore[reportUnknownArgumentType]
            raise ValueError(
                f"state_dict['param_groups'][{index}] has {len(ids)} 'params', but {len(names)} 'param_names'. "  # pyright: ignore[reportUnknownArgumentType]
                "Give each parameter its name, or take 'param_names' out of the groups to go by their order."
            )
    return list(groups), dict(entries)  # pyright: ignore[reportUnknownArgumentType]


def hparams_of_groups(
    groups: Sequence[Mapping[str, Any]], leaf_of: Mapping[Hashable, int], treespec: PyTreeSpec, params: Any
) -> AdamHparams:
    """The hyperparameters of all groups; a number in which they differ becomes a tree like params."""
    owner = {leaf_of[key]: index for index, group in enumerate(groups) for key in group["params"]}

    def number(values: list[Any]) -> Any:
        if all(_plain(value) == _plain(values[0]) for value in values):
            return own(values[0])
        return unflatten(treespec, [own(values[owner[leaf]]) for leaf in range(treespec.num_leaves)], params)

    for index, group in enumerate(groups):
        missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
        if missing:
            raise ValueError(
                f"state_dict['param_groups'][{index}] has no {missing[0]!r}. Expected a group of Adam or AdamW."
            )
        betas: Any = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:  # pyright: ignore[reportUnknownArgumentType]
            raise ValueError(f"state_dict['param_groups'][{index}]['betas'] is {betas!r}, expected a pair of numbers.")
        numbers: dict[str, Any] = {f"[{name!r}]": group[name] for name in ("lr", "eps", "weight_decay")}
        numbers |= {"['betas'][0]": betas[0], "['betas'][1]": betas[1]}
        for key, value in numbers.items():
            where = f"state_dict['param_groups'][{index}]{key}"
            check_scalar(value, where)
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(f"{where} is on meta, where there are no values. Load it to a device.")
        for name in FLAGS:
            flag = group.get(name)
            if not isinstance(flag, (int, type(None))):
                got = type(flag).__name__
                raise TypeError(f"state_dict['param_groups'][{index}]['{name}'] is of type {got}, expected a bool.")
    flags = {name: [bool(group.get(name, False)) for group in groups] for name in FLAGS}  # torch got them later
    for name, values in flags.items():
        if len({*values}) > 1:
            raise ValueError(
                f"state_dict['param_groups'] differ in {name!r}: {values}. It is one for all parameters: make the "
                "groups agree, or load each into a state of its own."
            )
    return AdamHparams(
        lr=number([group["lr"] for group in groups]),
        betas=(number([group["betas"][0] for group in groups]), number([group["betas"][1] for group in groups])),
        eps=number([group["eps"] for group in groups]),
        weight_decay=number([group["weight_decay"] for group in groups]),
        amsgrad=flags["amsgrad"][0],
        maximize=flags["maximize"][0],
        decoupled_weight_decay=flags["decoupled_weight_decay"][0],
    )


def _plain(value: Any) -> Any:
    """`value`, to be compared: Python numbers for a tensor."""
    return cast("Any", value).tolist() if isinstance(value, Tensor) else value


def own(value: Any) -> Any:
    """A hyperparameter, or a pair of them, in memory of its own; to torch a tensor of one element is a number."""
    if isinstance(value, (tuple, list)):
        return tuple(map(own, value))  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().reshape(()) if value.numel() == 1 else value
