"""Plain training steps: a donated and a pure `adam_update` against torch.optim.Adam(fused=True).step()."""

from functools import partial

import torch
from torch import Tensor

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.benchmarks.measure import Bench, Code, chained

HPARAMS = AdamHparams()

TREES = {  # leaves and elements of each
    "150 x 64": (150, 64),
    "1 x 2.5 M": (1, 2_500_000),
    "150 x 16,666": (150, 16_666),
}


def run(bench: Bench) -> None:
    for tree, (leaves, elements) in TREES.items():
        make = partial(torch.randn, leaves, elements, device=bench.device)
        params, grads = list(make().unbind(0)), list(make().unbind(0))
        for donate in (True, False):
            bench.time(
                f"{'donated' if donate else 'pure'} / torch, {tree}",
                adam_step(params, grads, donate=donate),
                torch_step(params, grads),
            )


def adam_step(params: list[Tensor], grads: list[Tensor], *, donate: bool) -> Code:
    """`adam_update` on copies of `params`, with the same gradients in every step."""

    def update(params: list[Tensor], state: AdamState) -> tuple[list[Tensor], AdamState]:
        return adam_update(params, grads, state, HPARAMS, donate=donate)

    copies = [param.clone() for param in params]
    return chained(update, copies, adam_init(copies, HPARAMS))


def torch_step(params: list[Tensor], grads: list[Tensor]) -> Code:
    """`torch.optim.Adam.step` on copies of `params`, with the same gradients in every step."""
    copies = [param.clone().requires_grad_() for param in params]
    for copy, grad in zip(copies, grads, strict=True):
        copy.grad = grad
    return torch.optim.Adam(copies, fused=True).step
