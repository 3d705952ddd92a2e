"""The functions of docs/recipes.md, taken from the page, do what torch's own schedulers, clipping and scaler do."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optree
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from functional_adam import AdamHparams, adam_init, adam_update
from tests.builders import clone, tensors_of
from tests.oracles import KERNELS, TORCH_FLAGS
from tests.strategies import random_tensor
from tests.test_cuda_path import CopyByOp, Recorder, assert_no_sync
from tests.tolerances import assert_close, assert_equal

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
SCHEDULE = {"peak": 0.1, "warmup": 5, "total": 30}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def run_page() -> SimpleNamespace:
    """What the blocks of the page define."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    return SimpleNamespace(**namespace)


@pytest.fixture(scope="module")
def recipes() -> SimpleNamespace:
    return run_page()


def make_tree(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    a, *b = (random_tensor(shape, dtype, seed + i) for i, shape in enumerate(((3, 4), (5,), ())))
    return {"a": a, "b": b}


def stacked(trees: Any) -> Any:
    return optree.tree_map(lambda *xs: torch.stack(xs), *trees)


def assert_all_on_device(recorder: Recorder) -> None:
    """No op reads a value, and none takes one from the host's memory."""
    assert_no_sync(recorder)
    for name, args, kwargs, result in recorder.calls:
        assert {x.device.type for x in tensors_of((args, kwargs, result))} <= {"cuda"}, name


# Schedules.


# SequentialLR calls its own schedulers with a deprecated argument.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step():UserWarning")
def test_warmup_and_cosine_are_those_of_torch(recipes: SimpleNamespace) -> None:
    warmup, total = SCHEDULE["warmup"], SCHEDULE["total"]
    optimizer = torch.optim.Adam([torch.ones(())], lr=SCHEDULE["peak"])
    rising = LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
    scheduler = SequentialLR(optimizer, [rising, CosineAnnealingLR(optimizer, total - warmup)], [warmup])
    for step in range(30):
        lr = recipes.warmup_cosine(torch.tensor(float(step)), **SCHEDULE)
        assert_close(lr, optimizer.param_groups[0]["lr"], torch.float32)
        optimizer.step()
        scheduler.step()


def test_a_schedule_takes_a_tree_of_steps_and_many_and_is_zero_after_the_end(recipes: SimpleNamespace) -> None:
    params, grads = make_tree(), make_tree(1)
    state = adam_init(params, AdamHparams(), per_leaf_step=True)
    _, state = adam_update(params, {"a": grads["a"], "b": [None, grads["b"][1]]}, state, AdamHparams())
    lr = optree.tree_map(lambda step: recipes.warmup_cosine(step, **SCHEDULE), state.step)
    expected = {"a": 0.04, "b": [0.02, 0.04]}
    assert_close(lr, expected)
    new, other = (adam_update(params, grads, state, AdamHparams(lr=x)) for x in (lr, expected))
    assert_close(new, other)
    many = torch.arange(40.0)
    mapped = vmap(lambda step: recipes.warmup_cosine(step, **SCHEDULE))(many)
    assert_close(mapped, recipes.warmup_cosine(many, **SCHEDULE))
    assert_close(mapped[[0, 4, 30, 39]], torch.tensor([0.02, 0.1, 0.0, 0.0]))


# Clipping.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("value", [None, 0.0, torch.inf, torch.nan])
def test_clipping_is_that_of_torch(recipes: SimpleNamespace, dtype: torch.dtype, value: float | None) -> None:
    grads = make_tree(dtype=dtype)
    if value is not None:
        grads = optree.tree_map(torch.zeros_like, grads)
        grads["b"][0][1] = value
    before = clone(grads)
    for max_norm in (1e-3, 1.0, 1e3, 0.0):
        clipped, norm = recipes.clip_by_global_norm(grads, max_norm)
        leaves = [torch.zeros_like(g).requires_grad_() for g in optree.tree_leaves(grads)]
        for leaf, gradient in zip(leaves, optree.tree_leaves(grads), strict=True):
            leaf.grad = gradient.clone()
        expected = torch.nn.utils.clip_grad_norm_(leaves, max_norm, foreach=False)
        got = [norm, *optree.tree_leaves(clipped)]
        torch.testing.assert_close(got, [expected, *(leaf.grad for leaf in leaves)], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(grads, before, rtol=0, atol=0, equal_nan=True)


def test_clipping_leaves_none_alone_and_is_mapped_and_differentiable(recipes: SimpleNamespace) -> None:
    tree = make_tree(dtype=torch.float64)
    assert recipes.clip_by_global_norm({"a": tree["a"], "b": None}, 1.0)[0]["b"] is None
    members = [optree.tree_map(lambda x, i=i: x * i, tree) for i in (0.01, 1.0, 100.0)]
    got = vmap(lambda g: recipes.clip_by_global_norm(g, 1.0))(stacked(members))
    assert_close(got, stacked([recipes.clip_by_global_norm(g, 1.0) for g in members]))
    _, (along, _) = jvp(lambda g: recipes.clip_by_global_norm(g, 1.0), (tree,), (tree,))
    assert max(x.abs().max() for x in optree.tree_leaves(along)) < 1e-5  # a clipped gradient only turns


# Steps that are not finite, and loss scaling.


SCALER = {"growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}
FACTORS = [1.0, torch.inf, 1.0, 1.0, 1.0, 1.0, torch.nan, torch.inf, *[1.0] * 9]


@each_kernel
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("start", "options", "factors", "extremes"),
    [(10, SCALER, FACTORS, (6, 12)), (126, {"growth_interval": 1}, [1e-6] * 3, (127, 127))],
    ids=["usual", "near the largest"],
)
def test_loss_scaling_has_the_bits_of_grad_scaler(
    recipes: SimpleNamespace, kernel: str, autocast: bool, start: int, options: Any, factors: Any, extremes: Any
) -> None:
    hparams = AdamHparams(lr=0.1, weight_decay=0.1)

    def loss(params: Any, factor: float) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return recipes.loss(params, recipes.x, recipes.y).float() * factor

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**start, **options)
    torch_params = optree.tree_map(lambda p: p.clone().requires_grad_(), recipes.params)
    leaves = optree.tree_leaves(torch_params)
    optimizer = torch.optim.Adam(leaves, lr=0.1, weight_decay=0.1, **TORCH_FLAGS[kernel])
    params, state = recipes.params, adam_init(recipes.params, hparams)
    current = recipes.LossScale(torch.tensor(2.0**start), torch.tensor(0, dtype=torch.int32))
    scales = []
    for factor in factors:
        grads = grad(lambda p, scale, factor: loss(p, factor) * scale)(params, current.scale, factor)
        found_inf = recipes.has_non_finite(grads)
        how = {"grad_scale": current.scale, "found_inf": found_inf, "kernel": kernel}
        params, state = adam_update(params, grads, state, hparams, **how)
        current = recipes.next_loss_scale(current, found_inf, **options)
        optimizer.zero_grad()
        scaler.scale(loss(torch_params, factor)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_equal(optree.tree_leaves(params), [leaf.detach() for leaf in leaves])
        assert current.scale.item() == scaler.get_scale()
        assert current.good_steps.item() == scaler.state_dict()["_growth_tracker"]
        scales.append(current.scale.log2().item())
    assert state.step == sum(map(math.isfinite, factors))
    assert (min(scales), max(scales)) == extremes
    assert (current.scale.dtype, current.good_steps.dtype) == (torch.float32, torch.int32)


# Ensembles.


def init_members(seeds: range, hparams: AdamHparams) -> list[Any]:
    return [(params := make_tree(10 * seed), adam_init(params, hparams)) for seed in seeds]


def test_stacking_and_unstacking_are_inverse(recipes: SimpleNamespace) -> None:
    hparams = AdamHparams(amsgrad=True)
    trees = [make_tree(10 * seed) for seed in range(3)]
    members = [adam_update(p, p, adam_init(p, hparams, per_leaf_step=True), hparams) for p in trees]
    ensemble = recipes.stack(members)
    back = recipes.unstack(ensemble)
    assert_equal(back, members)
    storages = [x.untyped_storage().data_ptr() for x in optree.tree_leaves((ensemble, back))]
    assert len({*storages}) == len(storages)
    (params, state), grads = back[0], make_tree(7)
    donated = adam_update(params, grads, state, hparams, donate=True)
    assert_equal(donated, adam_update(members[0][0], grads, members[0][1], hparams))
    assert_equal(recipes.unstack(ensemble)[1:], members[1:])


@each_kernel
def test_a_member_with_a_gradient_that_is_not_finite_stands_still_and_goes_on_later(
    recipes: SimpleNamespace, kernel: str
) -> None:
    hparams = AdamHparams(lr=0.1, weight_decay=0.1)

    def step(params: Any, state: Any, grads: Any) -> Any:
        found_inf = recipes.has_non_finite(grads)
        return adam_update(params, grads, state, hparams, kernel=kernel, found_inf=found_inf)

    members = init_members(range(3), hparams)
    ensemble = recipes.stack(members)
    for t, factors in enumerate(((1, torch.inf, 1), (-torch.inf, torch.nan, 1), (1, 1, 1))):
        before, gradients = recipes.unstack(ensemble), [make_tree(100 * t + s) for s in (1, 2, 3)]
        for gradient, factor in zip(gradients, factors, strict=True):
            gradient["b"][0][2] *= factor
        ensemble = vmap(step)(*ensemble, stacked(gradients))
        members = [step(*member, grads) for member, grads in zip(members, gradients, strict=True)]
        after = recipes.unstack(ensemble)
        assert_close(after, members)
        still = [i for i, factor in enumerate(factors) if factor != 1]
        assert_equal([after[i] for i in still], [before[i] for i in still])
    assert ensemble[1].step.tolist() == [2.0, 1.0, 3.0]


def test_restarted_members_are_fresh_and_others_are_untouched(recipes: SimpleNamespace) -> None:
    hparams = AdamHparams(lr=0.1, amsgrad=True)
    old, fresh = init_members(range(3), hparams), init_members(range(3, 6), hparams)
    old = [adam_update(p, make_tree(7), s, hparams) for p, s in old]
    got = recipes.select(torch.tensor([False, True, False]), recipes.stack(fresh), recipes.stack(old))
    assert_equal(recipes.unstack(got), [old[0], fresh[1], old[2]])


def test_each_member_stops_for_good_after_its_own_patience(recipes: SimpleNamespace) -> None:
    losses = torch.tensor([[3.0, 3.0, torch.nan], [4.0, 2.0, torch.nan], [5.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
    patience = recipes.Patience(torch.full((3,), torch.inf), torch.zeros(3, dtype=torch.int64))
    stops, betters = [], []
    for row in losses:
        patience, is_better, stopped = recipes.wait_for_better(patience, row, limit=2)
        stops.append(stopped.tolist())
        betters.append(is_better.tolist())
    no, yes = False, True
    assert betters == [[yes, yes, no], [no, yes, no], [no, no, no], [no, yes, no]]
    assert stops == [[no, no, no], [no, no, yes], [yes, no, yes], [yes, no, yes]]
    assert patience.best.tolist() == [3.0, 1.0, torch.inf]


# All together.


def whole_step(recipes: SimpleNamespace, **how: Any) -> Any:
    def step(params: Any, state: Any, loss_scale: Any, average: Any, grads: Any) -> Any:
        lr = recipes.warmup_cosine(state.step, **SCHEDULE)
        found_inf = recipes.has_non_finite(grads)
        grads = optree.tree_map(lambda g: g / loss_scale.scale, grads)
        grads, _ = recipes.clip_by_global_norm(grads, 1.0)
        params, state = adam_update(params, grads, state, AdamHparams(lr=lr), found_inf=found_inf, **how)
        average = recipes.ema_unbiased(recipes.ema_update(average, params, 0.9), state.step, 0.9)
        return params, state, recipes.next_loss_scale(loss_scale, found_inf, growth_interval=2), average

    return step


@pytest.mark.usefixtures("fresh_compiler")
def test_all_recipes_in_one_step_are_compiled_once(recipes: SimpleNamespace) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eager = whole_step(recipes)
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    params = make_tree()
    loss_scale = recipes.LossScale(torch.tensor(8.0), torch.tensor(0, dtype=torch.int32))
    got = expected = (params, adam_init(params, AdamHparams()), loss_scale, make_tree(10))
    for seed, factor in enumerate((1.0, 1.0, torch.inf, 1.0, 1.0)):
        grads = optree.tree_map(lambda g, factor=factor: g * factor, make_tree(10 * seed))
        got, expected = compiled(*got, grads), eager(*expected, grads)
        assert_close((got[:2], got[3]), (expected[:2], expected[3]))
        assert [x.item() for x in got[2]] == [x.item() for x in expected[2]]
    assert counter.frame_count == 1
    assert got[1].step == 4


@each_kernel
def test_no_recipe_waits_for_an_accelerator(recipes: SimpleNamespace, kernel: str) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode(), CopyByOp():
        params, grads = ({"a": empty(3, 4), "b": empty()} for _ in range(2))
        loss_scale = recipes.LossScale(empty(), empty(dtype=torch.int32))
        patience = recipes.Patience(empty(3), empty(3, dtype=torch.int64))
        state, mask = adam_init(params, AdamHparams()), empty(2, dtype=torch.bool)
        with Recorder() as recorder:
            whole_step(recipes, kernel=kernel)(params, state, loss_scale, params, grads)
            recipes.wait_for_better(patience, patience.best, limit=3)
            ensemble = recipes.stack([params, grads])
            recipes.unstack(recipes.select(mask, ensemble, ensemble))
        assert_all_on_device(recorder)
