"""The state as torch.optim keeps it: state dicts of Adam and AdamW, both ways."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeGuard, cast

from optree import PyTreeSpec
from torch import Tensor

from functional_adam.adam.pytrees import AdamHparams, AdamState, ScalarTree, adam_init, check_hparams, check_scalar
from functional_adam.call.arguments import read_arguments
from functional_adam.interop.checkpoint import check_has_values, copy_into, differences, listed, read_step
from functional_adam.tensors.trees import Scalar, TensorTree, flatten, flatten_like, insertion_order, keys_of, unflatten

Value: TypeAlias = Any
"""What a dict of an optimizer holds, to which torch gives no type."""
Group: TypeAlias = Mapping[str, Value]
"""A parameter group, or another dict of an optimizer."""

_NUMBERS = ("lr", "eps", "weight_decay")
_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def to_torch_state_dict(params: TensorTree, state: AdamState, hparams: AdamHparams) -> dict[str, Value]:
    """The `state_dict()` of a `torch.optim.Adam` or `AdamW` that had made the same updates.

    A parameter's index is its place in `params` in the order of insertion, which for `dict(model.named_parameters())`
    is that of `model.parameters()`. Leaves that share all hyperparameters are a group; groups come in the order of
    their first leaf, and the index counts through them, as in torch. Where keys of `params` are strings, the groups
    have `param_names`: the keys of a path joined by dots. Where they are not, or two paths would have one name, groups
    that change the order of the leaves have the places of their leaves as names. Kernel flags are those of a new
    optimizer: set `fused` or `foreach` in the groups before `load_state_dict`.

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
    moments = {name: column for name, column in zip(_MOMENTS, given.batch[1:4], strict=True) if column}
    steps, order = given.batch.leaf_steps, insertion_order(treespec, params)
    leaves_of: dict[int, list[int]] = {} if order else {0: []}
    for index in order:
        leaves_of.setdefault(given.places[index], []).append(index)
    names, kind = _names(treespec, params)
    # Groups that interleave change the order of the leaves, which then only names can tell.
    has_names = kind == "paths" or [index for leaves in leaves_of.values() for index in leaves] != order
    entries: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Value]] = []
    flags = {name: getattr(hparams, name) for name in _FLAGS}
    flags |= {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
    for place, leaves in leaves_of.items():
        lr, *betas, eps, weight_decay = map(_own, given.sets[place][:5])
        numbers = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        groups.append({**numbers, **flags, "params": [len(entries) + i for i in range(len(leaves))]})
        if has_names:
            groups[-1]["param_names"] = [names[i] for i in leaves]
        for index in leaves:
            entry = {name: column[index].detach().clone() for name, column in moments.items()}
            entries[len(entries)] = {"step": steps[index].detach().to("cpu", copy=True), **entry}
    return {"state": entries, "param_groups": groups}


def from_torch_state_dict(params: TensorTree, state_dict: Group) -> tuple[AdamState, AdamHparams]:
    """The state and hyperparameters of a `torch.optim.Adam` or `AdamW`; the inverse of :func:`to_torch_state_dict`.

    Parameters are found by name if the groups have `param_names` and keys of `params` are strings (the keys of a path
    joined by dots), or the names are the places that :func:`to_torch_state_dict` writes. Else index i is the i-th leaf
    in the order of insertion; with several groups that is the order in which the optimizer got them.

    All leaves share one step if each has a state and their steps are equal. Else each has its own, as with
    `adam_init(..., per_leaf_step=True)`; one without a state begins at step 0. Either continues as torch does.

    Args:
        params: pytree of tensors, in units U.
        state_dict: from `state_dict()`. Steps may be tensors or numbers. In a dict of an `AdamW` from before torch
            stored `decoupled_weight_decay`, that counts as False.

    Returns:
        `(state, hparams)`. A number in which groups differ is a tree like params. Moments are copies of their dtype,
        with the device and layout of their parameter; the steps are float32.

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
    names = _MOMENTS if hparams.amsgrad else _MOMENTS[:2]
    steps = {index: _step_of(entry, where, names) for index, (where, entry) in given.items()}
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
    is_shared = len(steps) == treespec.num_leaves and len({*map(float, steps.values())}) <= 1 >= len(devices)

    state = adam_init(params, hparams, per_leaf_step=not is_shared)
    paths, moments = treespec.accessors(), dict[str, Value]()
    for name in names:
        column: list[Value] = treespec.flatten_up_to(getattr(state, name))
        for index, (where, entry) in given.items():
            column[index] = copy_into(column[index], entry[name], f"{where}[{name!r}]", paths[index].codify("params"))
        moments[name] = treespec.unflatten(column)
    zeros: list[Tensor] = [state.step] if is_shared else flatten_like(treespec, state.step, "state.step", params)
    placed = [steps[i].to(zero.device, copy=True) if i in steps else zero for i, zero in enumerate(zeros)]
    return state._replace(step=placed[0] if is_shared else unflatten(treespec, placed, params), **moments), hparams


def _leaf_of(treespec: PyTreeSpec, params: TensorTree, groups: Sequence[Group]) -> dict[Hashable, int]:
    """The leaf of params that each id in the groups stands for, by its name or by its place."""
    ids: list[Hashable] = [key for group in groups for key in group["params"]]
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
    faults = differences({"lack": missing, "add": extra, "repeat": twice})
    if len({*ids}) != len(ids):
        faults = faults or "repeat an index"
    elif len(ids) != len(labels):
        faults = faults or "lack the names of some parameters"
    if faults:
        advice = ", or take 'param_names' out of the groups to go by their order." if what == "names" else "."
        raise ValueError(
            f"The {what} in state_dict['param_groups'] do not match the {len(names)} leaves of params: they {faults}. "
            f"Give the parameters of the optimizer{advice}"
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


def _step_of(entry: Group, where: str, moments: Sequence[str]) -> Tensor:
    """The step of `entry`; raise unless that holds what Adam keeps for a parameter."""
    names = ["step", *moments]
    # As in torch, the maximum stays behind where amsgrad was switched off.
    extra = [name for name in entry if name not in ("step", *_MOMENTS)]
    faults = differences({"lacks": [name for name in names if name not in entry], "has the extra": extra})
    if faults:
        raise ValueError(f"{where} {faults}. Expected {listed(names)}, as Adam and AdamW keep them.")
    step = read_step(entry["step"], f"{where}['step']")
    if step.shape != ():
        raise ValueError(f"{where}['step'] has shape {tuple(step.shape)}. Expected ().")
    return step


def _parts_of(state_dict: object) -> tuple[list[Group], Mapping[Hashable, Group]]:
    """The groups and the entries of `state_dict`, if it looks like one of torch.optim."""
    found = _dict(state_dict, "state_dict", "the dict of state_dict()")
    if not {"state", "param_groups"} <= found.keys():
        raise ValueError(
            f"state_dict has the keys {listed([*found])}. Expected 'state' and 'param_groups'. "
            "Give what state_dict() of an optimizer returned."
        )
    entries, groups = found["state"], found["param_groups"]
    if not all((isinstance(entries, Mapping), isinstance(groups, (list, tuple)))):
        got = f"{type(entries).__name__} and {type(groups).__name__}"
        raise TypeError(f"state_dict has a 'state' and 'param_groups' of types {got}. Expected a dict and a list.")
    if not groups:
        raise ValueError("state_dict['param_groups'] is empty. Expected a list with at least one group.")
    for index, group in enumerate(groups):
        where = f"state_dict['param_groups'][{index}]"
        _check_group(_dict(group, where), where)
    return [*groups], {key: _dict(x, f"state_dict['state'][{key!r}]") for key, x in entries.items()}


def _dict(x: object, where: str, expected: str = "a dict") -> Group:
    if not isinstance(x, Mapping):
        raise TypeError(f"{where} is of type {type(x).__name__}. Expected {expected}.")
    return cast("Group", x)


def _is_list_of(x: object, *kinds: type) -> TypeGuard[Sequence[object]]:
    return isinstance(x, (list, tuple)) and all(isinstance(item, kinds) for item in cast("Sequence[object]", x))


def _check_group(group: Group, where: str) -> None:
    """Raise unless `group` has parameters, and hyperparameters of the right types."""
    ids, names = group.get("params"), group.get("param_names")
    if not _is_list_of(ids, int, str):
        raise TypeError(f"{where}['params'] is {ids!r}. Expected a list of indices.")
    if names is not None and not _is_list_of(names, str):
        raise TypeError(f"{where}['param_names'] is of type {type(names).__name__}. Expected names.")
    if names is not None and len(names) != len(ids):
        raise ValueError(
            f"{where} has {len(ids)} 'params', but {len(names)} 'param_names'. Give each parameter its name, or take "
            "'param_names' out of the groups to go by their order."
        )
    missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}. Expected a group of Adam or AdamW.")
    betas = group["betas"]
    if not _is_list_of(betas, object) or len(betas) != 2:
        raise ValueError(f"{where}['betas'] is {betas!r}. Expected a pair of numbers.")
    numbers = {f"[{name!r}]": group[name] for name in _NUMBERS}
    for key, value in {**numbers, "['betas'][0]": betas[0], "['betas'][1]": betas[1]}.items():
        check_scalar(value, f"{where}{key}")
        check_has_values(value, f"{where}{key}")
    for name in _FLAGS:
        flag = group.get(name)
        if not isinstance(flag, (int, type(None))):
            raise TypeError(f"{where}['{name}'] is of type {type(flag).__name__}. Expected a bool.")


def _hparams_of_groups(
    groups: Sequence[Group], leaf_of: Mapping[Hashable, int], treespec: PyTreeSpec, params: TensorTree
) -> AdamHparams:
    """The hyperparameters of all groups; a number in which they differ becomes a tree like params."""
    owner = {leaf_of[key]: index for index, group in enumerate(groups) for key in group["params"]}

    def merged(values: list[Scalar]) -> ScalarTree:
        plain = [cast("Value", x).tolist() if isinstance(x, Tensor) else x for x in values]
        if all(x == plain[0] for x in plain):
            return _own(values[0])
        return unflatten(treespec, [_own(values[owner[leaf]]) for leaf in range(treespec.num_leaves)], params)

    flags = {name: [bool(group.get(name, False)) for group in groups] for name in _FLAGS}  # torch got them later
    for name, values in flags.items():
        if len({*values}) > 1:
            raise ValueError(
                f"state_dict['param_groups'] differ in {name!r}: {values}. It is one for all parameters: make the "
                "groups agree, or load each into a state of its own."
            )
    return AdamHparams(
        betas=(merged([group["betas"][0] for group in groups]), merged([group["betas"][1] for group in groups])),
        **{name: merged([group[name] for group in groups]) for name in _NUMBERS},
        **{name: values[0] for name, values in flags.items()},
    )


def _own(value: Scalar) -> Scalar:
    """A hyperparameter in memory of its own; to torch a tensor of one element is a number."""
    return value.detach().clone().reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value
