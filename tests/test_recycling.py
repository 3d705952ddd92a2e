"""Memory of large results serves later updates only after its last holder is gone, so that nobody can notice."""

import copy
import gc
import importlib.util
import io
import os
import pickle
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from functional_adam import AdamHparams, AdamState, adam_init, adam_update, recycling
from functional_adam.recycling import cached_bytes, empty_cache, set_cache_limit
from tests.interruptions import Interruption, interrupt
from tests.strategies import PROPERTY

COUNT = 2**15 + 16  # of float32: a little more than what is recycled
HPARAMS = AdamHparams(lr=0.1, weight_decay=0.1)
TIMEOUT = 20.0  # seconds, where a fault would wait for ever


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    set_cache_limit(None)
    empty_cache()
    yield
    set_cache_limit(None)
    empty_cache()


class Run(NamedTuple):
    """A training run: what one update needs."""

    params: Any
    grads: Any
    state: AdamState
    hparams: AdamHparams

    def next(self, **options: Any) -> "Run":
        return self._replace(**dict(zip(("params", "state"), adam_update(*self, **options), strict=True)))

    @property
    def large(self) -> list[Tensor]:
        """The tensors that an update replaces, steps aside."""
        return torch_pytree.tree_leaves((self.params, self.state[1:]))


def randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(
    shape: tuple[int, ...] = (COUNT,),
    *,
    leaves: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hparams: AdamHparams = HPARAMS,
    layout: Callable[[Tensor], Tensor] = Tensor.clone,
) -> Run:
    params = [layout(randn(shape, seed + i, dtype)) for i in range(leaves)]
    grads = [layout(randn(shape, seed + i + 100, dtype)) for i in range(leaves)]
    return Run(params, grads, adam_init(params, hparams), hparams)


def pointers(run: Run) -> list[int]:
    return [x.data_ptr() for x in run.large]


def as_bytes(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def assert_same_bits(got: Any, expected: Any) -> None:
    a, b = ([x for x in torch_pytree.tree_leaves(tree) if isinstance(x, Tensor)] for tree in (got, expected))
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(as_bytes(x), as_bytes(y))


def train(run: Run, updates: int) -> Run:
    for _ in range(updates):
        run = run.next()
    return run


def train_without_recycling(run: Run, updates: int) -> Run:
    set_cache_limit(0)
    run = train(run, updates)
    set_cache_limit(None)
    return run


# Memory comes back.


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("leaves", [1, 3])
def test_each_update_writes_to_the_memory_of_the_last_but_one(leaves: int, amsgrad: bool) -> None:
    run = make(leaves=leaves, hparams=AdamHparams(lr=0.1, amsgrad=amsgrad)).next()
    generation = sum(x.nbytes for x in run.large)
    assert len(run.large) == leaves * (4 if amsgrad else 3)
    run, before = run.next(), pointers(run)
    for _ in range(5):
        assert cached_bytes() == generation
        run, before, last_but_one = run.next(), pointers(run), before
        assert sorted(pointers(run)) == sorted(last_but_one)
    assert cached_bytes() == generation


def test_what_is_kept_costs_fresh_memory() -> None:
    runs = [make()]
    for _ in range(5):
        runs.append(runs[-1].next())
        assert cached_bytes() == 0
    every = [pointer for run in runs for pointer in pointers(run)]
    assert len(set(every)) == len(every)


def test_a_weak_reference_does_not_hold_memory() -> None:
    run = make().next()
    pointer, weak = run.params[0].data_ptr(), weakref.ref(run.params[0])
    run = run.next()
    assert weak() is None
    assert pointer in pointers(run.next())


@pytest.mark.parametrize("updates", [1, 7])
def test_results_are_the_same_with_and_without_recycling(updates: int) -> None:
    run = make(leaves=2)
    expected = train_without_recycling(run, updates)
    got = train(run, updates)
    assert_same_bits(got, expected)


# Memory that is held does not come back.

HOLDERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "itself": (lambda x: x, lambda x: x),
    "view": (lambda x: x.view(-1, 4), lambda x: x.view(-1)),
    "slice": (lambda x: (x[5:6], len(x)), lambda held: held[0].as_strided((held[1],), (1,), 0)),
    "detached": (Tensor.detach, lambda x: x),
    "shallow_copy": (copy.copy, lambda x: x),
    "numpy": (lambda x: x.numpy(), torch.from_numpy),
    "numpy_slice": (lambda x: x.numpy()[1:].reshape(-1, 1), lambda a: torch.from_numpy(a.base.ravel())),
    "numpy_memoryview": (lambda x: memoryview(x.numpy()), lambda m: torch.frombuffer(m, dtype=torch.float32)),
    "dlpack": (lambda x: torch.utils.dlpack.to_dlpack(x), torch.utils.dlpack.from_dlpack),
    "storage": (
        lambda x: x.untyped_storage(),
        lambda storage: torch.empty(0).set_(storage, 0, (storage.nbytes() // 4,)),
    ),
    "other_tensor_on_storage": (lambda x: torch.empty(0).set_(x), lambda x: x),
    "data_of_another": (lambda x: torch.nn.Parameter(torch.zeros(1)).data.set_(x), lambda x: x),
    "other_dtype": (lambda x: x.view(torch.int32), lambda x: x.view(torch.float32)),
    "parameter": (lambda x: torch.nn.Parameter(x), lambda x: x),
    "cycle": (lambda x: (cycle := [x]).append(cycle) or cycle, lambda cycle: cycle[0]),
}
COPIES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "shared_memory": (Tensor.share_memory_, lambda x: x),
    "pickle": (pickle.dumps, pickle.loads),
    "deep_copy": (copy.deepcopy, lambda x: x),
}


@pytest.mark.parametrize("name", [*HOLDERS, *COPIES])
def test_memory_that_is_held_keeps_its_values(name: str) -> None:
    hold, read = {**HOLDERS, **COPIES}[name]
    run = train(make(), 3)
    expected, pointer = run.params[0].clone(), run.params[0].data_ptr()
    held = hold(run.params[0])
    for _ in range(6):
        run = run.next()
        assert name in COPIES or pointer not in pointers(run)
    gc.collect()
    run = train(run, 3)
    assert torch.equal(read(held), expected)


@pytest.mark.parametrize("name", HOLDERS)
def test_memory_comes_back_when_its_last_holder_is_gone(name: str) -> None:
    run = train(make(), 3)
    pointer = run.params[0].data_ptr()
    held = HOLDERS[name][0](run.params[0])
    run = train(run, 3)
    assert pointer not in pointers(run)
    del held
    gc.collect()
    run = run.next()
    assert pointer in pointers(run) + pointers(run.next())


def test_a_saved_graph_keeps_old_results() -> None:
    run = train(make(), 3)
    weight = randn((COUNT,), 7).requires_grad_()
    expected, pointer = run.params[0].clone(), run.params[0].data_ptr()
    loss = (run.params[0] * weight).sum()
    for _ in range(6):
        run = run.next()
        assert pointer not in pointers(run)
    loss.backward()
    assert torch.equal(weight.grad, expected)


def test_a_differentiated_update_keeps_what_its_backward_reads() -> None:
    def meta_gradient(run: Run) -> Tensor:
        lr = torch.tensor(0.1, requires_grad=True)
        run = run._replace(hparams=AdamHparams(lr=lr))
        for _ in range(4):
            run = run.next()
        train(make(seed=5), 4)  # others write meanwhile
        (run.params[0] ** 2).sum().backward()
        return lr.grad

    start = train(make(), 2)
    set_cache_limit(0)
    expected = meta_gradient(start)
    set_cache_limit(None)
    for _ in range(3):
        assert torch.equal(meta_gradient(start), expected)


# Programs.


class Step(NamedTuple):
    """One line of a random program."""

    action: str
    place: int


ACTIONS = ("update", "update", "update", "donate", "keep", "drop", "view", "mutate", "mutate_current", "graph", "other")
programs = st.lists(st.builds(Step, st.sampled_from(ACTIONS), st.integers(0, 20)), min_size=4, max_size=16)


def execute(program: list[Step]) -> list[list[Tensor]]:
    """All values that the program can see, after each of its lines."""
    run, other = make(leaves=2), make((2, COUNT // 2), seed=50)
    weight = torch.ones(COUNT, requires_grad=True)
    kept: list[Tensor] = []
    graphs: list[Tensor] = []
    seen: list[list[Tensor]] = []
    for action, place in program:
        if action == "update":
            run = run.next()
        elif action == "donate":
            # What is kept may be the donated memory: it then changes, as without recycling.
            run = run.next(donate=True)
        elif action == "keep":
            kept.append(run.large[place % len(run.large)])
        elif action == "view":
            kept.append(run.large[place % len(run.large)][place : COUNT // 2].detach())
        elif action == "drop" and kept:
            del kept[place % len(kept)]
        elif action == "mutate" and kept:
            kept[place % len(kept)].add_(1)
        elif action == "mutate_current":
            run.large[place % len(run.large)].mul_(0.5)
        elif action == "graph":
            graphs.append((run.params[0].clone() * weight).sum() if place % 2 else (run.params[0].abs() * weight).sum())
        elif action == "other":
            other = other.next()
        seen.append([x.clone() for x in (*run.large, *other.large, *kept)])
    return [*seen, *([torch.autograd.grad(graph, weight)[0]] for graph in graphs)]


@PROPERTY
@given(programs)
def test_no_program_can_notice(program: list[Step]) -> None:
    set_cache_limit(0)
    expected = execute(program)
    set_cache_limit(None)
    for _ in range(2):  # the second time in memory that is warm from the beginning
        got = execute(program)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)


# Results look as if torch had allocated them.

LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((4, 8, 33, 33), Tensor.clone),
    "channels_last": ((4, 8, 33, 33), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "transposed": ((129, 257), lambda x: x.mT.contiguous().mT),
    "strided": ((129, 257), lambda x: torch.stack([x, x], -1)[..., 0]),
    "size_one": ((1, 129, 1, 257), lambda x: x.as_strided(x.shape, (7, 257, 3, 1))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_results_look_freshly_allocated(layout: str, dtype: torch.dtype, amsgrad: bool) -> None:
    shape, arrange = LAYOUTS[layout]
    shape = (2 * shape[0], *shape[1:]) if dtype.itemsize == 2 else shape
    start = make(shape, dtype=dtype, hparams=AdamHparams(lr=0.1, amsgrad=amsgrad), layout=arrange)
    expected = train_without_recycling(start, 4)
    run = train(start, 4)
    assert cached_bytes() > 0
    assert_same_bits(run, expected)
    for got, old in zip(run.large, expected.large, strict=True):
        assert got.stride() == old.stride()
        assert got.dtype == old.dtype
        assert not got._is_view()
        assert got.storage_offset() == 0
        assert got.untyped_storage().nbytes() == got.numel() * got.element_size()
        assert got.data_ptr() % 64 == 0
        assert got.is_leaf
        assert not got.requires_grad
    assert len({x.untyped_storage().data_ptr() for x in run.large}) == len(run.large)


def test_results_can_be_trained_mutated_and_saved() -> None:
    param = train(make(), 4).params[0]
    file = io.BytesIO()
    torch.save(param, file)
    assert file.tell() < param.nbytes + 4096
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), param)
    before = param.clone()
    with torch.no_grad():
        param.requires_grad_().mul_(2)
    (param**2).sum().backward()
    assert torch.equal(param, 2 * before)
    assert torch.equal(param.grad, 4 * before)


def test_results_under_inference_mode_are_inference_tensors() -> None:
    start = make()
    expected = train_without_recycling(start, 4)
    with torch.inference_mode():
        run = train(start, 4)
        assert all(x.is_inference() for x in run.large)
    assert_same_bits([x.clone() for x in run.large], expected.large)


# Threads and processes.


def test_threads_do_not_disturb_each_other() -> None:
    updates, count = 40, 4
    starts = [make(seed=10 * i) for i in range(count)]
    expected = [[train_without_recycling(start, n).params[0] for n in range(1, updates + 1)] for start in starts]
    given_away: list[list[Tensor]] = [[] for _ in range(count)]
    faults: list[str] = []
    barrier = threading.Barrier(count)

    def work(place: int) -> None:
        try:
            barrier.wait(TIMEOUT)
            run = starts[place]
            for update in range(updates):
                run = run.next()
                if not torch.equal(run.params[0], expected[place][update]):
                    faults.append(f"run {place} is wrong after update {update}")
                # The neighbour drops what it gets, as may happen in any thread.
                given_away[(place + 1) % count].append(run.state.exp_avg[0])
                if update % 3 == 0:
                    given_away[place].clear()
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert faults == []


def run_in_fork(work: Callable[[], bool], time_limit: float = TIMEOUT) -> None:
    """Run in a child process, which must answer True within the time limit."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent are not here
            code = 0 if work() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + time_limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child process hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == 0


ignore_fork_warning = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")


@ignore_fork_warning
def test_parent_and_forked_child_do_not_disturb_each_other() -> None:
    run = train(make(), 4)
    before = [x.clone() for x in run.large]
    expected = [x.clone() for x in train(run, 6).large]

    def work() -> bool:
        child = train(run, 5)
        last = pointers(child)
        child = child.next()
        is_right = all(map(torch.equal, child.large, expected))
        is_recycled = sorted(pointers(child.next())) == sorted(last)
        for x in (*run.large, *child.large):
            x.fill_(float("nan"))
        del child
        empty_cache()
        return is_right and is_recycled and cached_bytes() == 0

    run_in_fork(work)
    assert_same_bits(run.large, before)
    assert_same_bits(train(run, 6).large, expected)


class Updates(torch.utils.data.Dataset[Tensor]):
    """Parameters after one update more than the place says."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __len__(self) -> int:
        return 3

    def __getitem__(self, place: int) -> Tensor:
        return train(self.run, place + 1).params[0]


@ignore_fork_warning
def test_results_leave_a_forked_worker_whole() -> None:
    run = train(make(), 3)
    expected = [train(run, n).params[0].clone() for n in (1, 2, 3)]
    loader = torch.utils.data.DataLoader(
        Updates(run), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=TIMEOUT
    )
    got = []
    for x in loader:
        got.append(x)
        train(run, 3)  # writes meanwhile
    assert_same_bits(got, expected)


# The bound.


def drop_generations(count: int = 6) -> int:
    """Keep many results and drop them at once; how many bytes one update writes."""
    runs = [make(leaves=2)]
    for _ in range(count):
        runs.append(runs[-1].next())
    return sum(x.nbytes for x in runs[-1].large)


def test_by_default_at_most_twice_the_largest_update_is_kept() -> None:
    generation = drop_generations()
    assert cached_bytes() == 2 * generation
    train(make(), 4)
    assert cached_bytes() <= 2 * generation


@pytest.mark.parametrize("generations", [0, 0.5, 1, 3])
def test_at_most_the_limit_is_kept(generations: float) -> None:
    generation = drop_generations()
    empty_cache()
    set_cache_limit(int(generations * generation))
    drop_generations()
    assert cached_bytes() == int(generations * generation)


def test_a_lower_limit_is_kept_at_once_and_none_restores_the_default() -> None:
    generation = drop_generations()
    set_cache_limit(generation)
    assert cached_bytes() == generation
    set_cache_limit(0)
    assert cached_bytes() == 0
    set_cache_limit(None)
    drop_generations()
    assert cached_bytes() == 2 * generation


def test_sizes_that_are_no_longer_used_give_way() -> None:
    train(make(), 4)
    small = train(make((COUNT + 16,)), 4)
    generation = sum(x.nbytes for x in small.large)
    for _ in range(4):
        small = train(small, 4)
    assert cached_bytes() >= generation
    before = pointers(small)
    small = small.next()
    assert not set(before) & set(pointers(small))
    assert set(before) == set(pointers(small.next()))


def test_results_from_before_a_limit_of_zero_are_not_kept() -> None:
    run = train(make(), 3)
    set_cache_limit(0)
    del run
    assert cached_bytes() == 0


def test_without_recycling_results_can_be_resized() -> None:
    set_cache_limit(0)
    run = make().next()
    assert cached_bytes() == 0
    assert run.params[0].resize_(2 * COUNT).shape == (2 * COUNT,)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"limit is -1\. Expected a number of bytes >= 0, or None"):
        set_cache_limit(-1)


def test_empty_cache_gives_all_back_and_results_stay() -> None:
    run = train(make(), 4)
    before = [x.clone() for x in run.large]
    assert cached_bytes() > 0
    empty_cache()
    assert cached_bytes() == 0
    assert_same_bits(run.large, before)
    assert_same_bits(train(run, 3), train_without_recycling(run, 3))


# Interrupts.


def survives_signals(handle: Callable[[], None], signals: int = 2000) -> bool:
    """Update while `handle` is called `signals` times, at random moments; whether the cache is right in the end."""
    generator, received, is_open = random.Random(0), 0, False
    large = [torch.zeros(COUNT + 16 * i) for i in (0, 1, 0, 2)]

    # What traces or counts this process has locks of its own, which no interrupt is to leave held.
    own_files = {recycling.__file__, __file__, weakref.__file__}

    def receive(_: int, frame: Any) -> None:
        nonlocal received, is_open
        received += 1
        if is_open and frame.f_code.co_filename in own_files:
            is_open = False  # the next timer may be set already
            handle()

    sys.unraisablehook = lambda _: None  # Python reports what a handler raises while a block comes back
    signal.signal(signal.SIGALRM, receive)
    while received < signals:
        try:
            is_open = True
            signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-6, 5e-4))
            for _ in range(4):
                recycling.copies(large)
            is_open = False
        except KeyboardInterrupt:
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    return is_right(large)


def is_right(large: list[Tensor]) -> bool:
    """Whether blocks are lent once, are bounded and counted, come back, and can be given back to the system."""
    first, second = recycling.copies(large), recycling.copies(large)
    pointers = {x.data_ptr() for x in first + second}
    values = [x.fill_(i) for i, x in enumerate(first + second)]
    are_apart = len(pointers) == 2 * len(large) and all((x == i).all() for i, x in enumerate(values))
    del first, second, values
    generation = sum(x.nbytes for x in large)
    is_counted = cached_bytes() == 2 * generation
    again = recycling.copies(large)
    is_recycled = {x.data_ptr() for x in again} <= pointers and cached_bytes() == generation
    empty_cache()
    return are_apart and is_counted and is_recycled and cached_bytes() == 0


@ignore_fork_warning
@pytest.mark.parametrize(
    "handle",
    [interrupt, empty_cache, lambda: set_cache_limit(None), lambda: recycling.copies([torch.zeros(COUNT)])],
    ids=["raise", "empty_cache", "set_cache_limit", "update"],
)
def test_signal_handlers_may_raise_and_use_the_cache_at_any_moment(handle: Callable[[], None]) -> None:
    run_in_fork(lambda: survives_signals(handle), time_limit=6 * TIMEOUT)


def is_of_the_cache(code: CodeType) -> bool:
    return code.co_filename == recycling.__file__


def survives_before_any_bytecode(action: str) -> bool:
    """Let `action` happen before each bytecode of the cache in turn; whether the cache is right after each."""
    sys.unraisablehook = lambda _: None
    large, trace, place, is_over = [torch.zeros(COUNT), torch.zeros(COUNT + 16)], sys.gettrace(), 0, True
    while is_over:
        empty_cache()
        others, held = [recycling.copies(large)], recycling.copies(large)
        actions = {
            "raise": interrupt,
            "empty_cache": empty_cache,
            "drop": others.clear,
            "update": lambda: recycling.copies(large),
        }
        interruption = Interruption(place, actions[action], is_of_the_cache)
        try:
            sys.settrace(interruption)
            held = recycling.copies(large)
            held = recycling.copies(large)
            set_cache_limit(large[0].nbytes)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(trace)
        set_cache_limit(None)
        del others, held
        if not is_right(large):
            return False
        place, is_over = place + 1, interruption.is_over
    return place > 100


@ignore_fork_warning
@pytest.mark.parametrize("action", ["raise", "empty_cache", "drop", "update"])
def test_whatever_comes_before_any_bytecode_leaves_the_cache_right(action: str) -> None:
    run_in_fork(lambda: survives_before_any_bytecode(action), time_limit=6 * TIMEOUT)


class Cycle:
    """Holds a result until a garbage collection, in which it makes another and collects again."""

    collected = 0

    def __init__(self, run: Run) -> None:
        self.run, self.itself = run, self

    def __del__(self) -> None:
        Cycle.collected += 1
        held = self.run.next()
        gc.collect()
        assert held.large


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_garbage_may_be_collected_in_the_middle_of_an_update() -> None:
    start = train(make(), 3)
    expected = train_without_recycling(start, 8)
    Cycle.collected = 0
    threshold, run = gc.get_threshold(), start
    try:
        gc.set_threshold(1)
        for _ in range(8):
            Cycle(run)
            run = run.next()
    finally:
        gc.set_threshold(*threshold)
    assert Cycle.collected > 0
    assert_same_bits(run, expected)


# Where it stays out of the way.


@pytest.fixture
def no_lending(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("memory was lent")

    monkeypatch.setattr(recycling._cache, "lend", refuse)


class Subclass(Tensor):
    """A tensor with a meaning of its own."""


@pytest.mark.usefixtures("no_lending")
def test_large_leaves_are_lent_memory() -> None:
    with pytest.raises(AssertionError, match="memory was lent"):
        make().next()


@pytest.mark.usefixtures("no_lending")
@pytest.mark.parametrize("leaves", [1, 300])
def test_small_leaves_are_not_recycled(leaves: int) -> None:
    train(make((100,), leaves=leaves), 2)
    assert cached_bytes() == 0


@pytest.mark.usefixtures("no_lending")
def test_tensor_subclasses_are_not_recycled() -> None:
    run = train(make(layout=lambda x: x.as_subclass(Subclass)), 2)
    assert type(run.state.exp_avg[0]) is Subclass


@pytest.mark.usefixtures("no_lending")
def test_fake_tensors_are_not_recycled() -> None:
    with FakeTensorMode():
        run = make()
        run = run._replace(state=run.state._replace(step=torch.zeros(())))
        assert train(run, 2).params[0].shape == (COUNT,)


@pytest.mark.usefixtures("no_lending")
def test_meta_tensors_are_not_recycled() -> None:
    run = make(layout=lambda x: x.to("meta"))
    assert train(run, 2).params[0].is_meta


@pytest.mark.usefixtures("no_lending")
def test_nothing_is_recycled_under_a_compiler() -> None:
    run = make()
    compiled = torch.compile(adam_update, backend="eager", fullgraph=True)
    assert compiled(*run)[0][0].shape == (COUNT,)


@pytest.mark.usefixtures("no_lending")
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_nothing_is_recycled_under_a_tracer(mode: str) -> None:
    run = make()
    graph = make_fx(lambda *trees: adam_update(*trees, HPARAMS), tracing_mode=mode)(*run[:3])
    assert graph(*run[:3])[0][0].shape == (COUNT,)


def test_a_child_of_a_fork_begins_with_an_empty_cache():
    run = make()
    for _ in range(3):
        run = run.next()
    kept = cached_bytes()
    assert kept > 0
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, str(cached_bytes()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert os.read(read, 64) == b"0"
    os.close(read)
    assert cached_bytes() == kept


def test_a_system_without_forks_recycles_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "register_at_fork")
    spec = importlib.util.find_spec("functional_adam.recycling")
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    large = torch.zeros(COUNT)
    (copied,) = again.copies([large])
    assert torch.equal(copied, large)
    assert again.cached_bytes() == 0
    del copied
    assert again.cached_bytes() == large.nbytes


def test_plain_tensors_in_fake_mode_are_left_to_it():
    large = torch.zeros(2 * COUNT)
    with FakeTensorMode(allow_non_fake_inputs=True):
        (copied,) = recycling.copies([large])
        assert isinstance(copied, FakeTensor)


def test_without_the_list_operation_small_leaves_are_copied_one_by_one(monkeypatch: pytest.MonkeyPatch):
    run = make((3,), leaves=2)
    expected = run.next().next()
    monkeypatch.setattr(recycling, "_foreach_clone", None)
    got = run.next().next()
    for ours, theirs in zip(got.large, expected.large, strict=True):
        assert torch.equal(ours, theirs)


def test_the_size_that_was_not_used_for_longest_goes_first():
    set_cache_limit(3 * 2**20)
    oldest, middle, newest = (2**20 + 4096 * i for i in range(3))
    for nbytes in (oldest, middle, newest):
        view, _ = recycling._cache.lend(nbytes)
        del view
    assert [nbytes for nbytes, blocks in recycling._cache._spare.items() if blocks] == [middle, newest]
    assert cached_bytes() == middle + newest
