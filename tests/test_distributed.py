"""The adapters inside torch.distributed: what several processes compute together is what one computes alone."""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import autograd, rpc
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils._pytree import tree_map

from functional_adam import _FunctionalAdam, _FunctionalAdamW
from functional_adam.distributed import (
    distributed_optimizer,
    hook_then_step,
    register,
    step_in_backward,
    step_in_ddp,
    unregister,
)
from tests.processes import Workers
from tests.tolerances import assert_close, assert_equal

RANKS = 2
STEPS = 5
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True}
ADAPTERS: dict[str, Any] = {"Adam": _FunctionalAdam, "AdamW": _FunctionalAdamW}
OPTIMIZERS: dict[str, Any] = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}

# With the factor by which a scheduler multiplies the learning rate after each step.
RUNS = (("Adam", 1.0), ("AdamW", 0.5))


def torchs_optim() -> Any:
    """`torch.distributed.optim`, first imported by the package: torch warns of its own TorchScript."""
    unregister()
    import torch.distributed.optim

    return torch.distributed.optim


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: Callable[[Tensor], Tensor], step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator)
    return (model(x) - y).square().mean()


def values(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def train_alone(name: str, *, gamma: float = 1.0, steps: Sequence[int] = range(STEPS), ranks: int = RANKS) -> Any:
    """The parameters after torch.optim alone has taken `steps` by the mean of the gradients of `ranks`."""
    model = make_model()
    params = list(model.parameters())
    optimizer = OPTIMIZERS[name](params, **OPTIONS, foreach=False)
    scheduler = ExponentialLR(optimizer, gamma)
    for step in steps:
        grads = [torch.autograd.grad(loss_of(model, step, rank), params) for rank in range(ranks)]
        for param, *shares in zip(params, *grads, strict=True):
            param.grad = sum(share / ranks for share in shares)  # added up as an all-reduce does
        optimizer.step()
        scheduler.step()
    return values(model)


def train(model: nn.Module, optimizer: Any, gamma: float, *, steps: int = STEPS, is_overlapped: bool) -> list[Tensor]:
    """The parameters after `steps` in this process, which `backward` takes itself if `is_overlapped`."""
    scheduler = ExponentialLR(optimizer, gamma)
    for step in range(steps):
        loss_of(model, step, dist.get_rank()).backward()
        if not is_overlapped:
            optimizer.step()
        model.zero_grad()
        scheduler.step()
    return values(model)


# What each of two processes finds. A function that raises there fails the test.


def a_step_follows_backward_or_overlaps_with_it() -> None:
    optim = torchs_optim()
    from torch.distributed.algorithms.ddp_comm_hooks import optimizer_overlap_hooks as hooks

    ways = ("step", "ours", "views", "ours, functional", "torch's", "torch's, functional", "torch's fused")
    for (name, gamma), way in product(RUNS, ways):
        model = make_model()
        # Buckets of about a hundred numbers, so that there are several.
        ddp = DistributedDataParallel(model, bucket_cap_mb=4e-4, gradient_as_bucket_view=way == "views")
        optimizer = ADAPTERS[name](model.parameters(), **OPTIONS)
        register()
        if "functional" in way:
            optimizer = optim.as_functional_optim(ADAPTERS[name], **OPTIONS)
        if way == "torch's fused":
            ddp._register_fused_optim(ADAPTERS[name], **OPTIONS)
            optimizer._opt_called, gamma = True, 1.0  # what steps is another, out of reach of the scheduler
        unregister()
        if way in ("ours", "views", "ours, functional"):
            step_in_ddp(ddp, optimizer)
        elif way in ("torch's", "torch's, functional"):
            state = hooks._OptimizerHookState(optimizer)
            ddp.register_comm_hook(None, hooks._hook_then_optimizer(allreduce_hook, state))
        found = train(ddp, optimizer, gamma, is_overlapped=way != "step")
        assert_equal(found, train_alone(name, gamma=gamma))


def ddp_overlap_leaves_others_parameters_alone_and_waits_for_summed_gradients() -> None:
    model = make_model()
    ddp = DistributedDataParallel(model)
    step_in_ddp(ddp, _FunctionalAdam(model[0].parameters(), **OPTIONS))
    optimizer = torch.optim.Adam(model[2:].parameters(), **OPTIONS, foreach=False)
    for step in range(STEPS):
        with ddp.no_sync():
            loss_of(ddp, step, dist.get_rank()).mul(0.25).backward()
        loss_of(ddp, step, dist.get_rank()).mul(0.75).backward()
        optimizer.step()
        model.zero_grad()
    assert_close(values(model), train_alone("Adam"))


def ddp_overlap_steps_by_what_the_hook_returns_and_an_error_reaches_backward() -> None:
    def double(state: str, bucket: Any) -> Any:
        assert state == "the state"
        future = torch.futures.Future()
        future.set_result([bucket.buffer() * 2])
        return future

    model, plain = make_model(), make_model()
    ddp = DistributedDataParallel(model)
    optimizer = _FunctionalAdam(model.parameters(), **OPTIONS)
    step_in_ddp(ddp, optimizer, hook=double, state="the state")
    loss_of(ddp, 0, 0).backward()
    loss_of(plain, 0, 0).mul(2).backward()
    assert_equal([param.grad for param in model.parameters()], [param.grad for param in plain.parameters()])
    torch.optim.Adam(plain.parameters(), **OPTIONS, foreach=False).step()
    assert_equal(values(model), values(plain))
    optimizer.param_group["lr"] = -1.0
    with pytest.raises(Exception, match=r"Invalid learning rate: -1\.0"):
        loss_of(ddp, 0, 0).backward()
    assert_equal(values(model), values(plain))


def zero_shards_are_what_one_process_computes() -> None:
    make_zero = torchs_optim().ZeroRedundancyOptimizer
    for name, gamma in RUNS:
        model = make_model()
        ddp = DistributedDataParallel(model)
        zero = make_zero(model.parameters(), ADAPTERS[name], **OPTIONS)
        scheduler = ExponentialLR(zero, gamma)
        for step in range(STEPS):
            if step == 2:  # through a checkpoint
                zero.consolidate_state_dict(to=0)
                box = [zero.state_dict() if dist.get_rank() == 0 else None]
                dist.broadcast_object_list(box, src=0)
                zero = make_zero(model.parameters(), ADAPTERS[name], **OPTIONS)
                zero.load_state_dict(box[0])
                scheduler.optimizer = zero
            loss_of(ddp, step, dist.get_rank()).backward()
            zero.step()
            zero.zero_grad()
            scheduler.step()
        assert_equal(values(model), train_alone(name, gamma=gamma))


def zero_with_overlap_is_what_one_process_computes_but_torchs_class_ignores_the_scheduler() -> None:
    make_zero = torchs_optim().ZeroRedundancyOptimizer
    from torch.distributed.algorithms.ddp_comm_hooks import ddp_zero_hook

    warnings.filterwarnings("ignore", message=".TorchScript. support", category=DeprecationWarning)
    idle = 2  # steps that only find out about the buckets; then the learning rate starts anew
    for name, make, gamma, effect, shard_buckets in (
        ("Adam", _FunctionalAdam, 1.0, 1.0, False),
        ("AdamW", _FunctionalAdamW, 0.5, 0.5, False),
        ("Adam", _FunctionalAdam, 0.5, 0.5, True),
        ("Adam", torch.optim.Adam, 0.5, 1.0, False),
    ):
        model = make_model()
        ddp = DistributedDataParallel(model, bucket_cap_mb=4e-4)
        register()
        zero = make_zero(model.parameters(), make, overlap_with_ddp=True, **OPTIONS)
        unregister()
        # torch refuses gloo, which may hang with buckets out of order; those of this hook are in order.
        with mock.patch.object(dist, "get_backend", return_value="nccl"):
            hook = ddp_zero_hook.hook_with_zero_step(allreduce_hook, ddp, zero, shard_buckets=shard_buckets)
        ddp.register_comm_hook(None, hook)
        zero._opt_called = True  # lr_scheduler warns without a call of `step`, which does nothing here
        found = train(ddp, zero, gamma, steps=STEPS + idle, is_overlapped=True)
        assert_equal(found, train_alone(name, gamma=effect, steps=range(idle, STEPS + idle)))


def train_wrapped(wrapper: str, make: Any) -> tuple[list[Tensor], dict[Any, Any]]:
    """The parameters and the state, as far as this process has them."""
    optim, model = torchs_optim(), make_model()
    if wrapper == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    if wrapper == "_NamedOptimizer":
        optimizer = optim._NamedOptimizer(model.named_parameters(), make, None, None, foreach=True, **OPTIONS)
        optimizer.init_state()
    else:
        optimizer = make(model.parameters(), foreach=True, **OPTIONS)
    if wrapper == "PostLocalSGDOptimizer":
        optimizer = optim.PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=2, warmup_steps=1))
    for step in range(STEPS):
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
        model.zero_grad()
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
    found = values(model), optimizer.state_dict()["state"]
    return tree_map(lambda x: x.to_local() if isinstance(x, DTensor) else x, found)


def wrapped_and_sharded_adapters_are_torch_optim_there() -> None:
    for wrapper, name in product(("PostLocalSGDOptimizer", "_NamedOptimizer", "FSDP2"), OPTIMIZERS):
        ours, theirs = (train_wrapped(wrapper, make[name]) for make in (ADAPTERS, OPTIMIZERS))
        assert_equal(ours, theirs)
        assert ("0.weight" in ours[1]) == (wrapper == "_NamedOptimizer")


def references_to_params(model: Any) -> list[Any]:
    return [rpc.RRef(param) for param in model.local_value().parameters()]


def rpc_optimizer_is_what_one_process_computes() -> None:
    rank = dist.get_rank()
    torchs_optim()  # before rank 0 makes rank 1 import it, with torch's warnings
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=RANKS)
    for name, change in product(OPTIMIZERS, (unregister, register)) if rank == 0 else ():
        change()
        model = rpc.remote("worker1", make_model)
        params = rpc.rpc_sync("worker1", references_to_params, (model,))
        optimizer = distributed_optimizer(ADAPTERS[name], params, **OPTIONS)
        for step in range(STEPS):
            with autograd.context() as context:
                autograd.backward(context, [loss_of(model.rpc_sync().forward, step, 0)])
                optimizer.step(context)
        assert_equal(values(model.to_here()), train_alone(name, ranks=1))
    rpc.shutdown()


@pytest.mark.parametrize(
    "claim",
    [
        a_step_follows_backward_or_overlaps_with_it,
        ddp_overlap_leaves_others_parameters_alone_and_waits_for_summed_gradients,
        ddp_overlap_steps_by_what_the_hook_returns_and_an_error_reaches_backward,
        zero_shards_are_what_one_process_computes,
        zero_with_overlap_is_what_one_process_computes_but_torchs_class_ignores_the_scheduler,
        wrapped_and_sharded_adapters_are_torch_optim_there,
        rpc_optimizer_is_what_one_process_computes,
    ],
    ids=lambda claim: claim.__name__,
)
def test_in_each_of_two_processes(claim: Callable[[], None]) -> None:
    with Workers() as workers:  # new ones, since processes start RPC but once
        workers.run(RANKS, claim)


# Steps in backward.


@pytest.mark.parametrize(("name", "gamma"), RUNS)
def test_steps_in_backward_are_a_step_afterwards_and_frozen_parameters_stand(name: str, gamma: float) -> None:
    model, frozen = make_model(), torch.ones(2)
    optimizer = ADAPTERS[name]([*model.parameters(), frozen], **OPTIONS)
    scheduler = ExponentialLR(optimizer, gamma)
    with step_in_backward(optimizer):
        for step in range(STEPS):
            loss_of(model, step, 0).backward()
            assert all(param.grad is None for param in model.parameters())
            scheduler.step()
    after = values(model)
    assert_equal(after, train_alone(name, gamma=gamma, ranks=1))
    loss_of(model, 0, 0).backward()
    assert_equal(values(model), after)
    assert all(param.grad is not None for param in model.parameters())
    assert frozen not in optimizer.state


def test_steps_in_backward_keep_the_gradients_of_one_layer_at_most() -> None:
    model = make_model()
    counts: list[int] = []

    def count(_: Tensor) -> None:
        counts.append(sum(param.grad is not None for param in model.parameters()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    loss_of(model, 0, 0).backward()
    assert max(counts) == 6
    counts.clear()
    model.zero_grad()
    with step_in_backward(_FunctionalAdam(model.parameters())):
        loss_of(model, 0, 0).backward()
    assert max(counts) == 1


def test_torchs_own_step_in_backward_takes_the_adapter() -> None:
    model = make_model()
    torchs_optim()._apply_optimizer_in_backward(_FunctionalAdam, model.parameters(), OPTIONS)
    for step in range(STEPS):
        loss_of(model, step, 0).backward()
    assert_equal(values(model), train_alone("Adam", ranks=1))


# Registration and errors.


def test_registration_is_idempotent_and_reversible_and_keeps_what_was_there() -> None:
    table = torchs_optim().utils.functional_optim_map
    before = dict(table)
    for change, added in ((register, {x: x for x in ADAPTERS.values()}), (unregister, {})):
        for _ in range(2):
            change()
            assert table == {**before, **added}


def test_what_this_torch_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for function, module, match in (
        (
            partial(distributed_optimizer, _FunctionalAdam, []),
            None,
            r"no torch\.distributed\.optim \(import of .*halted",
        ),
        (partial(distributed_optimizer, _FunctionalAdam, []), SimpleNamespace(), "built without RPC"),
        (register, SimpleNamespace(), r"no torch\.distributed\.optim\.utils\.functional_optim_map"),
    ):
        monkeypatch.setitem(sys.modules, "torch.distributed.optim", module)
        with pytest.raises(RuntimeError, match=match):
            function()


def test_optimizers_without_parameters_or_of_another_class_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameters that require grad"):
        step_in_backward(_FunctionalAdam([torch.ones(2)]))
    other: Any = torch.optim.Adam([torch.ones(2, requires_grad=True)])
    for refused in (step_in_backward, partial(hook_then_step, mock.Mock())):
        with pytest.raises(TypeError, match=r"^optimizer is of type Adam\. Expected a _FunctionalAdam"):
            refused(other)
