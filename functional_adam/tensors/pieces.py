"""Leaves joined and cut into pieces that fit the cache: small ones are taken together, large ones slice by slice."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Columns: TypeAlias = list[list[list[Tensor]]]
"""The parts of each leaf, column by column."""
Piece: TypeAlias = list[tuple[int, int, int]]
"""Slices (leaf, start, stop) of flattened leaves."""
Rows: TypeAlias = list[list[Any]]
"""Columns of leaves that are flattened; None where there is none."""


def flattened(columns: Iterable[list[Any]]) -> Rows:
    """Each leaf as one row."""
    return [[x if x is None else x.reshape(x.numel()) for x in column] for column in columns]


def cut_into_pieces(leaves: Sequence[Tensor], size: int, *, is_joined: bool = True) -> list[Piece]:
    """All elements of `leaves` in pieces of at most `size`, of one leaf each unless `is_joined`."""
    joined: list[Piece] = []
    cut: list[Piece] = []
    room = -1  # nothing fits, not even an empty leaf
    for index, leaf in enumerate(leaves):
        count = leaf.numel()
        if count > size:
            cut += [[(index, start, min(count, start + size))] for start in range(0, count, size)]
            continue
        if count > room or not is_joined:
            joined.append([])
            room = size
        joined[-1].append((index, 0, count))
        room -= count
    return joined + cut


def join(piece: Piece, columns: Rows) -> tuple[Any, ...]:
    """The piece of each column as one tensor, in float32 or wider; None where there is none."""

    def joined(column: list[Any]) -> Any:
        if not column or column[piece[0][0]] is None:
            return None
        parts = [column[i] if stop - start == column[i].numel() else column[i][start:stop] for i, start, stop in piece]
        one = parts[0] if len(parts) == 1 else torch.cat(parts)
        return one.to(torch.promote_types(one.dtype, torch.float32))

    p, m, v, u, *g = map(joined, columns)
    return p, m, v, u, g[0] if g else None


def split(piece: Piece, value: Tensor | None, column: list[list[Tensor]]) -> None:
    """Append the parts of `value` to those of their leaves."""
    if value is not None:
        # Joined leaves are whole.
        parts = [value] if len(piece) == 1 else value.split_with_sizes([stop for _, _, stop in piece])
        for (index, _, _), part in zip(piece, parts, strict=True):
            column[index].append(part)


def put_together(columns: Columns, like: list[Tensor]) -> Iterator[Tensor]:
    """Leaves in the shapes and the one dtype of `like` from their parts, column after column."""
    dtype, shapes = like[0].dtype, [x.shape for x in like]
    for column in columns:
        for parts, shape in zip(column, shapes, strict=True):
            whole = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)
            yield whole if whole.dtype is dtype else whole.to(dtype)
