"""Pytrees by optree: flatten one tree like another, and say where and how two trees differ."""

from collections.abc import Sequence
from typing import Any

import optree
from optree import PyTreeSpec


def path_of(treespec: PyTreeSpec, index: int, root: str) -> str:
    """Leaf `index` of `treespec` as Python code: `params['layer'][0]`."""
    return treespec.accessors()[index].codify(root)


def flatten_like(treespec: PyTreeSpec, tree: Any, name: str, params: Any) -> list[Any]:
    """What stands in `tree` where `params`, whose structure is `treespec`, has its leaves."""
    try:
        return treespec.flatten_up_to(tree)
    except ValueError as error:
        message = _difference(params, tree, optree.PyTreeAccessor(), name) or f"{name}: {error}"
        raise ValueError(f"{message} {name} must have the structure of params.") from None


def broadcast_prefix(prefix: Any, name: str, params: Any) -> list[Any]:
    """For each leaf of `params` the leaf of `prefix` that stands at or above it."""

    def repeat(leaf: Any, subtree: Any) -> list[Any]:
        return [leaf] * len(optree.tree_leaves(subtree))

    try:
        # By tree_map, since dynamo makes no treespec of a dict of constants (torch 2.13).
        repeated: Any = optree.tree_map(repeat, prefix, params)
    except ValueError as error:
        message = _difference(prefix, params, optree.PyTreeAccessor(), "params", name) or f"{name}: {error}"
        raise ValueError(f"{message} {name} must be a number or a pytree prefix of params.") from None
    return optree.tree_leaves(repeated)


def _difference(params: Any, tree: Any, at: optree.PyTreeAccessor, name: str, model: str = "params") -> str | None:
    """The first place where the nodes of `params`, called `model`, are not met by `tree`, in a sentence."""
    if params is not None and optree.tree_is_leaf(params):
        return None
    here, there = at.codify(name), at.codify(model)
    if params is None:
        return None if tree is None else f"{here} is {_kind(tree)}, but {there} is None."
    expected: Any = _one_level(params)
    if tree is None or optree.tree_is_leaf(tree):
        return f"{here} is {_kind(tree)}, but {there} is {_kind(params)}."
    got = _one_level(tree)
    children: Sequence[Any] = got.children
    if isinstance(params, dict) and isinstance(tree, dict):
        by_key: dict[Any, Any] = dict(zip(got.entries, got.children, strict=True))
        missing = [key for key in expected.entries if key not in by_key]
        extra = [key for key in got.entries if key not in expected.entries]
        if missing or extra:
            lacks = f" lacks {missing}" if missing else ""
            adds = f" has the extra {extra}" if extra else ""
            return f"{here}{lacks}{' and' if lacks and adds else ''}{adds}, but {there} has {list(expected.entries)}."
        children = [by_key[key] for key in expected.entries]
    elif _kind(params) != _kind(tree):
        return f"{here} is {_kind(tree)}, but {there} is {_kind(params)}."
    elif len(expected.children) != len(got.children):
        return f"{here} has length {len(got.children)}, but {there} has length {len(expected.children)}."
    for key, param, child in zip(expected.entries, expected.children, children, strict=True):
        entry = expected.path_entry_type(key, expected.type, expected.kind)
        found = _difference(param, child, at + entry, name, model)
        if found:
            return found
    return None


def _one_level(tree: Any) -> Any:
    return optree.tree_flatten_one_level(tree)


def _kind(tree: Any) -> str:
    return "None" if tree is None else f"of type {tree.__class__.__qualname__}"
