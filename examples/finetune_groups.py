"""Fine-tune with parameter groups, a frozen layer and a schedule, press Ctrl-C in the middle, and lose nothing.

A small convolutional net learns the handwritten digits 0 to 4. Then it gets a new head and is fine-tuned on 5 to 9:

- groups: head and backbone have learning rates of their own, and only matrices decay. Both are pytrees over `params`.
- frozen: the first layer gets None as its gradient, and stands still.
- schedule and clipping: plain functions, of the step and of the gradients.
- resuming: a step is a pure function of (parameters, state, number of the step), so a checkpoint of these is all.

The script interrupts itself as Ctrl-C would, continues from the file, and compares with a run that nobody disturbed:
not a bit differs. A real Ctrl-C works as well: name a file by --checkpoint, and add --resume to go on. Takes about 10
seconds on two cores.

    pip install "functional_adam[examples]"
    python examples/finetune_groups.py --steps 200 --output finetune_groups.svg
"""

import argparse
import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import optree
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from functional_adam import AdamHparams, AdamState, adam_init, adam_update, state_from_dict, state_to_dict

Params = dict[str, dict[str, Tensor]]  # by part of the model, then by name

FROZEN = "stem"
PEAK_LR = {"stem": 0.0, "backbone": 1e-3, "head": 5e-3}  # a prefix of params names every part, frozen ones too
WEIGHT_DECAY = 0.01  # of matrices and kernels; biases do not decay
MAX_NORM = 1.0  # of all gradients together
BATCH_SIZE = 32
PRETRAIN_STEPS = 200
EVALUATE_EVERY = 5  # steps


class Images(NamedTuple):
    """Handwritten digits, and which of the five at hand they are."""

    pixels: Tensor  # (count, 1, 8, 8), float32: 0 is paper, 1 is ink
    labels: Tensor  # (count,), int64: 0 to 4


class Task(NamedTuple):
    """What decides a run."""

    steps: int
    seed: int
    train: Images
    test: Images


class Run(NamedTuple):
    """All that changes while training. Each step makes a new one."""

    params: Params
    state: AdamState
    history: list[tuple[int, float, float]]  # steps done, test loss in nats, test accuracy in percent

    def updates(self, part: str) -> int:
        """Updates of this part of the model so far."""
        return int(next(iter(self.state.step[part].values())))

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.updates("head")  # which is trained in each step


class PlannedInterrupt(KeyboardInterrupt):
    """Ctrl-C, pressed by the script itself."""


def hparams_for(params: Params) -> AdamHparams:
    """A learning rate for each part of the model, and a weight decay for each leaf."""
    decay = optree.tree_map(lambda weight: WEIGHT_DECAY if weight.ndim > 1 else 0.0, params)
    return AdamHparams(lr=PEAK_LR, weight_decay=decay, decoupled_weight_decay=True)


def at_step(step: int, steps: int, hparams: AdamHparams) -> AdamHparams:
    """`hparams` with the learning rates of step number `step`: linear warm-up, then half a cosine."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        factor = (step + 1) / warm_up
    else:
        factor = (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2
    return dataclasses.replace(hparams, lr={part: factor * lr for part, lr in hparams.lr.items()})


def clip(grads: Params, max_norm: float) -> Params:
    """`grads`, scaled down together if their common norm is larger than `max_norm`."""
    norm = torch.stack([leaf.norm() for leaf in optree.tree_leaves(grads)]).norm()
    factor = (max_norm / norm).clamp(max=1)
    return optree.tree_map(lambda leaf: leaf * factor, grads)


def batch_at(step: int, seed: int, images: Images) -> Images:
    """A batch that depends on `seed` and `step` alone. An epoch shows each image once, but for an incomplete batch."""
    epoch, position = divmod(step, len(images.labels) // BATCH_SIZE)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(images.labels), generator=generator)
    index = order[position * BATCH_SIZE :][:BATCH_SIZE]
    return Images(images.pixels[index], images.labels[index])


def load_task(first_digit: int, steps: int, seed: int) -> Task:
    """Five digits from `first_digit` on: about 670 images to train on and 225 to test on."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = (labels >= first_digit) & (labels < first_digit + 5)
    pixels, labels = pixels[chosen] / 16, labels[chosen] - first_digit
    split = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=seed)
    train_pixels, test_pixels = (torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) for x in split[:2])
    train_labels, test_labels = (torch.tensor(x, dtype=torch.int64) for x in split[2:])
    return Task(steps, seed, Images(train_pixels, train_labels), Images(test_pixels, test_labels))


def make_model(seed: int) -> nn.ModuleDict:
    def block(inputs: int, outputs: int, *more: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2), *more)

    torch.manual_seed(seed)  # Layers draw their initial weights from the global generator.
    return nn.ModuleDict({"stem": block(1, 16), "backbone": block(16, 32, nn.Flatten()), "head": nn.Linear(128, 5)})


def weights_of(model: nn.ModuleDict) -> Params:
    return {part: {name: x.detach() for name, x in module.named_parameters()} for part, module in model.items()}


def predict(model: nn.ModuleDict, params: Params, pixels: Tensor) -> Tensor:
    for part, module in model.items():
        pixels = functional_call(module, params[part], (pixels,))
    return pixels


def loss_of(model: nn.ModuleDict, params: Params, images: Images) -> Tensor:
    return cross_entropy(predict(model, params, images.pixels), images.labels)


def pretrain(model: nn.ModuleDict, task: Task) -> Params:
    """Weights that know the task."""
    params, hparams = weights_of(model), AdamHparams(lr=3e-3)
    state = adam_init(params, hparams)
    for step in tqdm(range(task.steps), desc="Pre-training", unit="step"):
        batch = batch_at(step, task.seed, task.train)
        grads = grad(lambda params, batch: loss_of(model, params, batch))(params, batch)
        params, state = adam_update(params, grads, state, hparams)
    return params


def evaluate(model: nn.ModuleDict, run: Run, task: Task) -> Run:
    """`run` with one more line of history."""
    scores = predict(model, run.params, task.test.pixels)
    accuracy = 100 * (scores.argmax(dim=1) == task.test.labels).double().mean().item()
    return run._replace(history=[*run.history, (run.step, cross_entropy(scores, task.test.labels).item(), accuracy)])


def begin(model: nn.ModuleDict, params: Params, task: Task) -> Run:
    # Each leaf has a step of its own, since those without a gradient do not count.
    state = adam_init(params, hparams_for(params), per_leaf_step=True)
    return evaluate(model, Run(params, state, history=[]), task)


def advance(model: nn.ModuleDict, run: Run, task: Task) -> Run:
    """One step: a pure function of what a checkpoint holds."""
    params, state, _ = run
    hparams = at_step(run.step, task.steps, hparams_for(params))
    trained = {part: weights for part, weights in params.items() if part != FROZEN}

    def batch_loss(trained: Params, batch: Images) -> Tensor:
        return loss_of(model, params | trained, batch)

    grads = clip(grad(batch_loss)(trained, batch_at(run.step, task.seed, task.train)), MAX_NORM)
    params, state = adam_update(params, grads | {FROZEN: dict.fromkeys(params[FROZEN])}, state, hparams)
    run = Run(params, state, run.history)
    return evaluate(model, run, task) if run.step % EVALUATE_EVERY == 0 or run.step == task.steps else run


def fine_tune(
    model: nn.ModuleDict,
    run: Run,
    task: Task,
    *,
    title: str,
    checkpoint: Path | None = None,
    save_every: int = 1,
    interrupt_at: int | None = None,
) -> Run:
    """Train to the last step. Whatever happens on the way, the last complete step is in `checkpoint` afterwards."""
    try:
        for step in tqdm(range(run.step, task.steps), desc=title, unit="step", initial=run.step, total=task.steps):
            if step == interrupt_at:
                raise PlannedInterrupt
            # One assignment, and nothing is changed in place: an interrupt finds either the old run or the new one.
            run = advance(model, run, task)
            if checkpoint and run.step % save_every == 0:
                save_checkpoint(checkpoint, run, task)
    finally:
        if checkpoint:
            save_checkpoint(checkpoint, run, task)
    return run


def save_checkpoint(path: Path, run: Run, task: Task) -> None:
    """Write a file that is there as a whole or not at all."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    made_by = {"steps": task.steps, "seed": task.seed}
    tree = {"params": run.params, "state": state_to_dict(run.state), "history": run.history, "made_by": made_by}
    torch.save(tree, unfinished)
    os.replace(unfinished, path)  # A rename cannot be halved.


def load_checkpoint(path: Path, task: Task) -> Run:
    tree = torch.load(path, weights_only=True)  # tensors, numbers, lists and dicts: nothing that could run code
    if tree["made_by"] != {"steps": task.steps, "seed": task.seed}:
        raise SystemExit(f"{path} was made with {tree['made_by']}. Give the same --steps and --seed.")
    params = tree["params"]
    return Run(params, state_from_dict(tree["state"], params, hparams_for(params)), tree["history"])


@matplotlib.style.context(Path(__file__).with_name("gallery.mplstyle"))
def plot(plain: Run, resumed: Run, resumed_at: int, task: Task, output: Path) -> None:
    """Draw test loss, test accuracy and learning rates against the step, as an SVG at `output`."""
    figure = Figure(figsize=(6, 7.5))
    figure.suptitle(f"From digits 0-4 to 5-9, interrupted after {resumed_at} steps and resumed")
    losses, accuracies, rates = figure.subplots(3, 1, sharex=True)
    # At the last evaluation before the interrupt both parts meet.
    meet = max((line[0] for line in resumed.history if line[0] <= resumed_at), default=0)
    parts = (
        ("not interrupted", {"color": "C5", "linewidth": 5, "alpha": 0.5}, plain.history),
        ("until the interrupt", {"color": "C0"}, [line for line in resumed.history if line[0] <= meet]),
        ("resumed", {"color": "C1"}, [line for line in resumed.history if line[0] >= meet]),
    )
    for column, axes in ((1, losses), (2, accuracies)):
        for name, style, history in parts:
            axes.plot([line[0] for line in history], [line[column] for line in history], label=name, **style)
    losses.set(title="Test loss", ylabel="mean cross-entropy (nats)", yscale="log")
    accuracies.set(title="Test accuracy", ylabel="images right (%)")
    steps, hparams = range(task.steps), hparams_for(plain.params)
    for part, dash, color in (("head", "-", "C3"), ("backbone", "--", "C4")):
        lrs = [at_step(step, task.steps, hparams).lr[part] for step in steps]
        rates.plot(steps, lrs, dash, color=color, label=f"{part}, up to {PEAK_LR[part]:g}")
    rates.set(title=f"Learning rates ({FROZEN}: frozen)", ylabel="learning rate\n(weight units a step)", xlabel="step")
    for axes in (losses, accuracies, rates):
        axes.axvline(resumed_at, color="C5", linestyle=":", linewidth=1)
    for axes in (losses, rates):
        axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Fine-tune with groups, a frozen layer and a schedule; press Ctrl-C in the middle; lose nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200, help="updates of the fine-tuning, at least 2")
    parser.add_argument("--seed", type=int, default=0, help="decides train/test split, initial weights and batches")
    parser.add_argument("--save-every", type=int, default=50, help="steps from one checkpoint to the next, at least 1")
    parser.add_argument("--checkpoint", type=Path, help="file to save to, temporary if None")
    parser.add_argument("--resume", action="store_true", help="continue from the file that --checkpoint names")
    parser.add_argument("--output", type=Path, default=Path("finetune_groups.svg"), help="where to write the SVG")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}, expected at least 2")
    if args.save_every < 1:
        parser.error(f"--save-every is {args.save_every}, expected at least 1")
    if args.resume and not (args.checkpoint and args.checkpoint.is_file()):
        parser.error(f"--resume needs a file to continue from, but --checkpoint is {args.checkpoint}")
    if args.checkpoint and args.checkpoint.exists() and not args.resume:
        parser.error(f"--checkpoint is {args.checkpoint}, which exists: continue from it by --resume, or delete it")

    # The net is too small to gain from threads, and sums split among threads would round differently.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            compare(args, args.checkpoint or Path(folder) / "checkpoint.pt")
        except KeyboardInterrupt:
            kept = args.checkpoint and args.checkpoint.is_file()
            advice = "Add --resume to continue." if kept else "No checkpoint is kept: see --checkpoint."
            print(f"Interrupted. {advice}", file=sys.stderr)
            raise SystemExit(130) from None  # as shells have it for Ctrl-C


def compare(args: argparse.Namespace, checkpoint: Path) -> None:
    """Train with an interrupt and without, and draw and print how both went."""
    model = make_model(args.seed)
    pretrained = pretrain(model, load_task(first_digit=0, steps=PRETRAIN_STEPS, seed=args.seed))
    task = load_task(first_digit=5, steps=args.steps, seed=args.seed)
    start = begin(model, pretrained | {"head": weights_of(make_model(args.seed + 1))["head"]}, task)

    saving = {"checkpoint": checkpoint, "save_every": args.save_every}
    if not args.resume:
        try:
            fine_tune(model, start, task, title="First part", interrupt_at=args.steps * 5 // 8, **saving)
        except PlannedInterrupt:
            print(f"Interrupted; saved in {checkpoint.name}")
    loaded = load_checkpoint(checkpoint, task)
    resumed = fine_tune(model, loaded, task, title="Resumed", **saving)
    plain = fine_tune(model, start, task, title="Not interrupted")

    plot(plain, resumed, loaded.step, task, args.output)
    differences = optree.tree_map(lambda x, y: (x - y).abs().max().item(), resumed.params, plain.params)
    difference = max(optree.tree_leaves(differences))
    print(f"Resumed after {loaded.step} of {task.steps} steps")
    print(f"Updates of each part: {', '.join(f'{part} {resumed.updates(part)}' for part in resumed.params)}")
    print(f"Test accuracy: {plain.history[0][2]:.2f} % before, {resumed.history[-1][2]:.2f} % after")
    print(f"Largest difference of parameters: {difference:g}")
    print(f"Picture: {args.output.resolve()}")
    if difference != 0:
        raise SystemExit("The resumed run left the other one: expected the same bits")


if __name__ == "__main__":
    main()
