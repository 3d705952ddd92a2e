"""What importing the package adds to importing torch, each in a fresh process."""

import subprocess
import sys
from functools import partial

from tests.benchmarks.measure import Bench, Target


def run(bench: Bench) -> None:
    ours, torch = (
        partial(subprocess.run, [sys.executable, "-c", f"import {names}"], check=True)
        for names in ("torch, functional_adam", "torch")
    )
    bench.time("import torch, functional_adam / import torch", ours, torch, Target(1.15))
