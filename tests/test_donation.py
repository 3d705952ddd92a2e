"""Donation gives the same bits in the same memory, and refuses whatever would make that unsafe."""

import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import (
    KERNELS_AND_AUTO,
    Call,
    assert_same_bits,
    assert_unchanged,
    clone,
    make_call,
    snapshot,
    strided,
    tensors_of,
    transposed,
)
from tests.oracles import KERNELS
from tests.strategies import PROPERTY
from tests.test_cuda_path import Recorder

HPARAMS = AdamHparams(lr=0.1, weight_decay=0.1, amsgrad=True)
SHAPES = ((5, 7), (7,), (2, 3, 4, 5), ())

each_kernel = pytest.mark.parametrize("kernel", KERNELS_AND_AUTO)
make = partial(make_call, SHAPES, hparams=HPARAMS)


def places(tree: Any) -> list[Any]:
    return [(x.data_ptr(), x.stride()) for x in tensors_of(tree)]


def donate(call: Call, **options: Any) -> tuple[Any, AdamState]:
    """Donate and return what comes back: the bits of the pure update in the old memory, and autograd is told."""
    params, _, state, _ = call
    expected = adam_update(*call, **options)
    before, old_steps, buffers = places((params, state)), tensors_of(state.step), tensors_of((params, state[1:]))
    versions = [x._version for x in buffers]
    got = adam_update(*call, donate=True, **options)
    assert torch_pytree.tree_structure(got) == torch_pytree.tree_structure(expected)
    assert_same_bits(got, expected)
    assert places(got) == before
    assert all(x._version > version for x, version in zip(buffers, versions, strict=True))
    # The new step is a fresh object on the memory of the old one, which is emptied.
    assert [x.numel() for x in old_steps] == [0] * len(old_steps)
    return got


# Same bits, same memory.

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"grad_scale": torch.tensor(8.0)},
    {"found_inf": torch.tensor(1.0)},
    {"found_inf": torch.tensor(0.0), "grad_scale": 2.0},
)


@each_kernel
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_donations_in_a_row_give_the_same_bits_in_the_same_memory(kernel: str, per_leaf_step: bool) -> None:
    call = make(per_leaf_step=per_leaf_step)
    for options in OPTIONS:
        params, state = donate(call, kernel=kernel, **options)
        call = call._replace(params=params, state=state)


@each_kernel
def test_backward_notices_stale_values_and_takes_returned_ones(kernel: str) -> None:
    call = make()
    saved = [tree["leaf0"] for tree in (call.params, *call.state[1:4])]
    products = [(torch.ones_like(x, requires_grad=True) * x).sum() for x in saved]
    params, _ = adam_update(*call, kernel=kernel, donate=True)
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    x = torch.ones_like(params["leaf0"], requires_grad=True)
    (x * params["leaf0"]).sum().backward()
    assert torch.equal(x.grad, params["leaf0"])


# Nothing that is tracked is donated.


@pytest.mark.parametrize(
    "which", ["params", "grads", "state", "lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale"]
)
def test_what_requires_grad_is_not_donated(which: str) -> None:
    names = ("lr", "eps", "weight_decay", "beta1", "beta2", "grad_scale")
    numbers = {name: torch.tensor(0.5, requires_grad=name == which) for name in names}
    betas, scale = (numbers.pop("beta1"), numbers.pop("beta2")), numbers.pop("grad_scale")
    call = make(hparams=AdamHparams(**numbers, betas=betas, amsgrad=True))
    trees = {"params": call.params, "grads": call.grads, "state": call.state.exp_avg_sq}
    if which in trees:
        trees[which]["leaf1"].requires_grad_()
    before = snapshot(call[:3])
    with pytest.raises(RuntimeError, match="Cannot donate: the update is watched by autograd"):
        adam_update(*call, donate=True, grad_scale=scale)
    assert_unchanged(call[:3], before)


def in_dual_level(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        run(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS: tuple[Callable[[Callable[[Tensor], Tensor], Tensor], Any], ...] = (
    lambda run, x: torch.func.grad(lambda y: run(y).sum())(x),
    lambda run, x: torch.func.vmap(run)(x.expand(2, *x.shape)),
    lambda run, x: torch.func.jvp(run, (x,), (x,)),
    in_dual_level,
)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["grad", "vmap", "jvp", "dual level"])
def test_nothing_is_donated_under_a_transform(transform: Callable[..., Any]) -> None:
    call = make()
    before = snapshot(call[:3])
    for change in (lambda x: {**call.grads, "leaf0": x}, lambda _: call.grads):

        def run(x: Tensor, change: Callable[[Tensor], Any] = change) -> Tensor:
            return adam_update(*call._replace(grads=change(x)), donate=True)[0]["leaf0"] * x

        refused = pytest.raises(RuntimeError, match=r"Cannot donate: the update is watched by a torch\.func")
        with torch.no_grad(), refused:
            transform(run, call.grads["leaf0"])
    assert_unchanged(call[:3], before)


# Memory that somebody else in the call uses is not donated.


def call_on(params: Any, grads: Any = None, hparams: AdamHparams | None = None, **fields: Any) -> Call:
    """A call with `fields` in the place of those that `adam_init` makes."""
    hparams = hparams or AdamHparams()
    grads = torch_pytree.tree_map(torch.ones_like, params) if grads is None else grads
    return Call(params, grads, adam_init(params, AdamHparams())._replace(**fields), hparams)


def call_with(written: Sequence[Tensor], read: Sequence[Tensor]) -> Call:
    """Parameters `written`, and then others, whose gradients are `read`."""
    others = [torch.zeros(x.shape, dtype=x.dtype) for x in read]
    return call_on([*written, *others], [*(torch.ones(x.shape, dtype=x.dtype) for x in written), *read])


def complex_of(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(6, 2))


# What is made of 12 numbers between 0 and 1, and the two tensors that the error names. Places and strides of any kind
# are drawn below.
OVERLAPS: dict[str, tuple[Callable[[Tensor], Call], str]] = {
    "parameter twice": (lambda x: call_on([x, x]), r"params\[0\]: .*params\[1\]"),
    "conjugate": (lambda x: call_on([complex_of(x), complex_of(x).conj()]), r"params\[0\]: .*params\[1\]"),
    "gradient": (lambda x: call_on(x, x), "params: .*grads"),
    "part of a gradient": (lambda x: call_on(x[:7], x[5:]), "params: .*grads"),
    "parameter as moment": (lambda x: call_on(x, exp_avg=x), "params: .*state.exp_avg,"),
    "gradient as moment": (lambda x: call_on(x, m := torch.zeros(12), exp_avg_sq=m), "state.exp_avg_sq: .*grads"),
    "moments": (lambda x: call_on(x, exp_avg=(m := torch.zeros(12)), exp_avg_sq=m), r"state.exp_avg: .*avg_sq"),
    "step": (lambda x: call_on(x, step=x[3]), "params: .*state.step"),
    "steps": (lambda x: call_on([x, x + 1], step=[s := torch.ones(()), s]), r"state.step\[0\]: .*state.step\[1\]"),
    "expanded": (lambda x: call_on(x[:1].expand(6)), "params: it overlaps itself"),
    "expanded moment": (lambda x: call_on(x, exp_avg=torch.zeros(()).expand(12)), "state.exp_avg: it overlaps itself"),
    "number": (lambda x: call_on(x, hparams=AdamHparams(lr=x[2])), "params: .*a hyperparameter"),
    "number in a tree": (lambda x: call_on([x], hparams=AdamHparams(eps=[x[2]])), r"params\[0\]: .*a hyperparameter"),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_memory_with_two_uses_is_not_donated(overlap: str) -> None:
    make_overlap, names = OVERLAPS[overlap]
    call = make_overlap(torch.linspace(0.1, 0.9, 12))
    before = snapshot(call[:3])
    for kernel in KERNELS_AND_AUTO:
        with pytest.raises(RuntimeError, match=f"Cannot donate {names}.*Clone"):
            adam_update(*call, kernel=kernel, donate=True)
        # Purely, the same arguments are as good as copies of them.
        got, expected = adam_update(*call, kernel=kernel), adam_update(*clone(call), kernel=kernel)
        torch.testing.assert_close(tensors_of(got), tensors_of(expected))
        assert_unchanged(call[:3], before)


PIECES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "rows": lambda w: [*w.split(10)],
    "columns": lambda w: [*w.split(32, dim=1)],
    "columns from several rows on": lambda w: [w[i : 60 + i, 24 * i : 24 * i + 24] for i in (2, 0, 3, 1)],
    "tiles": lambda w: [tile for rows in w.split(20) for tile in rows.split(36, dim=1)],
    "tiles beside a column": lambda w: [w[:, :10], w[:20, 10:50], w[20:50, 20:60], w[50:, 10:]],
    "bricks beside a column": lambda w: [w[:, 90:], w[:20, :30], w[:20, 40:70], w[20:40, 20:50]],
    "columns of heads": lambda w: [x for y in w.view(4, 3, 16, 32).unbind(1) for x in y.split(20, dim=2)],
    "checkerboard": lambda w: [w[i::2, j::2] for i in range(2) for j in range(2)],
    "real and imaginary parts": lambda w: [*torch.view_as_real(torch.view_as_complex(w.view(-1, 2))).unbind(-1)],
    "transposed": lambda w: [*w.t().split(20)],
    "flat buffer": lambda w: [w.view(-1)[:6].view(2, 3), w.view(-1)[6], w.view(-1)[7:]],
    # Strides (3, 2) on shape (2, 2) reach 0, 2, 3 and 5: no element twice, although the rows interleave.
    "interleaved strides": lambda w: [w.as_strided((2, 2), (3, 2)), w.as_strided((2,), (3,), 1)],
    "diagonals": lambda w: [w.diagonal(), w.diagonal(1), w.diagonal(-1)],
}
"""Pieces of a matrix, or of a stack of heads, that are apart."""


class View(NamedTuple):
    """A view of the buffer that a property is tried on, of elements of some bytes."""

    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, as is the offset
    offset: int

    @property
    def bytes(self) -> list[int]:
        """The addresses of all bytes, which it has several times if it overlaps itself."""
        places = [self.offset]
        for size, stride in zip(self.shape, self.strides, strict=True):
            places = [place + i * stride for place in places for i in range(size)]
        return [self.itemsize * place + i for place in places for i in range(self.itemsize)]

    def of(self, buffer: Tensor) -> Tensor:
        dtype = {2: torch.float16, 4: torch.float32, 8: torch.complex64}[self.itemsize]
        return buffer.view(dtype).as_strided(self.shape, self.strides, self.offset)


BUFFER_BYTES = 8 * 240


@st.composite
def any_views(draw: st.DrawFn) -> View:
    itemsize = draw(st.sampled_from((4, 2, 8)))
    shape = draw(st.lists(st.sampled_from((2, 3, 1, 4)), max_size=3).map(tuple))
    strides = tuple(draw(st.sampled_from((1, 2, 3, 4, 6, 12, 13, 0))) for _ in shape)
    return View(itemsize, shape, strides, draw(st.integers(0, 30)))


@st.composite
def slices_of_a_box(draw: st.DrawFn) -> View:
    """Of a contiguous tensor of shape (4, 6, 10): what users cut out of a matrix or a stack of heads."""
    box = torch.empty((4, 6, 10), dtype=torch.uint8)
    for dim, size in enumerate(box.shape):
        start, step = draw(st.integers(0, size - 1)), draw(st.sampled_from((1, 1, 2, 3)))
        stop = draw(st.integers(start + 1, size))
        box = box[(slice(None),) * dim + (slice(start, stop, step),)]
    return View(draw(st.sampled_from((4, 8))), tuple(box.shape), box.stride(), box.storage_offset())


@settings(PROPERTY, max_examples=5 * PROPERTY.max_examples)
@given(st.lists(any_views() | slices_of_a_box(), min_size=1, max_size=5), st.integers(1, 5))
def test_overlap_is_found_just_where_two_tensors_share_a_byte(views: list[View], written: int) -> None:
    buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8)
    tensors = [view.of(buffer) for view in views]
    taken = [view.bytes for view in views]

    def conflict(i: int, j: int) -> bool:
        return len(set(taken[i])) < len(taken[i]) if i == j else not set(taken[i]).isdisjoint(taken[j])

    pairs = itertools.combinations_with_replacement(range(len(views)), 2)
    conflicts = {(i, j) for i, j in pairs if i < written and conflict(i, j)}
    call = call_with(tensors[:written], tensors[written:])
    if not conflicts:
        before = places(call.params)
        assert places(adam_update(*call, donate=True)[0]) == before
        return
    with pytest.raises(RuntimeError, match="Cannot donate") as caught:
        adam_update(*call, donate=True)
    found = re.search(r"params\[(\d)\]: it (?:overlaps itself|shares memory with \w+\[(\d)\])", str(caught.value))
    assert found is not None
    assert (int(found[1]), int(found[2] or found[1])) in conflicts


def has_looked_at_bytes(recorder: Recorder) -> bool:
    """Whether there was a table of bytes, which holds int32."""
    return any(x.dtype is torch.int32 for *_, result in recorder.calls for x in tensors_of(result))


@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_a_matrix_are_donated_and_arithmetic_alone_shows_that_they_are_apart(name: str) -> None:
    pieces = PIECES[name](torch.randn(64, 96, generator=torch.Generator().manual_seed(2)))
    with Recorder() as recorder:
        for kernel, order in zip(KERNELS_AND_AUTO, (pieces, pieces[::-1]) * 2, strict=True):
            donate(call_with(order, ()), kernel=kernel)
            donate(call_with(order[::2], order[1::2]), kernel=kernel)
    assert not has_looked_at_bytes(recorder)
    with Recorder() as recorder, pytest.raises(RuntimeError, match="Cannot donate"):
        adam_update(*call_with(pieces, pieces[-1:]), donate=True)
    assert has_looked_at_bytes(recorder)


def test_where_arithmetic_gives_up_each_byte_is_looked_at() -> None:
    box = torch.zeros((3,) * 10)
    corners = box[(slice(None, None, 2),) * 10]
    between = box[(*(slice(None, None, 2),) * 9, slice(1, 2))]
    with Recorder() as recorder:
        adam_update(*call_with([corners, between], ()), donate=True)
    assert has_looked_at_bytes(recorder)
    with pytest.raises(RuntimeError, match=r"Cannot donate params\[0\]: it shares memory with grads\[2\]"):
        adam_update(*call_with([corners], [between, corners[0]]), donate=True)


def test_the_search_for_overlap_takes_each_tensor_a_fixed_number_of_times() -> None:
    def count_calls(columns: int) -> int:
        call, counter = call_with(torch.zeros(8, columns).unbind(1), ()), itertools.count()
        sys.setprofile(lambda *_: next(counter))
        try:
            adam_update(*call, donate=True)
        finally:
            sys.setprofile(None)
        return next(counter)

    _, few, twice, four_times = map(count_calls, (64, 64, 128, 256))  # what is only done once is done in the first
    assert four_times - twice < 2.05 * (twice - few)


@each_kernel
def test_gradients_may_overlap_each_other_and_lie_between_and_empty_leaves_overlap_nothing(kernel: str) -> None:
    flat = torch.arange(12.0)
    donate(call_on(flat[::2], flat[1::2], AdamHparams(lr=0.1)), kernel=kernel)
    assert torch.equal(flat[1::2], torch.arange(1.0, 12.0, 2.0))
    grad, empty = torch.ones(1).expand(3), torch.empty(0)
    donate(call_on([torch.ones(3), torch.ones(3), empty, empty], [grad, grad, empty, empty]), kernel=kernel)


# A donated state is spent.


@pytest.mark.parametrize("donate_again", [False, True])
def test_a_donated_state_cannot_be_used_again(donate_again: bool) -> None:
    for per_leaf_step in (False, True):
        call = make(per_leaf_step=per_leaf_step)
        params, state = adam_update(*call, donate=True)
        before = snapshot((params, state, call.grads, call.state))
        for stale in (call, call._replace(params=params)):
            with pytest.raises(RuntimeError, match=r"state\.step.*donated"):
                adam_update(*stale, donate=donate_again)
        assert_unchanged((params, state, call.grads, call.state), before)
        adam_update(params, call.grads, clone(state), HPARAMS, donate=donate_again)
    mixed = state._replace(step={**state.step, "leaf3": call.state.step["leaf3"]})
    with pytest.raises(RuntimeError, match=r"state\.step\['leaf3'\].*donated"):
        adam_update(params, call.grads, mixed, HPARAMS, donate=donate_again)


def test_a_state_donated_without_leaves_is_spent_too() -> None:
    call = call_on({})
    _, new_state = donate(call)
    assert new_state.step == 1
    with pytest.raises(RuntimeError, match="donated"):
        adam_update(*call)


# Running out of memory.


class OutOfMemory(TorchDispatchMode):
    """Fails in place of operation number `fatal` of those that make a tensor of more than one element."""

    def __init__(self, fatal: int) -> None:
        super().__init__()
        self.fatal = fatal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        makes_tensors = not any(x.alias_info for x in (*func._schema.arguments, *func._schema.returns))
        if makes_tensors and any(x.numel() > 1 for x in tensors_of(out)):
            self.fatal -= 1
            if self.fatal < 0:
                raise MemoryError("injected")
        return out


SHORT_OF_MEMORY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # hyperparameters, options of the update
    "coupled": ({"weight_decay": 0.1, "maximize": True, "amsgrad": True}, {}),
    "decoupled": ({"weight_decay": 0.1, "decoupled_weight_decay": True}, {}),
    "gaps": ({"weight_decay": 0.1, "maximize": True}, {}),
    "groups": ({"weight_decay": {"leaf0": 0.1, "leaf1": 0.0, "leaf2": 0.0}, "decoupled_weight_decay": True}, {}),
    "grad_scale": ({"weight_decay": 0.1, "lr": torch.tensor(0.1)}, {"grad_scale": 2.0, "found_inf": 0.0}),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"per_leaf_step": True},
    "masters": {"dtype": torch.bfloat16, "master_params": True},
    "wide moments": {"dtype": torch.bfloat16, "moment_dtype": torch.float32, "per_leaf_step": True},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", SHORT_OF_MEMORY)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_donated_update_that_runs_out_of_memory_changes_nothing(kernel: str, case: str, precision: str) -> None:
    numbers, options = SHORT_OF_MEMORY[case]
    layout = strided if case == "gaps" else Tensor.clone
    shapes = ((3, 5), (4, 5), (7,))
    call = make_call(shapes, hparams=AdamHparams(**numbers), layout=layout, **PRECISIONS[precision])
    # One parameter is laid out unlike its moments, and one gradient unlike its parameter.
    call.params["leaf1"], call.grads["leaf0"] = transposed(call.params["leaf1"]), transposed(call.grads["leaf0"])
    expected = adam_update(*call, kernel=kernel, **options)
    before = clone(call)
    failures = 0
    while True:
        try:
            with OutOfMemory(failures):
                got = adam_update(*call, kernel=kernel, donate=True, **options)
            break
        except MemoryError:
            failures += 1
            assert_same_bits(call, before)
    assert_same_bits(got, expected)
    # Single takes one piece of memory for the roots, and foreach one a leaf; fused needs none for leaves of one layout.
    assert failures > 0 or kernel == "fused"


def test_a_process_out_of_memory_keeps_what_it_was_to_donate() -> None:
    code = """
import resource, torch
from functional_adam import AdamHparams, adam_init, adam_update
hparams = AdamHparams(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)
grads = {"w": torch.ones(2**23)}
_, hard = resource.getrlimit(resource.RLIMIT_AS)
for kernel in ("single", "foreach"):
    small, params = {"w": torch.ones(4)}, {"w": torch.ones(2**23, dtype=torch.bfloat16)}
    adam_update(small, {"w": torch.ones(4)}, adam_init(small, hparams), hparams, kernel=kernel, donate=True)
    state = adam_init(params, hparams, master_params=True)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**22, hard))
    try:
        adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
    except (MemoryError, RuntimeError) as error:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        for tree, value in ((params, 1), (state.master_params, 1), (state.exp_avg, 0), (state.exp_avg_sq, 0)):
            assert bool((tree["w"] == value).all())
        params, state = adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
        print(kernel, state.step.item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["single", "1.0", "foreach", "1.0"], done.stdout
