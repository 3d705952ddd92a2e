"""Peak memory of a warm step of 25 M parameters, the third, beyond parameters, gradients and moments.

The last two run backward as well, through a product for each leaf, and hold no
gradient before and after: what they show is that a step in backward needs the
gradients of one leaf at a time.

Each number comes from a fresh process in which malloc keeps no freed block above
128 KiB; `python -m tests.benchmarks.memory NAME LEAVES ELEMENTS DEVICE` prints it
in bytes.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from functional_adam import _FunctionalAdam
from functional_adam.distributed import step_in_backward
from tests.benchmarks.measure import Bench, Code, Curve, MissingPeerError
from tests.benchmarks.peers import CONTENDERS, Params, make_tree

TREES = {leaves: 25_000_000 // leaves for leaves in (1, 150)}
NAMES = ("donated", "pure", "torch fused", "torch foreach", "torch default", "TorchOpt", "optax", "optax donated")
BACKWARD = ("backward, then step", "step in backward")
HELD_BYTES = 16  # an element: parameter, gradient and two moments of float32
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def run(bench: Bench) -> None:
    curve = Curve("peak memory of a step of 25 M parameters beyond what is held", "leaves", "MiB", 1, [], {})
    missing: dict[str, str] = {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    for leaves, elements in TREES.items():
        values: dict[str, float] = {}
        for name in (*NAMES, *BACKWARD):
            arguments = (name, str(leaves), str(elements), str(bench.device))
            command = [sys.executable, "-m", "tests.benchmarks.memory", *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                values[name] = int(done.stdout) / 2**20
            else:
                missing[name] = done.stderr.strip().rpartition("\n")[2]
        curve.add(leaves, values)
    for name, reason in missing.items():
        bench.skip(f"memory of {name}", reason)
    if curve.series:
        bench.curves.append(curve)


def measure(name: str, leaves: int, elements: int, device: torch.device) -> int:
    """Bytes at the peak of a warm step beyond what must be held, in this process."""
    # What the code itself takes is not counted: libraries, threads, compiled functions.
    steps(name, 150, 64, device)()
    before = held_bytes(device)
    step = steps(name, leaves, elements, device)
    reset_peak(device)
    step()
    # One of two trees of coefficients stands in for the gradients that are not held.
    return peak_bytes(device) - before - HELD_BYTES * leaves * elements


def steps(name: str, leaves: int, elements: int, device: torch.device) -> Code:
    """Code that has made two steps; nobody else holds its parameters."""
    trees = (make_tree(leaves, elements, device) for _ in range(2))
    step = backward_step(name, *trees) if name in BACKWARD else CONTENDERS[name](*trees)
    step()
    step()
    return step


def backward_step(name: str, params: Params, coefficients: Params) -> Code:
    """Backward through a product for each leaf, and a step after it or within it."""
    leaves = {key: param.clone().requires_grad_() for key, param in params.items()}
    optimizer = _FunctionalAdam(leaves.values(), fused=True)
    if name == "step in backward":
        step_in_backward(optimizer)

    def step() -> None:
        torch.stack([leaf.flatten() @ coefficients[key].flatten() for key, leaf in leaves.items()]).sum().backward()
        if name != "step in backward":
            optimizer.step()
            optimizer.zero_grad()

    return step


def held_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        RESET.write_text("5")


def _status(key: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[key].removesuffix("kB")) * 1024


if __name__ == "__main__":
    name, leaves, elements, device = sys.argv[1:]
    if device == "cpu" and not RESET.exists():
        sys.exit(f"There is no {RESET}: peaks are read on Linux only")
    try:
        print(measure(name, int(leaves), int(elements), torch.device(device)))
    except MissingPeerError as reason:
        sys.exit(str(reason))
