"""A pure update against itself, before and after jax is loaded: so far do ratios stray by chance."""

from tests.benchmarks import steps
from tests.benchmarks.measure import Bench, MissingPeerError
from tests.benchmarks.peers import load_jax


def run(bench: Bench) -> None:
    measure(bench, "")
    try:
        load_jax(bench.device)
        # Its threads start with the first computation.
        steps.contenders(["optax"], 150, 64, bench.device)[0]()
    except MissingPeerError as missing:
        bench.skip("noise with jax", missing)
    else:
        measure(bench, ", jax loaded")


def measure(bench: Bench, remark: str) -> None:
    for tree, (leaves, elements) in steps.TREES.items():
        ours, itself = steps.contenders(["pure", "pure"], leaves, elements, bench.device)
        bench.time(f"pure / itself, {tree}{remark}", ours, itself, elements=leaves * elements)
