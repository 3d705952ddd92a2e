"""Compare the package with other ways to the same result: time and memory.

Both sides of a comparison run in turn. The ratio is the median of the ratios of such pairs, with the quartiles
beside it; below 1 it speaks for this package. The first table compares code with itself: that much is noise.
Peers that are not installed are left out. All suites together take some minutes and up to 8 GB of memory.

Large results need fresh memory, and glibc's malloc is moody: it may keep freed blocks or give them back to the system,
which costs a factor of 2 or more when they are needed again. To pin it, set in the environment
    MALLOC_MMAP_THRESHOLD_=131072                          always give back (slow), or
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000   always keep (fast).
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from tests.benchmarks import imports, members, memory, noise, scaling, steps, transforms
from tests.benchmarks.measure import CURVE_ROUNDS, Bench
from tests.benchmarks.tables import tables

SUITES = {suite.__name__.rpartition(".")[2]: suite for suite in (imports, steps, transforms, members, scaling, memory)}
LOG_WIDTH = 110  # columns where no terminal says how many there are


def environment(device: torch.device) -> dict[str, str | float]:
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": platform.machine(),
        "processors": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # of other work, which makes two busy threads wait for each other
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
    rounds = f"pairs for each comparison (default: 31); curves take at most {CURVE_ROUNDS}"
    parser.add_argument("--rounds", type=positive, default=31, help=rounds)
    device = "(default: cpu, which targets are for)"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=device)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the curves of `scaling` into DIR/scaling.svg")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    described = environment(device)
    console.print(", ".join(f"{key}: {value}" for key, value in described.items()), highlight=False)
    chosen = SUITES if "all" in arguments.suites else {name: SUITES[name] for name in arguments.suites}
    bench, results = Bench(device, arguments.rounds, console), {}
    console.print(f"copy: {bench.copy_bytes_per_ms / 1e6:.1f} GB/s, read and written", highlight=False)
    for name, suite in {"noise": noise, **chosen}.items():
        torch.manual_seed(0)
        bench.rows, bench.curves = [], []
        start = time.perf_counter()
        suite.run(bench)
        console.print(f"\n{escape((suite.__doc__ or '').strip())}\n", highlight=False)
        for table in tables(name, bench):
            console.print(table)
        console.print(f"{time.perf_counter() - start:.0f} s", highlight=False)
        results[name] = {
            "comparisons": [row.as_json() for row in bench.rows],
            "curves": [curve._asdict() for curve in bench.curves],
        }
        if arguments.plot and suite is scaling:
            from tests.benchmarks.plot import draw  # matplotlib is needed for this alone

            arguments.plot.mkdir(parents=True, exist_ok=True)
            draw(bench.curves, arguments.plot / "scaling.svg")
    if arguments.json:
        described |= {"copy_bytes_per_ms": bench.copy_bytes_per_ms}
        document = {"environment": described, "rounds": arguments.rounds, "suites": results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
