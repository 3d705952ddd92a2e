"""What a typed program may write, and what type checkers must refuse: for `mypy --strict` and strict basedpyright.

`main` also runs, so that the types are those of real values. Each line of `mistakes` is an error to both checkers, and
each checker fails when a comment that silences it is no longer needed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import assert_type

import functional_adam
from functional_adam import (
    AdamHparams,
    AdamState,
    _FunctionalAdam,
    _FunctionalAdamW,
    adam_init,
    adam_update,
    explain,
    from_torch_state_dict,
    recycling,
    state_from_dict,
    state_to_dict,
    to_torch_state_dict,
    transformation,
)
from functional_adam.distributed import step_in_backward

HPARAMS = AdamHparams(lr=1e-2)


class Linear(NamedTuple):
    """Parameters as a NamedTuple."""

    weight: Tensor
    bias: Tensor


def loss(params: Linear) -> Tensor:
    """Least where the parameters are 1."""
    return (params.weight - 1).square().sum() + (params.bias - 1).square().sum()


def train(params: Linear, lr: Tensor | float) -> tuple[Linear, AdamState]:
    """A tree of one's own type keeps it where an annotation says so."""
    hparams = AdamHparams(lr=lr, decoupled_weight_decay=True)
    state = adam_init(params, hparams, moment_dtype=torch.float32)
    grads: Linear = torch.func.grad(loss)(params)
    updated: Linear
    updated, state = adam_update(params, grads, state, hparams, kernel="single", donate=False)
    return updated, state


def trees() -> None:
    """Dicts, groups of hyperparameters, and every option of an update."""
    params = {"backbone": torch.ones(2), "head": torch.ones(3)}
    hparams = AdamHparams(
        lr={"backbone": 1e-5, "head": torch.tensor(1e-3)}, betas=(0.9, torch.tensor(0.99)), amsgrad=True, maximize=True
    )
    state = adam_init(params, hparams, per_leaf_step=True, master_params=True)
    assert_type(state, AdamState)
    result = adam_update(
        params, {"backbone": None, "head": torch.ones(3)}, state, hparams, grad_scale=2.0, found_inf=torch.tensor(0)
    )
    assert_type(result[1], AdamState)
    explanation = explain(params, params, state, hparams, kernel="single", donate=False, grad_scale=2.0)
    assert_type(explanation.new_memory[0].nbytes, int)
    assert_type(explanation.groups[0].dtype, torch.dtype)
    assert_type(str(explanation), str)
    assert_type(hparams.amsgrad, bool)
    assert_type(hparams.betas, tuple[Any, Any])
    assert_type(state._replace(step=torch.zeros(())), AdamState)


def mapped() -> None:
    """A sweep over learning rates."""

    def member(lr: Tensor) -> Tensor:
        return loss(train(Linear(torch.zeros(2), torch.zeros(())), lr)[0])

    losses: Tensor = torch.func.vmap(member)(torch.tensor([0.1, 0.2]))
    assert losses.shape == (2,)


def files() -> None:
    """Checkpoints, both kinds, both ways."""
    params = torch.ones(2)
    state = adam_init(params, HPARAMS)
    flat = state_to_dict(state)
    assert_type(flat, dict[str, Tensor])
    assert_type(state_from_dict(flat, params, HPARAMS), AdamState)
    state_dict = to_torch_state_dict(params, state, HPARAMS)
    assert_type(state_dict, dict[str, Any])
    assert_type(from_torch_state_dict(params, state_dict), tuple[AdamState, AdamHparams])


def transformed() -> None:
    """The shape of optax."""
    optimizer = transformation.adam(1e-2, (0.9, 0.99), weight_decay=0.1, kernel="fused")
    assert_type(optimizer, transformation.GradientTransformation)
    params: dict[str, Tensor] = {"w": torch.ones(2)}
    state = optimizer.init(params)
    assert_type(state, AdamState)
    updates, state = optimizer.update({"w": torch.ones(2)}, state, params, inplace=True)
    assert_type(state, AdamState)
    params = transformation.apply_updates(params, updates)


def stateful() -> None:
    """The adapters, by hand and inside `backward`."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = _FunctionalAdamW([weight], lr=torch.tensor(0.1), betas=(0.8, 0.9), weight_decay=0.1, fused=True)
    optimizer.step([torch.ones(2)])
    optimizer.step(gradients=(None,))
    optimizer.step(lambda: 0.0)
    optimizer.step_param(weight, None)
    optimizer.amsgrad = optimizer.maximize
    assert_type(optimizer.fused, bool)
    assert_type(optimizer.param_group, dict[str, Any])
    assert_type(optimizer.state_dict(), dict[str, Any])
    torch.optim.lr_scheduler.StepLR(optimizer, 1).step()
    with step_in_backward(_FunctionalAdam([("weight", weight)])):
        torch.autograd.backward([weight.sum()])


def memory() -> None:
    """The memory that is kept, and the version."""
    recycling.set_cache_limit(0)
    recycling.set_cache_limit(None)
    recycling.empty_cache()
    assert_type(recycling.cached_bytes(), int)
    assert_type(functional_adam.__version__, str)


def main() -> None:
    """All of the above."""
    train(Linear(torch.ones(2, 2), torch.zeros(2)), 1e-3)
    for part in (trees, mapped, files, transformed, stateful, memory):
        part()


def mistakes(params: Linear, state: AdamState, optimizer: _FunctionalAdam) -> None:
    """Never called."""
    adam_update(params, params, state, HPARAMS, kernel="cuda")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    adam_update(params, params, state, HPARAMS, "fused")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    adam_update(params, params, state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    adam_update(params, params, HPARAMS, state)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    adam_update(params, params, state, HPARAMS, donate=())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    adam_update(params, params, state, HPARAMS, found_inf="no")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    adam_update(params, params, state, HPARAMS).params()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    adam_init(params, HPARAMS, moment_dtype="bfloat16")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    explain(params, params, state, HPARAMS, kernel="cuda")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    adam_init(params)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    AdamHparams(1e-3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    AdamHparams(learning_rate=1e-3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    AdamHparams(betas=(0.9,))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    AdamHparams(amsgrad="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    HPARAMS.lr = 1e-3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    state.step = torch.zeros(())  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    state.momentum()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    state_from_dict(["step"], params, HPARAMS)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    transformation.adam(lr="fast")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    transformation.adam(kernel="cuda")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    optimizer.foreach = "yes"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step(torch.ones(2))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    optimizer.step_param(params.weight)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    step_in_backward(torch.optim.Adam([params.weight]))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    functional_adam.adam()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    recycling.set_cache_limit("1 GiB")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
