"""Train a small network in bfloat16, with and without the remedies, and compare with float32.

What it shows: a number of bfloat16 has 8 significant bits, so that a weight of 1 cannot change by less than 0.004, and
a running mean cannot change by a thousandth of itself. `adam_init` has an option against each: `moment_dtype` for the
moments, `master_params` for the weights. Several networks (the members) learn scikit-learn's handwritten digits from
their own initial weights and batches, which are the same in every variant. Takes less than a minute on a CPU.

    pip install "functional_adam[examples]"
    python examples/bf16_training.py --members 8 --steps 3000 --lr 3e-4 --output bf16_training.svg
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import matplotlib.style
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.func import grad
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from functional_adam import AdamHparams, adam_init, adam_update

Params: TypeAlias = dict[str, Tensor]

HIDDEN = 32
BATCH_SIZE = 32
EVALUATIONS = 50  # per run


class Images(NamedTuple):
    """Handwritten digits and what they are."""

    pixels: Tensor  # (..., 64), float32: 0 is paper, 1 is ink
    labels: Tensor  # (...), int64: 0 to 9


class Variant(NamedTuple):
    """Which numbers are kept in which dtype."""

    name: str
    color: str
    line: str  # solid, dashed or both
    width: float  # of the line, in points
    param_dtype: torch.dtype
    moment_dtype: torch.dtype
    master_params: bool = False


VARIANTS = (
    Variant("float32", "C5", "-", 5, torch.float32, torch.float32),
    Variant("bfloat16", "C4", "-", 1.5, torch.bfloat16, torch.bfloat16),
    Variant("bfloat16, float32 moments", "C1", "--", 1.5, torch.bfloat16, torch.float32),
    Variant("bfloat16, masters, bfloat16 moments", "C2", "-.", 1.5, torch.bfloat16, torch.bfloat16, master_params=True),
    Variant("bfloat16, masters", "C0", "--", 1.5, torch.bfloat16, torch.float32, master_params=True),
)


class Result(NamedTuple):
    """What became of the members in one variant."""

    steps: Tensor  # (evaluations,): updates done
    losses: Tensor  # (evaluations, members): cross-entropy of the test images, in nats

    def mean(self) -> Tensor:
        """Over the members, of shape (evaluations,)."""
        return self.losses.mean(dim=1)

    def standard_error(self) -> Tensor:
        """Of that mean; 0 for a single member."""
        members = self.losses.shape[1]
        return self.losses.std(dim=1, correction=min(1, members - 1)) / members**0.5


def load_images(seed: int) -> tuple[Images, Images]:
    """1,347 images to train on and 450 to test on, with the same share of each digit in both."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=seed)
    train_pixels, test_pixels = (torch.tensor(x, dtype=torch.float32) / 16 for x in split[:2])
    train_labels, test_labels = (torch.tensor(y, dtype=torch.int64) for y in split[2:])
    return Images(train_pixels, train_labels), Images(test_pixels, test_labels)


def init_members(count: int, generator: torch.Generator) -> Params:
    """`count` networks of one hidden layer, stacked along the first axis."""
    return {
        "weight1": torch.randn(count, 64, HIDDEN, generator=generator) / 64**0.5,
        "bias1": torch.zeros(count, 1, HIDDEN),
        "weight2": torch.randn(count, HIDDEN, 10, generator=generator) / HIDDEN**0.5,
        "bias2": torch.zeros(count, 1, 10),
    }


def losses_of(params: Params, images: Images) -> Tensor:
    """Mean cross-entropy of each member on its images, in nats; all but the loss is computed in the params' dtype."""
    pixels = images.pixels.to(params["weight1"].dtype)
    hidden = torch.tanh(pixels @ params["weight1"] + params["bias1"])
    scores = (hidden @ params["weight2"] + params["bias2"]).float()
    return cross_entropy(scores.movedim(-1, 1), images.labels, reduction="none").mean(dim=1)


def train(
    variant: Variant, init: Params, train_images: Images, test_images: Images, batches: Tensor, lr: float
) -> Result:
    """Train all members; `batches` holds the indices of their images, of shape (steps, members, BATCH_SIZE)."""
    hparams = AdamHparams(lr=lr)
    # Adam is elementwise: members are stacked, and the sum of their losses gives each its own gradient.
    params = {name: x.to(variant.param_dtype, copy=True) for name, x in init.items()}  # copies: they are donated
    state = adam_init(params, hparams, moment_dtype=variant.moment_dtype, master_params=variant.master_params)
    every = max(1, len(batches) // EVALUATIONS)
    shape = batches.shape[1:2]
    test = Images(test_images.pixels, test_images.labels.expand(*shape, -1))
    steps, losses = [0], [losses_of(params, test)]
    for step, index in enumerate(tqdm(batches, desc=variant.name, unit="step"), start=1):
        batch = Images(train_images.pixels[index], train_images.labels[index])
        grads = grad(lambda params, batch: losses_of(params, batch).sum())(params, batch)
        params, state = adam_update(params, grads, state, hparams, donate=True)
        if step % every == 0 or step == len(batches):
            steps.append(step)
            losses.append(losses_of(params, test))
    return Result(torch.tensor(steps), torch.stack(losses))


@matplotlib.style.context(Path(__file__).with_name("gallery.mplstyle"))
def plot(results: Sequence[Result], title: str, output: Path) -> None:
    """Draw test losses against the step, as an SVG at `output`."""
    figure = Figure(figsize=(6, 5))
    figure.suptitle(title)
    axes = figure.subplots()
    for variant, result in zip(VARIANTS, results, strict=True):
        mean, error = result.mean(), result.standard_error()
        label = f"{variant.name}: {mean[-1]:.3f} nats at the end"
        axes.plot(result.steps, mean, variant.line, color=variant.color, linewidth=variant.width, label=label)
        axes.fill_between(result.steps, mean - error, mean + error, color=variant.color, alpha=0.3, linewidth=0)
    axes.set(yscale="log", xlabel="step", ylabel="test cross-entropy (nats)")
    axes.set_xlim(0, results[0].steps[-1].item())
    figure.legend(loc="outside lower center")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train in bfloat16, with and without float32 moments and masters, and compare with float32.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--members", type=int, default=8, help="networks trained in each variant, at least 1")
    parser.add_argument("--steps", type=int, default=3000, help="updates of each network, at least 1")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate in all variants")
    parser.add_argument("--seed", type=int, default=0, help="decides train/test split, initial weights and batches")
    parser.add_argument("--output", type=Path, default=Path("bf16_training.svg"), help="where to write the SVG")
    args = parser.parse_args(argv)
    for name in ("members", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least 1")

    # The networks are too small to gain from threads, and sums split among threads would round differently.
    torch.set_num_threads(1)
    train_images, test_images = load_images(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    init = init_members(args.members, generator)
    shape = (args.steps, args.members, BATCH_SIZE)
    batches = torch.randint(len(train_images.labels), shape, generator=generator)
    results = [train(variant, init, train_images, test_images, batches, args.lr) for variant in VARIANTS]

    plot(
        results,
        f"Handwritten digits, {args.members} networks, Adam, lr={args.lr:g} (shaded: standard error)",
        args.output,
    )
    print(f"Test loss after {args.steps} steps: mean of {args.members} networks +- standard error, in nats")
    for variant, result in zip(VARIANTS, results, strict=True):
        print(f"{variant.name:<40}{result.mean()[-1]:.4f} +- {result.standard_error()[-1]:.4f}")
    reference = results[0].losses[-1]
    print("Difference to float32, network by network:")
    for variant, result in zip(VARIANTS[1:], results[1:], strict=True):
        paired = Result(result.steps[-1:], (result.losses[-1] - reference)[None])
        print(f"{variant.name:<40}{paired.mean()[0]:+.4f} +- {paired.standard_error()[0]:.4f}")
    print(f"Picture: {args.output.resolve()}")


if __name__ == "__main__":
    main()
