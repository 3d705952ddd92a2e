"""What the transforms cost.

`vmap`: one update of 64 small networks in a mapped call, against a direct call
on the stacked tree and against a loop of torch.optim.Adam(fused=True).step();
"own lr" gives each network a learning rate of its own.

`meta`: a meta-gradient through unrolled inner steps on a network of four
layers, against the same with TorchOpt, and with plain gradient descent, the
floor that both stand on. `saved`: the memory that it keeps for backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from functional_adam import AdamHparams, adam_init, adam_update
from tests.benchmarks.measure import Bench, Code, MissingPeerError, Target, chained
from tests.benchmarks.peers import HPARAMS, LR, Params, adam_step, torchopt_adam

MEMBERS = 64
INPUTS, OUTPUTS = 64, 10

DEPTH = 4
BATCH = 32


def run(bench: Bench) -> None:
    for width in (16, 64, 128, 256):
        compare_members(bench, width)
    for width, steps in ((64, 20), (1024, 5)):
        compare_meta_gradients(bench, width, steps)


# Many models in one call.


def compare_members(bench: Bench, width: int) -> None:
    codes = member_steps(*make_members(width, MEMBERS, bench.device))
    bench.time(f"vmap / direct, width {width}", codes["vmap"], codes["direct"], Target(1.3, extra_ms=1.0))
    bench.time(f"vmap / torch, width {width}", codes["vmap"], codes["torch loop"], Target(0.5))
    bench.time(f"vmap, own lr / direct, width {width}", codes["vmap, own lr"], codes["direct"], Target(2.5))


def make_members(width: int, members: int, device: torch.device) -> tuple[Params, Params]:
    """Parameters and gradients of small networks of three layers, stacked."""
    shapes = ((width, INPUTS), (width,), (width, width), (width,), (OUTPUTS, width), (OUTPUTS,))
    params, grads = (
        {str(i): torch.randn(members, *shape, device=device) for i, shape in enumerate(shapes)} for _ in range(2)
    )
    return params, grads


def member_steps(params: Params, grads: Params) -> dict[str, Code]:
    """One step of all members in several ways."""
    members = len(params["0"])
    lrs = torch.linspace(LR / members, LR, members, device=params["0"].device)
    member_states = vmap(lambda p: adam_init(p, HPARAMS))(params)
    mapped = vmap(lambda p, g, s: adam_update(p, g, s, HPARAMS))
    mapped_lrs = vmap(lambda p, g, s, lr: adam_update(p, g, s, AdamHparams(lr=lr)))

    optimizers, leaves = torch_members(params, grads)

    def step_each() -> None:
        for optimizer in optimizers:
            optimizer.step()

    direct = adam_step(params, grads, donate=False)
    expected = direct()
    assert_close(mapped(params, grads, member_states)[0], expected)
    step_each()
    assert_close({name: torch.stack(rows) for name, rows in leaves.items()}, expected)
    return {
        "vmap": chained(lambda p, s: mapped(p, grads, s), params, member_states),
        "vmap, own lr": chained(lambda p, s: mapped_lrs(p, grads, s, lrs), params, member_states),
        "direct": direct,
        "torch loop": step_each,
    }


def torch_members(params: Params, grads: Params) -> tuple[list[torch.optim.Adam], dict[str, list[Tensor]]]:
    """An optimizer for each member, and copies of the members' parameters, which they write into."""
    members = {name: [x.detach().clone().requires_grad_() for x in param] for name, param in params.items()}
    for name, leaves in members.items():
        for leaf, grad in zip(leaves, grads[name], strict=True):
            leaf.grad = grad.clone()
    optimizers = [torch.optim.Adam(leaves, lr=LR, fused=True) for leaves in zip(*members.values(), strict=True)]
    return optimizers, {name: [leaf.detach() for leaf in leaves] for name, leaves in members.items()}


# Gradients through unrolled inner steps.


class Inner(NamedTuple):
    """An optimizer for inner steps."""

    init: Callable[[Params], Any]
    update: Callable[[Params, Params, Any], tuple[Params, Any]]  # params, grads, state


OURS = Inner(
    lambda params: adam_init(params, HPARAMS),
    lambda params, grads, state: adam_update(params, grads, state, HPARAMS),
)
SGD = Inner(  # the floor: what every inner optimizer pays for the network and its gradients
    lambda _: None,
    lambda params, grads, _: ({name: param - LR * grads[name] for name, param in params.items()}, None),
)


def torchopt() -> Inner:
    return Inner(*torchopt_adam())


class MetaProblem:
    """The loss of a small network after some inner steps, as a function of the weights before them."""

    def __init__(self, width: int, steps: int, device: torch.device) -> None:
        layers = [layer for _ in range(DEPTH) for layer in (torch.nn.Linear(width, width), torch.nn.Tanh())]
        self.network = torch.nn.Sequential(*layers[:-1]).to(device)
        self.params = {name: param.detach().requires_grad_() for name, param in self.network.named_parameters()}
        self.inputs, self.wanted = torch.randn(2, BATCH, width, device=device)
        self.steps = steps

    def loss(self, params: Params) -> Tensor:
        return mse_loss(functional_call(self.network, params, (self.inputs,)), self.wanted)

    def meta_loss(self, inner: Inner) -> Tensor:
        params, state = self.params, inner.init(self.params)
        for _ in range(self.steps):
            grads = torch.autograd.grad(self.loss(params), list(params.values()), create_graph=True)
            params, state = inner.update(params, dict(zip(params, grads, strict=True)), state)
        return self.loss(params)

    def meta_gradient(self, inner: Inner) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.meta_loss(inner), list(self.params.values()))

    def timed(self, inner: Inner) -> Code:
        return partial(self.meta_gradient, inner)


def compare_meta_gradients(bench: Bench, width: int, steps: int) -> None:
    problem = MetaProblem(width, steps, bench.device)
    remark = f"{steps} steps, width {width}"
    saved = partial(saved_bytes, problem)
    try:
        rival = torchopt()
    except MissingPeerError as missing:
        bench.skip(f"meta / TorchOpt, {remark}", missing)
    else:
        check_same_direction(problem.meta_gradient(OURS), problem.meta_gradient(rival))
        bench.time(f"meta / TorchOpt, {remark}", problem.timed(OURS), problem.timed(rival), Target(0.7))
        bench.count_bytes(f"saved / TorchOpt, {remark}", saved(OURS), saved(rival), Target(0.85))
    bench.time(f"meta / SGD, {remark}", problem.timed(OURS), problem.timed(SGD))
    bench.count_bytes(f"saved / SGD, {remark}", saved(OURS), saved(SGD))


def check_same_direction(ours: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    """Raise unless both meta-gradients are the same within the rounding of many steps."""
    a, b = (torch.cat([x.flatten() for x in gradient]).double() for gradient in (ours, other))
    error = ((a - b).norm() / b.norm()).item()
    if not error < 1e-2:
        raise AssertionError(f"The meta-gradients differ by {error:.2g} of their norm: they compute different things.")


def saved_bytes(problem: MetaProblem, inner: Inner) -> int:
    """Bytes that the graph of the meta-loss keeps for backward, each tensor counted once however often it is saved."""
    kept: dict[int, Tensor] = {}  # alive, so that no address is given out twice

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        problem.meta_loss(inner)
    return sum(x.untyped_storage().nbytes() for x in kept.values())
