"""Comparisons in one process: the codes run in turn, in changing order, so that a busy machine slows all alike."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from statistics import median, quantiles
from typing import Any, NamedTuple, TypeAlias

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

Code: TypeAlias = Callable[[], object]

SAMPLE_MS = 5.0  # a sample repeats fast code until it lasts about this long
WARM_UP_CALLS = 3
SLOW_MS = 500.0  # code that takes longer is warm after one call
CURVE_ROUNDS = 11  # at most, for each point of a curve: curves show where things go, targets are for comparisons
ADAM_BYTES = 28  # an element of float32: p, g, m and v are read, p, m and v are written
COPY_ELEMENTS = 25_000_000


class MissingPeerError(Exception):
    """A peer cannot run here; the message says why and what to do."""


class Target(NamedTuple):
    """Met if the ratio is at most this or, where given, if ours takes at most so much longer."""

    ratio: float
    extra_ms: float | None = None

    def __str__(self) -> str:
        return f"<= {self.ratio:g}" + ("" if self.extra_ms is None else f" or +{self.extra_ms:g} ms")

    def is_met(self, ratio: float, extra_ms: float = math.inf) -> bool:
        return ratio <= self.ratio or (self.extra_ms is not None and extra_ms <= self.extra_ms)


class Row(NamedTuple):
    """One comparison. Below 1 the ratio speaks for ours."""

    case: str
    unit: str
    ours: float  # median
    other: float  # median
    ratio: float  # median of the ratios of pairs, which is not the ratio of the medians
    ratio_quartiles: tuple[float, float]
    bound: float | None  # what moving the bytes of one update takes at the speed of a copy
    target: Target | None
    met: bool | None

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "target": self.target and self.target._asdict()}


class Curve(NamedTuple):
    """Medians of several codes over one axis; None where a code is left out."""

    title: str
    axis: str
    unit: str
    rounds: int
    x: list[int]
    series: dict[str, list[float | None]]

    def add(self, x: int, values: dict[str, float]) -> None:
        for label in values:
            self.series.setdefault(label, [None] * len(self.x))
        self.x.append(x)
        for label, column in self.series.items():
            column.append(values.get(label))


class Bench:
    """Compares, shows how far it is, and keeps the results."""

    def __init__(self, device: torch.device, rounds: int, console: Console) -> None:
        self.device = device
        self.rounds = rounds
        self.console = console
        self.rows: list[Row] = []
        self.curves: list[Curve] = []

    def time(self, case: str, ours: Code, other: Code, target: Target | None = None, *, elements: int = 0) -> None:
        """Compare the times of two codes; `elements`, if given, are those of one update, for the bound."""
        sides = self._rounds(case, (ours, other), self.rounds)
        ratios = [a / b for a, b in zip(*sides, strict=True)]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        ratio, extra = median(ratios), median(a - b for a, b in zip(*sides, strict=True))
        met = target and target.is_met(ratio, extra)
        bound = self.bound_ms(elements) if elements else None
        self.rows.append(Row(case, "ms", *map(median, sides), ratio, (low, high), bound, target, met))

    def count_bytes(self, case: str, ours: int, other: int, target: Target | None = None) -> None:
        """Compare two amounts of memory."""
        ratio = ours / other
        met = target and target.is_met(ratio)
        self.rows.append(Row(case, "MiB", ours / 2**20, other / 2**20, ratio, (ratio, ratio), None, target, met))

    def sweep(self, title: str, axis: str, points: Iterable[tuple[int, int, dict[str, Code]]]) -> None:
        """Time several codes at each of `points`: place on the axis, elements of one update or 0, codes by label."""
        curve = Curve(title, axis, "ms", min(self.rounds, CURVE_ROUNDS), [], {})
        for x, elements, codes in points:
            times = self._rounds(f"{title}, {x:,}", [*codes.values()], curve.rounds)
            values = dict(zip(codes, map(median, times), strict=True))
            curve.add(x, values | ({"bound": self.bound_ms(elements)} if elements else {}))
            codes.clear()  # frees their memory before the next point makes its own
        self.curves.append(curve)

    def skip(self, case: str, reason: object) -> None:
        """Say that a case is left out."""
        self.console.print(f"Skipped: {escape(case)}. {escape(str(reason))}", highlight=False)

    def bound_ms(self, elements: int) -> float:
        """What an update in place takes if memory alone limits it."""
        return ADAM_BYTES * elements / self.copy_bytes_per_ms

    @cached_property
    def copy_bytes_per_ms(self) -> float:
        """Bytes read and written by a large `Tensor.copy_`."""
        source = torch.ones(COPY_ELEMENTS, device=self.device)
        target = torch.zeros_like(source)
        ((*times,),) = self._rounds("copy", [lambda: target.copy_(source)], CURVE_ROUNDS)
        return 2 * source.nbytes / median(times)

    def _rounds(self, case: str, codes: Sequence[Code], rounds: int) -> list[list[float]]:
        """Milliseconds of a call, for each code a list over the rounds."""
        contenders = [(code, self._calls_per_sample(code)) for code in codes]
        times: list[list[float]] = [[] for _ in codes]
        is_log = not self.console.is_terminal
        # Drawn between rounds alone: a drawing thread would take a core from what is timed.
        progress = Progress(console=self.console, auto_refresh=False, transient=True, disable=is_log)
        with progress, _without_collector():
            for index in progress.track(range(rounds), description=escape(case)):
                for i in range(len(codes)):
                    side = (index + i) % len(codes)  # another begins in each round, so two alternate
                    times[side].append(self._milliseconds(*contenders[side]))
                gc.collect()
        return times

    def _calls_per_sample(self, code: Code) -> int:
        if self._milliseconds(code, 1) < SLOW_MS:
            self._milliseconds(code, WARM_UP_CALLS - 1)
        return max(1, math.ceil(SAMPLE_MS / self._milliseconds(code, 1)))

    def _milliseconds(self, code: Code, calls: int) -> float:
        """Mean time of a call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                code()
            return (time.perf_counter() - start) * 1e3 / calls
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        before.record()
        for _ in range(calls):
            code()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / calls


@contextmanager
def _without_collector() -> Iterator[None]:
    """Garbage is collected between rounds alone, as far as it is new: full collections may fall on one side only."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def chained(update: Callable[[Any, Any], tuple[Any, Any]], params: Any, state: Any) -> Callable[[], Any]:
    """Code that goes on where its last call ended, as a training loop does: old values live until new ones are made."""

    def step() -> Any:
        nonlocal params, state
        params, state = update(params, state)
        return params

    return step
