"""Memory of large results serves later updates only after its last holder is gone, so that nobody can notice."""

import copy
import gc
import importlib
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
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from functional_adam import AdamHparams, adam_update
from functional_adam.recycling import cached_bytes, empty_cache, set_cache_limit
from tests.builders import Call, assert_same_bits, clone, make_call, strided, tensors_of, transposed
from tests.interruptions import Interruption, interrupt
from tests.strategies import PROPERTY

COUNT = 2**15 + 16  # of float32: a little more than what is recycled
TIMEOUT = 20.0  # seconds, where a fault would wait for ever

# What is interrupted before each bytecode is the part of an update that takes memory, and nothing else of it.
RECYCLING: Any = importlib.import_module("functional_adam.tensors.recycling")
copies, CODE = RECYCLING.copies, RECYCLING.__file__


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    set_cache_limit(None)
    empty_cache()
    yield
    set_cache_limit(None)
    empty_cache()


def make(shape: tuple[int, ...] = (COUNT,), *, leaves: int = 1, **options: Any) -> Call:
    return make_call([shape] * leaves, **options)


def updated(run: Call, **options: Any) -> Call:
    params, state = adam_update(*run, **options)
    return run._replace(params=params, state=state)


def train(run: Call, updates: int) -> Call:
    for _ in range(updates):
        run = updated(run)
    return run


def train_without_recycling(run: Call, updates: int) -> Call:
    set_cache_limit(0)
    run = train(run, updates)
    set_cache_limit(None)
    return run


def large(run: Call) -> list[Tensor]:
    """The tensors that an update replaces, steps aside."""
    return tensors_of((run.params, run.state[1:]))


def pointers(run: Call) -> list[int]:
    return [x.data_ptr() for x in large(run)]


def param_of(run: Call) -> Tensor:
    return run.params["leaf0"]


# Memory comes back.


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("leaves", [1, 3])
def test_each_update_writes_to_the_memory_of_the_last_but_one(leaves: int, amsgrad: bool) -> None:
    run = updated(make(leaves=leaves, hparams=AdamHparams(lr=0.1, amsgrad=amsgrad)))
    generation = sum(x.nbytes for x in large(run))
    assert len(large(run)) == leaves * (4 if amsgrad else 3)
    run, before = updated(run), pointers(run)
    for _ in range(5):
        assert cached_bytes() == generation
        run, before, last_but_one = updated(run), pointers(run), before
        assert sorted(pointers(run)) == sorted(last_but_one)
    assert cached_bytes() == generation


def test_what_is_kept_costs_fresh_memory() -> None:
    runs = [make()]
    for _ in range(5):
        runs.append(updated(runs[-1]))
        assert cached_bytes() == 0
    every = [pointer for run in runs for pointer in pointers(run)]
    assert len(set(every)) == len(every)


# Memory that is held does not come back.

WEIGHT = torch.ones(COUNT, requires_grad=True)
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
    "saved_graph": (lambda x: (x * WEIGHT).sum(), lambda loss: torch.autograd.grad(loss, WEIGHT)[0]),
    "cycle": (lambda x: (cycle := [x]).append(cycle) or cycle, lambda cycle: cycle[0]),
}
COPIES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "shared_memory": (Tensor.share_memory_, lambda x: x),
    "pickle": (pickle.dumps, pickle.loads),
    "deep_copy": (copy.deepcopy, lambda x: x),
}


@pytest.mark.parametrize("name", [*HOLDERS, *COPIES])
def test_memory_keeps_its_values_while_it_is_held_and_comes_back_afterwards(name: str) -> None:
    hold, read = {**HOLDERS, **COPIES}[name]
    run = train(make(), 3)
    expected, pointer = param_of(run).clone(), param_of(run).data_ptr()
    held = hold(param_of(run))
    for _ in range(6):
        run = updated(run)
        assert name in COPIES or pointer not in pointers(run)
    assert torch.equal(read(held), expected)
    if name in HOLDERS:
        del held
        gc.collect()
        run = updated(run)
        assert pointer in pointers(run) + pointers(updated(run))


def test_a_differentiated_update_keeps_what_its_backward_reads() -> None:
    def meta_gradient(run: Call) -> Tensor:
        lr = torch.tensor(0.1, requires_grad=True)
        run = train(run._replace(hparams=AdamHparams(lr=lr)), 4)
        train(make(seed=5), 4)  # others write meanwhile
        return torch.autograd.grad((param_of(run) ** 2).sum(), lr)[0]

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


START, OTHER = make(leaves=2), make((2, COUNT // 2), seed=50)


def execute(program: list[Step]) -> list[list[Tensor]]:
    """All values that the program can see, after each of its lines."""
    run, other = clone(START), clone(OTHER)
    kept: list[Tensor] = []
    graphs: list[Tensor] = []
    seen: list[list[Tensor]] = []
    for action, place in program:
        if action == "update":
            run = updated(run)
        elif action == "donate":
            # What is kept may be the donated memory: it then changes, as without recycling.
            run = updated(run, donate=True)
        elif action == "keep":
            kept.append(large(run)[place % len(large(run))])
        elif action == "view":
            kept.append(large(run)[place % len(large(run))][place : COUNT // 2].detach())
        elif action == "drop" and kept:
            del kept[place % len(kept)]
        elif action == "mutate" and kept:
            kept[place % len(kept)].add_(1)
        elif action == "mutate_current":
            large(run)[place % len(large(run))].mul_(0.5)
        elif action == "graph":
            graphs.append((param_of(run).clone() * WEIGHT).sum() if place % 2 else (param_of(run).abs() * WEIGHT).sum())
        elif action == "other":
            other = updated(other)
        seen.append([x.clone() for x in (*large(run), *large(other), *kept)])
    return [*seen, *([torch.autograd.grad(graph, WEIGHT)[0]] for graph in graphs)]


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
    "transposed": ((129, 257), transposed),
    "strided": ((129, 257), strided),
    "size_one": ((1, 129, 1, 257), lambda x: x.as_strided(x.shape, (7, 257, 3, 1))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_look_freshly_allocated(layout: str, dtype: torch.dtype) -> None:
    shape, arrange = LAYOUTS[layout]
    shape = (2 * shape[0], *shape[1:]) if dtype.itemsize == 2 else shape
    start = make(shape, dtype=dtype, hparams=AdamHparams(lr=0.1, amsgrad=True), layout=arrange)
    expected = train_without_recycling(start, 4)
    run = train(start, 4)
    assert cached_bytes() > 0
    assert_same_bits(run, expected)
    for got, old in zip(large(run), large(expected), strict=True):
        assert got.stride() == old.stride()
        assert not got._is_view()
        assert got.storage_offset() == 0
        assert got.untyped_storage().nbytes() == got.nbytes
        assert got.data_ptr() % 64 == 0
        assert got.is_leaf
        assert not got.requires_grad
    assert len({x.untyped_storage().data_ptr() for x in large(run)}) == len(large(run))


def test_results_can_be_trained_mutated_and_saved() -> None:
    param = param_of(train(make(), 4))
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
        assert all(x.is_inference() for x in large(run))
    assert_same_bits([x.clone() for x in large(run)], large(expected))


# Threads and processes.


def test_threads_do_not_disturb_each_other() -> None:
    updates, count = 40, 4
    starts = [make(seed=10 * i) for i in range(count)]
    expected = [[param_of(train_without_recycling(start, n + 1)) for n in range(updates)] for start in starts]
    given_away: list[list[Tensor]] = [[] for _ in range(count)]
    faults: list[str] = []
    barrier = threading.Barrier(count)

    def work(place: int) -> None:
        barrier.wait(TIMEOUT)
        run = starts[place]
        for update in range(updates):
            run = updated(run)
            if not torch.equal(param_of(run), expected[place][update]):
                faults.append(f"run {place} is wrong after update {update}")
            # The neighbour drops what it gets, as may happen in any thread.
            given_away[(place + 1) % count].append(run.state.exp_avg["leaf0"])
            if update % 3 == 0:
                given_away[place].clear()

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
    before = [x.clone() for x in large(run)]
    expected = [x.clone() for x in large(train(run, 6))]
    kept = cached_bytes()

    def work() -> bool:
        # Else the parent would copy the pages that it writes, for a child that may have no use for them.
        begins_empty = cached_bytes() == 0
        child = train(run, 5)
        last = pointers(child)
        child = updated(child)
        is_right = all(map(torch.equal, large(child), expected))
        is_recycled = sorted(pointers(updated(child))) == sorted(last)
        for x in (*large(run), *large(child)):
            x.fill_(float("nan"))
        del child
        empty_cache()
        return begins_empty and is_right and is_recycled and cached_bytes() == 0

    run_in_fork(work)
    assert cached_bytes() == kept > 0
    assert_same_bits(large(run), before)
    assert_same_bits(large(train(run, 6)), expected)


@ignore_fork_warning
def test_results_leave_a_forked_worker_whole() -> None:
    run = train(make(), 3)
    expected = [param_of(train(run, n)).clone() for n in (1, 2, 3)]
    loader: Any = torch.utils.data.DataLoader(
        [1, 2, 3],
        batch_size=None,
        collate_fn=lambda n: param_of(train(run, n)),
        num_workers=1,
        multiprocessing_context="fork",
        timeout=TIMEOUT,
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
        runs.append(updated(runs[-1]))
    return sum(x.nbytes for x in large(runs[-1]))


def test_by_default_at_most_twice_the_largest_update_is_kept() -> None:
    generation = drop_generations()
    assert cached_bytes() == 2 * generation
    train(make(), 4)
    assert cached_bytes() <= 2 * generation


@pytest.mark.parametrize("generations", [0, 0.5, 1, 3])
def test_at_most_the_limit_is_kept(generations: float) -> None:
    generation = drop_generations()
    limit = int(generations * generation)
    set_cache_limit(limit)
    assert cached_bytes() == min(limit, 2 * generation)  # at once
    empty_cache()
    drop_generations()
    assert cached_bytes() == limit
    set_cache_limit(None)
    drop_generations()
    assert cached_bytes() == 2 * generation


def test_the_size_that_was_not_used_for_longest_goes_first() -> None:
    first, second, third = (torch.zeros(COUNT + 1024 * i) for i in range(3))
    set_cache_limit(3 * first.nbytes)
    for x in (first, second, first, third):
        copies([x])
    assert cached_bytes() == first.nbytes + third.nbytes


def test_sizes_that_are_no_longer_used_give_way() -> None:
    train(make(), 4)
    small = train(make((COUNT + 16,)), 4)
    generation = sum(x.nbytes for x in large(small))
    small = train(small, 16)
    assert cached_bytes() >= generation
    before = pointers(small)
    small = updated(small)
    assert not set(before) & set(pointers(small))
    assert set(before) == set(pointers(updated(small)))


def test_without_recycling_results_are_not_kept_and_can_be_resized() -> None:
    run = train(make(), 3)
    set_cache_limit(0)
    del run
    assert cached_bytes() == 0
    run = updated(make())
    assert cached_bytes() == 0
    assert param_of(run).resize_(2 * COUNT).shape == (2 * COUNT,)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"limit is -1\. Expected a number of bytes >= 0, or None"):
        set_cache_limit(-1)


def test_empty_cache_gives_all_back_and_results_stay() -> None:
    run = train(make(), 4)
    before = [x.clone() for x in large(run)]
    assert cached_bytes() > 0
    empty_cache()
    assert cached_bytes() == 0
    assert_same_bits(large(run), before)
    assert_same_bits(train(run, 3), train_without_recycling(run, 3))


# Interrupts.


def survives_signals(handle: Callable[[], None], signals: int = 1000) -> bool:
    """Update while `handle` is called `signals` times, at random moments; whether the cache is right in the end."""
    generator, received, is_open = random.Random(0), 0, False
    large = [torch.zeros(COUNT + 16 * i) for i in (0, 1, 0, 2)]

    # What traces or counts this process has locks of its own, which no interrupt is to leave held.
    own_files = {CODE, __file__, weakref.__file__}

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
                copies(large)
            is_open = False
        except KeyboardInterrupt:
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    return is_right(large)


def is_right(large: list[Tensor]) -> bool:
    """Whether blocks are lent once, are bounded and counted, come back, and can be given back to the system."""
    first, second = copies(large), copies(large)
    pointers = {x.data_ptr() for x in first + second}
    values = [x.fill_(i) for i, x in enumerate(first + second)]
    are_apart = len(pointers) == 2 * len(large) and all((x == i).all() for i, x in enumerate(values))
    del first, second, values
    generation = sum(x.nbytes for x in large)
    is_counted = cached_bytes() == 2 * generation
    again = copies(large)
    is_recycled = {x.data_ptr() for x in again} <= pointers and cached_bytes() == generation
    empty_cache()
    return are_apart and is_counted and is_recycled and cached_bytes() == 0


@ignore_fork_warning
@pytest.mark.parametrize(
    "handle",
    [interrupt, empty_cache, lambda: set_cache_limit(None), lambda: copies([torch.zeros(COUNT)])],
    ids=["raise", "empty_cache", "set_cache_limit", "update"],
)
def test_signal_handlers_may_raise_and_use_the_cache_at_any_moment(handle: Callable[[], None]) -> None:
    run_in_fork(lambda: survives_signals(handle), time_limit=6 * TIMEOUT)


def survives_before_any_bytecode(action: str) -> bool:
    """Let `action` happen before each bytecode of the cache in turn; whether the cache is right after each."""
    sys.unraisablehook = lambda _: None
    large, trace, place, is_over = [torch.zeros(COUNT), torch.zeros(COUNT + 16)], sys.gettrace(), 0, True
    while is_over:
        empty_cache()
        others, held = [copies(large)], copies(large)
        actions = {
            "raise": interrupt,
            "empty_cache": empty_cache,
            "drop": others.clear,
            "update": lambda: copies(large),
        }
        interruption = Interruption(place, actions[action], lambda code: code.co_filename == CODE)
        try:
            sys.settrace(interruption)
            held = copies(large)
            held = copies(large)
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

    def __init__(self, run: Call) -> None:
        self.run, self.itself = run, self

    def __del__(self) -> None:
        Cycle.collected += 1
        held = updated(self.run)
        gc.collect()
        assert large(held)


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
            run = updated(run)
    finally:
        gc.set_threshold(*threshold)
    assert Cycle.collected > 0
    assert_same_bits(run, expected)


# Where it stays out of the way.


class Subclass(Tensor):
    """A tensor with a meaning of its own."""


def in_fake_mode() -> Tensor:
    with FakeTensorMode():
        return param_of(train(make(), 2))


def of_plain_tensor_in_fake_mode() -> Tensor:
    plain = torch.zeros(COUNT)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return copies([plain])[0]


def compiled() -> Tensor:
    return torch.compile(adam_update, backend="eager", fullgraph=True)(*make())[0]["leaf0"]


def traced(mode: str) -> Tensor:
    run = make()
    graph = make_fx(lambda *trees: adam_update(*trees, run.hparams), tracing_mode=mode)(*run[:3])
    return graph(*run[:3])[0]["leaf0"]


ELSEWHERE: dict[str, tuple[Callable[[], Tensor], type[Tensor]]] = {
    "small": (lambda: param_of(train(make((100,)), 2)), Tensor),
    "many_small": (lambda: param_of(train(make((100,), leaves=300), 2)), Tensor),
    "subclass": (lambda: param_of(train(make(layout=lambda x: x.as_subclass(Subclass)), 2)), Subclass),
    "meta": (lambda: param_of(train(make(layout=lambda x: x.to("meta")), 2)), Tensor),
    "fake": (in_fake_mode, FakeTensor),
    "plain_in_fake_mode": (of_plain_tensor_in_fake_mode, FakeTensor),
    "compiled": (compiled, Tensor),
    "traced_real": (lambda: traced("real"), Tensor),
    "traced_fake": (lambda: traced("fake"), Tensor),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_memory_of_its_own_is_for_large_plain_results_alone(name: str) -> None:
    update, kind = ELSEWHERE[name]
    # Garbage of earlier tests may hold blocks, and finalizers that make updates of their own.
    gc.collect()
    empty_cache()
    assert type(update()) is kind
    gc.collect()
    assert cached_bytes() == 0
    updated(make())
    assert cached_bytes() > 0


def test_a_system_without_forks_and_a_torch_without_the_list_operation_recycle_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "register_at_fork")
    monkeypatch.delattr(torch, "_foreach_clone")
    spec = importlib.util.find_spec(RECYCLING.__name__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    tensors = [torch.rand(COUNT), torch.rand(3)]
    copied = again.copies(tensors)
    assert_same_bits(copied, tensors)
    assert_same_bits(again.copies(tensors[1:], largest=0), tensors[1:])
    assert again.cached_bytes() == 0
    del copied
    assert again.cached_bytes() == tensors[0].nbytes
