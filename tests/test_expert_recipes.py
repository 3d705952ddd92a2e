"""The recipes of docs/recipes.md for averages, unrolling, inference mode and CUDA graphs hold what the page says."""

import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import clone, tensors_of
from tests.strategies import random_tensor
from tests.test_cuda_path import SYNCS, CopyByOp, Recorder
from tests.test_numerics import Unread
from tests.test_recipes import assert_all_on_device, each_kernel, make_tree, run_page, stacked
from tests.tolerances import assert_close, assert_equal


@pytest.fixture(scope="module")
def recipes() -> SimpleNamespace:
    return run_page()


# Averages.


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_an_average_is_that_of_torch(recipes: SimpleNamespace, decay: float, dtype: torch.dtype) -> None:
    average, *others = trees = [make_tree(10 * seed, dtype) for seed in range(4)]
    before = clone(trees)
    model = torch.nn.ParameterList(clone(optree.tree_leaves(average)))
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    oracle.update_parameters(model)
    for tree in others:
        for parameter, value in zip(model, optree.tree_leaves(tree), strict=True):
            parameter.data.copy_(value)
        oracle.update_parameters(model)
        average = recipes.ema_update(average, tree, decay)
        assert_equal(optree.tree_leaves(average), [x.detach() for x in oracle.module])
    assert_equal(trees, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_unbiased_averages_are_weighted_means_with_a_decay_for_each_member(
    recipes: SimpleNamespace, dtype: torch.dtype
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    decays = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)
    trees = [make_tree(10 * seed, dtype) for seed in range(5)]
    average = stacked([optree.tree_map(lambda p: torch.zeros_like(p, dtype=wide), trees[0])] * 3)
    for count, tree in enumerate(trees, start=1):
        average = vmap(recipes.ema_update, in_dims=(0, None, 0))(average, tree, decays.to(wide))
        got = vmap(recipes.ema_unbiased)(average, torch.full((3,), float(count)), decays)
        assert {x.dtype for x in optree.tree_leaves(got)} == {wide}
        for decay, member in zip(decays.tolist(), recipes.unstack(got), strict=True):
            weights = decay ** np.arange(count - 1, -1, -1.0)
            expected = optree.tree_map(
                lambda *xs, w=weights: np.average([x.double().numpy() for x in xs], axis=0, weights=w), *trees[:count]
            )
            assert_close(member, expected)


# Unrolled steps. The oracle is Adam in plain operations of torch.


def plain_steps(
    recipes: SimpleNamespace, lr: Tensor, start: list[Tensor], steps: int, window: int | None = None
) -> Tensor:
    """The loss after `steps` steps on the leaves of the page's parameters, differentiable through the last window."""
    treespec = optree.tree_structure(recipes.params)
    p = [x.detach().requires_grad_() for x in start]
    m, v = [torch.zeros_like(x) for x in p], [torch.zeros_like(x) for x in p]
    for t in range(1, steps + 1):
        if window is not None and (t - 1) % window == 0:
            p, m, v = ([x.detach() for x in column] for column in (p, m, v))
            p = [x.requires_grad_() for x in p]
        g = torch.autograd.grad(loss_of(recipes, treespec.unflatten(p)), p, create_graph=True)
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
        v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g, strict=True)]
        size, root = lr / (1 - 0.9**t), (1 - 0.999**t) ** 0.5
        p = [x - size * a / (b.sqrt() / root + 1e-8) for x, a, b in zip(p, m, v, strict=True)]
    return loss_of(recipes, treespec.unflatten(p))


def loss_of(recipes: SimpleNamespace, params: Any) -> Tensor:
    space = recipes.loss.__globals__
    return recipes.loss(params, space["x"], space["y"])


@pytest.fixture
def wide(recipes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's parameters and data in float64."""
    space = recipes.loss.__globals__
    for name in ("x", "y"):
        monkeypatch.setitem(space, name, space[name].double())
    return optree.tree_map(Tensor.double, recipes.params)


def tracked_lr() -> Tensor:
    return torch.tensor(0.1, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("window", [1, 2, 3, 6])
def test_a_truncated_gradient_is_that_of_the_last_window(recipes: SimpleNamespace, wide: Any, window: int) -> None:
    lr = tracked_lr()
    expected = plain_steps(recipes, lr, optree.tree_leaves(wide), 6, window)
    (slope,) = torch.autograd.grad(expected, lr)
    state = adam_init(wide, AdamHparams())

    def after(lr: Tensor) -> Tensor:
        return recipes.loss_after(lr, wide, state, steps=6, window=window)[0]

    assert_close(after(lr), expected)
    assert_close(grad(after)(lr.detach()), slope)
    assert_close(torch.autograd.grad(after(lr), lr), (slope,))
    assert_close(jvp(after, (lr.detach(),), (torch.ones_like(lr),))[1], slope)
    assert_close(vmap(grad(after))(torch.stack([lr.detach()] * 2)), torch.stack([slope] * 2))
    full = grad(lambda lr: recipes.loss_after(lr, wide, state, steps=6, window=6)[0])(lr.detach())
    assert torch.isclose(full, slope, rtol=1e-3) == (window == 6)


class LiveBytes(TorchDispatchMode):
    """How many bytes of tensors that operations have made are alive now, and how many were at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def free(self, nbytes: int) -> None:
        self.now -= nbytes


def test_what_is_cut_off_is_freed(recipes: SimpleNamespace) -> None:
    state = adam_init(recipes.params, AdamHparams())

    def alive(steps: int, window: int) -> int:
        lr = torch.tensor(0.1, requires_grad=True)
        with LiveBytes() as live:
            result = recipes.loss_after(lr, recipes.params, state, steps=steps, window=window)
            assert result[0].requires_grad
            return live.now

    for window in (1, 2, 4):
        assert alive(2 * window, window) == alive(8 * window, window)
        assert alive(8, window) < alive(8, 2 * window)


# Checkpoints.


def test_a_gradient_through_checkpoints_is_that_without(recipes: SimpleNamespace, wide: Any) -> None:
    def unrolled(lr: Tensor) -> Tensor:
        params = optree.tree_map(lambda p: p.detach().requires_grad_(), wide)
        state = adam_init(params, AdamHparams())
        for _ in range(6):
            params, state = recipes.step_by_autograd(lr, params, state)
        return loss_of(recipes, params)

    def slopes(loss: Tensor) -> Any:
        (first,) = torch.autograd.grad(loss, lr, create_graph=True)
        return loss, first, *torch.autograd.grad(first, lr)

    lr = tracked_lr()
    expected = slopes(plain_steps(recipes, lr, optree.tree_leaves(wide), 6))
    got = slopes(recipes.loss_after_steps(lr, wide, steps=6))
    assert_equal(got, slopes(unrolled(lr)))
    assert_close(got, expected)
    for chunk in (1, 2, 3, 6):
        lr = tracked_lr()
        loss = recipes.loss_after_chunks(lr, wide, steps=6, chunk=chunk)
        loss.backward()
        assert_close((loss, lr.grad), expected[:2])


def test_memory_of_chunks(recipes: SimpleNamespace) -> None:
    params = recipes.params
    state = adam_init(params, AdamHparams())

    def by_autograd(lr: Tensor, chunk: int) -> Tensor:
        def chunk_of_steps(*tree: Any) -> Any:
            for _ in range(chunk):
                tree = recipes.step_by_autograd(lr, *tree)
            return tree

        tree: Any = optree.tree_map(lambda p: p.detach().requires_grad_(), params), state
        for _ in range(64 // chunk):
            tree = checkpoint(chunk_of_steps, *tree, use_reentrant=False)
        return loss_of(recipes, tree[0])

    def measure(run: Callable[[Tensor], Tensor]) -> tuple[int, int]:
        lr = torch.tensor(0.1, requires_grad=True)
        with LiveBytes() as live:
            loss = run(lr)
            kept = live.now
            loss.backward()
        return kept, live.most

    rows = {"no chunks": measure(lambda lr: recipes.loss_after(lr, params, state, steps=64, window=64)[0])}
    for chunk in (1, 4, 8, 16):
        run = partial(recipes.loss_after_chunks, params=params, steps=64, chunk=chunk)
        rows[f"{chunk}, `use_reentrant=True`"] = measure(run)
    rows["1, `use_reentrant=False`"] = measure(partial(recipes.loss_after_steps, params=params, steps=64))
    rows["8, `use_reentrant=False`"] = measure(partial(by_autograd, chunk=8))
    print("\n| steps in a chunk | after forward | at most |\n|---|---|---|")
    for name, (kept, most) in rows.items():
        print(f"| {name} | {kept:,} | {most:,} |")

    for name, part in (("4, `use_reentrant=True`", 4), ("8, `use_reentrant=True`", 4), ("1, `use_reentrant=True`", 2)):
        assert rows[name][1] < rows["no chunks"][1] / part
    assert rows["1, `use_reentrant=False`"][1] < rows["no chunks"][1] / 2
    assert rows["8, `use_reentrant=False`"][0] > rows["no chunks"][1]


def test_torch_func_does_not_go_with_checkpoints(recipes: SimpleNamespace) -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        torch.autograd.grad(recipes.loss_after_chunks(lr, recipes.params, steps=2, chunk=1), lr)
    params, state = recipes.params, adam_init(recipes.params, AdamHparams())

    def inside(lr: Tensor) -> Tensor:
        return recipes.loss_after(lr, params, state, steps=1, window=1)[0]

    def outside(lr: Tensor) -> Tensor:
        return loss_of(recipes, adam_update(params, params, state, AdamHparams(lr=lr))[0])

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        checkpoint(inside, lr, use_reentrant=False)
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        grad(lambda lr: checkpoint(outside, lr, use_reentrant=False))(lr.detach())


# Inference mode.


@each_kernel
def test_steps_inside_inference_mode_have_the_bits_of_steps_outside(recipes: SimpleNamespace, kernel: str) -> None:
    def train(params: Any, state: AdamState, *, donate: bool = False) -> Any:
        for _ in range(3):
            grads = grad(lambda p: recipes.loss(p, recipes.x, recipes.y))(params)
            params, state = adam_update(params, grads, state, AdamHparams(lr=0.1), kernel=kernel, donate=donate)
        return params, state

    start = recipes.params, adam_init(recipes.params, AdamHparams())
    copies, outside = clone(start), train(*start)
    with torch.inference_mode():
        inside, donated = train(*start), train(*copies, donate=True)
    assert_equal((inside, donated), (outside, outside))
    assert all(x.is_inference() for x in optree.tree_leaves(inside))
    assert not any(x.requires_grad_().is_inference() for x in optree.tree_leaves(donated))


def test_what_was_made_inside_is_of_limited_use_outside() -> None:
    with torch.inference_mode():
        params = make_tree()
        params, state = adam_update(params, make_tree(1), adam_init(params, AdamHparams()), AdamHparams())
    lr = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        adam_update(params, make_tree(1), state, AdamHparams(lr=lr))
    with pytest.raises(RuntimeError, match="requires_grad=True on inference tensor outside InferenceMode"):
        params["a"].requires_grad_()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        params["a"].add_(1)
    with pytest.raises(RuntimeError, match=r"Cannot donate tensors made under torch.inference_mode\(\) outside of it"):
        adam_update(params, make_tree(1), state, AdamHparams(), donate=True)
    result = adam_update(params, make_tree(1), state, AdamHparams())
    assert not any(x.is_inference() for x in optree.tree_leaves(result))
    copies = clone((params, state))
    assert_equal(adam_update(copies[0], make_tree(1), copies[1], AdamHparams(), donate=True), result)


# CUDA graphs.


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"hparams": {"amsgrad": True, "weight_decay": 0.1}},
    "decoupled": {"hparams": {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}},
    "per_leaf_step": {"init": {"per_leaf_step": True}},
    "masters": {"init": {"master_params": True, "moment_dtype": torch.float32}, "dtype": torch.bfloat16},
    "masters_and_steps": {"init": {"master_params": True, "per_leaf_step": True}, "dtype": torch.bfloat16},
    "narrow_moments": {"init": {"moment_dtype": torch.bfloat16}},
    "complex": {"dtype": torch.complex64},
    "grad_scale": {"update": {"grad_scale": 8.0}},
    "found_inf": {"update": {"found_inf": 0.0}},
}
each_option = pytest.mark.parametrize("name", OPTIONS)


def begin(name: str, device: str) -> tuple[Any, AdamState, Callable[..., Any], dict[str, Tensor]]:
    """Parameters, state, a donated step on `(params, state, grads, lr, numbers)`, and such numbers, on `device`."""
    fixed, init, update = (OPTIONS[name].get(key, {}) for key in ("hparams", "init", "update"))
    params = make_tree(dtype=OPTIONS[name].get("dtype", torch.float32))
    is_fake = device == "cuda" and not torch.cuda.is_available()  # a CPU build cannot move tensors there
    params = optree.tree_map(lambda p: torch.empty_like(p, device=device) if is_fake else p.to(device), params)
    state = adam_init(params, AdamHparams(**fixed), **init)
    numbers = {key: unread(torch.tensor(x, device=device)) for key, x in update.items()}

    def step(params: Any, state: AdamState, grads: Any, lr: Tensor, numbers: Any, **how: Any) -> Any:
        return adam_update(params, grads, state, AdamHparams(lr=lr, **fixed), **{"donate": True, **how}, **numbers)

    return params, state._replace(step=unread(state.step)), step, numbers


def unread(tree: Any) -> Any:
    """Numbers on the CPU as if on an accelerator, where the host does not read them."""
    return optree.tree_map(lambda x: x.as_subclass(Unread) if x.device.type == "cpu" else x, tree)


def addresses(tree: Any) -> list[int]:
    return [x.data_ptr() for x in optree.tree_leaves(tree)]


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: operations recorded with the memory they read and write, and repeated on that memory.

    Memory that was there before is put back at the end of the recording, since a capture computes nothing. Reading a
    value is an error, as it is in a capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        assert name not in SYNCS, name
        given = torch_pytree.tree_map_only(Tensor, self.alias, (args, kwargs))  # `set_` takes memory away
        for tensor in tensors_of(given):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()
        result = func(*args, **kwargs)
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, None))
        if name != "set_":
            self.calls.append((func, *given, torch_pytree.tree_map_only(Tensor, self.alias, result)))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, old in self.before.values():
            if old is not None:
                storage.copy_(old)

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for target, value in zip(tensors_of(result), tensors_of(again), strict=True):
                if target.data_ptr() != value.data_ptr():
                    target.copy_(value)

    @staticmethod
    def alias(tensor: Tensor) -> Tensor:
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where steps are captured; on the CPU by a tape, with `torch.cuda` as far as the recipe uses it."""
    if request.param == "cpu":
        stream = SimpleNamespace(wait_stream=lambda _: None)
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.autograd.profiler.record_function("stream"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
        monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    return request.param


@each_option
@each_kernel
def test_replays_are_the_steps_that_follow(recipes: SimpleNamespace, device: str, name: str, kernel: str) -> None:
    params, state, step, numbers = begin(name, device)
    start = expected = clone((params, state))
    dtype = params["a"].dtype
    grads = optree.tree_map(lambda x: x.to(device), make_tree(100, dtype))
    lr = unread(torch.tensor(1.0, device=device))
    before = addresses((params, state))

    def captured(params: Any, state: AdamState, *rest: Any) -> Any:
        return step(params, state, *rest, kernel=kernel)

    graph, result = recipes.capture(captured, params, state, grads, lr, numbers)
    assert addresses(result) == before
    assert_equal(result, start)
    for seed in range(1, 4):
        new = optree.tree_map(lambda x: x.to(device), make_tree(10 * seed, dtype))
        optree.tree_map(Tensor.copy_, grads, new)
        lr.fill_(0.1 / seed)
        if "found_inf" in numbers:
            numbers["found_inf"].fill_(seed == 2)
        expected = step(*expected, new, lr.clone(), numbers, kernel=kernel, donate=False)
        graph.replay()
        assert_equal(result, expected)
        assert_equal(grads, new)
    assert optree.tree_leaves(result[1].step)[0] == (2 if "found_inf" in numbers else 3)


def test_the_step_of_the_page_captured_with_a_schedule_trains_as_torch_does(
    recipes: SimpleNamespace, device: str
) -> None:
    x, y = random_tensor((8, 3), torch.float32, 1).to(device), random_tensor((8, 1), torch.float32, 2).to(device)
    params = optree.tree_map(lambda p: p.to(device, copy=True), recipes.params)
    torch_params = optree.tree_map(lambda p: p.clone().requires_grad_(), params)
    optimizer = torch.optim.Adam(optree.tree_leaves(torch_params), fused=True)
    static, lr = [torch.ones_like(x), torch.ones_like(y)], unread(torch.tensor(1.0, device=device))
    state = adam_init(params, AdamHparams())
    state = state._replace(step=unread(state.step))

    def step(params: Any, state: AdamState, x: Tensor, y: Tensor, lr: Tensor) -> Any:
        return recipes.train_step(params, state, x, y, lr * (state.step + 1))

    graph, (params, state, value) = recipes.capture(step, params, state, *static, lr)
    static[1].copy_(y)
    lr.fill_(0.125)
    for t in range(1, 5):
        static[0].copy_(x * t)
        optimizer.param_groups[0]["lr"] = 0.125 * t
        optimizer.zero_grad()
        loss = recipes.loss(torch_params, x * t, y)
        loss.backward()
        optimizer.step()
        graph.replay()
        assert_close(value, loss)
        assert_close(params, torch_params)
        assert state.step == t


def test_replays_without_donation_stand_still(recipes: SimpleNamespace, device: str) -> None:
    params, state, step, numbers = begin("plain", device)
    grads, lr = optree.tree_map(lambda x: x.to(device), make_tree(1)), unread(torch.tensor(0.1, device=device))
    once = step(params, state, grads, lr, numbers, donate=False)
    graph, result = recipes.capture(lambda *given: step(*given, donate=False), params, state, grads, lr, numbers)
    for _ in range(3):
        graph.replay()
        assert_equal(result, once)


def test_the_tape_refuses_to_read_a_value() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Tape():
        torch.ones(()).add(1).item()


@each_option
@each_kernel
def test_a_donated_step_is_all_on_the_device_and_in_its_memory(name: str, kernel: str) -> None:
    with FakeTensorMode(), CopyByOp():
        params, state, step, numbers = begin(name, "cuda")
        grads, lr = optree.tree_map(torch.empty_like, params), torch.empty((), device="cuda")
        before = [x.untyped_storage()._cdata for x in optree.tree_leaves((params, state))]
        with Recorder() as recorder:
            result = step(params, state, grads, lr, numbers, kernel=kernel)
        assert_all_on_device(recorder)
        assert [x.untyped_storage()._cdata for x in optree.tree_leaves(result)] == before
