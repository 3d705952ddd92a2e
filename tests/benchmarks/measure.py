"""Paired comparisons: two pieces of code run in turn, so that a busy machine slows both alike."""

import math
import time
from collections.abc import Callable, Iterator
from statistics import median, quantiles
from typing import Any, NamedTuple, TypeAlias

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

Code: TypeAlias = Callable[[], object]

SAMPLE_MS = 5.0  # a sample repeats fast code until it lasts about this long
WARM_UP_CALLS = 3


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
    target: Target | None
    met: bool | None

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "target": self.target and self.target._asdict()}


class Bench:
    """Compares, shows how far it is, and keeps the rows."""

    def __init__(self, device: torch.device, rounds: int, console: Console) -> None:
        self.device = device
        self.rounds = rounds
        self.console = console
        self.rows: list[Row] = []

    def time(self, case: str, ours: Code, other: Code, target: Target | None = None) -> None:
        """Time both in every round, in alternating order."""
        contenders = [(code, self._calls_per_sample(code)) for code in (ours, other)]
        pairs: list[list[float]] = []
        is_log = not self.console.is_terminal
        # Drawn between rounds alone: a drawing thread would take a core from what is timed.
        with Progress(console=self.console, auto_refresh=False, transient=True, disable=is_log) as progress:
            for index in progress.track(range(self.rounds), description=escape(case)):
                pair = [0.0, 0.0]
                for side in (0, 1) if index % 2 == 0 else (1, 0):
                    pair[side] = self._milliseconds(*contenders[side])
                pairs.append(pair)
        ratios = [a / b for a, b in pairs]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        ratio, extra = median(ratios), median(a - b for a, b in pairs)
        met = target and target.is_met(ratio, extra)
        columns = zip(*pairs, strict=True)
        self.rows.append(Row(case, "ms", *map(median, columns), ratio, (low, high), target, met))

    def count_bytes(self, case: str, ours: int, other: int, target: Target | None = None) -> None:
        """Compare two amounts of memory."""
        ratio = ours / other
        met = target and target.is_met(ratio)
        self.rows.append(Row(case, "MiB", ours / 2**20, other / 2**20, ratio, (ratio, ratio), target, met))

    def skip(self, case: str, reason: str) -> None:
        """Say that a case is left out."""
        self.console.print(f"Skipped: {escape(case)}. {escape(reason)}")

    def tables(self, title: str) -> Iterator[Table]:
        """The rows, a table for each unit."""
        for unit in dict.fromkeys(row.unit for row in self.rows):
            table = Table(title=f"{title}, {unit}", title_justify="left")
            table.add_column("case", overflow="fold")
            for name in (f"ours {unit}", f"other {unit}", "ratio (quartiles)" if unit == "ms" else "ratio"):
                table.add_column(name, justify="right", no_wrap=True)
            table.add_column("target")
            table.add_column("met")
            for row in self.rows:
                if row.unit == unit:
                    spread = " ({:.2f}-{:.2f})".format(*row.ratio_quartiles) if unit == "ms" else ""
                    numbers = (_short(row.ours), _short(row.other), f"{row.ratio:.2f}{spread}")
                    met = {None: "", True: "[green]yes", False: "[red]no"}[row.met]
                    table.add_row(escape(row.case), *numbers, str(row.target or ""), met)
            yield table

    def _calls_per_sample(self, code: Code) -> int:
        self._milliseconds(code, WARM_UP_CALLS)
        return max(1, math.ceil(SAMPLE_MS / self._milliseconds(code, 1)))

    def _milliseconds(self, code: Code, calls: int) -> float:
        """Mean time of a call."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            code()
        self._synchronize()
        return (time.perf_counter() - start) * 1e3 / calls

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def chained(update: Callable[[Any, Any], tuple[Any, Any]], params: Any, state: Any) -> Code:
    """Code that goes on where its last call ended, as a training loop does: old values live until new ones are made."""

    def step() -> None:
        nonlocal params, state
        params, state = update(params, state)

    return step


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
