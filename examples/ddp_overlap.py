"""Train in several processes with the update inside the gradients' all-reduce, and compare with a step afterwards.

What it shows: DistributedDataParallel sums gradients bucket by bucket while backward still runs. `step_in_ddp` updates
the parameters of each bucket as soon as it is there, so that no step is left to do after `backward()`. The same
processes then train once more, by `torch.optim.Adam` and its step after `backward()`, and the parameters are compared:
they are equal to the last bit. Each process trains on its own part of scikit-learn's handwritten digits. Takes about
20 seconds on two cores.

    pip install "functional_adam[examples]"
    python examples/ddp_overlap.py --processes 2 --steps 300 --output ddp_overlap.svg
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import torch
import torch.distributed as dist
import torch.multiprocessing
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from functional_adam import _FunctionalAdam
from functional_adam.distributed import step_in_ddp

HOST = "127.0.0.1"
TIME_LIMIT = timedelta(seconds=120)  # for which processes wait for each other
LEARNING_RATE = 1e-3
BATCH_SIZE = 32  # images of one process in one step
BUCKET_MB = 0.25  # of gradients that are reduced, and updated, together


class Run(NamedTuple):
    """One training of the first process."""

    losses: list[float]  # before each step, on its own images, in nats
    params: list[Tensor]
    seconds: float


def train(images: Tensor, labels: Tensor, steps: int, seed: int, *, overlap: bool) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    ddp = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB)
    optimizer: torch.optim.Optimizer
    if overlap:
        optimizer = _FunctionalAdam(model.parameters(), LEARNING_RATE, fused=True)
        step_in_ddp(ddp, optimizer)
    else:
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)

    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    begin = time.perf_counter()
    what = "step in all-reduce" if overlap else "step afterwards"
    for _ in tqdm(range(steps), desc=what, unit="step", disable=dist.get_rank() > 0):
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(ddp(images[rows]), labels[rows])
        loss.backward()
        if not overlap:
            optimizer.step()
        losses.append(loss.item())
    return Run(losses, [p.detach().clone() for p in model.parameters()], time.perf_counter() - begin)


def work(rank: int, processes: int, port: int, steps: int, seed: int, folder: str) -> None:
    """What each process does; the first one writes both runs to `folder`."""
    torch.set_num_threads(1)
    store = dist.TCPStore(HOST, port, is_master=False, timeout=TIME_LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=TIME_LIMIT)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)[rank::processes] / 16  # 0 to 1
    labels = torch.tensor(digits.target)[rank::processes]
    runs = [train(images, labels, steps, seed, overlap=overlap) for overlap in (True, False)]
    if rank == 0:
        torch.save([run._asdict() for run in runs], Path(folder) / "runs.pt")
    dist.destroy_process_group()


@matplotlib.style.context(Path(__file__).with_name("gallery.mplstyle"))
def plot(overlapped: Run, afterwards: Run, output: Path) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.semilogy(afterwards.losses, color="C5", linewidth=5, alpha=0.5, label="torch.optim.Adam, step after backward")
    axes.semilogy(overlapped.losses, color="C0", linewidth=1, label="step_in_ddp, step in the all-reduce")
    axes.set(xlabel="step", ylabel="cross-entropy of the first process (nats)", title="The same training, twice")
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train in several processes, with the update inside the all-reduce of gradients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, help="how many train together, at least 1")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each run, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="decides initial weights and batches")
    parser.add_argument("--output", type=Path, default=Path("ddp_overlap.svg"), help="where to write the SVG")
    args = parser.parse_args(argv)
    if min(args.processes, args.steps) < 1:
        parser.error("--processes and --steps must be at least 1")

    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # on a free port
    with tempfile.TemporaryDirectory() as folder:
        arguments = (args.processes, store.port, args.steps, args.seed, folder)
        torch.multiprocessing.spawn(work, arguments, nprocs=args.processes)
        overlapped, afterwards = (Run(**run) for run in torch.load(Path(folder) / "runs.pt"))
    plot(overlapped, afterwards, args.output)

    pairs = zip(overlapped.params, afterwards.params, strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"Last loss: {overlapped.losses[-1]:.6f} nats")
    print(f"In the all-reduce: {1e3 * overlapped.seconds / args.steps:.2f} ms a step")
    print(f"Afterwards:        {1e3 * afterwards.seconds / args.steps:.2f} ms a step")
    print(f"Largest difference of parameters: {difference:g}")
    print(f"Picture: {args.output.resolve()}")
    if difference:
        raise SystemExit("The two runs differ.")


if __name__ == "__main__":
    main()
