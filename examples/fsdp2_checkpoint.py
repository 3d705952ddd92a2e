"""Train with FSDP2, kill the processes in the middle, and continue on other processes from the last checkpoint.

Two processes train a small net on handwritten digits: torch's `fully_shard` splits the weights, so that each process
holds, and updates by `adam_update`, only its part. On the way they save checkpoints. Then one is killed with SIGKILL.
Three processes find the last complete checkpoint, share the same weights and moments out among themselves, and train
to the end. At last the same steps run in this process alone, without any sharding, and the losses are compared.
Takes about 15 seconds on two cores.

    pip install "functional_adam[examples]"
    python examples/fsdp2_checkpoint.py --steps 200 --output fsdp2_checkpoint.svg
"""

import argparse
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from functional_adam import AdamHparams, AdamState, adam_init, adam_update

BATCH_SIZE = 96  # images of one step, all processes together
TIME_LIMIT = 300  # seconds that processes wait for each other
TOLERANCE = 1e-9  # nats; in float64, sums over parts of a batch round to about 1e-16 and training amplifies it
HPARAMS = AdamHparams(lr=2e-3, weight_decay=1e-4, decoupled_weight_decay=True)

Params = dict[str, Tensor]


def as_tree(params: Params, state: AdamState) -> dict[str, object]:
    """What a checkpoint holds: dicts of tensors by name, since torch.distributed.checkpoint splits only those."""
    return {"params": params, "state": {name: tree for name, tree in state._asdict().items() if not _is_absent(tree)}}


def _is_absent(tree: object) -> bool:
    return isinstance(tree, tuple) and not tree


def save_checkpoint(folder: Path, params: Params, state: AdamState) -> None:
    """Write a checkpoint, named for the number of updates, that is there as a whole or not at all. All processes call.

    Each process writes its own shards, under a temporary name. The last act is a rename, which a crash cannot halve.
    """
    name = f"step-{int(state.step):08d}"
    temporary = folder / f"unfinished-{name}"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # of an earlier crash
        temporary.mkdir(parents=True)
    dist.barrier()
    dcp.save(as_tree(params, state), checkpoint_id=temporary)
    dist.barrier()
    if dist.get_rank() == 0:
        os.replace(temporary, folder / name)
    dist.barrier()


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most updates, or None. `.metadata` is what torch writes last."""
    return max((path.parent for path in folder.glob("step-*/.metadata")), default=None)


def load_checkpoint(path: Path, params: Params, state: AdamState) -> None:
    """Fill `params` and `state` in place, each process its own shards, whoever saved them. All processes call."""
    dcp.load(as_tree(params, state), checkpoint_id=path)


class Images(NamedTuple):
    """Digits and what they are."""

    pixels: Tensor  # (count, 64), 0 to 1
    labels: Tensor  # (count,), 0 to 9


def load_images() -> Images:
    # Here, since each spawned process imports all that stands at the top.
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Images(torch.from_numpy(digits.data / 16.0), torch.from_numpy(digits.target))


class Run(NamedTuple):
    """What processes need to know."""

    folder: Path
    steps: int
    save_every: int
    seed: int
    images: Images


def make_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)).double()


def batch_at(step: int, run: Run) -> Images:
    """The batch depends on the step alone, so that a run that continues meets the same batches."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
    index = torch.randint(len(run.images.labels), (BATCH_SIZE,), generator=generator)
    return Images(run.images.pixels[index], run.images.labels[index])


def train_plain(run: Run) -> list[float]:
    """The loss of each step, in this process alone."""
    model = make_model(run.seed)
    params = {name: weight.detach() for name, weight in model.named_parameters()}
    state = adam_init(params, HPARAMS)
    losses: list[float] = []
    for step in tqdm(range(run.steps), desc="Plain run", unit="step"):
        batch = batch_at(step, run)
        loss = cross_entropy(model(batch.pixels), batch.labels)
        loss.backward()
        grads = {name: weight.grad for name, weight in model.named_parameters()}
        params, state = adam_update(params, grads, state, HPARAMS, donate=True)
        model.zero_grad()
        losses.append(loss.item())
    return losses


def train_sharded(rank: int, port: int, world_size: int, run: Run, kill_at: int | None) -> None:
    """One of `world_size` processes. Rank 0 writes the losses to a file as they come."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is for several processes, and stays behind when one is killed
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    timeout = timedelta(seconds=TIME_LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)

    model = make_model(run.seed)
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # Detached, the weights are still the memory of the model. The donated updates write there.
    params = {name: weight.detach() for name, weight in model.named_parameters()}
    state = adam_init(params, HPARAMS)
    found = latest_checkpoint(run.folder)
    if found:
        load_checkpoint(found, params, state)

    done = int(state.step)
    title = f"{world_size} processes"
    steps = tqdm(range(done, run.steps), desc=title, unit="step", initial=done, total=run.steps, disable=rank != 0)
    with (run.folder / f"losses-{world_size}.txt").open("a") as file:
        for step in steps:
            if step == kill_at and rank == world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            batch = batch_at(step, run)
            mine = slice(rank, None, world_size)
            # FSDP averages gradients over processes. Shares of the batch count by their size.
            loss = cross_entropy(model(batch.pixels[mine]), batch.labels[mine], reduction="sum") / BATCH_SIZE
            (loss * world_size).backward()
            grads = {name: weight.grad for name, weight in model.named_parameters()}
            params, state = adam_update(params, grads, state, HPARAMS, donate=True)
            model.zero_grad()
            loss = loss.detach()
            dist.all_reduce(loss)
            if rank == 0:
                print(step, loss.item(), file=file, flush=True)
            if (step + 1) % run.save_every == 0:
                save_checkpoint(run.folder, params, state)
    dist.destroy_process_group()


def start(world_size: int, run: Run, kill_at: int | None = None) -> dict[int, float]:
    """Spawn the processes and wait for them. Returns losses by step; those after the last checkpoint may be lost."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # takes a free port
    arguments = (store.port, world_size, run, kill_at)
    try:
        torch.multiprocessing.spawn(train_sharded, arguments, world_size)
    except torch.multiprocessing.ProcessExitedException as error:
        if kill_at is None:
            raise
        print(f"Killed as planned: {error}")
    lines = (run.folder / f"losses-{world_size}.txt").read_text().splitlines()
    return {int(step): float(loss) for step, loss in map(str.split, lines)}


@matplotlib.style.context(Path(__file__).with_name("gallery.mplstyle"))
def plot(plain: list[float], parts: dict[str, dict[int, float]], output: Path) -> None:
    figure = Figure(figsize=(6, 6))
    figure.suptitle("FSDP2 with adam_update: killed, and continued on other processes")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(range(len(plain)), plain, color="C5", linewidth=5, alpha=0.5, label="plain, one process")
    for (name, losses), color in zip(parts.items(), ("C0", "C1"), strict=True):
        steps = list(losses)
        above.plot(steps, list(losses.values()), color=color, label=name)
        below.plot(steps, [abs(losses[i] - plain[i]) for i in steps], color=color, label=name)
    above.set(title="Training loss", ylabel="mean cross-entropy (nats)", yscale="log")
    below.set(title="Difference to the plain run", xlabel="step", ylabel="difference of the loss (nats)")
    for axes in (above, below):
        axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train with FSDP2, kill the processes, continue on others, and compare with an unsharded run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200, help="updates in all, at least 4")
    parser.add_argument("--seed", type=int, default=0, help="decides initial weights and batches")
    parser.add_argument("--output", type=Path, default=Path("fsdp2_checkpoint.svg"), help="where to write the SVG")
    args = parser.parse_args(argv)
    if args.steps < 4:
        parser.error(f"--steps is {args.steps}, expected at least 4")

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), args.steps, max(1, args.steps // 8), args.seed, load_images())
        first = start(2, run, kill_at=args.steps * 5 // 8 - 1)
        found = latest_checkpoint(run.folder)
        print(f"Continue from {found.name if found else 'the beginning'}")
        second = start(3, run)
    plain = train_plain(run)
    plot(plain, {"2 processes, killed": first, "3 processes, continued": second}, args.output)

    assert first.keys() | second.keys() == set(range(args.steps))
    difference = max(abs(loss - plain[step]) for part in (first, second) for step, loss in part.items())
    print(f"Training loss of the last step: {plain[-1]:.8f} nats")
    print(f"Largest difference to the plain run: {difference:.1e} nats")
    print(f"Picture: {args.output.resolve()}")
    if not difference <= TOLERANCE:
        raise SystemExit(f"The sharded run left the plain one: expected at most {TOLERANCE:.0e} nats")


if __name__ == "__main__":
    main()
