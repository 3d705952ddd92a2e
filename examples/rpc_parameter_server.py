"""Train a model whose halves live in two processes, by RPC, and compare with the same training in one process.

What it shows: torch's distributed autograd sends activations and gradients between processes, and
`distributed_optimizer` runs a `_FunctionalAdam` where the parameters live, in plain Python, without TorchScript. The
trainer keeps the first layer, the server the rest. Afterwards the trainer does the same steps alone with
`torch.optim.Adam`, and all parameters are compared: they are equal to the last bit. The data are scikit-learn's
handwritten digits. Takes about 15 seconds on two cores.

    pip install "functional_adam[examples]"
    python examples/rpc_parameter_server.py --steps 300 --output rpc_parameter_server.svg
"""

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib.style
import torch
import torch.distributed as dist
import torch.multiprocessing
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed import autograd, rpc
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from functional_adam import _FunctionalAdam
from functional_adam.distributed import distributed_optimizer

HOST = "127.0.0.1"
TIME_LIMIT = 120.0  # seconds for which processes wait for each other
LEARNING_RATE = 1e-3
BATCH_SIZE = 64
HIDDEN = 128


def make_halves(seed: int) -> tuple[nn.Module, nn.Module]:
    """The layers of the trainer and those of the server."""
    torch.manual_seed(seed)
    return nn.Linear(64, HIDDEN), nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


class Server:
    """The second half of the model. It is made in the server's process and stays there."""

    def __init__(self, seed: int) -> None:
        _, self.half = make_halves(seed)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits from what the trainer's layer gives."""
        return self.half(hidden)

    def param_rrefs(self) -> list[rpc.RRef]:
        """References to the parameters, which stay here."""
        return [rpc.RRef(param) for param in self.half.parameters()]

    def params(self) -> list[Tensor]:
        """The values of the parameters."""
        return [param.detach().clone() for param in self.half.parameters()]


def batches(steps: int, seed: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=what, unit="step"):
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        yield images[rows], labels[rows]


def train_by_rpc(steps: int, seed: int) -> tuple[list[float], list[Tensor]]:
    half, _ = make_halves(seed)
    server = rpc.remote("server", Server, args=(seed,))
    rrefs = [*map(rpc.RRef, half.parameters()), *server.rpc_sync().param_rrefs()]
    optimizer = distributed_optimizer(_FunctionalAdam, rrefs, lr=LEARNING_RATE, fused=True)
    losses: list[float] = []
    for images, labels in batches(steps, seed, "two processes"):
        with autograd.context() as context:
            loss = cross_entropy(server.rpc_sync().forward(half(images)), labels)
            autograd.backward(context, [loss])
            optimizer.step(context)
        losses.append(loss.item())
    return losses, [param.detach() for param in half.parameters()] + server.rpc_sync().params()


def train_alone(steps: int, seed: int) -> tuple[list[float], list[Tensor]]:
    model = nn.Sequential(*make_halves(seed))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    losses: list[float] = []
    for images, labels in batches(steps, seed, "one process"):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [param.detach() for param in model.parameters()]


def work(rank: int, port: int, steps: int, seed: int, folder: str) -> None:
    """What each process does; the trainer writes both runs to `folder`."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
    options = rpc.TensorPipeRpcBackendOptions(rpc_timeout=TIME_LIMIT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what it uses itself
        rpc.init_rpc(("trainer", "server")[rank], rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        runs: list[Callable[[int, int], tuple[list[float], list[Tensor]]]] = [train_by_rpc, train_alone]
        torch.save([run(steps, seed) for run in runs], Path(folder) / "runs.pt")
    rpc.shutdown()


@matplotlib.style.context(Path(__file__).with_name("gallery.mplstyle"))
def plot(together: list[float], alone: list[float], output: Path) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.semilogy(alone, color="C5", linewidth=5, alpha=0.5, label="torch.optim.Adam, one process")
    axes.semilogy(together, color="C0", linewidth=1, label="distributed_optimizer, two processes")
    axes.set(xlabel="step", ylabel="cross-entropy (nats)", title="The same training, twice")
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train a model whose halves live in two processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps of each run, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="decides initial weights and batches")
    parser.add_argument("--output", type=Path, default=Path("rpc_parameter_server.svg"), help="where to write the SVG")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}, expected at least 1")
    if not rpc.is_available():
        raise SystemExit("This torch was built without RPC.")

    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # on a free port
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (store.port, args.steps, args.seed, folder), nprocs=2)
        (together, params), (alone, expected) = torch.load(Path(folder) / "runs.pt")
    plot(together, alone, args.output)

    difference = max((a - b).abs().max().item() for a, b in zip(params, expected, strict=True))
    print(f"Last loss: {together[-1]:.6f} nats")
    print(f"Largest difference of parameters: {difference:g}")
    print(f"Picture: {args.output.resolve()}")
    if difference:
        raise SystemExit("The two runs differ.")


if __name__ == "__main__":
    main()
