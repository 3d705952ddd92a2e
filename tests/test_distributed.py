"""The adapters inside torch.distributed: what several processes compute together is what one computes alone."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ExponentialLR

import functional_adam
from functional_adam import _FunctionalAdam
from functional_adam.distributed import (
    distributed_optimizer,
    hook_then_step,
    register,
    registration,
    step_in_backward,
    step_in_ddp,
    unregister,
)
from tests.processes import Workers
from tests.tolerances import assert_close, assert_equal

RANKS = 2
STEPS = 5
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True}
OPTIMIZERS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}

each_name = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as workers:
        yield workers


def adapter_of(name: str) -> Any:
    return getattr(functional_adam, f"_Functional{name}")


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: Callable[[Tensor], Tensor], step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator)
    return (model(x) - y).square().mean()


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def mean_grads(model: nn.Module, step: int) -> list[Tensor]:
    """The mean of the ranks' gradients, added up as an all-reduce of two does."""
    params = list(model.parameters())
    first, second = (torch.autograd.grad(loss_of(model, step, rank), params) for rank in range(RANKS))
    return [a / RANKS + b / RANKS for a, b in zip(first, second, strict=True)]


def train_alone(name: str, *, steps: Sequence[int] = range(STEPS), gamma: float | None = None) -> list[Tensor]:
    """The parameters after torch.optim alone has taken `steps`, each followed by a decay of the learning rate."""
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters(), **OPTIONS, foreach=False)
    scheduler = None if gamma is None else ExponentialLR(optimizer, gamma)
    for step in steps:
        for param, grad in zip(model.parameters(), mean_grads(model, step), strict=True):
            param.grad = grad
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return values(model.parameters())


# DistributedDataParallel.


def train_in_ddp(name: str, way: str, gamma: float | None) -> list[Tensor]:
    model = make_model()
    # Buckets of about a hundred numbers, so that there are several.
    ddp = DistributedDataParallel(model, bucket_cap_mb=4e-4, gradient_as_bucket_view=way == "views")
    optimizer = adapter_of(name)(model.parameters(), **OPTIONS)
    optim = registration.import_optim()
    from torch.distributed.algorithms.ddp_comm_hooks import optimizer_overlap_hooks as hooks
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    if "as_functional_optim" in way:
        register()
        optimizer = optim.as_functional_optim(adapter_of(name), **OPTIONS)
        unregister()
    if way in ("ours", "views", "ours_as_functional_optim"):
        step_in_ddp(ddp, optimizer)
    elif way == "torchs_fused_optim":
        register()
        ddp._register_fused_optim(adapter_of(name), **OPTIONS)
        unregister()
    elif way in ("torchs", "torchs_as_functional_optim"):
        state = hooks._OptimizerHookState(optimizer)
        ddp.register_comm_hook(None, hooks._hook_then_optimizer(allreduce_hook, state))
    scheduler = None if gamma is None else ExponentialLR(optimizer, gamma)
    for step in range(STEPS):
        loss_of(ddp, step, dist.get_rank()).backward()
        if way == "step":
            optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return values(model.parameters())


@each_name
@pytest.mark.parametrize("gamma", [None, 0.5])
@pytest.mark.parametrize(
    "way", ["step", "ours", "views", "ours_as_functional_optim", "torchs", "torchs_as_functional_optim"]
)
def test_ddp_overlap_is_backward_and_then_a_step(workers: Workers, name: str, way: str, gamma: float | None) -> None:
    expected = train_alone(name, gamma=gamma)
    for params in workers.run(RANKS, train_in_ddp, name, way, gamma):
        assert_equal(params, expected)


def train_with_two_optimizers() -> list[Tensor]:
    model = make_model()
    ddp = DistributedDataParallel(model)
    own, others = [*model[0].parameters()], [*model[2:].parameters()]
    step_in_ddp(ddp, _FunctionalAdam(own, **OPTIONS))
    optimizer = torch.optim.Adam(others, **OPTIONS, foreach=False)
    for step in range(STEPS):
        with ddp.no_sync():
            loss_of(ddp, step, dist.get_rank()).mul(0.25).backward()
        loss_of(ddp, step, dist.get_rank()).mul(0.75).backward()
        optimizer.step()
        model.zero_grad()
    return values(model.parameters())


@each_name
def test_torchs_fused_optimizer_takes_the_registered_adapter(workers: Workers, name: str) -> None:
    expected = train_alone(name)
    for params in workers.run(RANKS, train_in_ddp, name, "torchs_fused_optim", None):
        assert_equal(params, expected)


def test_ddp_overlap_leaves_others_parameters_alone_and_waits_for_summed_gradients(workers: Workers) -> None:
    expected = train_alone("Adam")
    for params in workers.run(RANKS, train_with_two_optimizers):
        assert_close(params, expected)


def train_with_a_hook_that_returns_another_tensor(way: str) -> list[Tensor]:
    states: list[str] = []

    def double(state: str, bucket: Any) -> Any:
        states.append(state)
        future = torch.futures.Future()
        future.set_result([bucket.buffer() * 2])
        return future

    model = make_model()
    ddp = DistributedDataParallel(model)
    optimizer = _FunctionalAdam(model.parameters(), **OPTIONS)
    if way == "hook_then_step":
        ddp.register_comm_hook("the state", hook_then_step(double, optimizer))
    else:
        step_in_ddp(ddp, optimizer, hook=double, state="the state")
    before = values(model.parameters())
    loss_of(ddp, 0, 0).backward()
    assert states == ["the state"]
    after, twice = values(model.parameters()), [p.grad for p in model.parameters()]
    optimizer = torch.optim.Adam(before, **OPTIONS, foreach=False)
    for param, grad in zip(before, twice, strict=True):
        param.grad = grad
    optimizer.step()
    assert_equal(after, before)
    plain = make_model()
    loss_of(plain, 0, 0).backward()
    assert_equal(twice, [p.grad * 2 for p in plain.parameters() if p.grad is not None])
    return after


@pytest.mark.parametrize("way", ["hook_then_step", "step_in_ddp"])
def test_ddp_overlap_steps_by_what_the_hook_returns(workers: Workers, way: str) -> None:
    workers.run(1, train_with_a_hook_that_returns_another_tensor, way)


def fail_in_the_hook() -> tuple[str, bool]:
    model = make_model()
    ddp = DistributedDataParallel(model)
    optimizer = _FunctionalAdam(model.parameters())
    step_in_ddp(ddp, optimizer)
    optimizer.param_group["lr"] = -1.0
    before = values(model.parameters())
    try:
        loss_of(ddp, 0, 0).backward()
    except Exception as error:
        return str(error), all(map(torch.equal, before, values(model.parameters())))
    return "", False


def test_an_error_of_the_update_reaches_the_caller_of_backward(workers: Workers) -> None:
    for message, unchanged in workers.run(RANKS, fail_in_the_hook):
        assert "Invalid learning rate: -1.0" in message
        assert unchanged


# ZeroRedundancyOptimizer.


def train_in_zero(name: str, gamma: float | None) -> list[Tensor]:
    model = make_model()
    ddp = DistributedDataParallel(model)
    optim = registration.import_optim()
    zero = optim.ZeroRedundancyOptimizer(model.parameters(), adapter_of(name), **OPTIONS)
    scheduler = None if gamma is None else ExponentialLR(zero, gamma)
    for step in range(STEPS):
        if step == 2:  # through a checkpoint
            zero.consolidate_state_dict(to=0)
            box = [zero.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box, src=0)
            zero = optim.ZeroRedundancyOptimizer(model.parameters(), adapter_of(name), **OPTIONS)
            zero.load_state_dict(box[0])
            if scheduler is not None:
                scheduler.optimizer = zero
        loss_of(ddp, step, dist.get_rank()).backward()
        zero.step()
        zero.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return values(model.parameters())


@each_name
@pytest.mark.parametrize("gamma", [None, 0.5])
def test_zero_shards_are_what_one_process_computes(workers: Workers, name: str, gamma: float | None) -> None:
    expected = train_alone(name, gamma=gamma)
    for params in workers.run(RANKS, train_in_zero, name, gamma):
        assert_equal(params, expected)


# The first steps under overlap only find out about the buckets; then the learning rate starts anew.
IDLE = 2


def train_in_overlapping_zero(name: str, gamma: float | None, whose: str, shard_buckets: bool) -> list[Tensor]:
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=4e-4)
    optim = registration.import_optim()
    from torch.distributed.algorithms.ddp_comm_hooks import ddp_zero_hook
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    warnings.filterwarnings("ignore", message=".TorchScript. support", category=DeprecationWarning)
    register()
    optimizer_class = adapter_of(name) if whose == "ours" else OPTIMIZERS[name]
    zero = optim.ZeroRedundancyOptimizer(model.parameters(), optimizer_class, overlap_with_ddp=True, **OPTIONS)
    unregister()
    # torch refuses gloo, which may hang with buckets out of order; those of this hook are in order.
    with mock.patch.object(dist, "get_backend", return_value="nccl"):
        hook = ddp_zero_hook.hook_with_zero_step(allreduce_hook, ddp, zero, shard_buckets=shard_buckets)
    ddp.register_comm_hook(None, hook)
    scheduler = None if gamma is None else ExponentialLR(zero, gamma)
    for step in range(STEPS + IDLE):
        loss_of(ddp, step, dist.get_rank()).backward()
        zero.zero_grad()
        if scheduler is not None:
            if step == 0:
                zero.step()  # which does nothing here, but lr_scheduler warns without one
            scheduler.step()
    return values(model.parameters())


@each_name
@pytest.mark.parametrize("gamma", [None, 0.5])
@pytest.mark.parametrize("shard_buckets", [False, True])
def test_zero_with_overlap_is_what_one_process_computes(
    workers: Workers, name: str, gamma: float | None, shard_buckets: bool
) -> None:
    expected = train_alone(name, steps=range(IDLE, STEPS + IDLE), gamma=gamma)
    for params in workers.run(RANKS, train_in_overlapping_zero, name, gamma, "ours", shard_buckets):
        assert_equal(params, expected)


def test_under_zero_overlap_torchs_class_ignores_the_scheduler_and_ours_does_not(workers: Workers) -> None:
    constant = train_alone("Adam", steps=range(IDLE, STEPS + IDLE))
    scheduled = train_alone("Adam", steps=range(IDLE, STEPS + IDLE), gamma=0.5)
    (theirs, _) = workers.run(RANKS, train_in_overlapping_zero, "Adam", 0.5, "torch", False)
    (ours, _) = workers.run(RANKS, train_in_overlapping_zero, "Adam", 0.5, "ours", False)
    assert_equal(theirs, constant)
    assert_equal(ours, scheduled)
    assert not torch.equal(ours[0], theirs[0])


# Wrappers.


def train_in_post_local_sgd(name: str, whose: str) -> tuple[list[Tensor], Any]:
    model = make_model()
    optim = registration.import_optim()
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    make: Any = adapter_of(name) if whose == "ours" else OPTIMIZERS[name]
    optimizer = optim.PostLocalSGDOptimizer(
        make(model.parameters(), **OPTIONS, foreach=True), PeriodicModelAverager(period=2, warmup_steps=1)
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
    return values(model.parameters()), optimizer.state_dict()["state"]


@each_name
def test_post_local_sgd_is_that_around_torch_optim(workers: Workers, name: str) -> None:
    ours = workers.run(RANKS, train_in_post_local_sgd, name, "ours")
    theirs = workers.run(RANKS, train_in_post_local_sgd, name, "torch")
    assert_equal(ours, theirs)


def train_in_named_optimizer(name: str, whose: str) -> tuple[list[Tensor], Any]:
    optim = registration.import_optim()
    model = make_model()
    make: Any = adapter_of(name) if whose == "ours" else OPTIMIZERS[name]
    optimizer = optim._NamedOptimizer(model.named_parameters(), make, None, None, **OPTIONS, foreach=True)
    optimizer.init_state()
    for step in range(STEPS):
        model.zero_grad()  # torch's wrapper has no zero_grad that works
        loss_of(model, step, 0).backward()
        optimizer.step()
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
    return values(model.parameters()), optimizer.state_dict()["state"]


@each_name
def test_named_optimizer_is_that_around_torch_optim(name: str) -> None:
    ours, theirs = (train_in_named_optimizer(name, whose) for whose in ("ours", "torch"))
    assert_equal(ours, theirs)
    assert "0.weight" in ours[1]


# FSDP2.


def train_in_fsdp(name: str, whose: str) -> tuple[list[Tensor], list[Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(make_model(), mesh=init_device_mesh("cpu", (RANKS,)))
    make: Any = adapter_of(name) if whose == "ours" else OPTIMIZERS[name]
    optimizer = make(model.parameters(), **OPTIONS, foreach=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
    columns = [model.parameters(), (optimizer.state[param]["exp_avg"] for param in model.parameters())]
    params, moments = ([x.detach().to_local().clone() for x in column] for column in columns)
    return params, moments


@each_name
def test_shards_of_fsdp2_are_those_of_torch_optim(workers: Workers, name: str) -> None:
    ours = workers.run(RANKS, train_in_fsdp, name, "ours")
    theirs = workers.run(RANKS, train_in_fsdp, name, "torch")
    assert_equal(ours, theirs)


# RPC.


class Server:
    """The second half of a model, which lives on its owner."""

    def __init__(self) -> None:
        self.half = make_model()[2:]

    def forward(self, x: Tensor) -> Tensor:
        return self.half(x)

    def params(self) -> list[Any]:
        from torch.distributed import rpc

        return [rpc.RRef(param) for param in self.half.parameters()]

    def values(self) -> list[Tensor]:
        return values(self.half.parameters())


def train_by_rpc() -> dict[str, list[Tensor]]:
    """The parameters by adapter and whether it is registered; all in one session, since RPC starts but once."""
    from torch.distributed import autograd, rpc

    rank = dist.get_rank()
    registration.import_optim()  # before rank 0 makes rank 1 import it, with torch's warnings
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=RANKS)
    results: dict[str, list[Tensor]] = {}
    for name in OPTIMIZERS if rank == 0 else ():
        for change, what in ((unregister, "plain"), (register, "registered")):
            change()
            half = make_model()[:2]
            server = rpc.remote("worker1", Server)
            rrefs = [*map(rpc.RRef, half.parameters()), *server.rpc_sync().params()]
            optimizer = distributed_optimizer(adapter_of(name), rrefs, **OPTIONS)
            for step in range(STEPS):
                with autograd.context() as context:
                    loss = loss_of(lambda x, server=server, half=half: server.rpc_sync().forward(half(x)), step, 0)
                    autograd.backward(context, [loss])
                    optimizer.step(context)
            results[f"{what} {name}"] = values(half.parameters()) + server.rpc_sync().values()
    rpc.shutdown()
    unregister()
    return results


def test_rpc_optimizer_is_what_one_process_computes(workers: Workers) -> None:
    workers.close()  # processes that have not had RPC yet
    results, _ = workers.run(RANKS, train_by_rpc)
    for name, optimizer_class in OPTIMIZERS.items():
        model = make_model()
        optimizer = optimizer_class(model.parameters(), **OPTIONS, foreach=False)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, step, 0).backward()
            optimizer.step()
        assert_equal(results[f"plain {name}"], values(model.parameters()))
        assert_equal(results[f"registered {name}"], values(model.parameters()))
    workers.close()


@pytest.mark.parametrize("has_optim", [False, True])
def test_without_rpc_the_error_says_so(has_optim: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_module(name: str) -> Any:
        if has_optim:
            return object()
        raise ImportError(f"no {name}")

    monkeypatch.setattr(registration.importlib, "import_module", no_module)
    match = "built without RPC" if has_optim else r"no torch.distributed.optim \(no torch.distributed.optim\)"
    with pytest.raises(RuntimeError, match=match):
        distributed_optimizer(_FunctionalAdam, [])


# Steps in backward.


@each_name
@pytest.mark.parametrize("gamma", [None, 0.5])
def test_steps_in_backward_are_a_step_afterwards(name: str, gamma: float | None) -> None:
    model, reference = make_model(), make_model()
    optimizer = adapter_of(name)(model.parameters(), **OPTIONS)
    afterwards = OPTIMIZERS[name](reference.parameters(), **OPTIONS, foreach=False)
    schedulers = [] if gamma is None else [ExponentialLR(one, gamma) for one in (optimizer, afterwards)]
    with step_in_backward(optimizer):
        for step in range(STEPS):
            loss_of(model, step, 0).backward()
            assert all(param.grad is None for param in model.parameters())
            loss_of(reference, step, 0).backward()
            afterwards.step()
            afterwards.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
    assert_equal(values(model.parameters()), values(reference.parameters()))
    before = values(model.parameters())
    loss_of(model, 0, 0).backward()
    assert_equal(values(model.parameters()), before)
    assert all(param.grad is not None for param in model.parameters())


def most_gradients_alive(model: nn.Module) -> int:
    """The largest number of gradients that exist together during a backward pass."""
    params = list(model.parameters())
    counts: list[int] = []

    def count(_: Tensor) -> None:
        counts.append(sum(param.grad is not None for param in params))

    handles = [param.register_post_accumulate_grad_hook(count) for param in params]
    loss_of(model, 0, 0).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return max(counts)


def test_steps_in_backward_keep_the_gradients_of_one_layer_at_most() -> None:
    model = make_model()
    assert most_gradients_alive(model) == 6
    with step_in_backward(_FunctionalAdam(model.parameters())):
        assert most_gradients_alive(model) <= 1


def test_torchs_own_step_in_backward_takes_the_adapter() -> None:
    model, reference = make_model(), make_model()
    optimizer = torch.optim.Adam(reference.parameters(), **OPTIONS, foreach=False)
    registration.import_optim()._apply_optimizer_in_backward(_FunctionalAdam, model.parameters(), OPTIONS)
    for step in range(STEPS):
        loss_of(model, step, 0).backward()
        loss_of(reference, step, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(values(model.parameters()), values(reference.parameters()))


def test_steps_in_backward_leave_frozen_parameters_alone() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    before = values(model[0].parameters())
    optimizer = _FunctionalAdam(model.parameters())
    with step_in_backward(optimizer):
        loss_of(model, 0, 0).backward()
    assert_equal(values(model[0].parameters()), before)
    assert len(optimizer.state) == 4


def test_steps_in_backward_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameters that require grad"):
        step_in_backward(_FunctionalAdam([torch.ones(2)]))


# Registration.


def test_registration_is_idempotent_and_reversible_and_keeps_what_was_there() -> None:
    table = registration._table()
    before = dict(table)
    register()
    register()
    assert {**before, **{c: c for c in (adapter_of("Adam"), adapter_of("AdamW"))}} == table
    unregister()
    unregister()
    assert table == before


def test_without_torchs_table_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(registration.import_optim().utils, "functional_optim_map")
    with pytest.raises(RuntimeError, match=r"no torch\.distributed\.optim\.utils\.functional_optim_map"):
        register()


def test_a_hook_refuses_another_optimizer() -> None:
    other: Any = torch.optim.Adam([torch.ones(2, requires_grad=True)])
    with pytest.raises(TypeError, match=r"^optimizer is of type Adam, expected a _FunctionalAdam"):
        hook_then_step(mock.Mock(), other)
