"""One training step of Adam in every way that is compared, each behind `CONTENDERS[name](params, grads)`."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.benchmarks.measure import MissingPeerError, chained

Params: TypeAlias = dict[str, Tensor]
Step: TypeAlias = Callable[[], Any]  # makes one step from where the last call ended; returns the parameters

LR = 1e-3
HPARAMS = AdamHparams(lr=LR)


def make_tree(leaves: int, elements: int, device: torch.device) -> Params:
    """A tree such as `dict(model.named_parameters())`."""
    return {f"layers.{i}.weight": torch.randn(elements, device=device) for i in range(leaves)}


def copy_tree(tree: Params) -> Params:
    return {name: x.clone() for name, x in tree.items()}


def adam_step(params: Params, grads: Params, *, donate: bool) -> Step:
    """`adam_update`, on a dict."""

    def update(params: Params, state: AdamState) -> tuple[Params, AdamState]:
        return adam_update(params, grads, state, HPARAMS, donate=donate)

    params = copy_tree(params)
    return chained(update, params, adam_init(params, HPARAMS))


def torch_step(params: Params, grads: Params, **flags: bool) -> Step:
    """`torch.optim.Adam.step`, on a list."""
    copies = [x.clone().requires_grad_() for x in params.values()]
    for copy, grad in zip(copies, grads.values(), strict=True):
        copy.grad = grad
    optimizer = torch.optim.Adam(copies, lr=LR, **flags)

    def step() -> list[Tensor]:
        optimizer.step()
        return copies

    return step


def raw_fused_step(params: Params, grads: Params) -> Step:
    """torch's fused kernel alone, on buffers that are there."""
    kernel: Any = getattr(torch, "_fused_adam_", None)
    if kernel is None:
        raise MissingPeerError("This torch has no torch._fused_adam_.")
    copies, gradients = [*copy_tree(params).values()], [*grads.values()]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(x) for x in copies] for _ in range(2))
    t = torch.zeros((), device=copies[0].device)
    scalars: dict[str, Any] = {"lr": LR, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}

    def step() -> list[Tensor]:
        t.add_(1)
        steps = [t] * len(copies)
        kernel(copies, gradients, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, maximize=False, **scalars)
        return copies

    return step


def torchopt_adam() -> tuple[Callable[[Params], Any], Callable[[Params, Params, Any], tuple[Params, Any]]]:
    """TorchOpt's functional Adam: init, and update from params, grads and state."""
    try:
        import torchopt
    except ImportError:
        raise MissingPeerError("TorchOpt is not installed: pip install --no-deps torchopt==0.7.3 graphviz") from None
    optimizer = torchopt.adam(LR)

    def update(params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        updates, state = optimizer.update(grads, state, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False), state

    return optimizer.init, update


def torchopt_step(params: Params, grads: Params) -> Step:
    init, update = torchopt_adam()
    return chained(lambda params, state: update(params, grads, state), params, init(params))


def load_jax(device: torch.device) -> tuple[Any, Any]:
    """The modules jax and optax, on the kind of device that torch is timed on."""
    if device.type == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Else jax takes most of the memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax
        import optax
    except ImportError:
        raise MissingPeerError("optax is not installed: pip install jax optax") from None
    expected = "gpu" if device.type == "cuda" else "cpu"
    if jax.default_backend() != expected:
        raise MissingPeerError(
            f"jax runs on {jax.default_backend()}, torch on {device.type}: see jax's installation guide"
        )
    return jax, optax


def optax_step(params: Params, grads: Params, *, donate: bool, mapped: bool = False) -> Step:
    """`optax.adam(...).update` and `apply_updates` in one jitted function; with `mapped`, under `jax.vmap`."""
    jax, optax = load_jax(next(iter(params.values())).device)
    optimizer = optax.adam(LR)

    def update(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    init = jax.vmap(optimizer.init) if mapped else optimizer.init
    compiled = jax.jit(jax.vmap(update) if mapped else update, donate_argnums=(0, 2) if donate else ())
    values, gradients = (
        {name: jax.numpy.array(x.cpu().numpy()) for name, x in tree.items()} for tree in (params, grads)
    )
    return chained(
        lambda params, state: jax.block_until_ready(compiled(params, gradients, state)), values, init(values)
    )


CONTENDERS: dict[str, Callable[[Params, Params], Step]] = {
    "donated": partial(adam_step, donate=True),
    "pure": partial(adam_step, donate=False),
    "torch fused": partial(torch_step, fused=True),
    "torch foreach": partial(torch_step, foreach=True),
    "torch default": torch_step,
    "raw fused": raw_fused_step,
    "TorchOpt": torchopt_step,
    "optax": partial(optax_step, donate=False),
    "optax donated": partial(optax_step, donate=True),
}
