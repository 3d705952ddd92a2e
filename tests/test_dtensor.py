"""Trees of DTensors: sharded updates, training with FSDP2, and checkpoints, against the run without sharding."""

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
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
from torch.nn.functional import cross_entropy

from functional_adam import AdamHparams, adam_init, adam_update, explain
from tests.oracles import KERNELS, TORCH_FLAGS
from tests.processes import WorkerDiedError, Workers
from tests.tolerances import assert_close, assert_equal, assert_within_roundings

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from fsdp2_checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
donate_or_not = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donate"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The plain runs add up in the order of the workers, which have one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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

OPTIONS = {
    "adam": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    "adamw": {"decoupled_weight_decay": True, "weight_decay": 0.1, "betas": (0.7, 0.9)},
}


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
        if placements is not None:
            placed[name] = distribute_tensor(tree[name], mesh, placements)
            if placements == [Shard(1)]:
                width = tree[name].shape[1] // mesh.size()
                local = tree[name][:, mesh.get_local_rank() * width :][:, :width]
                assert not local.is_contiguous()
                placed[name] = DTensor.from_local(local, mesh, placements)
    return placed


def local(tree: Any) -> Any:
    return optree.tree_map(lambda x: x.to_local() if isinstance(x, DTensor) else x, tree)


def full(tree: Any) -> Any:
    return optree.tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def clone(tree: Any) -> Any:
    return optree.tree_map(torch.clone, tree)


def is_equal(a: Any, b: Any) -> bool:
    return optree.tree_all(optree.tree_map(lambda x, y: x.dtype == y.dtype and torch.equal(x, y), a, b))


def updates(params: Any, all_grads: list[Any], options: dict[str, Any], kernel: Any, donate: bool) -> Any:
    """Three updates, the second of which finds an infinity and the third of which is scaled."""
    hparams = AdamHparams(lr=0.1, **options)
    state = adam_init(params, hparams)
    extras: list[dict[str, Any]] = [{}, {"found_inf": torch.tensor(1.0)}, {"grad_scale": torch.tensor(4.0)}]
    for grads, extra in zip(all_grads, extras, strict=True):
        given = (local(params), local(state._replace(step=())))
        before = clone(given)
        kept_grads = clone(local(grads))
        params, state = adam_update(params, grads, state, hparams, kernel=kernel, donate=donate, **extra)
        assert is_equal(kept_grads, local(grads))
        if donate:
            now = (local(params), local(state._replace(step=())))
            for old, new in zip(optree.tree_leaves(given), optree.tree_leaves(now), strict=True):
                assert old.data_ptr() == new.data_ptr()
        else:
            assert is_equal(before, given)
    return params, state


def update_sharded(mesh_shape: tuple[int, ...], options: dict[str, Any], kernel: str, donate: bool) -> Any:
    mesh = init_device_mesh("cpu", mesh_shape)
    params, *all_grads = (place(full_tree(seed), mesh) for seed in range(4))
    new = updates(params, all_grads, options, kernel, donate)
    for tree in (new[0], *(x for x in new[1][1:] if x)):
        for name, x in tree.items():
            assert type(x) is type(params[name])
            if isinstance(x, DTensor):
                assert x.placements == params[name].placements
                assert x.device_mesh == mesh
                assert x.shape == params[name].shape
    assert type(new[1].step) is Tensor
    return full(new)


@pytest.mark.parametrize("mesh_shape", [(2,), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_kernel
@donate_or_not
def test_sharded_update_is_the_unsharded_one(
    workers: Workers, mesh_shape: tuple[int, ...], options: dict[str, Any], kernel: str, donate: bool
):
    count = torch.Size(mesh_shape).numel()
    results = workers.run(count, update_sharded, mesh_shape, options, kernel, donate)
    params, *all_grads = (full_tree(seed) for seed in range(4))
    expected = updates(params, all_grads, options, kernel, donate)
    assert expected[1].step == 2
    for result in results:
        if kernel == "fused":  # its vector body and scalar tail round differently, and shards have other tails
            assert_close(result, expected)
        else:
            assert_equal(result, expected)


PLACEMENTS = {"rows": [Shard(0)], "columns": [Shard(1)], "replicated": [Replicate()]}


def gradient_from(placements: list[Any], full: Tensor, mesh: DeviceMesh) -> Tensor:
    if isinstance(placements[0], Partial):  # shares that sum up exactly
        return DTensor.from_local(full * (0.25 if mesh.get_local_rank() else 0.75), mesh, placements)
    return distribute_tensor(full, mesh, placements)


def update_with_other_placements(kernel: Any) -> dict[Any, Any]:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    param, grad = torch.randn(5, 3), torch.randn(5, 3)
    hparams = AdamHparams(lr=0.1)
    results: dict[Any, Any] = {}
    for name, placements in PLACEMENTS.items():
        params = {"w": distribute_tensor(param, mesh, placements)}
        for grad_name, grad_placements in {**PLACEMENTS, "partial": [Partial()]}.items():
            grads = {"w": gradient_from(grad_placements, grad, mesh)}
            kept = grads["w"].to_local().clone()
            new = adam_update(params, grads, adam_init(params, hparams), hparams, kernel=kernel)
            assert torch.equal(grads["w"].to_local(), kept)
            assert [x.placements for x in optree.tree_leaves(new) if isinstance(x, DTensor)] == [tuple(placements)] * 3
            results[name, grad_name] = full(new)
    return results


@every_kernel
def test_gradients_are_brought_to_the_placements_of_their_parameters(workers: Workers, kernel: Any):
    torch.manual_seed(0)
    params, grads = {"w": torch.randn(5, 3)}, {"w": torch.randn(5, 3)}
    hparams = AdamHparams(lr=0.1)
    expected = adam_update(params, grads, adam_init(params, hparams), hparams, kernel=kernel)
    for results in workers.run(2, update_with_other_placements, kernel):
        assert len(results) == 12
        for result in results.values():
            assert_within_roundings(result, expected, 2)


def update_with_dtensor_scalars() -> tuple[Any, Any]:
    """Under one rank only: an infinity that is a sum still to be made, and a scale that is a norm of shards."""
    mesh = init_device_mesh("cpu", (2,))
    params = {"w": distribute_tensor(torch.arange(6.0), mesh, [Shard(0)]), "plain": torch.ones(2)}
    hparams = AdamHparams(lr=0.1)
    state = adam_init(params, hparams)
    flag = DTensor.from_local(torch.tensor(float(dist.get_rank())), mesh, [Partial()])
    skipped = adam_update(params, params, state, hparams, found_inf=flag)
    norm = nn.utils.get_total_norm([params["w"]])
    assert isinstance(norm, DTensor)
    scaled = adam_update(params, params, state, hparams, found_inf=~norm.isfinite(), grad_scale=norm)
    assert all(type(x) is Tensor for x in (skipped[1].step, scaled[1].step, scaled[0]["plain"]))
    return full(skipped), full(scaled)


def test_found_inf_and_grad_scale_may_be_dtensors(workers: Workers):
    params = {"w": torch.arange(6.0), "plain": torch.ones(2)}
    hparams = AdamHparams(lr=0.1)
    state = adam_init(params, hparams)
    expected = adam_update(params, params, state, hparams, grad_scale=55**0.5)
    for skipped, scaled in workers.run(2, update_with_dtensor_scalars):
        assert_equal(skipped, (params, state))
        assert_close(scaled, expected)


def explain_shards() -> Any:
    mesh = init_device_mesh("cpu", (2,))
    params = {name: distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]) for name in ("a", "b")}
    grads = {"a": params["a"], "b": distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])}
    hparams = AdamHparams()
    found = explain(params, grads, adam_init(params, hparams), hparams)
    return (
        found.groups[0].element_count,
        [x for x in found.new_memory if "result" not in x.why],
        found.new_memory[0].nbytes,
    )


def test_an_explanation_is_of_this_process_and_names_the_gradients_that_travel(workers: Workers):
    for count, copies, nbytes in workers.run(2, explain_shards):
        assert (count, nbytes) == (12, 48)
        assert [tuple(x) for x in copies] == [
            (["grads['b']"], 24, "is redistributed to the placements of its parameter")
        ]


def skip_missing() -> Any:
    mesh = init_device_mesh("cpu", (2,))
    params = {name: distribute_tensor(torch.ones(3), mesh, [Shard(0)]) for name in ("moves", "stands")}
    hparams = AdamHparams(lr=0.1)
    state = adam_init(params, hparams, per_leaf_step=True)
    return full(adam_update(params, {"moves": params["moves"], "stands": None}, state, hparams))


def test_sharded_leaf_without_gradient_stands_still(workers: Workers):
    for params, state in workers.run(2, skip_missing):
        assert_close(params, {"moves": torch.full((3,), 0.9), "stands": torch.ones(3)})
        assert state.step == {"moves": 1, "stands": 0}


def misfit_calls() -> dict[str, Callable[[], Any]]:
    mesh, other_mesh = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    hparams = AdamHparams(lr=0.1)
    plain = torch.arange(6.0).view(3, 2)
    rows, columns = (distribute_tensor(plain, mesh, [Shard(dim)]) for dim in (0, 1))
    elsewhere = distribute_tensor(plain, other_mesh, [Replicate(), Shard(0)])
    partial = DTensor.from_local(plain, mesh, [Partial()])
    unequal = DTensor.from_local(
        plain[:1] if dist.get_rank() == 0 else plain[1:], mesh, [Shard(0)], shape=(3, 2), stride=(2, 1)
    )

    def call(param: Any, grad: Any, moment: Any, **options: Any) -> Any:
        state = adam_init({"w": moment}, hparams)
        return adam_update({"w": param}, {"w": grad}, state, hparams, **options)

    def twice() -> Any:
        params = {"a": rows, "b": distribute_tensor(plain, mesh, [Shard(0)])}
        params["b"] = DTensor.from_local(rows.to_local()[:1], mesh, [Shard(0)])
        return adam_update(params, params, adam_init(params, hparams), hparams, donate=True)

    return {
        "plain gradient": lambda: call(rows, plain, rows),
        "plain parameter": lambda: call(plain, rows, plain),
        "plain moment": lambda: call(rows, rows, plain),
        "gradient on another mesh": lambda: call(rows, elsewhere, rows),
        "moment on another mesh": lambda: call(rows, rows, elsewhere),
        "moment split elsewhere": lambda: call(rows, rows, unequal),
        "gradient split elsewhere": lambda: call(rows, unequal, rows),
        "moment with other placements": lambda: call(rows, rows, columns),
        "partial parameter": lambda: call(partial, rows, partial),
        "overlapping shards": twice,
        "donated gradient": lambda: call(rows, rows, rows, donate=True),
        "autograd": lambda: call(rows.detach().requires_grad_(), rows, rows),
        "autograd of lr": lambda: adam_update(
            {"w": rows},
            {"w": rows},
            adam_init({"w": rows}, hparams),
            AdamHparams(lr=torch.tensor(0.1, requires_grad=True)),
        ),
        "vmap": lambda: torch.func.vmap(lambda scale: call(rows, rows, rows, grad_scale=scale))(torch.ones(2)),
    }


MISFITS = {
    "plain gradient": (
        ValueError,
        r"grads\['w'\] is no DTensor, but params\['w'\] is a DTensor on .*distribute_tensor",
    ),
    "plain parameter": (ValueError, r"grads\['w'\] is a DTensor on .*, but params\['w'\] is no DTensor.*full_tensor"),
    "plain moment": (ValueError, r"state\.exp_avg\['w'\] is no DTensor, but params\['w'\] is a DTensor"),
    "gradient on another mesh": (ValueError, r"grads\['w'\] is on DeviceMesh\(.*, but params\['w'\] is on DeviceMesh"),
    "moment on another mesh": (ValueError, r"state\.exp_avg\['w'\] is on DeviceMesh\(.*, but params\['w'\] is on"),
    "moment split elsewhere": (ValueError, r"state\.exp_avg\['w'\] has a local shard of shape .* Split both alike"),
    "gradient split elsewhere": (ValueError, r"grads\['w'\] has a local shard of shape .*, but params\['w'\] has"),
    "moment with other placements": (
        ValueError,
        r"state\.exp_avg\['w'\] is placed as .*Shard\(dim=1\).*, but params\['w'\] as .*Shard\(dim=0\).*redistribute",
    ),
    "partial parameter": (ValueError, r"params\['w'\] is placed as .*Partial.*redistribute"),
    "overlapping shards": (RuntimeError, r"Cannot donate params\['a'\]: it shares memory with params\['b'\]"),
    "donated gradient": (RuntimeError, r"Cannot donate params\['w'\]: it shares memory with grads\['w'\]"),
    "autograd": (RuntimeError, r"params\['w'\] is a DTensor, and the update is watched by autograd .*torch.no_grad"),
    "autograd of lr": (RuntimeError, r"params\['w'\] is a DTensor, and the update is watched by autograd"),
    "vmap": (RuntimeError, r"params\['w'\] is a DTensor, and the update is watched by a torch.func transform"),
}


def errors_of_misfits() -> dict[str, tuple[type[Exception], str]]:
    errors: dict[str, tuple[type[Exception], str]] = {}
    for name, call in misfit_calls().items():
        try:
            call()
        except Exception as error:
            errors[name] = (type(error), str(error))
    return errors


def test_misfits_are_errors_that_name_the_leaf_in_every_process(workers: Workers):
    for errors in workers.run(2, errors_of_misfits):
        assert errors.keys() == MISFITS.keys()
        for name, (error, text) in errors.items():
            expected, pattern = MISFITS[name]
            assert error is expected, (name, text)
            assert re.search(pattern, text), (name, text)


def backward_through_donated(kernel: Any) -> str:
    mesh = init_device_mesh("cpu", (2,))
    param = distribute_tensor(torch.ones(4), mesh, [Shard(0)]).requires_grad_()
    loss = (param * param).sum()
    hparams = AdamHparams(lr=0.1)
    with torch.no_grad():
        adam_update(param, param.clone(), adam_init(param, hparams), hparams, kernel=kernel, donate=True)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "nothing was noticed"


@every_kernel
def test_autograd_notices_that_a_saved_dtensor_was_donated(workers: Workers, kernel: str):
    for text in workers.run(2, backward_through_donated, kernel):
        assert "modified by an inplace operation" in text


def compile_sharded() -> Any:
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2,))
    hparams = AdamHparams(lr=0.1)
    params, grads = (
        {"w": distribute_tensor(x, mesh, [Shard(0)])} for x in (torch.ones(4, 3), torch.arange(12.0).view(4, 3))
    )
    step = torch.compile(
        lambda params, grads, state: adam_update(params, grads, state, hparams), fullgraph=True, backend="aot_eager"
    )
    new = step(params, grads, adam_init(params, hparams))
    assert new[0]["w"].placements == new[1].exp_avg["w"].placements == (Shard(0),)
    return full(new)


def test_compiled_sharded_update_is_the_eager_unsharded_one(workers: Workers):
    params, grads = {"w": torch.ones(4, 3)}, {"w": torch.arange(12.0).view(4, 3)}
    hparams = AdamHparams(lr=0.1)
    expected = adam_update(params, grads, adam_init(params, hparams), hparams)
    for result in workers.run(2, compile_sharded):
        assert_close(result, expected)


# Training. Every process sees the whole batch, so that the mean gradient of 1, 2 or 4 of them is exactly the plain one.

HPARAMS = AdamHparams(lr=3e-3, weight_decay=0.01, amsgrad=True)
STEPS = 8


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 34), nn.ReLU(), nn.Linear(34, 10))


def batch_loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    labels = torch.arange(16) % 10
    return cross_entropy(model(torch.randn(16, 64, generator=generator) + 2 * torch.eye(10, 64)[labels]), labels)


def shard(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def shard_tensor_parallel(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """Columns and rows over the second dimension of the mesh, FSDP over the first."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # of torch's own making
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return shard(model, mesh["data"])


def train(
    model: nn.Module,
    kernel: Any,
    *,
    stop: int = STEPS,
    folder: Path | None = None,
    save_at: tuple[int, ...] = (),
    before: Callable[[str, int], None] = lambda _, __: None,
) -> tuple[dict[int, float], Any, Any]:
    """Continue from the last checkpoint in `folder`. Returns the loss of each step, full parameters and state."""
    params = {name: weight.detach() for name, weight in model.named_parameters()}
    state = adam_init(params, HPARAMS)
    found = latest_checkpoint(folder) if folder else None
    if found:
        load_checkpoint(found, params, state)
    losses: dict[int, float] = {}
    for step in range(int(state.step), stop):
        loss = batch_loss(model, step)
        loss.backward()
        before("training", step)
        grads = {name: weight.grad for name, weight in model.named_parameters()}
        params, state = adam_update(params, grads, state, HPARAMS, kernel=kernel, donate=True)
        model.zero_grad()
        losses[step] = loss.item()
        if folder and step + 1 in save_at:
            before("saving", step)
            save_checkpoint(folder, params, state)
    return losses, full(params), tuple(full(state))


def train_sharded(mesh_shape: tuple[int, ...], how: str, kernel: str) -> Any:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("data", "tensor")[: len(mesh_shape)])
    return train((shard_tensor_parallel if how == "tensor parallel" else shard)(make_model(), mesh), kernel)


@pytest.fixture(scope="module")
def plain() -> Any:
    """The run without sharding, once for all tests: single and foreach are bit-equal."""
    return train(make_model(), "single")


@pytest.mark.parametrize("kernel", ["single", "foreach"])
@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2)], ids=["shards", "replicas of shards"])
def test_training_with_fully_shard_is_plain_training_bit_for_bit(
    workers: Workers, plain: Any, mesh_shape: tuple[int, ...], kernel: str
):
    for losses, params, state in workers.run(torch.Size(mesh_shape).numel(), train_sharded, mesh_shape, "fsdp", kernel):
        assert losses == plain[0]
        assert_equal((params, state), plain[1:])


@pytest.mark.parametrize(
    ("mesh_shape", "how", "kernel"),
    [((2,), "fsdp", "fused"), ((3,), "fsdp", "single"), ((2, 2), "tensor parallel", "single")],
    ids=["fused", "three processes", "tensor parallel"],
)
def test_training_with_other_sums_is_plain_training_within_rounding(
    workers: Workers, plain: Any, mesh_shape: tuple[int, ...], how: str, kernel: str
):
    for losses, params, _ in workers.run(torch.Size(mesh_shape).numel(), train_sharded, mesh_shape, how, kernel):
        assert list(losses.values()) == pytest.approx(list(plain[0].values()), rel=2e-5)
        # Where a gradient is near 0, Adam divides rounding by rounding: a fraction of a step.
        for name, param in params.items():
            torch.testing.assert_close(param, plain[1][name], rtol=0, atol=0.1 * float(HPARAMS.lr))


def train_by_torch(kernel: str) -> tuple[list[float], Any]:
    model = shard(make_model(), init_device_mesh("cpu", (2,)))
    options = {"lr": 3e-3, "weight_decay": 0.01, "amsgrad": True}
    optimizer = torch.optim.Adam(model.parameters(), **options, **TORCH_FLAGS[kernel])
    losses: list[float] = []
    for step in range(STEPS):
        loss = batch_loss(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, full({name: weight.detach() for name, weight in model.named_parameters()})


@every_kernel
def test_training_with_fully_shard_is_that_of_torch_optim_bit_for_bit(workers: Workers, kernel: str):
    [expected, _] = workers.run(2, train_by_torch, kernel)
    for losses, params, _ in workers.run(2, train_sharded, (2,), "fsdp", kernel):
        assert list(losses.values()) == expected[0]
        assert_equal(params, expected[1])


# Checkpoints.


def train_with_checkpoints(folder: Path, stop: int, save_at: tuple[int, ...], crash: str | None = None) -> Any:
    model = shard(make_model(), init_device_mesh("cpu", (dist.get_world_size(),)))
    return train(model, "single", stop=stop, folder=folder, save_at=save_at, before=crash_when(crash))


def crash_when(crash: str | None) -> Callable[[str, int], None]:
    """Kills this process before the update of step 4, or in the second save, where it is about to do `crash`."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(what: str, step: int) -> None:
        rank = dist.get_rank()
        if (what, step, crash, rank) == ("training", 4, "training", 1):
            die()
        if (what, step) == ("saving", 5):
            if crash == "writing shards" and rank == 1:
                dcp.FileSystemWriter.write_data = die
            if crash == "writing metadata" and rank == 0:
                dcp.FileSystemWriter.finish = die
            if crash == "renaming" and rank == 0:
                os.replace = die

    return before


@pytest.mark.parametrize("count", [1, 3, 4])
def test_checkpoint_of_two_processes_continues_on_others(workers: Workers, plain: Any, tmp_path: Path, count: int):
    for losses, *_ in workers.run(2, train_with_checkpoints, tmp_path, 4, (2, 4)):
        assert losses == {step: plain[0][step] for step in range(4)}
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-00000004"
    for losses, params, state in workers.run(count, train_with_checkpoints, tmp_path, STEPS, ()):
        assert list(losses) == [4, 5, 6, 7]
        if count == 3:  # a third of a sum of three rounds
            assert list(losses.values()) == pytest.approx([plain[0][step] for step in losses], rel=2e-5)
        else:
            assert losses == {step: plain[0][step] for step in losses}
            assert_equal((params, state), plain[1:])


@pytest.mark.parametrize("crash", ["training", "writing shards", "writing metadata", "renaming"])
def test_a_killed_run_loses_only_what_followed_the_last_complete_checkpoint(
    workers: Workers, plain: Any, tmp_path: Path, crash: str
):
    # Of their own: with a killed process goes its record of the lines that it has run.
    with Workers() as doomed, pytest.raises(WorkerDiedError, match="died with exit code -9"):
        doomed.run(2, train_with_checkpoints, tmp_path, STEPS, (3, 6), crash)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-00000003"
    assert (tmp_path / "unfinished-step-00000006").exists() == (crash != "training")
    for losses, params, state in workers.run(2, train_with_checkpoints, tmp_path, STEPS, (3, 6)):
        assert losses == {step: plain[0][step] for step in range(3, STEPS)}
        assert_equal((params, state), plain[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]
