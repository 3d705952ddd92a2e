"""The curves as one picture of small panels, readable on light and on dark pages."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tests.benchmarks.measure import Curve

GALLERY_STYLE = Path(__file__).parents[2] / "examples" / "gallery.mplstyle"
STYLES = {  # by label: colour, line; ours are solid, floors and bounds dotted
    "donated": ("C0", "-"),
    "pure": ("C2", "-"),
    "vmap": ("C2", "-"),
    "vmap, own lr": ("C0", "-"),
    "direct": ("C4", "-"),
    "torch fused": ("C1", "--"),
    "torch loop": ("C1", "--"),
    "optax": ("C3", "-."),
    "optax, vmap": ("C3", "-."),
    "TorchOpt": ("C4", "-."),
    "bound": ("C5", ":"),
    "SGD": ("C5", ":"),
}
PANEL_HEIGHT = 2.3  # inches


@matplotlib.style.context(GALLERY_STYLE)
def draw(curves: Sequence[Curve], path: Path) -> None:
    figure = Figure()
    figure.set_figheight(PANEL_HEIGHT * len(curves))
    for curve, axes in zip(curves, figure.subplots(len(curves), 1, squeeze=False).flat, strict=True):
        draw_panel(curve, axes)
    figure.savefig(path, metadata={"Date": None})


def draw_panel(curve: Curve, axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlabel=curve.axis, ylabel=f"time ({curve.unit})")
    for label, values in curve.series.items():
        points = [(x, y) for x, y in zip(curve.x, values, strict=True) if y is not None]
        colour, line = STYLES[label]
        axes.plot(*zip(*points, strict=True), line, color=colour, marker=".", label=label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
    measured = [y for label, column in curve.series.items() if label != "bound" for y in column if y is not None]
    axes.set_ylim(min(measured) / 2, max(measured) * 2)  # the bound of small trees is far below all that can be reached
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
