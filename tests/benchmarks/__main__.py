"""Compare the package with other ways to the same result: time, and memory kept for backward.

Both sides of a comparison run in turn. The ratio is the median of the ratios of such pairs, with the quartiles
beside it; below 1 it speaks for this package. The first table compares code with itself: that much is noise.

Pure updates of large leaves need fresh memory, and glibc's malloc is moody: it may keep freed blocks or give them back
to the system, which costs a factor of 2 or more when they are needed again. To pin it, set in the environment
    MALLOC_MMAP_THRESHOLD_=131072                          always give back (slow), or
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000   always keep (fast).
"""

import argparse
import json
import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from tests.benchmarks import steps, transforms
from tests.benchmarks.measure import Bench

SUITES = {"transforms": transforms, "steps": steps}


def measure_noise(bench: Bench) -> None:
    for tree, (leaves, elements) in steps.TREES.items():
        params = list(torch.randn(leaves, elements, device=bench.device).unbind(0))
        ours, itself = (steps.adam_step(params, params, donate=False) for _ in range(2))
        bench.time(f"pure / itself, {tree}", ours, itself)


def environment(device: torch.device) -> dict[str, str | int]:
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": platform.machine(),
        "processors": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "malloc": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")) or "default",
    }


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["all", *SUITES]
    parser.add_argument("suites", nargs="*", choices=names, default="all", metavar="suite", help=", ".join(names))
    parser.add_argument("--rounds", type=positive, default=31, help="pairs for each comparison (default: 31)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu, which targets are for)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    console = Console()
    described = environment(device)
    console.print(", ".join(f"{key}: {value}" for key, value in described.items()))
    chosen = SUITES if "all" in arguments.suites else {name: SUITES[name] for name in arguments.suites}
    runs = {"noise": measure_noise} | {name: suite.run for name, suite in chosen.items()}
    results = {}
    for name, run in runs.items():
        torch.manual_seed(0)
        bench = Bench(device, arguments.rounds, console)
        run(bench)
        if name in chosen:
            console.print(f"\n{escape((chosen[name].__doc__ or '').strip())}\n", highlight=False)
        for table in bench.tables(name):
            console.print(table)
        results[name] = [row.as_json() for row in bench.rows]
    if arguments.json:
        document = {"environment": described, "rounds": arguments.rounds, "suites": results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
