"""Plain training steps on dicts of parameters, and the ratios that they must reach.

"raw fused" is torch's fused kernel alone, on buffers that are there; "optax" is
jitted and pure unless donated; the bound is what moving 28 bytes an element
takes at the speed of a large copy (small trees stay in the cache, far above it).
"""

from collections.abc import Iterable

import numpy
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.benchmarks.measure import Bench, Code, MissingPeerError, Target
from tests.benchmarks.peers import CONTENDERS, make_tree

TREES = {  # leaves and elements of each
    "1 x 25 M": (1, 25_000_000),
    "150 x 166,667": (150, 166_667),
    "150 x 64": (150, 64),
    "10,000 x 64": (10_000, 64),
}

LARGE = ("1 x 25 M", "150 x 166,667")
CASES: tuple[tuple[str, str, str, float | None], ...] = (  # tree, ours, other, target
    *((tree, "donated", "torch fused", 1.05) for tree in LARGE),
    *((tree, "donated", "optax donated", 0.9) for tree in LARGE),
    *((tree, "pure", "raw fused", 2.5) for tree in LARGE),
    *((tree, "pure", "torch default", 1.0) for tree in LARGE),
    ("1 x 25 M", "pure", "optax", 0.6),
    ("150 x 166,667", "pure", "optax", 1.0),
    ("150 x 166,667", "pure", "torch foreach", None),
    ("150 x 64", "donated", "torch fused", 0.6),
    ("150 x 64", "pure", "torch fused", 1.0),
    ("150 x 64", "pure", "torch foreach", None),
    ("150 x 64", "pure", "TorchOpt", 0.1),
    ("150 x 64", "pure", "optax", 1.0),
    ("10,000 x 64", "donated", "torch fused", 0.7),
)


def run(bench: Bench) -> None:
    check_contenders(bench.device)
    for tree, ours, other, target in CASES:
        case = f"{ours} / {other}, {tree}"
        leaves, elements = TREES[tree]
        try:
            codes = contenders((ours, other), leaves, elements, bench.device)
        except MissingPeerError as missing:
            bench.skip(case, missing)
            continue
        bench.time(case, *codes, target and Target(target), elements=leaves * elements)


def contenders(names: Iterable[str], leaves: int, elements: int, device: torch.device) -> list[Code]:
    """Contenders with equal parameters, a copy each, and the same gradients."""
    params, grads = (make_tree(leaves, elements, device) for _ in range(2))
    return [CONTENDERS[name](params, grads) for name in names]


def check_contenders(device: torch.device) -> None:
    """Raise unless all contenders that are there compute the same."""
    params, grads = (make_tree(3, 50, device) for _ in range(2))
    expected: list[Tensor] = []
    for name, make in CONTENDERS.items():
        try:
            step = make(params, grads)
        except MissingPeerError:
            continue
        step()
        new = step()
        leaves = [new[key] for key in params] if isinstance(new, dict) else new
        tensors = [x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(numpy.array(x)) for x in leaves]
        expected = expected or tensors
        assert_close(tensors, expected, msg=lambda text, name=name: f"{name}: {text}")
