"""The curves as one picture of small panels, readable on light and on dark pages."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.benchmarks.measure import Curve

GREY = "#808080"  # of text and axes: the background is transparent
STYLES = {  # by label: colour, line; ours are blue and solid, floors and bounds are grey
    "donated": ("#1f77d0", "-"),
    "pure": ("#56a8f0", "-"),
    "vmap": ("#56a8f0", "-"),
    "vmap, own lr": ("#1f77d0", "-"),
    "direct": ("#4fae9b", "-"),
    "torch fused": ("#e4572e", "--"),
    "torch loop": ("#e4572e", "--"),
    "optax": ("#9a6fd0", "-."),
    "optax, vmap": ("#9a6fd0", "-."),
    "TorchOpt": ("#d09a1f", "-."),
    "bound": (GREY, ":"),
    "SGD": (GREY, ":"),
}
COLUMNS = 2
PANEL = (4.4, 3.4)  # inches


def draw(curves: Sequence[Curve], path: Path) -> None:
    rows = -(-len(curves) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL[0], rows * PANEL[1]), layout="constrained")
    for curve, axes in zip(curves, figure.subplots(rows, COLUMNS, squeeze=False).flat, strict=False):
        draw_panel(curve, axes)
    figure.savefig(path, dpi=150, transparent=True)


def draw_panel(curve: Curve, axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for label, values in curve.series.items():
        points = [(x, y) for x, y in zip(curve.x, values, strict=True) if y is not None]
        colour, line = STYLES[label]
        axes.plot(*zip(*points, strict=True), line, color=colour, marker=".", label=label)
    measured = [y for label, column in curve.series.items() if label != "bound" for y in column if y is not None]
    axes.set_ylim(min(measured) / 2, max(measured) * 2)  # the bound of small trees is far below all that can be reached
    axes.set_xlabel(curve.axis, color=GREY)
    axes.set_ylabel(f"time, {curve.unit}", color=GREY)
    axes.tick_params(which="both", colors=GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.grid(color=GREY, alpha=0.2)
    axes.legend(frameon=False, labelcolor=GREY, fontsize="small")
