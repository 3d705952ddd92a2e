"""Staging: what a kernel cannot take as it is goes through copies, in runs that fit the cache.

Small leaves are taken together, large ones slice by slice. Stage a run, call the kernel on it, commit it. Copies for
purity, casts, unscaled gradients and other layouts are all staging, so that they cost traffic to the cache and not to
memory.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_adam.tensors.batch import BUFFERS, Batch
from functional_adam.tensors.layouts import as_real, is_laid_out_like
from functional_adam.tensors.recycling import copies, empties, empty_like

# In elements of a column. Smaller runs cost more in calls than they save.
RUN = 2**19
COLUMNS = (*BUFFERS, "grads")

Columns: TypeAlias = list[list[list[Tensor]]]
"""The parts of each leaf, column by column."""
Piece: TypeAlias = list[tuple[int, int, int]]
"""Slices (leaf, start, stop) of flattened leaves."""
Rows: TypeAlias = list[list[Any]]
"""Columns of leaves that are flattened; None where there is none."""
Reasons: TypeAlias = dict[tuple[str, int], str]
"""Why a kernel gets a copy of a tensor, by its column and its place in that."""


class Stage(NamedTuple):
    """What a kernel asks of the leaves of a group."""

    dtype: torch.dtype
    """In which all are computed."""
    needs_one_layout: bool = False
    """Whether all tensors of a leaf must be dense and laid out alike."""
    is_scaled: bool = False
    """Whether gradients are divided, by the kernel in place or beforehand."""
    is_chosen: bool = False
    """Whether results are chosen afterwards, by a found_inf whose value is not read."""

    def reasons(self, batch: Batch) -> Reasons:
        """What the kernel cannot take as it is."""
        everything = batch.buffers + batch.grads
        if (
            not (self.is_scaled or self.is_chosen or self.dtype.is_complex)
            and all(x.dtype is self.dtype for x in everything)
            and not any(x.is_neg() for x in everything)
            and (not self.needs_one_layout or all(x.is_contiguous() for x in everything))
        ):
            return {}
        found = (
            ((column, place), self._why_copied(x, batch.params[place], column))
            for column, leaves in zip(COLUMNS, batch, strict=False)
            for place, x in enumerate(leaves)
        )
        return {key: why for key, why in found if why}

    def _why_copied(self, x: Tensor, param: Tensor, column: str) -> str | None:
        if x.dtype is not self.dtype:
            return f"is of {x.dtype} and computed in {self.dtype}"
        if x.is_conj() or x.is_neg():
            return "has a lazy conjugation or negation"
        if self.needs_one_layout and not is_laid_out_like(x, param):
            return "is not dense" if x is param else "is not laid out like its parameter"
        if column == "grads":
            return "is divided by grad_scale" if self.is_scaled else None
        return "is chosen by found_inf, whose value is not read" if self.is_chosen else None


class Run(NamedTuple):
    """Leaves that a kernel takes in one call, and where the results go: to other buffers, or to those of `batch`."""

    batch: Batch
    results: Batch
    stage: Stage
    reasons: Reasons

    def cut(self) -> Iterator["Run"]:
        """Runs that fit the cache."""
        batch, results, _, _ = self
        for piece in cut_into_pieces(batch.params, RUN):
            indices, (first, start, stop) = [index for index, _, _ in piece], piece[0]
            places = {index: place for place, index in enumerate(indices)}
            reasons = {(column, places[i]): why for (column, i), why in self.reasons.items() if i in places}
            part, whole = batch.take(indices), results.take(indices)
            if stop - start < batch.params[first].numel():
                part, whole = _sliced(part, start, stop), _sliced(whole, start, stop)
            yield Run(part, whole, self.stage, reasons)

    def start(
        self, kernel: Callable[[Batch], Iterator[None]], divisor: Tensor | float | None, found_inf: Tensor | None
    ) -> Iterator[None]:
        """Update `results`; pauses once when all memory is there and none of the buffers of `batch` is written.

        `divisor` divides the gradients. Where `found_inf` holds, results are the old values.
        """
        commits: list[tuple[Tensor, Tensor, Tensor]] = []
        staged = self.batch if self.is_ready else self._stage(commits)
        if divisor is not None:
            for grad in staged.grads:
                grad.div_(divisor)
        run = kernel(staged)
        next(run)
        yield
        finish(run)
        for old, new, ready in commits:
            if found_inf is not None:
                torch.where(found_inf, old, ready, out=ready)
            new.copy_(ready.to(new.dtype) if new.is_neg() else ready)  # as above

    @property
    def is_ready(self) -> bool:
        """Whether there is nothing to stage."""
        return not self.reasons and self.results is self.batch and not self.stage.dtype.is_complex

    def _stage(self, commits: list[tuple[Tensor, Tensor, Tensor]]) -> Batch:
        """What the kernel gets, real and in one dtype; `commits` takes old values, places and copies of buffers."""
        batch, results, stage, reasons = self
        columns: list[list[Tensor]] = []
        for root, olds, news in zip(COLUMNS, batch, (*results[:4], batch.grads), strict=False):
            columns.append([])
            for place, (old, new) in enumerate(zip(olds, news, strict=True)):
                ready = new
                if (root, place) in reasons:
                    # Between float16 and float32, torch's copy_ ignores the negative bit.
                    ready = empty_like(results.params[place], stage.dtype).copy_(old.resolve_neg())
                    if root != "grads":
                        commits.append((old, new, ready))
                elif new is not old:
                    new.copy_(old)
                columns[-1].append(as_real(ready))
        params, exp_avgs, exp_avg_sqs, maxima, grads = columns
        return Batch(params, exp_avgs, exp_avg_sqs, maxima, grads, batch.steps)


def copied(batch: Batch, *, largest: int | None = None) -> Batch:
    """`batch` with copies of its buffers, `largest` as in `recycling.copies`."""
    return batch.with_buffers(copies(batch.buffers, largest=largest))


def emptied(batch: Batch) -> Batch:
    """`batch` with buffers like its own that are still to be filled."""
    return batch.with_buffers(empties(batch.buffers))


def finish(run: Iterator[None]) -> None:
    """Go through what is left of a run."""
    deque(run, maxlen=0)


def finish_together(runs: Iterable[Iterator[None]]) -> None:
    """Go through all runs, none of which writes before all have their memory."""
    started = list(runs)
    for run in started:
        next(run)
    for run in started:
        finish(run)


def _sliced(batch: Batch, start: int, stop: int) -> Batch:
    return batch.with_columns(lambda column: [x.view(-1)[start:stop] for x in column])


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
