"""Learn Adam's own hyperparameters by differentiating through training (hypergradient descent).

What it shows: `torch.func.grad_and_value` with respect to a whole `AdamHparams`. An inner loop trains small networks
on scikit-learn's handwritten digits by `adam_update`; the gradient of their validation loss at the end comes back as
an `AdamHparams` of derivatives, through every inner step. The outer loop then moves all hyperparameters downhill, by
`adam_update` again. The networks of one outer step are trained side by side under `torch.func.vmap`, and so are
the settings that are compared afterwards, each with its own hyperparameters.

To stay in range, the outer loop moves logarithms and logits; `torch.func.vjp` carries the derivatives over.

What is learnt is compared with the defaults of AdamW, and with the best learning rate of a grid (other values as in
the defaults), on images that neither loop has seen and with new initial weights: after as many steps as the outer loop
differentiates through, and after ten times as many. What is best for a short training need not be for a long one.

Takes about 20 seconds on one core. The same seed gives the same result on one machine with one number of threads.

    pip install "functional_adam[examples]"
    python examples/learn_the_optimizer.py --output learn_the_optimizer.svg
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import matplotlib.style
import optree
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, grad_and_value, vjp, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from functional_adam import AdamHparams, AdamState, adam_init, adam_update

Params: TypeAlias = dict[str, Tensor]

DEFAULTS = AdamHparams(weight_decay=0.01, decoupled_weight_decay=True)  # those of torch.optim.AdamW
LABELS = ("lr", "beta1", "beta2", "eps", "weight_decay")  # in the order of AdamHparams.numbers()
LR_GRID = torch.logspace(-3, -0.5, 11, dtype=torch.float64)

HORIZON = 40  # inner steps that the outer loop differentiates through
LONG = 10 * HORIZON  # inner steps of the comparison
STRIDE = 10  # inner steps between two points of the curves
NETWORKS = 8  # averaged in an outer gradient
TEST_NETWORKS = 16  # averaged in the comparison
BATCH_SIZE = 64
HIDDEN = 32

# eps is in nats, as the slopes are. Without it, hyperparameters that the loss hardly feels would move as fast as the
# others, driven by noise.
OUTER = AdamHparams(lr=0.2, betas=(0.8, 0.99), eps=1e-3)


class Images(NamedTuple):
    """Digits and what they are; batches of them have more dimensions in front."""

    pixels: Tensor  # (n, 64), float32: 0 is paper, 1 is ink
    labels: Tensor  # (n,), int64: 0 to 9


class Splits(NamedTuple):
    """Three sets without a common image."""

    train: Images  # for the inner loop
    validation: Images  # for the outer loop
    test: Images  # for the comparison


class Raw(NamedTuple):
    """Hyperparameters as the outer loop moves them: any real numbers are in range. Each is (), float64."""

    log_lr: Tensor
    logit_beta1: Tensor
    logit_beta2: Tensor
    log_eps: Tensor
    log_weight_decay: Tensor


class OuterStep(NamedTuple):
    """Where the outer loop stood before one of its steps."""

    loss: float  # validation loss after HORIZON inner steps, in nats, mean over the networks
    hparams: AdamHparams
    slopes: Raw  # d loss / d raw, in nats per unit of a log or logit


class Curve(NamedTuple):
    """One setting on the test images, every STRIDE inner steps from 0 to LONG."""

    losses: Tensor  # (points, networks), in nats
    accuracies: Tensor  # (points, networks), in percent


def to_hparams(raw: Raw) -> AdamHparams:
    return AdamHparams(
        lr=raw.log_lr.exp(),
        betas=(raw.logit_beta1.sigmoid(), raw.logit_beta2.sigmoid()),
        eps=raw.log_eps.exp(),
        weight_decay=raw.log_weight_decay.exp(),
        decoupled_weight_decay=True,
    )


def to_raw(hparams: AdamHparams) -> Raw:
    lr, beta1, beta2, eps, weight_decay = (torch.as_tensor(x, dtype=torch.float64) for x in hparams.numbers())
    return Raw(lr.log(), beta1.logit(), beta2.logit(), eps.log(), weight_decay.log())


def load_splits(generator: torch.Generator) -> Splits:
    """100 images to train on (few, so that networks overfit), 600 to validate and 1,097 to test."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator)
    pixels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)[order]
    return Splits(*map(Images, pixels.split([100, 600, 1097]), labels.split([100, 600, 1097])))


def draw_networks(count: int, generator: torch.Generator) -> Params:
    """Initial weights of `count` networks, stacked."""
    return {
        "w1": torch.randn(count, 64, HIDDEN, generator=generator) / math.sqrt(64),
        "b1": torch.zeros(count, HIDDEN),
        "w2": torch.randn(count, HIDDEN, 10, generator=generator) / math.sqrt(HIDDEN),
        "b2": torch.zeros(count, 10),
    }


def draw_batches(images: Images, networks: int, steps: int, generator: torch.Generator) -> Images:
    """Random batches, one for each network and step: (networks, steps, BATCH_SIZE, ...)."""
    index = torch.randint(len(images.labels), (networks, steps, BATCH_SIZE), generator=generator)
    return Images(images.pixels[index], images.labels[index])


def predict(params: Params, pixels: Tensor) -> Tensor:
    """Logits of one network."""
    return torch.relu(pixels @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_of(params: Params, images: Images) -> Tensor:
    return cross_entropy(predict(params, images.pixels), images.labels)


def accuracy_of(params: Params, images: Images) -> Tensor:
    return 100 * (predict(params, images.pixels).argmax(dim=-1) == images.labels).float().mean()


def train(params: Params, state: AdamState, batches: Images, hparams: AdamHparams) -> tuple[Params, AdamState]:
    """The inner loop, for one network: a step for each batch."""
    for pixels, labels in zip(*batches, strict=True):
        grads = grad(loss_of)(params, Images(pixels, labels))
        params, state = adam_update(params, grads, state, hparams)
    return params, state


def final_loss(hparams: AdamHparams, params: Params, batches: Images, held_out: Images) -> Tensor:
    """Loss of one network on `held_out` images after training from `params`: what the outer loop differentiates."""
    params, _ = train(params, adam_init(params, hparams), batches, hparams)
    return loss_of(params, held_out)


def mean_final_loss(hparams: AdamHparams, params: Params, batches: Images, held_out: Images) -> Tensor:
    """`final_loss`, mean over stacked networks with the same hyperparameters."""
    return vmap(final_loss, in_dims=(None, 0, 0, None))(hparams, params, batches, held_out).mean()


def learn(splits: Splits, steps: int, generator: torch.Generator) -> tuple[AdamHparams, list[OuterStep]]:
    """The outer loop: what it ends with and where it went, from the defaults on."""
    raw = to_raw(DEFAULTS)
    state = adam_init(raw, OUTER)
    history: list[OuterStep] = []
    progress = tqdm(range(steps), desc="Learning", unit="outer step")
    for step in progress:
        networks = draw_networks(NETWORKS, generator)
        batches = draw_batches(splits.train, NETWORKS, HORIZON, generator)
        hparams, pull_back = vjp(to_hparams, raw)
        hparam_grads, loss = grad_and_value(mean_final_loss)(hparams, networks, batches, splits.validation)
        (raw_grads,) = pull_back(hparam_grads)
        history.append(OuterStep(loss.item(), hparams, raw_grads))
        # The step size falls to zero along a cosine: every outer loss has its own networks and batches, and is noisy.
        outer = dataclasses.replace(OUTER, lr=OUTER.lr * (1 + math.cos(math.pi * step / steps)) / 2)
        raw, state = adam_update(raw, raw_grads, state, outer)
        progress.set_postfix(loss=f"{loss:.3f}", lr=f"{hparams.lr:.4f}")
    return to_hparams(raw), history


def choose_lr(splits: Splits, generator: torch.Generator) -> AdamHparams:
    """The defaults with that learning rate of the grid which has the smallest validation loss after HORIZON steps."""
    networks = draw_networks(TEST_NETWORKS, generator)
    batches = draw_batches(splits.train, TEST_NETWORKS, HORIZON, generator)

    def loss_at(lr: Tensor) -> Tensor:
        return mean_final_loss(dataclasses.replace(DEFAULTS, lr=lr), networks, batches, splits.validation)

    best = vmap(loss_at)(LR_GRID).argmin()
    return dataclasses.replace(DEFAULTS, lr=LR_GRID[best])


def compare(settings: Sequence[AdamHparams], splits: Splits, generator: torch.Generator) -> list[Curve]:
    """Train the same networks on the same batches with each setting, all at once, and test them on the way."""
    stacked = optree.tree_map(lambda *x: torch.tensor([float(value) for value in x], dtype=torch.float64), *settings)
    networks = draw_networks(TEST_NETWORKS, generator)
    # (settings, networks, ...): the inner vmap maps over networks with one setting, the outer one over settings.
    params = {name: weight.expand(len(settings), *weight.shape) for name, weight in networks.items()}
    state = vmap(vmap(adam_init, in_dims=(0, None)), in_dims=(0, 0))(params, stacked)
    train_all = vmap(vmap(train, in_dims=(0, 0, 0, None)), in_dims=(0, 0, None, 0))
    loss_all, accuracy_all = (vmap(vmap(f, in_dims=(0, None)), in_dims=(0, None)) for f in (loss_of, accuracy_of))
    losses = [loss_all(params, splits.test)]
    accuracies = [accuracy_all(params, splits.test)]
    for _ in tqdm(range(0, LONG, STRIDE), desc="Testing", unit="point"):
        batches = draw_batches(splits.train, TEST_NETWORKS, STRIDE, generator)
        params, state = train_all(params, state, batches, stacked)
        losses.append(loss_all(params, splits.test))
        accuracies.append(accuracy_all(params, splits.test))
    return [Curve(*pair) for pair in zip(torch.stack(losses, 1), torch.stack(accuracies, 1), strict=True)]


def report(learnt: AdamHparams, history: Sequence[OuterStep], curves: dict[str, Curve]) -> None:
    print("\nHyperparameter      default       learnt   slope at the default (nats per unit of its log or logit)")
    for name, old, new, slope in zip(LABELS, DEFAULTS.numbers(), learnt.numbers(), history[0].slopes, strict=True):
        print(f"{name:14} {float(old):12.6g} {float(new):12.6g} {float(slope):+12.2g}")
    print(f"\nTest images, {TEST_NETWORKS} new networks: loss in nats, mean (standard deviation); accuracy in percent")
    for steps in (HORIZON, LONG):
        for name, curve in curves.items():
            losses, accuracies = (x[steps // STRIDE] for x in curve)
            loss = f"loss {losses.mean():.4f} ({losses.std():.4f})"
            print(f"{steps:4} steps, {name:24} {loss}, accuracy {accuracies.mean():.2f}")


@matplotlib.style.context(Path(__file__).with_name("gallery.mplstyle"))
def plot(history: Sequence[OuterStep], learnt: AdamHparams, curves: dict[str, Curve], title: str, output: Path) -> None:
    """Draw the outer loss, the test curves and the path of each hyperparameter, as an SVG at `output`."""
    figure = Figure(figsize=(6, 9))
    figure.suptitle(title)
    above, middle, below = figure.subplots(3, 1)

    above.plot([step.loss for step in history], "o-", label=f"mean of {NETWORKS} new networks")
    above.set(title=f"Validation loss after {HORIZON} inner steps", xlabel="outer step")
    steps = range(0, LONG + 1, STRIDE)
    for (name, curve), line in zip(curves.items(), (":", "--", "-"), strict=True):
        mean, spread = curve.losses.mean(dim=1), curve.losses.std(dim=1)
        (drawn,) = middle.plot(steps, mean, line, linewidth=2, label=name)
        middle.fill_between(steps, mean - spread, mean + spread, color=drawn.get_color(), alpha=0.3, linewidth=0)
    middle.axvline(HORIZON, color="C5", linewidth=1, label="horizon learnt on")
    middle.set(title=f"Test loss, mean and spread of {TEST_NETWORKS} networks", xlabel="inner step")
    for axes in (above, middle):
        axes.set(yscale="log", ylabel="cross-entropy (nats)")
        axes.set_yticks([0.4, 0.6, 0.8, 1, 2], ["0.4", "0.6", "0.8", "1", "2"])
        axes.minorticks_off()

    numbers = zip(
        *([float(x) for x in h.numbers()] for h in [*(step.hparams for step in history), learnt]), strict=True
    )
    for name, line, path in zip(LABELS, ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1))), numbers, strict=True):
        # Betas of 0.99 and 0.999 look the same; what they leave for new gradients differs by a factor of ten.
        is_beta = name.startswith("beta")
        values = [1 - x for x in path] if is_beta else path
        below.plot([x / values[0] for x in values], linestyle=line, label=f"1 - {name}" if is_beta else name)
    below.set(title="Hyperparameters", xlabel="outer step", yscale="log", ylabel="value (multiples of the default)")
    for axes in (above, middle):
        axes.legend()
    figure.legend(handles=below.get_lines(), loc="outside lower center", ncols=5)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", metadata={"Date": None})


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Learn Adam's hyperparameters by differentiating through training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=60, help="outer steps, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="decides split, initial weights and batches")
    parser.add_argument("--output", type=Path, default=Path("learn_the_optimizer.svg"), help="where to write the SVG")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}, expected at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    generator = torch.Generator().manual_seed(args.seed)
    splits = load_splits(generator)
    learnt, history = learn(splits, args.steps, generator)
    tuned = choose_lr(splits, generator)
    settings = {"default": DEFAULTS, f"best lr of a grid, {tuned.lr:.2g}": tuned, "learnt": learnt}
    curves = dict(zip(settings, compare([*settings.values()], splits, generator), strict=True))
    report(learnt, history, curves)
    plot(history, learnt, curves, f"Adam's hyperparameters learnt through training (seed {args.seed})", args.output)
    print(f"Picture: {args.output.resolve()}")


if __name__ == "__main__":
    main()
