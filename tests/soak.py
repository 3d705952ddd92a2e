"""Does memory stay flat over very many updates of every kind? `python -m tests.soak --steps 100000` says."""

import argparse
import gc
import io
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor

from functional_adam import (
    AdamHparams,
    _FunctionalAdam,
    adam_init,
    adam_update,
    from_torch_state_dict,
    recycling,
    state_from_dict,
    state_to_dict,
    to_torch_state_dict,
)


class Sample(NamedTuple):
    """What is alive after a number of steps."""

    steps: int
    objects: int  # that the garbage collector knows
    traced: int  # bytes that Python allocated since tracing began
    cached: int  # bytes of recycled memory that wait for an update
    resident: int  # bytes of the process in memory


LIMITS = Sample(steps=0, objects=50, traced=2**17, cached=0, resident=2**23)
"""How much each may grow, whatever the number of steps: caches fill up in the first few thousand."""


class _Run:
    """A run of a few tiny leaves and one that is large enough to be recycled."""

    def __init__(self) -> None:
        self.hparams = AdamHparams(lr=1e-3, weight_decay=0.01)
        self.params: Any = {"w": torch.ones(3, 4), "layer": [torch.ones(5), torch.ones(())]}
        self.grads: Any = optree.tree_map(lambda x: 0.1 * torch.ones_like(x), self.params)
        self.state = adam_init(self.params, self.hparams)
        self.large = torch.ones(2**15 + 1)
        self.large_state = adam_init(self.large, self.hparams)
        self.weights = [torch.ones(4), torch.ones(2)]
        self.optimizer = _FunctionalAdam(self.weights, lr=1e-3)

    def update(self, **options: Any) -> None:
        self.params, self.state = adam_update(self.params, self.grads, self.state, self.hparams, **options)

    def others(self) -> None:
        for options in ({"kernel": "single", "grad_scale": 2.0}, {"kernel": "foreach"}, {"found_inf": 1.0}):
            self.update(**options)
        self.update(found_inf=torch.tensor(1.0), donate=True)

    def recycled(self) -> None:
        self.large, self.large_state = adam_update(self.large, self.large, self.large_state, self.hparams)

    def adapter(self) -> None:
        self.optimizer.step([torch.ones(4), None])
        self.optimizer.step_param(self.weights[1], torch.ones(2))

    def other_shapes(self) -> None:
        # More kinds of calls than are remembered.
        for size in range(1, 12):
            x = torch.ones(size)
            adam_update(x, x, adam_init(x, self.hparams), self.hparams)

    def stacked(self) -> None:
        params, grads = optree.tree_map(lambda x: torch.stack([x, x]), (self.params, self.grads))

        def member(p: Any, g: Any) -> Any:
            return adam_update(p, g, adam_init(p, self.hparams), self.hparams)

        torch.func.vmap(member)(params, grads)

    def derived(self) -> None:
        def total(lr: Tensor) -> Tensor:
            new, _ = adam_update(self.params, self.grads, self.state, AdamHparams(lr=lr))
            return sum((x.sum() for x in optree.tree_leaves(new)), torch.zeros(()))

        rate = torch.tensor(0.1)
        torch.func.grad(total)(rate)
        torch.func.jvp(total, (rate,), (rate,))
        rate.requires_grad_()
        total(rate).backward()

    def saved(self) -> None:
        file = io.BytesIO()
        torch.save(state_to_dict(self.state), file)
        file.seek(0)
        self.state = state_from_dict(torch.load(file, weights_only=True), self.params, self.hparams)
        state_dict = to_torch_state_dict(self.params, self.state, self.hparams)
        self.state, _ = from_torch_state_dict(self.params, state_dict)

    def refused(self) -> None:
        with pytest.raises(ValueError, match="grads is of type Tensor, but params is of type dict"):
            adam_update(self.params, self.large, self.state, self.hparams)
        with pytest.raises(ValueError, match="found_inf has shape"):
            self.update(found_inf=torch.ones(2))
        with pytest.raises(ValueError, match="must match params"):
            adam_update(self.large, torch.ones(3), self.large_state, self.hparams, donate=True)
        with pytest.raises(ValueError, match="Invalid learning rate"):
            AdamHparams(lr=-1.0)

    def donated(self) -> None:
        old = self.state
        self.update(donate=True)
        with pytest.raises(RuntimeError, match="was donated"):
            adam_update(self.params, self.grads, old, self.hparams)


_EVERY: dict[str, int] = {
    "update": 1,
    "donated": 2,
    "others": 5,
    "recycled": 25,
    "adapter": 10,
    "other_shapes": 250,
    "stacked": 100,
    "derived": 100,
    "saved": 100,
    "refused": 50,
}
"""Of how many steps one is of each kind."""


def soak(steps: int, samples: int, extra: Callable[[], Any] = lambda: None) -> Iterator[Sample]:
    """Take `steps` steps, each with a call of `extra`, and a sample now and then. The first 500 steps are not sampled.

    By then every kind of step was taken, and what is made once is there.
    """
    run = _Run()
    every = max(1, steps // samples)
    was_tracing = tracemalloc.is_tracing()
    for step in range(1, 501 + steps):
        for name, period in _EVERY.items():
            if step % period == 0:
                getattr(run, name)()
        extra()
        if step == 500 and not was_tracing:
            tracemalloc.start()
        if step >= 1000 and step % every == 0:
            yield _sample(step)
    if not was_tracing:
        tracemalloc.stop()


def grown(samples: Sequence[Sample]) -> list[str]:
    """What has grown by more than it may from the first to the last of `samples`."""
    rows = zip(Sample._fields, samples[0], samples[-1], LIMITS, strict=True)
    return [name for name, first, last, limit in rows if name != "steps" and last - first > limit]


def _sample(step: int) -> Sample:
    gc.collect()
    traced, _ = tracemalloc.get_traced_memory()
    memory = Path("/proc/self/statm")  # Linux alone has it
    resident = int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if memory.exists() else 0
    return Sample(step, len(gc.get_objects()), traced, recycling.cached_bytes(), resident)


def main() -> int:
    """Take the steps, print the samples, and return 1 if anything has grown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=20, help="how often to look")
    options = parser.parse_args()
    if options.steps < 2000 or options.samples < 2:
        parser.error("at least 2000 steps and 2 samples are needed")
    samples: list[Sample] = []
    print("| step | objects alive | traced by Python (KiB) | recycled (KiB) | resident (MiB) |\n|---|---|---|---|---|")
    for x in soak(options.steps, options.samples):
        samples.append(x)
        sizes = f"{x.traced / 2**10:.1f} | {x.cached / 2**10:.1f} | {x.resident / 2**20:.1f}"
        print(f"| {x.steps:,} | {x.objects:,} | {sizes} |", flush=True)
    faults = grown(samples)
    print(f"Grown: {', '.join(faults)}" if faults else "Nothing has grown.")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
