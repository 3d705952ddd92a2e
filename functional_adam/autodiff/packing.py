"""The flat argument list of an update as an autograd.Function takes it, and the update itself on such a list."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from functional_adam.adam.equations import Scalars
from functional_adam.adam.hparams import Scalar
from functional_adam.adam.planning import check_numbers, run_kernel
from functional_adam.tensors.leaves import Buffers
from functional_adam.tensors.recycling import copies
from functional_adam.tensors.tracking import is_host_value, readable


@dataclass(frozen=True)
class Spec:
    """How a flat list is made up. Not a pytree, so that torch.func takes it for a constant."""

    kernel: str
    count: int  # leaves
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    is_ready: bool  # as `run_kernel` means it

    @property
    def buffer_count(self) -> int:
        """How many buffers there are, which come first."""
        return self.count * (4 if self.amsgrad else 3)

    @property
    def leaf_count(self) -> int:
        """How many buffers and gradients there are, before numbers and steps."""
        return self.buffer_count + self.count

    def scalars(self, numbers: Iterable[Scalar]) -> Scalars:
        """The five numbers and the flags."""
        lr, beta1, beta2, eps, weight_decay = numbers
        flags = (self.amsgrad, self.maximize, self.decoupled_weight_decay)
        return Scalars(lr, beta1, beta2, eps, weight_decay, *flags)

    def per_leaf(self, steps: list[Tensor]) -> list[Tensor]:
        """One step a leaf, from those or from one that all share."""
        return steps * self.count if len(steps) == 1 else steps


class Parts(NamedTuple):
    """The arguments of an update, or what stands in their places: needs, tangents, dimensions."""

    buffers: Buffers
    grads: list[Tensor]
    numbers: list[Any]  # lr, beta1, beta2, eps, weight_decay
    steps: list[Tensor]  # before this update; one, or one a leaf


def unpack(spec: Spec, flat: Sequence[Any]) -> Parts:
    """The parts of a flat argument list."""
    rest = list(flat[spec.buffer_count :])
    grads, rest = rest[: spec.count], rest[spec.count :]
    return Parts(unpack_buffers(spec, flat), grads, rest[:5], rest[5:])


def unpack_buffers(spec: Spec, flat: Sequence[Any]) -> Buffers:
    """The buffers of a flat list that begins with them."""
    n = spec.count
    params, exp_avgs, exp_avg_sqs, maxima = (list(flat[i * n : (i + 1) * n]) for i in range(4))
    return Buffers(params, exp_avgs, exp_avg_sqs, maxima if spec.amsgrad else [])


def run(spec: Spec, flat: Sequence[Any]) -> tuple[Tensor, ...]:
    """The kernel on copies: new buffers."""
    given = unpack(spec, flat)
    new = given.buffers.with_flat(copies(given.buffers.flat))
    steps = spec.per_leaf([step + 1 for step in given.steps])
    scalars = spec.scalars(x.item() if isinstance(x, Tensor) and is_host_value(x) else x for x in given.numbers)
    check_numbers([scalars], readable(given.steps))
    run_kernel(spec.kernel, new, given.grads, steps, [scalars] * spec.count, is_ready=spec.is_ready)
    return tuple(new.flat)
