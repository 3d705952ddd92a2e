"""Memory of large results serves later updates only after its last holder is gone, so that nobody can notice."""

import copy
import gc
import importlib
import importlib.util
import io
import multiprocessing
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

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

RECYCLING: Any = importlib.import_module("functional_adam.tensors.recycling")
copies: Callable[..., list[Tensor]] = RECYCLING.copies


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


def test_each_update_writes_to_the_memory_of_the_last_but_one_unless_that_is_kept() -> None:
    run = updated(make(leaves=3, hparams=AdamHparams(lr=0.1, amsgrad=True)))
    generation = sum(x.nbytes for x in large(run))
    assert len(large(run)) == 12
    run, before = updated(run), pointers(run)
    for _ in range(5):
        assert cached_bytes() == generation
        run, before, last_but_one = updated(run), pointers(run), before
        assert sorted(pointers(run)) == sorted(last_but_one)
    empty_cache()
    runs = [run]
    for _ in range(5):
        runs.append(updated(runs[-1]))
        assert cached_bytes() == 0
    every = [pointer for run in runs for pointer in pointers(run)]
    assert len(set(every)) == len(every)


# Memory that is held does not come back.

WEIGHT = torch.ones(COUNT, requires_grad=True)
# How memory is held, how its values are read, and whether it is the memory itself.
HOLDERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], bool]] = {
    "slice": (lambda x: (x[5:6], len(x)), lambda held: held[0].as_strided((held[1],), (1,), 0), True),
    "numpy_slice": (lambda x: x.numpy()[1:].reshape(-1, 1), lambda a: torch.from_numpy(a.base.ravel()), True),
    "memoryview": (lambda x: memoryview(x.numpy()), lambda m: torch.frombuffer(m, dtype=torch.float32), True),
    "dlpack": (torch.utils.dlpack.to_dlpack, torch.utils.dlpack.from_dlpack, True),
    "storage": (Tensor.untyped_storage, lambda s: torch.empty(0).set_(s, 0, (s.nbytes() // 4,)), True),
    "data_of_another": (lambda x: torch.nn.Parameter(torch.zeros(1)).data.set_(x), lambda x: x, True),
    "saved_graph": (lambda x: (x * WEIGHT).sum(), lambda loss: torch.autograd.grad(loss, WEIGHT)[0], True),
    "cycle": (lambda x: (cycle := [x]).append(cycle) or cycle, lambda cycle: cycle[0], True),
    "shared_memory": (Tensor.share_memory_, lambda x: x, False),
    "deep_copy": (copy.deepcopy, lambda x: x, False),
}


@pytest.mark.parametrize(("hold", "read", "is_held"), HOLDERS.values(), ids=HOLDERS)
def test_memory_keeps_its_values_while_it_is_held_and_comes_back_afterwards(
    hold: Callable[[Tensor], Any], read: Callable[[Any], Tensor], is_held: bool
) -> None:
    run = train(make(), 3)
    expected, pointer = param_of(run).clone(), param_of(run).data_ptr()
    held = hold(param_of(run))
    for _ in range(4):
        run = updated(run)
        assert not is_held or pointer not in pointers(run)
    assert torch.equal(read(held), expected)
    if is_held:
        del held
        gc.collect()
        run = updated(run)
        assert pointer in pointers(run) + pointers(updated(run))


def test_a_differentiated_update_keeps_what_its_backward_reads() -> None:
    def meta_gradient() -> Tensor:
        lr = torch.tensor(0.1, requires_grad=True)
        run = train(start._replace(hparams=AdamHparams(lr=lr)), 4)
        train(make(seed=5), 4)  # others write meanwhile
        return torch.autograd.grad((param_of(run) ** 2).sum(), lr)[0]

    start = train_without_recycling(make(), 2)
    found = [meta_gradient() for _ in range(3)]
    set_cache_limit(0)
    assert_same_bits(found, [meta_gradient()] * 3)


# Programs.


ACTIONS = ("update", "update", "update", "donate", "keep", "drop", "view", "mutate", "mutate_current", "graph", "other")
programs = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 20)), min_size=4, max_size=16)
START, OTHER = make(leaves=2), make((2, COUNT // 2), seed=50)


def execute(program: list[tuple[str, int]]) -> list[list[Tensor]]:
    """All values that the program can see, after each of its lines."""
    run, other = clone(START), clone(OTHER)
    kept: list[Tensor] = []
    graphs: list[Tensor] = []
    seen: list[list[Tensor]] = []
    for action, place in program:
        if action in ("update", "donate"):
            # What is kept may be the donated memory: it then changes, as without recycling.
            run = updated(run, donate=action == "donate")
        elif action == "other":
            other = updated(other)
        elif action == "graph":
            graphs.append(((param_of(run).clone() if place % 2 else param_of(run).abs()) * WEIGHT).sum())
        elif action == "keep":
            kept.append(large(run)[place % 6])
        elif action == "view":
            kept.append(large(run)[place % 6][place : COUNT // 2].detach())
        elif action == "mutate_current":
            large(run)[place % 6].mul_(0.5)
        elif action == "mutate" and kept:
            kept[place % len(kept)].add_(1)
        elif action == "drop" and kept:
            del kept[place % len(kept)]
        seen.append([x.clone() for x in (*large(run), *large(other), *kept)])
    return [*seen, *([torch.autograd.grad(graph, WEIGHT)[0]] for graph in graphs)]


@PROPERTY
@given(programs)
def test_no_program_can_notice(program: list[tuple[str, int]]) -> None:
    set_cache_limit(0)
    expected = execute(program)
    set_cache_limit(None)
    for _ in range(2):  # the second time in memory that is warm from the beginning
        assert_same_bits(execute(program), expected)


# Results look as if torch had allocated them.

LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((4, 8, 33, 33), Tensor.clone),
    "channels_last": ((4, 8, 33, 33), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "transposed": ((129, 257), transposed),
    "strided": ((129, 257), strided),
    "size_one": ((1, 129, 1, 257), lambda x: x.as_strided(x.shape, (7, 257, 3, 1))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
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


def test_results_can_be_trained_mutated_and_saved_and_are_inference_tensors_where_they_should() -> None:
    start = make()
    expected = train_without_recycling(start, 4)
    with torch.inference_mode():
        run = train(start, 4)
        assert all(x.is_inference() for x in large(run))
        assert_same_bits(large(run), large(expected))
    param, file = param_of(train(start, 4)), io.BytesIO()
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


# Processes.


def run_in_fork(work: Callable[[], bool]) -> None:
    """Run in a child process, which must answer True within the time limit."""

    def run() -> None:
        torch.set_num_threads(1)  # the threads of the parent are not here
        os._exit(0 if work() else 2)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(TIMEOUT)
    child.kill()  # if it hangs
    child.join()
    assert child.exitcode == 0


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
        child = train(run, 6)
        is_same = all(map(torch.equal, large(child), expected))
        for x in (*large(run), *large(child)):
            x.fill_(float("nan"))
        empty_cache()
        return begins_empty and is_same and is_right([torch.zeros(COUNT)])

    run_in_fork(work)
    assert cached_bytes() == kept > 0
    assert_same_bits(large(run), before)
    assert_same_bits(large(train(run, 6)), expected)


# The bound.


def drop_generations(count: int = 6) -> int:
    """Keep many results and drop them at once; how many bytes one update writes."""
    runs = [make(leaves=2)]
    for _ in range(count):
        runs.append(updated(runs[-1]))
    return sum(x.nbytes for x in large(runs[-1]))


def test_at_most_the_limit_is_kept_and_by_default_twice_the_largest_update() -> None:
    generation = drop_generations()
    assert cached_bytes() == 2 * generation
    train(make(), 4)
    assert cached_bytes() <= 2 * generation
    for limit in (0, generation // 2, 3 * generation):
        set_cache_limit(None)
        drop_generations()
        assert cached_bytes() == 2 * generation
        set_cache_limit(limit)
        assert cached_bytes() == min(limit, 2 * generation)  # at once
        empty_cache()
        drop_generations()
        assert cached_bytes() == limit
    with pytest.raises(ValueError, match=r"limit is -1\. Expected a number of bytes >= 0, or None"):
        set_cache_limit(-1)


def test_the_size_that_was_not_used_for_longest_goes_first() -> None:
    first, second, third = (torch.zeros(COUNT + 1024 * i) for i in range(3))
    set_cache_limit(3 * first.nbytes)
    for x in (first, second, first, third):
        copies([x])
    assert cached_bytes() == first.nbytes + third.nbytes


def test_emptied_or_without_recycling_nothing_is_kept_and_results_stay() -> None:
    run = train(make(), 4)
    before = clone(run)
    assert cached_bytes() > 0
    empty_cache()
    assert cached_bytes() == 0
    assert_same_bits(run, before)
    assert_same_bits(train(run, 3), train_without_recycling(run, 3))
    set_cache_limit(0)
    run = updated(run)
    assert cached_bytes() == 0
    assert param_of(run).resize_(2 * COUNT).shape == (2 * COUNT,)


# Interrupts: what a signal handler or a finalizer does, or raises, anywhere in the part of an update that takes memory.

FILES = {RECYCLING.__file__, weakref.__file__}


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


def survives_before_any_bytecode(action: str) -> bool:
    """Let `action` happen before each bytecode of the cache in turn; whether the cache is right after each."""
    sys.unraisablehook = lambda _: None  # Python reports what is raised while a block comes back
    large, trace, place, is_over = [torch.zeros(COUNT), torch.zeros(COUNT + 16)], sys.gettrace(), 0, True
    while is_over:
        empty_cache()
        others, held = [copies(large)], copies(large)
        copies(large[:1])  # one block waits: then one is taken, and one is made
        actions = {
            "raise": interrupt,
            "limit": lambda: [empty_cache(), set_cache_limit(None)],
            "drop": others.clear,
            "update": partial(copies, large),
        }
        interruption = Interruption(place, actions[action], lambda code: code.co_filename in FILES)
        try:
            sys.settrace(interruption)
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
@pytest.mark.parametrize("action", ["raise", "limit", "drop", "update"])
def test_whatever_comes_before_any_bytecode_leaves_the_cache_right(action: str) -> None:
    run_in_fork(lambda: survives_before_any_bytecode(action))


# Where it stays out of the way.


class Subclass(Tensor):
    """A tensor with a meaning of its own."""


def in_fake_mode() -> Tensor:
    plain = torch.zeros(COUNT)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(param_of(train(make(), 2))) is FakeTensor
        return copies([plain])[0]


def compiled() -> Tensor:
    return torch.compile(adam_update, backend="eager", fullgraph=True)(*make())[0]["leaf0"]


def traced() -> Tensor:
    run = make()
    graph = make_fx(lambda *trees: adam_update(*trees, run.hparams), tracing_mode="fake")(*run[:3])
    return graph(*run[:3])[0]["leaf0"]


ELSEWHERE: dict[str, tuple[Callable[[], Tensor], type[Tensor]]] = {
    "small": (lambda: param_of(train(make((100,), leaves=300), 2)), Tensor),
    "subclass": (lambda: param_of(train(make(layout=lambda x: x.as_subclass(Subclass)), 2)), Subclass),
    "meta": (lambda: param_of(train(make(layout=lambda x: x.to("meta")), 2)), Tensor),
    "fake": (in_fake_mode, FakeTensor),
    "compiled": (compiled, Tensor),
    "traced": (traced, Tensor),
}


@pytest.mark.usefixtures("fresh_compiler")
def test_memory_of_its_own_is_for_large_plain_results_alone() -> None:
    # Garbage of earlier tests may hold blocks, and finalizers that make updates of their own.
    gc.collect()
    empty_cache()
    for name, (update, kind) in ELSEWHERE.items():
        assert type(update()) is kind, name
        gc.collect()
        assert cached_bytes() == 0, name
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
