"""Members with numbers or steps of their own, in one mapped update.

`hand`: against Adam as a user would write it for one member, mapped over the
same trees. `lists` and `stacked`: against the two ways that the batching rule
chooses from, for numbers other than the learning rate and for steps: each
member in the list of a kernel, or the stacked leaves with numbers beside them.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.testing import assert_close

from functional_adam import AdamHparams, AdamState, adam_init, adam_update, batching
from tests.benchmarks.measure import Bench, Code, Target
from tests.benchmarks.peers import HPARAMS, LR, Params

SIZES = ((8, 64), (64, 256), (512, 64), (64, 4096), (64, 16384), (8, 100_000))


def run(bench: Bench) -> None:
    for kind in ("own lr", "own numbers", "own steps"):
        for members, elements in SIZES:
            compare(bench, kind, members, elements)


def compare(bench: Bench, kind: str, members: int, elements: int) -> None:
    case = f"{kind}, {members} x {elements:,}"
    ours, hand = mapped(kind, members, elements, bench.device)
    assert_close(ours()[0], hand()[0])
    bench.time(f"{case} / hand", ours, hand, Target(1.3))
    if kind != "own lr":
        bench.time(f"{case} / lists", ours, within(ours, 0), Target(1.2))
        bench.time(f"{case} / stacked", ours, within(ours, 2**40), Target(1.2))


def mapped(kind: str, members: int, elements: int, device: torch.device) -> tuple[Code, Code]:
    """The update of all members, and the same by hand."""
    params, grads = ({"w": torch.randn(members, elements, device=device)} for _ in range(2))
    state = vmap(lambda p: adam_init(p, HPARAMS))(params)
    share = torch.linspace(0.1, 1, members, dtype=torch.float64, device=device)
    numbers: dict[str, Any] = {"lr": LR * share} if kind == "own lr" else {"lr": LR}
    if kind == "own numbers":
        numbers = {"lr": LR * share, "betas": (0.9 * share, 0.999 * share), "eps": 1e-6 * share}
    if kind == "own steps":  # as after early stopping
        state = state._replace(step=torch.arange(members, dtype=torch.float32, device=device) % 50)

    def ours(params: Params, grads: Params, state: AdamState, numbers: dict[str, Any]) -> Any:
        return adam_update(params, grads, state, AdamHparams(**numbers))

    axes = {name: None if isinstance(x, float) else 0 for name, x in numbers.items()}
    sides = (vmap(update, in_dims=(0, 0, 0, axes)) for update in (ours, by_hand))
    ours_mapped, hand_mapped = (partial(side, params, grads, state, numbers) for side in sides)
    return ours_mapped, hand_mapped


def by_hand(params: Params, grads: Params, state: AdamState, numbers: dict[str, Any]) -> tuple[Params, AdamState]:
    """Adam for one member, without any check."""
    (b1, b2), lr, eps = numbers.get("betas", (0.9, 0.999)), numbers["lr"], numbers.get("eps", 1e-8)
    t = state.step.double() + 1
    step_size, root_correction = lr / (1 - b1**t), (1 - b2**t).sqrt()

    def number(x: float | Tensor) -> float | Tensor:
        return x.float() if isinstance(x, Tensor) else x

    new_params, exp_avg, exp_avg_sq = {}, {}, {}
    for name, g in grads.items():
        m = torch.lerp(state.exp_avg[name], g, number(1 - b1))
        v = number(b2) * state.exp_avg_sq[name] + number(1 - b2) * g * g
        new_params[name] = params[name] - number(step_size) * m / (v.sqrt() / number(root_correction) + number(eps))
        exp_avg[name], exp_avg_sq[name] = m, v
    return new_params, AdamState(t.float(), exp_avg, exp_avg_sq)


def within(code: Code, small: int) -> Code:
    """`code` with another bound below which members are stacked."""

    def run() -> object:
        before, batching.SMALL_MEMBER = batching.SMALL_MEMBER, small
        try:
            return code()
        finally:
            batching.SMALL_MEMBER = before

    return run
