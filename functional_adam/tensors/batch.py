"""The leaves of an update as parallel columns: place i of each column belongs to leaf i."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

BUFFERS = ("params", "state.exp_avg", "state.exp_avg_sq", "state.max_exp_avg_sq")
"""What users call the columns that an update replaces."""


class Batch(NamedTuple):
    """Columns of tensors. The first four are the buffers, which an update replaces."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty without amsgrad
    grads: list[Tensor]
    steps: list[Tensor]  # one for all leaves, or one a leaf

    @property
    def buffers(self) -> list[Tensor]:
        """All of them, column after column."""
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.max_exp_avg_sqs]

    def with_buffers(self, buffers: Sequence[Tensor]) -> "Batch":
        """Other buffers, column after column."""
        n = len(self.params)
        params, exp_avgs, exp_avg_sqs, maxima = (
            buffers[:n],
            buffers[n : 2 * n],
            buffers[2 * n : 3 * n],
            buffers[3 * n :],
        )
        return Batch([*params], [*exp_avgs], [*exp_avg_sqs], [*maxima], self.grads, self.steps)

    def with_columns(self, function: Callable[[list[Tensor]], list[Tensor]]) -> "Batch":
        """`function` of each column but the steps."""
        params, exp_avgs, exp_avg_sqs, maxima, grads = map(function, self[:5])
        return Batch(params, exp_avgs, exp_avg_sqs, maxima, grads, self.steps)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """`function` of each buffer."""
        return self.with_buffers([function(x) for x in self.buffers])

    def take(self, indices: Sequence[int]) -> "Batch":
        """The leaves at `indices` only."""
        taken = self.with_columns(lambda column: [column[i] for i in indices] if column else [])
        return taken if len(self.steps) == 1 else taken._replace(steps=[self.steps[i] for i in indices])

    def rows(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """The buffers leaf by leaf; without amsgrad the last one is None."""
        maxima = self.max_exp_avg_sqs or [None] * len(self.params)
        return zip(self.params, self.exp_avgs, self.exp_avg_sqs, maxima, strict=True)

    @property
    def leaf_steps(self) -> list[Tensor]:
        """A step for each leaf."""
        return self.steps * len(self.params) if len(self.steps) == 1 else self.steps
