"""Results as rich tables."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from tests.benchmarks.measure import Bench, Curve, Row


def tables(title: str, bench: Bench) -> Iterator[Table]:
    """A table for each unit of the comparisons, and one for each curve."""
    for unit in dict.fromkeys(row.unit for row in bench.rows):
        yield _comparisons(f"{title}, {unit}", unit, [row for row in bench.rows if row.unit == unit])
    for curve in bench.curves:
        yield _curve(curve)


def _comparisons(title: str, unit: str, rows: list[Row]) -> Table:
    timed = unit == "ms"
    table = Table(title=title, title_justify="left")
    table.add_column("case", overflow="fold")
    for name in (f"ours {unit}", f"other {unit}", *(["bound ms"] if timed else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ratio (quartiles)" if timed else "ratio", justify="right", no_wrap=True)
    table.add_column("target", no_wrap=True)
    table.add_column("met", no_wrap=True)
    for row in rows:
        spread = " ({:.2f}-{:.2f})".format(*row.ratio_quartiles) if timed else ""
        numbers = [_short(row.ours), _short(row.other), *([_short(row.bound)] if timed else [])]
        met = {None: "", True: "[green]yes", False: "[red]no"}[row.met]
        table.add_row(escape(row.case), *numbers, f"{row.ratio:.2f}{spread}", str(row.target or ""), met)
    return table


def _curve(curve: Curve) -> Table:
    rounds = f", median of {curve.rounds}" if curve.rounds > 1 else ""
    table = Table(title=f"{curve.title}, {curve.unit}{rounds}", title_justify="left")
    table.add_column(curve.axis, justify="right")
    for label in curve.series:
        table.add_column(label, justify="right")
    for x, *values in zip(curve.x, *curve.series.values(), strict=True):
        table.add_row(f"{x:,}", *map(_short, values))
    return table


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}"
