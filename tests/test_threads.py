"""Threads that update at once compute what they compute one after the other."""

import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from functional_adam import AdamHparams, adam_init, adam_update, recycling
from tests.builders import assert_same_bits, assert_unchanged, snapshot
from tests.strategies import random_tensor

TIMEOUT = 120.0  # seconds, where a fault would wait for ever
THREADS = 4
HPARAMS = AdamHparams(lr=0.1, weight_decay=0.1)


@pytest.fixture(autouse=True)
def _eager_switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    recycling.set_cache_limit(None)
    recycling.empty_cache()


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of `calls`, each in a thread of its own, all begun at once."""
    results: list[Future[Any]] = [Future() for _ in calls]
    barrier = threading.Barrier(len(calls), timeout=TIMEOUT)

    def run(call: Callable[[], Any], result: Future[Any]) -> None:
        try:
            barrier.wait()
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    for pair in zip(calls, results, strict=True):
        threading.Thread(target=run, args=pair, daemon=True).start()
    return [result.result(TIMEOUT) for result in results]


def tree(seed: int, *, size: int = 3) -> dict[str, Any]:
    w, b, c = (random_tensor(shape, torch.float32, seed + i) for i, shape in enumerate([(size, 4), (size,), ()]))
    return {"w": w, "b": [b, c]}


# Programs: each gives the same result for the same seed.


def pure(seed: int, *, size: int = 3, count: int = 40, **options: Any) -> Any:
    params = tree(seed, size=size)
    state = adam_init(params, HPARAMS, per_leaf_step=bool(seed % 2))
    for i in range(count):
        params, state = adam_update(params, tree(seed + i, size=size), state, HPARAMS, **options)
    return params, state


def of_many_shapes(seed: int) -> Any:
    # More kinds of tensors than are remembered, in another order in each thread.
    return [pure(seed, size=1 + (seed + i) % 12, count=3) for i in range(12)]


def skipped(seed: int) -> Any:
    params, state = pure(seed, count=3)
    for found_inf in (1.0, torch.tensor(2.0), 0.0, torch.tensor(0.0)) * 4:
        params, state = adam_update(params, tree(seed), state, HPARAMS, found_inf=found_inf, grad_scale=2.0)
    return params, state


def stacked(seed: int) -> Any:
    def program(params: Any, grads: Any) -> Any:
        return adam_update(params, grads, adam_init(params, HPARAMS), HPARAMS)

    params, grads = (optree.tree_map(lambda x: torch.stack([x, 2 * x]), tree(seed + i)) for i in range(2))
    return [torch.func.vmap(program)(params, grads) for _ in range(5)]


def derived(seed: int) -> Any:
    params = tree(seed)

    def total(lr: Tensor) -> Tensor:
        new, _ = adam_update(params, params, adam_init(params, HPARAMS), AdamHparams(lr=lr))
        return new["w"].sum() + new["b"][0].sum()

    rate = torch.tensor(0.1)
    watched = rate.clone().requires_grad_()
    for _ in range(3):
        total(watched).backward()
    # No forward mode: torch (2.13) has one dual level for the whole process, and threads that open it at once raise.
    return [torch.func.grad(total)(rate), torch.func.jacrev(torch.func.grad(total))(rate), watched.grad]


large = partial(pure, size=2**15 + 1, count=8)
PROGRAMS: dict[str, Callable[[int], Any]] = {
    "donated": partial(pure, donate=True),
    "by single": partial(pure, kernel="single"),
    "large": large,
    **{program.__name__: program for program in (pure, of_many_shapes, skipped, stacked, derived)},
}
CALLS: dict[str, list[Callable[[], Any]]] = {
    **{name: [partial(program, seed) for seed in range(THREADS)] for name, program in PROGRAMS.items()},
    "all": [partial(program, 7) for program in PROGRAMS.values()],
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_threads_compute_what_they_compute_in_turn(calls: list[Callable[[], Any]]) -> None:
    assert_same_bits(together(calls), [call() for call in calls])


def test_threads_compute_the_same_while_this_one_is_in_forward_mode() -> None:
    calls = [partial(PROGRAMS[name], 7) for name in ("pure", "by single", "large", "skipped", "stacked")]
    expected = [call() for call in calls]
    with forward_ad.dual_level():
        assert_same_bits(together(calls), expected)


@pytest.mark.parametrize("size", [3, 2**15 + 1])
def test_threads_may_share_and_differentiate_what_they_do_not_donate(size: int) -> None:
    params, grads = tree(1, size=size), tree(2, size=size)
    watched, state = optree.tree_map(lambda x: x.clone().requires_grad_(), params), adam_init(params, HPARAMS)
    before = snapshot((params, grads, state, watched))

    def program() -> Any:
        new, _ = adam_update(watched, grads, state, HPARAMS)
        gradient = torch.autograd.grad(new["w"].square().sum(), watched["w"])
        return adam_update(params, grads, state, HPARAMS), gradient

    expected = [program()] * 5
    for found in together([lambda: [program() for _ in range(5)]] * THREADS):
        assert_same_bits(found, expected)
    assert_unchanged((params, grads, state, watched), before)


def test_the_cache_may_be_limited_and_emptied_while_others_update_and_drop_what_others_made() -> None:
    expected = [large(seed) for seed in range(2)] * 3
    is_done, given_away = threading.Event(), deque[Any](maxlen=3)

    def meddle() -> None:
        for limit in itertools.cycle((0, None, 2**18, 2**30)):
            recycling.set_cache_limit(limit)
            recycling.empty_cache()
            if is_done.wait(1e-4):
                return

    def updates() -> Any:
        found = []
        try:
            for seed in (0, 1) * 3:
                given_away.append(large(seed, count=3))  # which drops one that another thread may have made
                found.append(large(seed))
            return found
        finally:
            is_done.set()

    *found, _ = together([updates, updates, meddle])
    assert_same_bits(found, [expected] * 2)
    # Whoever gives back, no more than the limit is kept.
    recycling.set_cache_limit(2**20)
    together([lambda seed=seed: large(seed) and None for seed in range(THREADS)])
    assert 0 <= recycling.cached_bytes() <= 2**20
    recycling.empty_cache()
    assert recycling.cached_bytes() == 0
