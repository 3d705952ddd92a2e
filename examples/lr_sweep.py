"""Train with thirty-two learning rates in one run, and compare with the same runs one by one.

What it shows: `torch.func.vmap` over a whole training function. Parameters and learning rates are stacked, `lr` of an
`AdamHparams` like any other tensor, and all members advance together. The same function called in a Python loop, once
for each member, gives the same curves and takes longer. Each member trains a small network on scikit-learn's
handwritten digits; members of one seed differ in their learning rate alone. Takes some seconds on a CPU.

    pip install "functional_adam[examples]"
    python examples/lr_sweep.py --learning-rates 32 --members 2 --steps 100 --output lr_sweep.svg
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import matplotlib.style
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.functional import avg_pool1d, cross_entropy
from torch.utils._pytree import tree_map
from tqdm import tqdm

from functional_adam import AdamHparams, adam_init, adam_update

Params: TypeAlias = dict[str, Tensor]
TrainAll: TypeAlias = Callable[[Params, AdamHparams, Sequence["Images"]], tuple[Params, Tensor]]

HIDDEN = 32
BATCH_SIZE = 32
LOWEST, HIGHEST = 1e-4, 1.0  # learning rates
# At higher rates the weights jump about, and training can magnify differences of rounding until they show. Two ways
# to compute need not agree there. Up to this rate they do, for hundreds of steps.
HIGHEST_STABLE = 0.02
TOLERANCE = 1e-9  # of losses, in nats, up to that rate
SMOOTHING = 10  # steps; for the picture alone


class Images(NamedTuple):
    """Digits and what they are."""

    pixels: Tensor  # (n, 64), float64: 0 is paper, 1 is ink
    labels: Tensor  # (n,), int64: 0 to 9


class Sweep(NamedTuple):
    """What became of all members."""

    losses: Tensor  # (learning rates, networks, steps): cross-entropy of each minibatch before its step, in nats
    test_losses: Tensor  # (learning rates, networks): after the last step, in nats
    seconds: float  # that it took


def load_images(seed: int) -> tuple[Images, Images]:
    """1,347 images to train on and 450 to test on, in float64, to keep rounding out of the comparison."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=seed)
    train_pixels, test_pixels = (torch.tensor(x, dtype=torch.float64) / 16 for x in split[:2])
    train_labels, test_labels = (torch.tensor(y, dtype=torch.int64) for y in split[2:])
    return Images(train_pixels, train_labels), Images(test_pixels, test_labels)


def init_networks(count: int, generator: torch.Generator) -> Params:
    """`count` networks of one hidden layer, stacked along the first axis."""
    return {
        "weight1": torch.randn(count, 64, HIDDEN, dtype=torch.float64, generator=generator) / 64**0.5,
        "bias1": torch.zeros(count, HIDDEN, dtype=torch.float64),
        "weight2": torch.randn(count, HIDDEN, 10, dtype=torch.float64, generator=generator) / HIDDEN**0.5,
        "bias2": torch.zeros(count, 10, dtype=torch.float64),
    }


def loss_of(params: Params, images: Images) -> Tensor:
    """Mean cross-entropy of one network, in nats."""
    hidden = torch.tanh(images.pixels @ params["weight1"] + params["bias1"])
    return cross_entropy(hidden @ params["weight2"] + params["bias2"], images.labels)


def train(params: Params, hparams: AdamHparams, batches: Iterable[Images]) -> tuple[Params, Tensor]:
    """An ordinary training run of one network: its last parameters, and its loss before each step."""
    state = adam_init(params, hparams)
    losses: list[Tensor] = []
    for batch in batches:
        grads, loss = grad_and_value(loss_of)(params, batch)
        params, state = adam_update(params, grads, state, hparams)
        losses.append(loss)
    return params, torch.stack(losses)


def train_together(params: Params, hparams: AdamHparams, batches: Sequence[Images]) -> tuple[Params, Tensor]:
    """`train` once, for all members."""
    # Tensors are mapped along their first axis. Plain numbers (betas, eps, weight decay) are the same for all.
    axes = tree_map(lambda number: 0 if isinstance(number, Tensor) else None, hparams)
    steps = tqdm(batches, desc="All together", unit="step", leave=False)
    return vmap(lambda params, hparams: train(params, hparams, steps), in_dims=(0, axes))(params, hparams)


def train_one_by_one(params: Params, hparams: AdamHparams, batches: Sequence[Images]) -> tuple[Params, Tensor]:
    """`train` for one member after the other."""
    runs: list[tuple[Params, Tensor]] = []
    for member in tqdm(range(len(params["bias1"])), desc="One by one", unit="run", leave=False):
        own = tree_map(lambda x, i=member: x[i] if isinstance(x, Tensor) else x, (params, hparams))
        runs.append(train(*own, batches))
    return tree_map(lambda *members: torch.stack(members), *runs)


def sweep(how: TrainAll, rates: Tensor, inits: Params, batches: Sequence[Images], test_images: Images) -> Sweep:
    """Train every network of `inits` with every learning rate, in the way of `how`."""
    shape = (len(rates), len(inits["bias1"]))
    params = tree_map(lambda x: x.expand(len(rates), *x.shape).flatten(0, 1), inits)
    hparams = AdamHparams(lr=rates.repeat_interleave(shape[1]))
    start = time.perf_counter()
    params, losses = how(params, hparams, batches)
    seconds = time.perf_counter() - start
    test_losses = vmap(lambda params: loss_of(params, test_images))(params)
    return Sweep(losses.unflatten(0, shape), test_losses.unflatten(0, shape), seconds)


def largest_difference(one: Sweep, other: Sweep, which: Tensor) -> float:
    """Between the losses of two sweeps at the learning rates in `which`, in nats."""
    pairs = ((one.losses, other.losses), (one.test_losses, other.test_losses))
    return max((x[which] - y[which]).abs().max().item() if which.any() else 0.0 for x, y in pairs)


@matplotlib.style.context(Path(__file__).with_name("gallery.mplstyle"))
def plot(rates: Tensor, result: Sweep, title: str, output: Path) -> None:
    """Draw the last losses against the learning rate, and the loss curves, as an SVG at `output`."""
    figure = Figure(figsize=(6, 7))
    figure.suptitle(title)
    above, below = figure.subplots(2, 1)

    last = min(SMOOTHING, result.losses.shape[-1])
    train_losses = result.losses[..., -last:].mean(dim=-1)
    for losses, label, line in (
        (train_losses, f"train, mean of the last {last} steps", "o-"),
        (result.test_losses, "test, after the last step", "s--"),
    ):
        (drawn,) = above.plot(rates, losses.mean(dim=1), line, label=label)
        above.fill_between(rates, losses.amin(dim=1), losses.amax(dim=1), color=drawn.get_color(), alpha=0.3, lw=0)
    above.set(title="After training (shaded: range over networks)", xscale="log", yscale="log")
    above.set(xlabel="learning rate (weight units a step)", ylabel="cross-entropy (nats)")
    above.legend()

    colours = LinearSegmentedColormap.from_list("readable everywhere", ["C0", "C3", "C1"])
    norm = LogNorm(rates[0].item(), rates[-1].item())
    stride = max(1, last // 2)  # more points do not show more
    curves = avg_pool1d(result.losses.mean(dim=1), last, stride)
    steps = range(last, result.losses.shape[-1] + 1, stride)
    for rate, curve in zip(rates.tolist(), curves, strict=True):
        below.plot(steps, curve, color=colours(norm(rate)), lw=1.2)
    below.set(title=f"Training (mean over networks and {last} steps)", yscale="log")
    below.set(xlabel="step", ylabel="cross-entropy (nats)")
    scale = figure.colorbar(ScalarMappable(norm, colours), ax=below, label="learning rate (weight units a step)")
    scale.minorticks_off()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", metadata={"Date": None})


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train with many learning rates in one vmapped run, and one by one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--learning-rates", type=int, default=32, help="how many, at least 2, between 1e-4 and 1")
    parser.add_argument("--members", type=int, default=2, help="networks with each learning rate, at least 1")
    parser.add_argument("--steps", type=int, default=100, help="minibatches to train on, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="decides split, initial weights and minibatches")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more do not help tensors as small as these")
    parser.add_argument("--output", type=Path, default=Path("lr_sweep.svg"), help="where to write the SVG")
    args = parser.parse_args(argv)
    for name, least in (("learning_rates", 2), ("members", 1), ("steps", 1), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {least}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    train_images, test_images = load_images(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    inits = init_networks(args.members, generator)
    indices = torch.randint(len(train_images.labels), (args.steps, BATCH_SIZE), generator=generator)
    batches = [Images(train_images.pixels[index], train_images.labels[index]) for index in indices]
    rates = torch.logspace(math.log10(LOWEST), math.log10(HIGHEST), args.learning_rates, dtype=torch.float64)

    sweep(train_together, rates[:2], inits, batches[:2], test_images)  # what torch sets up once is not to be timed
    together = sweep(train_together, rates, inits, batches, test_images)
    one_by_one = sweep(train_one_by_one, rates, inits, batches, test_images)
    stable = rates <= HIGHEST_STABLE
    difference = largest_difference(together, one_by_one, stable)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"Losses differ by {difference:.1e} nats at stable learning rates, expected {TOLERANCE:g}.")

    best = together.test_losses.mean(dim=1).argmin()
    title = f"{args.learning_rates} learning rates x {args.members} networks in one vmapped run (seed {args.seed})"
    plot(rates, together, title, args.output)
    print(f"Best learning rate: {rates[best]:.2g}, test loss {together.test_losses[best].mean():.8f} nats")
    print(f"Largest difference of losses: {difference:.1e} nats up to rate {HIGHEST_STABLE}", end="")
    print(f", {largest_difference(together, one_by_one, ~stable):.1e} nats above")
    ratio = one_by_one.seconds / together.seconds
    print(f"{args.learning_rates * args.members} runs together: {together.seconds:.2f} s")
    print(
        f"{args.learning_rates * args.members} runs one by one: {one_by_one.seconds:.2f} s, {ratio:.1f} times as long"
    )
    print(f"Picture: {args.output.resolve()}")


if __name__ == "__main__":
    main()
