"""Pytrees by optree: flatten one tree like another, say where and how two trees differ, and print one by shapes.

Nodes that torch's pytree knows and optree does not, such as a TensorDict, are registered with optree when they are
first met, in a namespace of this package's own, so that nothing changes for others.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeAlias, cast

import optree
import torch
import torch.utils._pytree as torch_pytree
from optree import PyTreeSpec
from torch import Tensor

Scalar: TypeAlias = float | Tensor
Tree: TypeAlias = Any
"""A pytree, a node or a leaf: optree sets no bound on what these are, so neither does the type."""
TensorTree: TypeAlias = Tree
"""A pytree of tensors."""

NAMESPACE = "functional_adam"

_torch_nodes: dict[Tree, Tree] = getattr(torch_pytree, "SUPPORTED_NODES", {})
_learned: set[Tree] = set()
_DICTS = (dict, OrderedDict, defaultdict)
_LEAVES = 24  # so many are printed
_FIELDS: dict[type[object], str] = {
    torch_pytree.MappingKey: "key",
    torch_pytree.SequenceKey: "idx",
    torch_pytree.GetAttrKey: "name",
}


class TorchEntry(optree.PyTreeEntry):
    """A step of a path through a node that torch's pytree has described: a key, a place or the name of an attribute."""

    def codify(self, node: str = "") -> str:
        """The child of `node` as Python code."""
        return f"{node}{self.entry}"


def flatten(tree: Tree, is_end: Callable[[Tree], bool] | None = None) -> tuple[list[Tree], PyTreeSpec]:
    """The leaves of `tree`, and its structure. What `is_end` holds for counts as a leaf too."""
    leaves, treespec = optree.tree_flatten(tree, is_end, namespace=NAMESPACE)
    others = leaves if is_end is None else [leaf for leaf in leaves if not is_end(leaf)]
    is_outdated = not torch.compiler.is_dynamo_compiling() and learn(others)
    return flatten(tree, is_end) if is_outdated else (leaves, treespec)


def learn(leaves: Iterable[Tree]) -> bool:
    """Whether some of `leaves` are nodes, which optree knows from now on: what was flattened must be flattened anew."""
    kinds: set[Tree] = {*map(type, leaves)}
    nodes = {kind for kind in kinds & _torch_nodes.keys() if not issubclass(kind, Tensor)}
    # Without a lock, which would stay held where a signal handler or a finalizer updates in the middle.
    for node in nodes - _learned:
        try:
            _register(node)
        except ValueError as error:
            # By another thread, or by a call that was interrupted.
            if "already registered" not in str(error):
                raise
        _learned.add(node)
    return bool(nodes)


def _register(node: Tree) -> None:
    its = _torch_nodes[node]

    def flatten_with_keys(tree: Tree) -> tuple[list[Tree], Tree, list[Tree]]:
        children, context = its.flatten_fn(tree)  # the context that comes with the keys may be another one
        return children, context, [key for key, _ in its.flatten_with_keys_fn(tree)[0]]

    has_keys = its.flatten_with_keys_fn is not None
    register = getattr(optree, "register_pytree_node")  # noqa: B009 (optree's types want a collection)
    register(
        node,
        flatten_with_keys if has_keys else its.flatten_fn,
        lambda context, children: its.unflatten_fn([*children], context),  # pyright: ignore[reportUnknownLambdaType]
        path_entry_type=TorchEntry if has_keys else optree.FlattenedEntry,
        namespace=NAMESPACE,
    )


def leaves_of(tree: Tree, is_end: Callable[[Tree], bool] | None = None) -> list[Tree]:
    """The leaves of `tree`, whose nodes optree knows."""
    return optree.tree_leaves(tree, is_end, namespace=NAMESPACE)


def is_leaf(tree: Tree) -> bool:
    """Whether `tree` is neither None nor a node."""
    return optree.tree_is_leaf(tree, namespace=NAMESPACE)


def map_leaves(function: Tree, tree: Tree, *like: Tree) -> Tree:
    """`function` of each leaf of `tree`, and of what stands in its place in the others."""
    return optree.tree_map(function, tree, *like, namespace=NAMESPACE)


def unflatten(treespec: PyTreeSpec, values: Iterable[Tree], params: Tree) -> Tree:
    """A tree of `values` like `params`, whose nodes need not be able to hold them: a dict stands for a TensorDict."""
    # Without a namespace, none of its nodes was learned.
    return _fill(params, iter(values)) if treespec.namespace else treespec.unflatten(values)


def _fill(params: Tree, values: Iterator[Tree]) -> Tree:
    nodes, treespec = optree.tree_flatten(params, lambda x: type(x) in _learned, namespace=NAMESPACE)
    return treespec.unflatten([_fill_node(x, values) if type(x) in _learned else next(values) for x in nodes])


def _fill_node(node: Tree, values: Iterator[Tree]) -> Tree:
    level = _one_level(node)
    children = [_fill(child, values) for child in level.children]
    plain = _plain_type_of(node)
    if plain is dict:
        return dict(zip(map(_key, level.entries), children, strict=True))
    return children if plain is list else level.unflatten_func(level.metadata, children)


def labels_of(treespec: PyTreeSpec) -> Callable[[str, int], str]:
    """What names leaf `index` of the tree `root`, as Python code: `params['layer'][0]`."""
    paths: list[optree.PyTreeAccessor] = []

    def label(root: str, index: int) -> str:
        if not paths:
            paths.extend(treespec.accessors())
        return paths[index].codify(root)

    return label


def keys_of(path: optree.PyTreeAccessor) -> list[Tree]:
    """The keys, places and names of attributes on `path`."""
    return [_key(getattr(entry, "field", entry.entry)) for entry in path]


def insertion_order(treespec: PyTreeSpec, params: Tree) -> list[int]:
    """The indices of leaves as `model.parameters()` has them: by insertion of keys, where optree sorts them."""

    def walk(tree: Tree) -> list[int]:
        if isinstance(tree, int):
            return [tree]
        nodes: Tree = cast("Tree", tree).values() if isinstance(tree, dict) else _one_level(tree).children
        return [index for child in nodes for index in walk(child)]

    return walk(unflatten(treespec, range(treespec.num_leaves), params))


def in_kind_of(model: Tree, tree: Tree) -> Tree:
    """`tree`, as a list where `model` is one and it is a tuple, or the reverse."""
    return type(model)(tree) if {type(model), type(tree)} == {list, tuple} else tree


def flatten_like(treespec: PyTreeSpec, tree: Tree, name: str, params: Tree) -> list[Tree]:
    """What stands in `tree` where `params`, whose structure is `treespec`, has its leaves."""
    try:
        return treespec.flatten_up_to(tree)
    except ValueError:
        pass  # It takes no list for a tuple and no dict for a TensorDict, and its errors name no path.
    return _align(params, in_kind_of(params, tree), name, (), is_prefix=False)


def broadcast_prefix(prefix: Tree, name: str, params: Tree) -> list[Tree]:
    """For each leaf of `params` the leaf of `prefix` that stands at or above it."""
    return _align(params, in_kind_of(params, prefix), name, (), is_prefix=True)


def _align(params: Tree, tree: Tree, name: str, at: tuple[tuple[Tree, Tree], ...], *, is_prefix: bool) -> list[Tree]:
    """What `tree` has for each leaf of `params`; raise ValueError where the two first differ.

    Dicts are met by key: optree goes through some kinds in the order of insertion, and through others by sorted keys.
    """
    if params is None and tree is None:
        return []
    is_single, is_end = is_leaf(params), is_leaf(tree)
    if is_single and (is_end or not is_prefix):
        return [tree]
    if is_prefix and is_end:
        return [tree] * len(leaves_of(params))
    plain = _plain_type_of(params)
    if is_single or is_end or plain is not _plain_type_of(tree):
        raise _mismatch(name, at, _kind(tree), _kind(params), is_prefix=is_prefix)
    expected = _one_level(params)
    if plain is dict:
        by_key, keys = _by_key(tree), [*map(_key, expected.entries)]
        if by_key.keys() != {*keys}:
            raise _mismatch(name, at, _strangers(by_key, keys), f"has {_few(keys)}", is_prefix=is_prefix)
        children = [by_key[key] for key in keys]
    else:
        children, metadata = _one_level(tree)[:2]
        if len(expected.children) != len(children):
            lengths = [f"has length {len(x)}" for x in (children, expected.children)]
            raise _mismatch(name, at, *lengths, is_prefix=is_prefix)
        if expected.kind == optree.PyTreeKind.CUSTOM and type(tree) is type(params) and expected.metadata != metadata:
            data = [f"has {x!r} beside its children" for x in (metadata, expected.metadata)]
            raise _mismatch(name, at, *data, is_prefix=is_prefix)
    return [
        x
        for key, param, child in zip(expected.entries, expected.children, children, strict=True)
        for x in _align(param, child, name, (*at, (expected, key)), is_prefix=is_prefix)
    ]


def _mismatch(name: str, at: tuple[tuple[Tree, Tree], ...], got: str, expected: str, *, is_prefix: bool) -> ValueError:
    path = optree.PyTreeAccessor([node.path_entry_type(key, node.type, node.kind) for node, key in at])
    advice = "be a number or a pytree prefix" if is_prefix else "have the structure"
    return ValueError(
        f"{path.codify(name)} {got}, but {path.codify('params')} {expected}. {name} must {advice} of params."
    )


def _strangers(got: dict[Tree, Tree], expected: list[Tree]) -> str:
    """Which keys are too few and too many."""
    known = {*expected}
    kinds = {"lacks": [x for x in expected if x not in got], "has the extra": [x for x in got if x not in known]}
    return " and ".join(f"{what} {_few(keys)}" for what, keys in kinds.items() if keys)


def _few(keys: list[Tree]) -> str:
    return f"{keys[:4]}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _plain_type_of(tree: Tree) -> Tree:
    """The built-in dict or list, if it can stand for the node `tree`, else the type of that."""
    own = cast("Tree", type(tree))
    if own in _learned:
        keys = _one_level(tree).entries
        for plain, kind in ((dict, torch_pytree.MappingKey), (list, torch_pytree.SequenceKey)):
            if all(isinstance(key, kind) for key in keys):
                return plain
    return dict if isinstance(tree, dict) else own


def _by_key(tree: Tree) -> dict[Tree, Tree]:
    # Dynamo flattens no dict of constants (torch 2.13).
    if type(tree) in _DICTS:
        return tree
    level = _one_level(tree)
    return dict(zip(map(_key, level.entries), level.children, strict=True))


def _key(entry: object) -> Tree:
    """A key, place or name without the class that torch gives it."""
    field = _FIELDS.get(type(entry))
    return entry if field is None else getattr(entry, field)


def _one_level(tree: Tree) -> Tree:
    return optree.tree_flatten_one_level(tree, namespace=NAMESPACE)


def _kind(tree: Tree) -> str:
    return "is None" if tree is None else f"is of type {tree.__class__.__qualname__}"


def shown(tree: TensorTree) -> str:
    """The `repr` of `tree` with `f32[2, 3]` in the place of a tensor, and only the first leaves of many."""
    return _Text().of(tree)


class _Text:
    """What is written of one tree."""

    room = _LEAVES

    def of(self, tree: TensorTree) -> str:
        """The text of a node or a leaf."""
        name, items = type(tree).__name__, tree
        if isinstance(tree, dict):
            text = "{" + self._listed([(f"{key!r}: ", x) for key, x in items.items()]) + "}"
            return text if name == "dict" else f"{name}({text})"
        if isinstance(tree, list):
            return f"[{self._listed([('', x) for x in items])}]"
        if isinstance(tree, tuple):
            fields = getattr(items, "_fields", None)
            if fields:
                return f"{name}({self._listed([(f'{key}=', x) for key, x in zip(fields, items, strict=True)])})"
            return f"({self._listed([('', x) for x in items])}{',' * (len(items) == 1)})"
        if isinstance(tree, Tensor) or is_leaf(tree):  # dynamo cannot ask optree about a tensor
            self.room -= 1
            return _leaf(tree) if isinstance(tree, Tensor) else repr(tree)
        try:
            return repr(map_leaves(partial(_StandIn, self), tree))
        except Exception:  # a node may refuse such leaves in a way of its own
            return repr(tree)

    def _listed(self, items: list[tuple[str, TensorTree]]) -> str:
        texts: list[str] = []
        for label, child in items:
            if self.room <= 0:
                texts.append(f"... {len(items) - len(texts)} more")
                break
            texts.append(label + self.of(child))
        return ", ".join(texts)


class _StandIn:
    """Something that prints as the text of a leaf, for a node that prints itself."""

    def __init__(self, text: _Text, leaf: object) -> None:
        self.text, self.leaf = text, leaf

    def __repr__(self) -> str:
        return self.text.of(self.leaf)


def _leaf(x: Tensor) -> str:
    dtype = str(x.dtype).removeprefix("torch.").replace("float", "f").replace("complex", "c")
    return f"{dtype}[{'nested' if x.is_nested else ', '.join(map(str, x.shape))}]"
