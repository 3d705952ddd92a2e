"""The state as torch.optim keeps it: state dicts of Adam and AdamW, both ways."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

from optree import PyTreeSpec
from torch import Tensor

from functional_adam.adam.pytrees import AdamHparams, AdamState, adam_init, check_hparams, check_scalar
from functional_adam.call.arguments import Arguments, read_arguments
from functional_adam.interop.checkpoint import copy_into, listed, read_step
from functional_adam.tensors.trees import TensorTree, flatten, flatten_like, insertion_order, keys_of, unflatten

Group: TypeAlias = Mapping[str, Any]
"""A parameter group, or another dict of an optimizer, whose values torch gives no type."""

_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def to_torch_state_dict(params: TensorTree, state: AdamState, hparams: AdamHparams) -> dict[str, Any]:
    """The `state_dict()` of a `torch.optim.Adam` or `AdamW` that had made the same updates.

    The index of a parameter is its place in `params` in the order of insertion, which for
    `dict(model.named_parameters())` is that of `model.parameters()`. Leaves that share all hyperparameters are a group;
    groups come in the order of their first leaf, and the index counts through them, as in torch. Where keys of
    `params` are strings, the groups have `param_names`: the keys of a path joined by dots. Where they are not, or two
    paths would have one name, groups that change the order of the leaves have the places of their leaves as names.
    Kernel flags are those of a new optimizer: set `fused` or `foreach` in the groups before `load_state_dict`, which
    takes them from there.

    Args:
        params: pytree of tensors, in units U.
        state: a state of `params`, not stacked.
        hparams: the hyperparameters, of each leaf.

    Returns:
        `{"state": {index: {"step", "exp_avg", "exp_avg_sq"[, "max_exp_avg_sq"]}}, "param_groups": [group, ...]}`.
        Tensors are copies; each step is a float32 tensor of shape () of its own, on the CPU, as torch keeps it.

    Raises:
        TypeError, ValueError, RuntimeError: as `adam_update`, if the arguments do not fit together.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> hparams = AdamHparams(lr=0.1)
        >>> _, state = adam_update(weight.detach(), torch.ones(2), adam_init(weight, hparams), hparams)
        >>> optimizer = torch.optim.Adam([weight])
        >>> optimizer.load_state_dict(to_torch_state_dict(weight, state, hparams))
        >>> optimizer.state[weight]["step"], optimizer.param_groups[0]["lr"]
        (tensor(1.), 0.1)

    Source: `torch.optim.Optimizer.state_dict`.
    """
    # Parameters are as good as gradients for the checks.
    given, treespec = read_arguments(params, params, state, hparams)
    given.check()
    columns = [column for column in given.batch[1:4] if column]
    order = insertion_order(treespec, params)
    leaves_of: dict[int, list[int]] = {}
    for index in order:
        leaves_of.setdefault(given.places[index], []).append(index)
    names, kind = _names(treespec, params)
    # Groups that interleave change the order of the leaves, which then only names can tell.
    has_names = kind == "paths" or [index for leaves in leaves_of.values() for index in leaves] != order
    entries: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    flags = {name: getattr(hparams, name) for name in _FLAGS}
    flags |= {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
    for leaves in leaves_of.values() or [[]]:
        lr, *betas, eps, weight_decay = given.sets[given.places[leaves[0]] if leaves else 0][:5]
        numbers = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        places = [len(entries) + i for i in range(len(leaves))]
        group: dict[str, Any] = {**{name: _own(x) for name, x in numbers.items()}, **flags, "params": places}
        groups.append({**group, "param_names": [names[i] for i in leaves]} if has_names else group)
        for place, index in zip(places, leaves, strict=True):
            entries[place] = _entry(given, columns, index)
    return {"state": entries, "param_groups": groups}


def _entry(given: Arguments, columns: list[list[Tensor]], index: int) -> dict[str, Tensor]:
    """What torch.optim keeps for a parameter."""
    step = given.batch.leaf_steps[index].detach().to("cpu", copy=True)
    moments = {name: column[index].detach().clone() for name, column in zip(_MOMENTS, columns, strict=False)}
    return {"step": step, **moments}


def from_torch_state_dict(params: TensorTree, state_dict: Group) -> tuple[AdamState, AdamHparams]:
    """The state and hyperparameters of a `torch.optim.Adam` or `AdamW`; the inverse of :func:`to_torch_state_dict`.

    Where the groups carry `param_names`, and keys of `params` are strings, parameters are found by name: the keys of
    a path joined by dots. So they are where the names are the places that :func:`to_torch_state_dict` gives to other
    trees. Else index i is the i-th leaf in the order of insertion; with several groups that is the order in which the
    optimizer got them.

    All leaves share one step if each has a state and their steps are equal. Else each has its own, as with
    `adam_init(..., per_leaf_step=True)`; one without a state begins at step 0. Either continues as torch does.

    Args:
        params: pytree of tensors, in units U.
        state_dict: from `state_dict()`. Steps may be tensors or numbers. A dict of an `AdamW` that was written before
            torch had `decoupled_weight_decay` in it gives False.

    Returns:
        `(state, hparams)`. A number in which groups differ is a tree like params. Moments are copies with the device
        and layout of their parameter, of the dtype that they had; the steps are float32.

    Raises:
        TypeError: something in `state_dict` is of the wrong type.
        ValueError: an index, name or entry is missing, superfluous or there twice; a shape or step is wrong; groups
            differ in a flag.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> state, hparams = from_torch_state_dict(dict(model.named_parameters()), optimizer.state_dict())
        >>> hparams.lr, hparams.weight_decay, hparams.decoupled_weight_decay
        (0.1, 0.01, True)

    Source: `torch.optim.Optimizer.load_state_dict`.
    """
    leaves, treespec = flatten(params)
    groups, entries = _parts_of(state_dict)
    leaf_of = _leaf_of(treespec, params, groups)
    hparams = _hparams_of_groups(groups, leaf_of, treespec, params)
    check_hparams(hparams)
    unknown = [key for key in entries if key not in leaf_of]
    if unknown:
        raise ValueError(f"state_dict['state'] has {listed(unknown)}, which no group lists. Take them out.")
    given = {leaf_of[key]: (f"state_dict['state'][{key!r}]", entry) for key, entry in entries.items() if entry}
    for where, entry in given.values():
        _check_entry(entry, where, hparams)
    steps = {index: read_step(entry["step"], f"{where}['step']") for index, (where, entry) in given.items()}
    for index, step in steps.items():
        if step.shape != ():
            raise ValueError(f"{given[index][0]}['step'] has shape {tuple(step.shape)}, expected ().")
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
    is_shared = len(steps) == treespec.num_leaves and len({*map(float, steps.values())}) <= 1 >= len(devices)

    state = adam_init(params, hparams, per_leaf_step=not is_shared)
    paths, moments = treespec.accessors(), dict[str, Any]()
    for name in _MOMENTS if hparams.amsgrad else _MOMENTS[:2]:
        column: list[Any] = treespec.flatten_up_to(getattr(state, name))
        for index, (where, entry) in given.items():
            column[index] = copy_into(column[index], entry[name], f"{where}[{name!r}]", paths[index].codify("params"))
        moments[name] = treespec.unflatten(column)
    zeros: list[Any] = [state.step] if is_shared else flatten_like(treespec, state.step, "state.step", params)
    placed = [steps[i].to(zero.device, copy=True) if i in steps else zero for i, zero in enumerate(zeros)]
    return state._replace(step=placed[0] if is_shared else unflatten(treespec, placed, params), **moments), hparams


def _leaf_of(treespec: PyTreeSpec, params: TensorTree, groups: Sequence[Group]) -> dict[Hashable, int]:
    """The leaf of params that each id in the groups stands for, by its name or by its place."""
    ids: list[Any] = [key for group in groups for key in group.get("params", ())]
    # torch.distributed.checkpoint writes names instead of indices.
    labels = ids if all(isinstance(x, str) for x in ids) else [x for g in groups for x in g.get("param_names") or ()]
    names, kind = _names(treespec, params)
    leaf_of: dict[Hashable, int] = {name: index for index, name in enumerate(names)}
    what = "names"
    if labels and kind == "clash" and leaf_of.keys() != {*labels}:
        raise ValueError(
            "Two leaves of params have one name, so that they cannot be found by the names in state_dict. Rename "
            "one, or take 'param_names' out of the groups to go by the order of params."
        )
    if not labels or (kind == "places" and leaf_of.keys() != {*labels}):
        labels, what = ids, "indices"
        leaf_of = dict(enumerate(insertion_order(treespec, params)))
    counts = Counter(labels)
    missing = [label for label in leaf_of if label not in counts]
    extra = [label for label in counts if label not in leaf_of]
    twice = [label for label, count in counts.items() if count > 1]
    faults = [f"{text} {listed(x)}" for text, x in (("lack", missing), ("add", extra), ("repeat", twice)) if x]
    if len({*ids}) != len(ids):
        faults = faults or ["repeat an index"]
    elif len(ids) != len(labels):
        faults = faults or ["lack the names of some parameters"]
    if faults:
        raise ValueError(
            f"The {what} in state_dict['param_groups'] do not match the {len(names)} leaves of params: they "
            f"{' and '.join(faults)}. Give the parameters of the optimizer"
            + (", or take 'param_names' out of the groups to go by their order." if what == "names" else ".")
        )
    return {key: leaf_of[label] for key, label in zip(ids, labels, strict=True)}


def _names(treespec: PyTreeSpec, params: TensorTree) -> tuple[list[str], Literal["paths", "places", "clash"]]:
    """A name for each leaf: its path joined by dots. Where no key is a string, or two paths clash, its place."""
    paths = [keys_of(path) for path in treespec.accessors()]
    names = [".".join(map(str, path)) for path in paths]
    has_keys = any(isinstance(key, str) for path in paths for key in path)
    if has_keys and len({*names}) == len(names):
        return names, "paths"
    place_of = {index: str(place) for place, index in enumerate(insertion_order(treespec, params))}
    return [place_of[index] for index in range(len(names))], "clash" if has_keys else "places"


def _check_entry(entry: Group, where: str, hparams: AdamHparams) -> None:
    """Raise ValueError unless `entry` is what Adam keeps for a parameter."""
    names = ("step", *(_MOMENTS if hparams.amsgrad else _MOMENTS[:2]))
    missing = [name for name in names if name not in entry]
    # As in torch, the maximum stays behind where amsgrad was switched off.
    extra = [name for name in entry if name not in ("step", *_MOMENTS)]
    if missing or extra:
        faults = [f"lacks {listed(missing)}"] * bool(missing) + [f"has the extra {listed(extra)}"] * bool(extra)
        raise ValueError(f"{where} {' and '.join(faults)}. Expected {listed(names)}, as Adam and AdamW keep them.")


def _parts_of(state_dict: Any) -> tuple[list[dict[str, Any]], dict[Hashable, dict[str, Any]]]:
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


def _hparams_of_groups(
    groups: Sequence[Group], leaf_of: Mapping[Hashable, int], treespec: PyTreeSpec, params: Any
) -> AdamHparams:
    """The hyperparameters of all groups; a number in which they differ becomes a tree like params."""
    owner = {leaf_of[key]: index for index, group in enumerate(groups) for key in group["params"]}

    def number(values: list[Any]) -> Any:
        if all(_plain(value) == _plain(values[0]) for value in values):
            return _own(values[0])
        return unflatten(treespec, [_own(values[owner[leaf]]) for leaf in range(treespec.num_leaves)], params)

    for index, group in enumerate(groups):
        _check_numbers(group, f"state_dict['param_groups'][{index}]")
    flags = {name: [bool(group.get(name, False)) for group in groups] for name in _FLAGS}  # torch got them later
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


def _check_numbers(group: Group, place: str) -> None:
    """Raise unless the hyperparameters of `group` are there and of the right types."""
    missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
    if missing:
        raise ValueError(f"{place} has no {missing[0]!r}. Expected a group of Adam or AdamW.")
    betas: Any = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError(f"{place}['betas'] is {betas!r}, expected a pair of numbers.")
    numbers: dict[str, Any] = {f"[{name!r}]": group[name] for name in ("lr", "eps", "weight_decay")}
    numbers |= {"['betas'][0]": betas[0], "['betas'][1]": betas[1]}
    for key, value in numbers.items():
        where = f"{place}{key}"
        check_scalar(value, where)
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(f"{where} is on meta, where there are no values. Load it to a device.")
    for name in _FLAGS:
        flag = group.get(name)
        if not isinstance(flag, (int, type(None))):
            got = type(flag).__name__
            raise TypeError(f"{place}['{name}'] is of type {got}, expected a bool.")


def _plain(value: Any) -> Any:
    """`value`, to be compared: Python numbers for a tensor."""
    return cast("Any", value).tolist() if isinstance(value, Tensor) else value


def _own(value: Any) -> Any:
    """A hyperparameter, or a pair of them, in memory of its own; to torch a tensor of one element is a number."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_own, value))  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().reshape(()) if value.numel() == 1 else value
