"""A pytree of tensors as text: its containers as they print, and of each tensor the dtype and the shape."""

from functools import partial

from torch import Tensor

from functional_adam.tensors.trees import TensorTree, is_leaf, map_leaves

_LEAVES = 24  # so many are shown


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
