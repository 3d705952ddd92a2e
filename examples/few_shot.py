"""Learn initial weights from which a few steps of Adam tell digits apart that were never seen before (MAML).

What it shows: an inner loop of `adam_update` that is differentiated through and mapped over a batch of tasks by
`torch.func.vmap`, inside an outer loop of `adam_update`. A task is to tell three digits apart, given a few examples of
each. The outer loop learns initial weights, and the inner learning rate with them, on tasks made of seven digits; the
test is on tasks made of the other three. The same is done with gradient descent (SGD) as the inner loop. Both are also
compared with random initial weights and the best inner learning rate of a grid. How much is gained depends on the three
digits held out, so everything is done for three such splits. Takes less than a minute on a CPU.

    pip install "functional_adam[examples]"
    python examples/few_shot.py --meta-steps 200 --inner-steps 5 --shots 1 --output few_shot.svg

Source: Finn, Abbeel and Levine, https://arxiv.org/abs/1703.03400, with all second derivatives.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

import matplotlib.style
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map
from tqdm import tqdm

from functional_adam import AdamHparams, adam_init, adam_update

Params: TypeAlias = dict[str, Tensor]

SPLITS = ((0, 1, 2), (3, 4, 5), (6, 7, 8))  # digits that meta-training never sees
WAYS = 3  # digits in a task
QUERIES = 10  # images of each digit that a task is judged by
HIDDEN = 64
META_BATCH = 16  # tasks in a meta-step
TEST_TASKS = 500  # of each split
MEAN_OVER = 20  # meta-steps; for the picture alone
OUTER = AdamHparams(lr=1e-3)
# Adam's step and its derivative are smooth where gradients are not far above eps. With the usual 1e-8 the first step is
# the sign of the gradient, whose derivative is zero nearly everywhere, and enormous between the signs.
INNER_EPS = 1e-2


class Task(NamedTuple):
    """Images of `WAYS` digits; labels count from 0 in an order of the task's own. Stacked, a batch of tasks."""

    support: Tensor  # (WAYS * shots, 64): what there is to learn from
    support_labels: Tensor  # (WAYS * shots,)
    query: Tensor  # (WAYS * QUERIES, 64): what is asked
    query_labels: Tensor  # (WAYS * QUERIES,)


class Learner(NamedTuple):
    """What the outer loop learns."""

    params: Params  # where every task starts
    log_lr: Tensor  # (): logarithm of the inner learning rate, so that the rate stays positive


class Inner(NamedTuple):
    """A kind of inner loop."""

    name: str
    # The parameters before and after each step on the support images, without end.
    adapt: Callable[[Learner, Task], Iterator[Params]]
    initial_lr: float  # what meta-training begins with
    lr_grid: Tensor  # (rates,): what random weights may choose from


class Result(NamedTuple):
    """How one kind of inner loop did on one split."""

    meta_losses: Tensor  # (meta-steps,): query loss after adaptation, mean over tasks, in nats
    learnt: Tensor  # (test tasks, steps + 1): percentage of query images right, before and after each inner step
    random: Tensor  # the same from random initial weights
    learnt_lr: float
    random_lr: float


def load_images() -> list[Tensor]:
    """For each digit its images, as a (count, 8, 8) tensor of mean 0 and standard deviation 1 over all digits."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor((pixels - pixels.mean()) / pixels.std(), dtype=torch.float32).reshape(-1, 8, 8)
    return [images[labels == digit] for digit in range(10)]


def sample_tasks(images: Sequence[Tensor], count: int, shots: int, generator: torch.Generator) -> Task:
    """`count` tasks, stacked. Each draws digits and images from `images`, and turns or mirrors all of its images alike.

    Seven digits alone make so few tasks that a learner knows them by heart, and fails on other digits.
    """
    rows: list[Tensor] = []  # (WAYS, shots + QUERIES, 64) each
    for _ in range(count):
        digits = torch.randperm(len(images), generator=generator)[:WAYS].tolist()
        drawn = [images[d][torch.randperm(len(images[d]), generator=generator)[: shots + QUERIES]] for d in digits]
        quarters, mirror = divmod(int(torch.randint(8, (), generator=generator)), 2)
        turned = torch.rot90(torch.stack(drawn), quarters, dims=(2, 3))
        rows.append((turned.transpose(2, 3) if mirror else turned).flatten(2))
    support, query = torch.stack(rows).split([shots, QUERIES], dim=2)
    labels = torch.arange(WAYS).expand(count, WAYS)
    return Task(
        *(support.flatten(1, 2), labels.repeat_interleave(shots, dim=1)),
        *(query.flatten(1, 2), labels.repeat_interleave(QUERIES, dim=1)),
    )


def init_network(generator: torch.Generator) -> Params:
    """A network of one hidden layer."""
    return {
        "weight1": torch.randn(64, HIDDEN, generator=generator) / 64**0.5,
        "bias1": torch.zeros(HIDDEN),
        "weight2": torch.randn(HIDDEN, WAYS, generator=generator) / HIDDEN**0.5,
        "bias2": torch.zeros(WAYS),
    }


def logits_of(params: Params, images: Tensor) -> Tensor:
    hidden = torch.tanh(images @ params["weight1"] + params["bias1"])
    return hidden @ params["weight2"] + params["bias2"]


def loss_of(params: Params, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return cross_entropy(logits_of(params, images), labels)


def adapt_by_adam(learner: Learner, task: Task) -> Iterator[Params]:
    """Adam: a generator of plain functions, in which nothing says that it will be mapped and differentiated."""
    params, hparams = learner.params, AdamHparams(lr=learner.log_lr.exp(), eps=INNER_EPS)
    state = adam_init(params, hparams)
    while True:
        yield params
        grads = grad(loss_of)(params, task.support, task.support_labels)
        params, state = adam_update(params, grads, state, hparams)


def adapt_by_sgd(learner: Learner, task: Task) -> Iterator[Params]:
    """Gradient descent."""
    params = learner.params
    while True:
        yield params
        grads = grad(loss_of)(params, task.support, task.support_labels)
        params = tree_map(lambda p, g: p - learner.log_lr.exp() * g, params, grads)


INNER_LOOPS = (
    Inner("Adam", adapt_by_adam, 0.01, torch.logspace(-3, -0.5, 11)),
    Inner("SGD", adapt_by_sgd, 0.1, torch.logspace(-2, 0.5, 11)),
)


def meta_train(learner: Learner, inner: Inner, batches: Sequence[Task], steps: int) -> tuple[Learner, Tensor]:
    """The learner after one outer step for each batch of tasks, and the losses on the way."""

    def task_loss(learner: Learner, task: Task) -> Tensor:
        adapted = next(islice(inner.adapt(learner, task), steps, None))
        return loss_of(adapted, task.query, task.query_labels)

    def meta_loss(learner: Learner, tasks: Task) -> Tensor:
        return vmap(task_loss, in_dims=(None, 0))(learner, tasks).mean()

    state = adam_init(learner, OUTER)
    losses: list[Tensor] = []
    progress = tqdm(batches, desc=f"Meta-training, inner {inner.name}", unit="step")
    for tasks in progress:
        grads, loss = grad_and_value(meta_loss)(learner, tasks)
        learner, state = adam_update(learner, grads, state, OUTER)
        losses.append(loss)
        progress.set_postfix(loss=f"{loss:.3f}")
    return learner, torch.stack(losses)


def accuracy_by_task(learner: Learner, inner: Inner, tasks: Task, steps: int) -> Tensor:
    """Percentage of query images that are right, (tasks, steps + 1): before and after each inner step."""

    def of_one(task: Task) -> Tensor:
        visited = islice(inner.adapt(learner, task), steps + 1)
        right = [logits_of(params, task.query).argmax(dim=1) == task.query_labels for params in visited]
        return 100 * torch.stack(right).double().mean(dim=1)

    return vmap(of_one)(tasks)


def best_lr(params: Params, inner: Inner, tasks: Task, steps: int) -> Tensor:
    """The rate of the grid that adapts `params` best to `tasks`; all rates are tried at once."""

    def accuracy(lr: Tensor) -> Tensor:
        return accuracy_by_task(Learner(params, lr.log()), inner, tasks, steps)[:, -1].mean()

    return inner.lr_grid[vmap(accuracy)(inner.lr_grid).argmax()]


def run(inner: Inner, params: Params, batches: Sequence[Task], test_tasks: Task, steps: int) -> Result:
    """Meta-train from `params`, and test with twice the `steps` that were trained for."""
    learner, meta_losses = meta_train(Learner(params, torch.tensor(inner.initial_lr).log()), inner, batches, steps)
    # The digits of the test take no part in choosing the learning rate for random weights.
    known_tasks = Task(*(torch.cat(column) for column in zip(*batches[:10], strict=True)))
    random_lr = best_lr(params, inner, known_tasks, steps)
    return Result(
        meta_losses=meta_losses,
        learnt=accuracy_by_task(learner, inner, test_tasks, 2 * steps),
        random=accuracy_by_task(Learner(params, random_lr.log()), inner, test_tasks, 2 * steps),
        learnt_lr=learner.log_lr.exp().item(),
        random_lr=random_lr.item(),
    )


@matplotlib.style.context(Path(__file__).with_name("gallery.mplstyle"))
def plot(results: dict[str, list[Result]], steps: int, title: str, output: Path) -> None:
    """Draw accuracy against adaptation steps, and the meta-training curves, as an SVG at `output`."""
    figure = Figure(figsize=(6, 7))
    figure.suptitle(title)
    above, below = figure.subplots(2, 1)
    for (name, splits), colour, marker in zip(results.items(), ("C0", "C1"), ("o", "s"), strict=True):
        for start, line in (("learnt", "-"), ("random", ":")):
            by_split = torch.stack([getattr(split, start).mean(dim=0) for split in splits])
            label = f"{name}, {start} initial weights"
            above.plot(by_split.mean(dim=0), line, color=colour, marker=marker, label=label)
        meta_losses = torch.stack([split.meta_losses for split in splits]).mean(dim=0)
        window = min(MEAN_OVER, len(meta_losses))
        curve = meta_losses.unfold(0, window, 1).mean(dim=1)
        below.plot(range(window, len(meta_losses) + 1), curve, color=colour, label=f"inner {name}")
    above.axvline(steps, color="C5", lw=1, ls="--", label="steps meta-trained for")
    above.axhline(100 / WAYS, color="C5", lw=1, ls="-.", label="chance")
    above.set(title="Held-out digits", ylabel="query images right (%)", xlabel="inner step")
    below.set(title=f"Meta-training (mean over {window} steps)", xlabel="meta-step")
    below.set_ylabel("query loss after adaptation (nats)")
    for axes in (above, below):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", metadata={"Date": None})


def report(results: dict[str, list[Result]], step: int) -> None:
    """Print a table: percent right after `step` inner steps, split by split."""
    print(f"Query images of held-out digits that are right after {step} inner step{'s' * (step != 1)}, in percent:")
    print("inner initial  ", *(f"without {','.join(map(str, held_out))}" for held_out in SPLITS), "  mean", sep="  ")
    for name, splits in results.items():
        for start in ("learnt", "random"):
            columns = [getattr(split, start)[:, step] for split in splits]
            cells = [f"{x.mean():6.2f} +- {1.96 * x.std() / len(x) ** 0.5:.2f}" for x in columns]
            print(f"{name:5} {start:9}", *cells, f"{torch.cat(columns).mean():6.2f}", sep="  ")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Learn to learn new digits in a few steps of Adam, by differentiating through them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--meta-steps", type=int, default=200, help="outer updates, at least 1")
    parser.add_argument("--inner-steps", type=int, default=5, help="updates of the inner loop, at least 1")
    parser.add_argument("--shots", type=int, default=1, help="examples of each digit in a task, 1 to 100")
    parser.add_argument("--seed", type=int, default=0, help="decides initial weights and tasks")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more do not help tensors as small as these")
    parser.add_argument("--output", type=Path, default=Path("few_shot.svg"), help="where to write the SVG")
    args = parser.parse_args(argv)
    for name in ("meta_steps", "inner_steps", "shots", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    if args.shots > 100:
        parser.error(f"--shots is {args.shots}, expected at most 100: there are fewer than 180 images of some digits")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    images = load_images()
    generator = torch.Generator().manual_seed(args.seed)
    params = init_network(generator)
    results: dict[str, list[Result]] = {inner.name: [] for inner in INNER_LOOPS}
    for held_out in SPLITS:
        known = [images[digit] for digit in range(10) if digit not in held_out]
        unknown = [images[digit] for digit in held_out]
        test_tasks = sample_tasks(unknown, TEST_TASKS, args.shots, generator)
        batches = [sample_tasks(known, META_BATCH, args.shots, generator) for _ in range(args.meta_steps)]
        for inner in INNER_LOOPS:
            results[inner.name].append(run(inner, params, batches, test_tasks, args.inner_steps))

    title = f"{WAYS}-way {args.shots}-shot tasks of handwritten digits, mean of {len(SPLITS)} splits (seed {args.seed})"
    plot(results, args.inner_steps, title, args.output)
    for step in sorted({0, 1, args.inner_steps}):
        report(results, step)
    print("+-: 95 % interval over test tasks. Learning rates are learnt or chosen for the last of these step counts.")
    for name, splits in results.items():
        learnt, random = ([f"{getattr(x, lr):.4f}" for x in splits] for lr in ("learnt_lr", "random_lr"))
        print(f"Inner learning rates of {name}: learnt {', '.join(learnt)}; for random weights {', '.join(random)}")
    print(f"Picture: {args.output.resolve()}")


if __name__ == "__main__":
    main()
