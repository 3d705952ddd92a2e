"""How the time of a step grows: with leaves, with elements, with members of an ensemble, with unrolled steps.

The torch loop makes one step of torch.optim.Adam(fused=True) for each member.
Unrolled steps are inner steps on a network of four layers, and the time is that
of the meta-gradient; SGD is the floor. Each point is a median of few rounds.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import torch

from tests.benchmarks.measure import Bench, Code, MissingPeerError
from tests.benchmarks.peers import CONTENDERS, load_jax, make_tree, optax_step
from tests.benchmarks.transforms import OURS, SGD, MetaProblem, make_members, member_steps, torchopt

SMALL_LEAF = 64
LEAVES = (10, 30, 100, 300, 1_000, 3_000, 10_000)
ELEMENTS = tuple(10**i for i in range(3, 9))
MEMBERS = (1, 4, 16, 64, 256, 1_024)
MEMBER_WIDTH = 16
UNROLLED = (1, 2, 5, 10, 20, 50)
UNROLLED_WIDTH = 64

Point = tuple[int, int, dict[str, Code]]  # place on the axis, elements of one update, codes

PEERS = {  # and the largest point at which each is still cheap to prepare and to run: leaves, elements
    "donated": (10_000, 10**8),
    "pure": (10_000, 10**8),
    "torch fused": (10_000, 10**8),
    "optax": (1_000, 10**8),
    "TorchOpt": (1_000, 10**7),
}


def run(bench: Bench) -> None:
    for name, make in (("optax", partial(load_jax, bench.device)), ("TorchOpt", torchopt)):
        try:
            make()
        except MissingPeerError as missing:
            bench.skip(f"curves of {name}", missing)
    bench.sweep("leaves", f"leaves of {SMALL_LEAF} elements", trees([(n, SMALL_LEAF, n) for n in LEAVES], bench.device))
    bench.sweep("elements", "elements in one leaf", trees([(1, n, n) for n in ELEMENTS], bench.device))
    bench.sweep("members", f"members of an ensemble, width {MEMBER_WIDTH}", ensembles(bench.device))
    bench.sweep("unrolled steps", f"unrolled steps, width {UNROLLED_WIDTH}", unrolled(bench.device))


def trees(sizes: list[tuple[int, int, int]], device: torch.device) -> Iterator[Point]:
    """Plain steps on trees of (leaves, elements of each), shown at the place on the axis that comes third."""
    for leaves, elements, x in sizes:
        params, grads = (make_tree(leaves, elements, device) for _ in range(2))
        codes: dict[str, Code] = {}
        for name, (most_leaves, most_elements) in PEERS.items():
            if leaves <= most_leaves and elements <= most_elements:
                add(codes, name, partial(CONTENDERS[name], params, grads))
        yield x, leaves * elements, codes


def ensembles(device: torch.device) -> Iterator[Point]:
    for members in MEMBERS:
        params, grads = make_members(MEMBER_WIDTH, members, device)
        codes = member_steps(params, grads)
        add(codes, "optax, vmap", partial(optax_step, params, grads, donate=False, mapped=True))
        yield members, sum(x.numel() for x in params.values()), codes


def unrolled(device: torch.device) -> Iterator[Point]:
    for steps in UNROLLED:
        problem = MetaProblem(UNROLLED_WIDTH, steps, device)
        codes: dict[str, Code] = {}
        for name, inner in (("pure", lambda: OURS), ("TorchOpt", torchopt), ("SGD", lambda: SGD)):
            add(codes, name, lambda problem=problem, inner=inner: problem.timed(inner()))
        yield steps, 0, codes


def add(codes: dict[str, Code], name: str, make: Callable[[], Code]) -> None:
    """Make a code unless its peer is missing, which was said at the start."""
    with suppress(MissingPeerError):
        codes[name] = make()
