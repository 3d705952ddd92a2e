"""The steps of `tests/benchmarks/steps.py` one by one, for pytest-benchmark: `python -m pytest -n 0 -m speed`."""

from collections.abc import Callable

import pytest
import torch

from tests.benchmarks.measure import Code
from tests.benchmarks.steps import CASES, TREES, contenders

PAIRS = dict.fromkeys((tree, name) for tree, *names, _ in CASES for name in names)


@pytest.mark.speed
@pytest.mark.parametrize(("tree", "name"), PAIRS)
def test_step(benchmark: Callable[[Code], object], tree: str, name: str):
    torch.manual_seed(0)
    # Where a peer is missing, MissingPeerError says what to install.
    (step,) = contenders([name], *TREES[tree], torch.device("cpu"))
    benchmark.group = tree
    benchmark(step)
