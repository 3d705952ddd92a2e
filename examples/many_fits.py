"""Fit ten thousand small surfaces at once, each with a loss of its own, by one `adam_update` a step.

What it shows: many independent fits as one stacked problem. To each of 10,000 patches of 8 x 8 pixels from the
photograph `flower.jpg`, which scikit-learn ships, this fits a soft edge of five parameters: brightness in the middle,
contrast, and place, direction and sharpness of the border. `torch.func.vmap` of `torch.func.grad_and_value` gives the
gradient of each patch's own loss. Then one `adam_update` on the stacked parameters is ten thousand updates: Adam
computes each element from the gradient of that element alone, so the members of a stack do not feel each other. (Since
the losses are independent, the gradient of their sum would be the same.) With `donate=True` a step reuses the memory
of the one before.

The first hundred patches are then fitted the usual way, each by a `torch.optim.Adam` of its own in a Python loop. Both
must agree; the largest difference is printed. How long the loop would take for all patches is extrapolated from that,
and labelled so.

Takes about 10 seconds on one core. The same seed gives the same fits on one machine with one number of threads. Where
other programs use the cores too, set OMP_NUM_THREADS=1: threads that wait for each other slow the stack down.

    pip install "functional_adam[examples]"
    python examples/many_fits.py --output many_fits.svg
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import matplotlib.style
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.func import grad_and_value, vmap
from tqdm import tqdm

from functional_adam import AdamHparams, adam_init, adam_update

Params: TypeAlias = dict[str, Tensor]

HPARAMS = AdamHparams(lr=0.05)
SIZE = 8  # pixels along one side of a patch
MIN_CONTRAST = 0.08  # standard deviation of brightness: flat patches have no edge to fit
# float64, so that the comparison shows what is computed differently and not how rounding errors grow.
COORDINATES = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
Y, X = torch.meshgrid(COORDINATES, COORDINATES, indexing="ij")
QUANTILES = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)


class Fits(NamedTuple):
    """All patches, fitted."""

    params: Params  # stacked: each leaf has the patch as its first dimension
    start: Tensor  # (patches,): loss before the first step, mean squared residual
    end: Tensor  # (patches,): loss after the last
    quantiles: Tensor  # (steps + 1, 3): of the losses over the patches
    seconds: float  # for all patches


def load_patches(count: int, seed: int) -> Tensor:
    """`count` different patches, (count, 8, 8), float64: 0 is black, 1 is white. Their corners are random."""
    grey = torch.tensor(load_sample_image("flower.jpg"), dtype=torch.float64).mean(dim=2) / 255
    patches = grey.unfold(0, SIZE, 1).unfold(1, SIZE, 1).flatten(0, 1)
    candidates = (patches.std(dim=(1, 2)) > MIN_CONTRAST).nonzero().squeeze(1)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return patches[candidates[order[:count]]]


def guess(patch: Tensor) -> Params:
    """Where to start for one patch: an edge through the centre, across the mean slope of brightness."""
    slope = torch.stack([(patch * X).mean(), (patch * Y).mean()])
    # Not the mean: there the gradient by `middle` is zero but for rounding, which Adam's first step would magnify.
    dark, bright = patch.amin(), patch.amax()
    return {
        "middle": (bright + dark) / 2,  # ()
        "contrast": (bright - dark) / 2,  # ()
        "normal": 2 * slope / slope.norm().clamp(min=1e-6),  # (2,): across the border, longer if sharper
        "offset": torch.zeros_like(patch[0, 0]),  # ()
    }


def edge(params: Params) -> Tensor:
    """The surface for one patch, (8, 8)."""
    across = params["normal"][0] * X + params["normal"][1] * Y - params["offset"]
    return params["middle"] + params["contrast"] * torch.tanh(across)


def loss_of(params: Params, patch: Tensor) -> Tensor:
    """Mean squared residual of one patch."""
    return (edge(params) - patch).square().mean()


def fit_all(patches: Tensor, steps: int) -> Fits:
    """Fit all patches together."""
    params = vmap(guess)(patches)
    state = adam_init(params, HPARAMS)  # one step count for all: they advance together
    grads_and_losses = vmap(grad_and_value(loss_of))
    history: list[Tensor] = []
    grads_and_losses(params, patches)  # not timed: the first call of a transform imports what it needs
    start = time.perf_counter()
    for _ in tqdm(range(steps), desc="All at once", unit="step"):
        grads, losses = grads_and_losses(params, patches)
        history.append(losses)
        # No vmap: Adam is elementwise, so the update of the stack is the stack of the updates.
        params, state = adam_update(params, grads, state, HPARAMS, donate=True)
    seconds = time.perf_counter() - start
    history.append(vmap(loss_of)(params, patches))
    quantiles = torch.stack([losses.quantile(QUANTILES) for losses in history])
    return Fits(params, history[0], history[-1], quantiles, seconds)


def fit_one(patch: Tensor, steps: int) -> Params:
    """Fit one patch by `torch.optim.Adam`."""
    params = {name: value.requires_grad_() for name, value in guess(patch).items()}
    # fused=True is torch's fastest on a CPU.
    optimizer = torch.optim.Adam(params.values(), lr=HPARAMS.lr, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(params, patch).backward()
        optimizer.step()
    return {name: value.detach() for name, value in params.items()}


def fit_one_by_one(patches: Tensor, steps: int) -> tuple[Params, float]:
    """Fit each patch by its own optimizer: the parameters, stacked, and the seconds for all `patches`."""
    fit_one(patches[0], 1)  # not timed, as in `fit_all`
    start = time.perf_counter()
    fitted = [fit_one(patch, steps) for patch in tqdm(patches, desc="One by one", unit="fit")]
    seconds = time.perf_counter() - start
    return {name: torch.stack([params[name] for params in fitted]) for name in fitted[0]}, seconds


def explained(patches: Tensor, losses: Tensor) -> Tensor:
    """Share of each patch's variance that its fit explains, in percent."""
    return 100 * (1 - losses / patches.var(dim=(1, 2), correction=0))


def largest_difference(fits: Fits, reference: Params) -> float:
    """Between the first fits and `reference`, over all parameters. Raises AssertionError if they do not agree."""
    for name, expected in reference.items():
        torch.testing.assert_close(fits.params[name][: len(expected)], expected, rtol=1e-6, atol=1e-6)
    return max((fits.params[name][: len(x)] - x).abs().max().item() for name, x in reference.items())


@matplotlib.style.context(Path(__file__).with_name("gallery.mplstyle"))
def plot(patches: Tensor, fits: Fits, title: str, output: Path) -> None:
    """Draw some patches with their fits, and the losses of all of them, as an SVG at `output`."""
    figure = Figure(figsize=(6, 7.5))
    figure.suptitle(title)
    above, below = figure.subfigures(2, 1, height_ratios=(0.8, 1))

    columns = min(6, len(patches))
    share = explained(patches, fits.end)
    chosen = share.argsort()[torch.linspace(0.02, 0.98, columns).mul(len(patches) - 1).long()]
    surfaces = vmap(edge)({name: leaf[chosen] for name, leaf in fits.params.items()})
    above.suptitle("Patches at the 2nd to the 98th percentile of variance explained")
    panels = above.subplots(3, columns, squeeze=False)
    residuals = patches[chosen] - surfaces
    largest = residuals.abs().max().item()
    rows = (
        ("photograph", patches[chosen], {"vmin": 0, "vmax": 1}),
        ("fitted edge", surfaces, {"vmin": 0, "vmax": 1}),
        ("residual", residuals, {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}),
    )
    for row, (label, images, scale) in zip(panels, rows, strict=True):
        for axes, image in zip(row, images, strict=True):
            drawn = axes.imshow(image.numpy(), interpolation="none", **scale)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(label)
        if label == "fitted edge":
            above.colorbar(drawn, ax=panels[:2], label="brightness\n(0 black, 1 white)", aspect=15)
    above.colorbar(drawn, ax=panels[2:], label="residual\n(brightness)", aspect=8)
    for axes, index in zip(panels[0], chosen, strict=True):
        axes.set_title(f"{share[index]:.0f} %", loc="center")

    middle, low = below.subplots(2, 1)
    roots = fits.quantiles.sqrt().numpy()
    middle.fill_between(
        range(len(roots)), roots[:, 0], roots[:, 2], alpha=0.3, label="5th to 95th percentile", linewidth=0
    )
    middle.plot(roots[:, 1], linewidth=2, label="median")
    middle.set(title="Residuals while fitting", xlabel="step", ylabel="rms residual\n(brightness)")
    middle.set_ylim(bottom=0)
    bins = torch.linspace(0, fits.start.sqrt().quantile(0.999).item(), 60).numpy()
    low.hist(fits.start.sqrt().numpy(), bins, histtype="stepfilled", color="C1", alpha=0.5, label="first guess")
    low.hist(fits.end.sqrt().numpy(), bins, histtype="stepfilled", color="C0", alpha=0.5, label="fitted")
    low.set(title=f"Residuals of all {len(patches):,} fits", xlabel="rms residual (brightness)", ylabel="patches")
    for axes in (middle, low):
        axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", metadata={"Date": None})


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fit thousands of image patches at once, and compare with a loop of torch.optim.Adam.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--fits", type=int, default=10_000, help="patches to fit, 1 to 20,000")
    parser.add_argument("--loop", type=int, default=100, help="how many of them to fit one by one as well, at least 1")
    parser.add_argument("--steps", type=int, default=200, help="steps of Adam for each fit, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="decides which patches are fitted")
    parser.add_argument("--output", type=Path, default=Path("many_fits.svg"), help="where to write the SVG")
    args = parser.parse_args(argv)
    if not (1 <= args.loop <= args.fits <= 20_000 and args.steps >= 1):
        parser.error(f"--loop {args.loop} --fits {args.fits} --steps {args.steps}: expected 1 <= loop <= fits <= 20000")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    patches = load_patches(args.fits, args.seed)
    fits = fit_all(patches, args.steps)
    reference, loop_seconds = fit_one_by_one(patches[: args.loop], args.steps)
    difference = largest_difference(fits, reference)
    plot(patches, fits, f"{args.fits:,} fits with one adam_update a step (seed {args.seed})", args.output)

    stacked_ms, loop_ms = 1e3 * fits.seconds / args.fits, 1e3 * loop_seconds / args.loop
    before, after = (x.sqrt().median().item() for x in (fits.start, fits.end))
    print(f"Median rms residual: {before:.6f} at first, {after:.6f} fitted (brightness from 0 to 1)")
    print(f"Median share of variance explained: {explained(patches, fits.end).median():.2f} %")
    print(f"Largest difference to torch.optim.Adam over {args.loop} fits: {difference:.2g}")
    print(f"Threads: {torch.get_num_threads()}")
    print(f"All at once: {fits.seconds:.2f} s for {args.fits:,} fits, {stacked_ms:.3f} ms a fit")
    print(f"One by one:  {loop_seconds:.2f} s for {args.loop:,} fits, {loop_ms:.3f} ms a fit")
    print(f"One by one, extrapolated (not run) to {args.fits:,} fits: {loop_ms * args.fits / 1e3:.0f} s")
    print(f"For each fit, all at once is {loop_ms / stacked_ms:.1f} times as fast")
    print(f"Picture: {args.output.resolve()}")


if __name__ == "__main__":
    main()
