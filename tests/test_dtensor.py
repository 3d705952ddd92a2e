"""Trees of DTensors: sharded updates, training with FSDP2, and checkpoints, against the run without sharding."""

import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from functional_adam import AdamHparams, adam_init, adam_update, explain
from tests.builders import assert_unchanged, snapshot
from tests.oracles import KERNELS, TORCH_FLAGS
from tests.processes import WorkerDiedError, Workers
from tests.test_distributed import loss_of, make_model
from tests.tolerances import assert_close, assert_equal, assert_within_roundings

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from fsdp2_checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as workers:
        yield workers


# Each leaf with its placements on a mesh of 1 and of 2 dimensions; None: a plain tensor.
LEAVES: dict[str, tuple[Tensor, Any, Any]] = {
    "uneven": (torch.empty(5, 3), [Shard(0)], [Shard(0), Shard(0)]),
    "fewer_rows_than_ranks": (torch.empty(1, 4), [Shard(0)], [Shard(0), Shard(1)]),
    "columns": (torch.empty(4, 12), [Shard(1)], [Replicate(), Shard(1)]),
    "columns_of_transposed": (torch.empty(12, 7).T, [Shard(0)], [Shard(1), Shard(0)]),
    "replicated": (torch.empty(7), [Replicate()], [Replicate(), Replicate()]),
    "scalar": (torch.empty(()), [Replicate()], [Replicate(), Replicate()]),
    "vectorised": (torch.empty(67), [Shard(0)], [Replicate(), Shard(0)]),
    "bfloat16": (torch.empty(5, 2, dtype=torch.bfloat16), [Shard(0)], [Shard(1), Shard(0)]),
    "complex": (torch.empty(5, dtype=torch.complex64), [Shard(0)], [Shard(0), Replicate()]),
    "plain": (torch.empty(3, 3), None, None),
}

OPTIONS: tuple[dict[str, Any], ...] = (
    {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    {"decoupled_weight_decay": True, "weight_decay": 0.1, "betas": (0.7, 0.9)},
)


def full_tree(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty_like(model).copy_(torch.randn(model.shape, dtype=model.dtype, generator=generator))
        for name, (model, *_) in LEAVES.items()
    }


def place(tree: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """As DTensors whose local shards are views with gaps where they are columns."""
    placed = dict(tree)
    for name, (_, *by_dims) in LEAVES.items():
        placements = by_dims[mesh.ndim - 1]
        if placements == [Shard(1)]:
            placed[name] = DTensor.from_local(tree[name].chunk(mesh.size(), 1)[mesh.get_local_rank()], mesh, placements)
            assert not placed[name].to_local().is_contiguous()
        elif placements is not None:
            placed[name] = distribute_tensor(tree[name], mesh, placements)
    return placed


def local(tree: Any) -> Any:
    return optree.tree_map(lambda x: x.to_local() if isinstance(x, DTensor) else x, tree)


def full(tree: Any) -> Any:
    return optree.tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def updates(params: Any, all_grads: list[Any], options: dict[str, Any], kernel: Any, donate: bool) -> Any:
    """Three updates, the second of which finds an infinity and the third of which is scaled."""
    hparams = AdamHparams(lr=0.1, **options)
    state = adam_init(params, hparams)
    extras: list[dict[str, Any]] = [{}, {"found_inf": torch.tensor(1.0)}, {"grad_scale": torch.tensor(4.0)}]
    for grads, extra in zip(all_grads, extras, strict=True):
        given, read = local((params, state[1:])), local(grads)
        before, read_before = snapshot(given), snapshot(read)
        params, state = adam_update(params, grads, state, hparams, kernel=kernel, donate=donate, **extra)
        assert_unchanged(read, read_before)
        if donate:
            places = [x[0] for x in snapshot(local((params, state[1:])))]
            assert places == [x[0] for x in before]
        else:
            assert_unchanged(given, before)
    return params, state


def kind_of(x: Tensor) -> str:
    return f"{type(x)} {x.shape} {(x.placements, x.device_mesh) if isinstance(x, DTensor) else None}"


def compare_with_unsharded(mesh_shape: tuple[int, ...]) -> None:
    mesh = init_device_mesh("cpu", mesh_shape)
    full_grads = [full_tree(seed) for seed in range(1, 4)]
    all_grads = [place(grads, mesh) for grads in full_grads]
    kinds = optree.tree_map(kind_of, all_grads[0])
    for kernel, options, donate in product(KERNELS, OPTIONS, (False, True)):
        params = place(full_tree(0), mesh)
        new = updates(params, all_grads, options, kernel, donate)
        for tree in (new[0], *filter(None, new[1][1:])):
            assert optree.tree_map(kind_of, tree) == kinds
        assert type(new[1].step) is Tensor
        expected = updates(full_tree(0), full_grads, options, kernel, donate)
        assert expected[1].step == 2
        # The vector body and the scalar tail of fused round differently, and shards have other tails.
        (assert_close if kernel == "fused" else assert_equal)(full(new), expected)


@pytest.mark.parametrize("mesh_shape", [(2,), (3,), (2, 2)], ids=str)
def test_sharded_update_is_the_unsharded_one(workers: Workers, mesh_shape: tuple[int, ...]):
    workers.run(math.prod(mesh_shape), compare_with_unsharded, mesh_shape)


# What each of two processes finds. A function that raises there fails the test.

RATE = AdamHparams(lr=0.1)


def in_rows(x: Tensor) -> DTensor:
    return distribute_tensor(x, init_device_mesh("cpu", (2,)), [Shard(0)])


def gradients_are_brought_to_the_placements_of_their_parameters() -> None:
    mesh = init_device_mesh("cpu", (2,))
    param, grad = (torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    share = grad * (0.25 if mesh.get_local_rank() else 0.75)  # they sum up exactly
    placements = ([Shard(0)], [Shard(1)], [Replicate()])
    all_grads = [DTensor.from_local(share, mesh, [Partial()]), *(distribute_tensor(grad, mesh, x) for x in placements)]
    for kernel, placed, given in product(KERNELS, placements, all_grads):
        params, before = distribute_tensor(param, mesh, placed), snapshot(local(given))
        new = adam_update(params, given, adam_init(params, RATE), RATE, kernel=kernel)
        assert_unchanged(local(given), before)
        assert [x.placements for x in (new[0], *new[1][1:3])] == [tuple(placed)] * 3
        expected = adam_update(param, grad, adam_init(param, RATE), RATE, kernel=kernel)
        assert_within_roundings(full(new), expected, 2)


def found_inf_and_grad_scale_may_be_dtensors() -> None:
    """Under one rank only: an infinity that is a sum still to be made, and a scale that is a norm of shards."""
    plain = {"w": torch.arange(6.0), "plain": torch.ones(2)}
    params = {**plain, "w": in_rows(plain["w"])}
    state = adam_init(params, RATE)
    flag = DTensor.from_local(torch.tensor(float(dist.get_rank())), params["w"].device_mesh, [Partial()])
    skipped = adam_update(params, params, state, RATE, found_inf=flag)
    norm = nn.utils.get_total_norm([params["w"]])
    assert isinstance(norm, DTensor)
    scaled = adam_update(params, params, state, RATE, found_inf=~norm.isfinite(), grad_scale=norm)
    assert all(type(x) is Tensor for x in (skipped[1].step, scaled[1].step, scaled[0]["plain"]))
    assert_equal(full(skipped), (plain, adam_init(plain, RATE)))
    assert_close(full(scaled), adam_update(plain, plain, adam_init(plain, RATE), RATE, grad_scale=55**0.5))


def a_leaf_may_have_no_gradient_and_an_explanation_is_of_this_process_and_names_what_travels() -> None:
    params = {name: in_rows(torch.ones(4, 3)) for name in ("a", "b", "stands")}
    grads = {"a": params["a"], "b": params["b"].redistribute(placements=[Replicate()]), "stands": None}
    state = adam_init(params, RATE, per_leaf_step=True)
    found = explain(params, grads, state, RATE)
    assert (found.groups[0].element_count, found.new_memory[0].nbytes) == (12, 72)
    copies = [tuple(x) for x in found.new_memory if "result" not in x.why]
    assert copies == [(["grads['b']"], 24, "is redistributed to the placements of its parameter")]
    new, state = full(adam_update(params, grads, state, RATE))
    assert_close(new, {"a": torch.full((4, 3), 0.9), "b": torch.full((4, 3), 0.9), "stands": torch.ones(4, 3)})
    assert state.step == {"a": 1, "b": 1, "stands": 0}


def misfits_are_errors_that_name_the_leaf() -> None:
    mesh, other_mesh = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    plain = torch.arange(6.0).view(3, 2)
    rows, columns = (distribute_tensor(plain, mesh, [Shard(dim)]) for dim in (0, 1))
    elsewhere = distribute_tensor(plain, other_mesh, [Replicate(), Shard(0)])
    unsummed = DTensor.from_local(plain, mesh, [Partial()])
    own_rows = plain[:1] if dist.get_rank() == 0 else plain[1:]
    unequal = DTensor.from_local(own_rows, mesh, [Shard(0)], shape=(3, 2), stride=(2, 1))

    def update(param: Any, grad: Any, moment: Any, lr: float | Tensor = 0.1, **options: Any) -> Any:
        state = adam_init({"w": moment}, RATE)
        return adam_update({"w": param}, {"w": grad}, state, AdamHparams(lr=lr), **options)

    def refused(error: type[Exception], match: str, *leaves: Any, **options: Any) -> None:
        with pytest.raises(error, match=match) as caught:
            update(*leaves, **options)
        assert caught.type is error

    grads, params, moment = r"grads\['w'\]", r"params\['w'\]", r"state\.exp_avg\['w'\]"
    refused(ValueError, f"{grads} is a DTensor on .*, but {params} is no DTensor", plain, rows, plain)
    for name, leaves in ((grads, lambda x: (rows, x, rows)), (moment, lambda x: (rows, rows, x))):
        refused(ValueError, f"{name} is no DTensor, but {params} is a DTensor on ", *leaves(plain))
        refused(ValueError, rf"{name} is on DeviceMesh\(.*, but {params} is on DeviceMesh", *leaves(elsewhere))
        refused(ValueError, f"{name} has a local shard of shape .*, but {params} has", *leaves(unequal))
    refused(ValueError, rf"{moment} is placed as .*dim=1\).*, but {params} as .*Shard\(dim=0\)", rows, rows, columns)
    refused(ValueError, f"{params} is placed as .*Partial.*redistribute", unsummed, rows, unsummed)
    refused(RuntimeError, f"{params}: it shares memory with {grads}", rows, rows, rows, donate=True)

    watched = f"{params} is a DTensor, and the update is watched by"
    refused(RuntimeError, f"{watched} autograd .*torch.no_grad", rows.detach().requires_grad_(), rows, rows)
    refused(RuntimeError, f"{watched} autograd", rows, rows, rows, lr=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(RuntimeError, match=f"{watched} a torch.func transform"):
        torch.func.vmap(lambda scale: update(rows, rows, rows, grad_scale=scale))(torch.ones(2))

    overlapping = {"a": rows, "b": DTensor.from_local(rows.to_local()[:1], mesh, [Shard(0)])}
    with pytest.raises(RuntimeError, match=r"Cannot donate params\['a'\]: it shares memory with params\['b'\]"):
        adam_update(overlapping, overlapping, adam_init(overlapping, RATE), RATE, donate=True)


def autograd_notices_that_a_saved_dtensor_was_donated() -> None:
    for kernel in KERNELS:
        param = in_rows(torch.ones(4)).requires_grad_()
        loss = (param * param).sum()
        with torch.no_grad():
            adam_update(param, param.clone(), adam_init(param, RATE), RATE, kernel=kernel, donate=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def a_compiled_update_is_the_eager_unsharded_one() -> None:
    plain, grads = torch.ones(4, 3), torch.arange(12.0).view(4, 3)
    step = torch.compile(lambda *call: adam_update(*call, RATE), fullgraph=True, backend="aot_eager")
    new = step(in_rows(plain), in_rows(grads), adam_init(in_rows(plain), RATE))
    assert new[0].placements == new[1].exp_avg.placements == (Shard(0),)
    assert_close(full(new), adam_update(plain, grads, adam_init(plain, RATE), RATE))


def training_with_fully_shard_is_that_of_torch_optim_bit_for_bit() -> None:
    for kernel in KERNELS:
        losses, params, _ = train_sharded(kernel)
        model = shard(make_model(), init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=0.01, amsgrad=True, **TORCH_FLAGS[kernel])
        for step in range(STEPS):
            loss = loss_of(model, step, 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert losses[step] == loss.item()
        assert_equal(params, full({name: weight.detach() for name, weight in model.named_parameters()}))


@pytest.mark.parametrize(
    "claim",
    [
        gradients_are_brought_to_the_placements_of_their_parameters,
        found_inf_and_grad_scale_may_be_dtensors,
        a_leaf_may_have_no_gradient_and_an_explanation_is_of_this_process_and_names_what_travels,
        misfits_are_errors_that_name_the_leaf,
        autograd_notices_that_a_saved_dtensor_was_donated,
        a_compiled_update_is_the_eager_unsharded_one,
        training_with_fully_shard_is_that_of_torch_optim_bit_for_bit,
    ],
    ids=lambda claim: claim.__name__,
)
def test_in_each_of_two_processes(workers: Workers, claim: Callable[[], None]):
    workers.run(2, claim)


# Training. Every process sees the whole batch, so that the mean gradient of 1, 2 or 4 of them is exactly the plain one.

HPARAMS = AdamHparams(lr=3e-3, weight_decay=0.01, amsgrad=True)
STEPS = 8


def shard(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def shard_tensor_parallel(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """Columns and rows over the second dimension of the mesh, FSDP over the first."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # of torch's own making
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return shard(model, mesh["data"])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# On how many processes the run continues, and the rank that dies, in which method, from which moment on.
CRASHES: dict[str, tuple[int, int, tuple[Any, str], tuple[str, int]]] = {
    "training": (1, 1, (nn.Module, "named_parameters"), ("training", 4)),
    "writing shards": (2, 1, (dcp.FileSystemWriter, "write_data"), ("saving", 5)),
    "writing metadata": (3, 0, (dcp.FileSystemWriter, "finish"), ("saving", 5)),
    "renaming": (4, 0, (os, "replace"), ("saving", 5)),
}


def train(model: nn.Module, kernel: Any = "single", *, folder: Path | None = None, crash: str | None = None) -> Any:
    """From the last checkpoint in `folder` on: the loss of each step, full parameters and state."""

    def may_die(*now: Any) -> None:
        if crash and (dist.get_rank(), now) == (CRASHES[crash][1], CRASHES[crash][3]):
            setattr(*CRASHES[crash][2], die)

    params = {name: weight.detach() for name, weight in model.named_parameters()}
    state = adam_init(params, HPARAMS)
    if folder and (found := latest_checkpoint(folder)):
        load_checkpoint(found, params, state)
    losses: dict[int, float] = {}
    for step in range(int(state.step), STEPS):
        loss = loss_of(model, step, 0)
        loss.backward()
        may_die("training", step)
        grads = {name: weight.grad for name, weight in model.named_parameters()}
        params, state = adam_update(params, grads, state, HPARAMS, kernel=kernel, donate=True)
        model.zero_grad()
        losses[step] = loss.item()
        if folder and step in (2, 5):
            may_die("saving", step)
            save_checkpoint(folder, params, state)
    return losses, full(params), tuple(full(state))


def train_sharded(kernel: str = "single", **options: Any) -> Any:
    return train(shard(make_model(), init_device_mesh("cpu", (dist.get_world_size(),))), kernel, **options)


def train_plain() -> Any:
    return train(make_model())


@pytest.fixture(scope="module")
def plain(workers: Workers) -> Any:
    """The run without sharding, in a process that adds up in the order of the others."""
    return workers.run(1, train_plain)[0]


def assert_same_run(run: Any, plain: Any, *, first: int = 0, has_other_sums: bool = False) -> None:
    """From step `first` on, `run` is the plain run, bit for bit or within the rounding of sums."""
    losses, params, state = run
    expected = {step: plain[0][step] for step in range(first, STEPS)}
    if has_other_sums:
        assert losses == pytest.approx(expected, rel=2e-5)
        # Where a gradient is near 0, Adam divides rounding by rounding: a fraction of a step.
        for name, param in params.items():
            torch.testing.assert_close(param, plain[1][name], rtol=0, atol=0.1 * float(HPARAMS.lr))
    else:
        assert losses == expected
        assert_equal((params, state), plain[1:])


def train_in_two_dimensions() -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return [train(split(make_model(), mesh)) for split in (shard, shard_tensor_parallel)]


def test_training_on_a_mesh_of_two_dimensions_is_plain_training(workers: Workers, plain: Any):
    for replicas_of_shards, tensor_parallel in workers.run(4, train_in_two_dimensions):
        assert_same_run(replicas_of_shards, plain)
        assert_same_run(tensor_parallel, plain, has_other_sums=True)


@pytest.mark.parametrize("crash", CRASHES)
def test_a_killed_run_of_two_processes_continues_on_others_from_the_last_complete_checkpoint(
    workers: Workers, plain: Any, tmp_path: Path, crash: str
):
    # Of their own: with a killed process goes its record of the lines that it has run.
    with Workers() as doomed, pytest.raises(WorkerDiedError, match="died with exit code -9"):
        doomed.run(2, partial(train_sharded, folder=tmp_path, crash=crash))
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"
    assert (tmp_path / "unfinished-step-00000006").exists() == (crash != "training")
    count, *_ = CRASHES[crash]
    for run in workers.run(count, partial(train_sharded, folder=tmp_path)):
        assert_same_run(run, plain, first=3, has_other_sums=count == 3)  # a third of a sum of three rounds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]
