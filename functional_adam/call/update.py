"""adam_update: run what computes the update, and put the trees together again."""

from typing import Any, cast

import torch
from torch import Tensor

from functional_adam.adam.equations import update_leaf
from functional_adam.adam.hparams import AdamHparams, Scalar
from functional_adam.adam.planning import KernelName, group_leaves, run_kernel
from functional_adam.adam.state import AdamState, TensorTree
from functional_adam.autodiff.function import advance, differentiable_update
from functional_adam.call.arguments import Arguments, flatten_arguments
from functional_adam.call.compiled_donation import checked_steps
from functional_adam.call.dispatch import EQUATIONS, Way, select_way
from functional_adam.call.donation import release, replace_steps_
from functional_adam.tensors.layouts import with_layout_of
from functional_adam.tensors.leaves import Buffers, local_shards
from functional_adam.tensors.recycling import copies
from functional_adam.tensors.trees import unflatten


def adam_update(
    params: TensorTree,
    grads: TensorTree,
    state: AdamState,
    hparams: AdamHparams,
    *,
    kernel: KernelName = "auto",
    donate: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
) -> tuple[TensorTree, AdamState]:
    """One step of Adam, as a pure function.

    With g the gradient, t the number of this update, b1 and b2 the betas, and m, v, u the moments `exp_avg`,
    `exp_avg_sq` and `max_exp_avg_sq`, each leaf p becomes::

        g = g / grad_scale                  if given
        g = -g                              if maximize
        g = g + weight_decay * p            or p = p * (1 - lr * weight_decay) if decoupled
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        u = max(u, v)                       if amsgrad
        p = p - lr / (1 - b1^t) * m / (sqrt(v or u) / sqrt(1 - b2^t) + eps)

    Nothing given is changed, unless donated. The update is differentiable to any order and mappable like any torch
    function, and the kernel still computes it. Where none can (a compiler traces, forward mode is nested, or a
    mapped update with numbers of its members is differentiated), the equations above do, as plain operations.

    Args:
        params: pytree of floating or complex tensors of any shape and layout, in units U.
        grads: like params, in L/U. A leaf of another dtype is cast to the wider of the parameter's and the moments'.
            A leaf may be None if it has a step of its own; the leaf is then skipped. At the root of this and any other
            tree a tuple may stand for a list, as `torch.autograd.grad` returns one, and a list for a tuple.
        state: from `adam_init` or the previous update.
        hparams: the hyperparameters.
        kernel: "single", "foreach" or "fused": which of torch's kernels computes; "auto" is the fastest that can.
        donate: reuse the memory of `params` and `state` for the results. The donated state cannot be used again.
            Gradients are never written.
        grad_scale: number or 0-dim tensor that divides the gradients first, in float32.
        found_inf: number or 0-dim tensor; unless it is 0, the step changes nothing at all, `step` included.

    Returns:
        `(new_params, new_state)`, of the structure, shapes, dtypes and devices of `params` and `state`, with the
        strides of each leaf where it is dense, else those of `torch.empty_like`. The tensors share no memory with
        anything given, unless donated, and parameters are plain tensors.

    Raises:
        TypeError: an argument or a leaf is of the wrong type, such as a sparse or integer gradient.
        ValueError: structure, shape or device of a leaf does not match params; a missing or superfluous AMSGrad
            moment; an unknown kernel; a gradient that is None where all leaves share one step.
        RuntimeError: the kernel cannot run here; a state is used after it was donated; a donation that autograd
            would notice, or of memory that overlaps.

    Example:
        >>> params = {"w": torch.tensor([1.0, -2.0])}
        >>> hparams = AdamHparams(lr=0.1)
        >>> state = adam_init(params, hparams)
        >>> grads = torch.func.grad(lambda p: (p["w"] ** 2).sum())(params)
        >>> params, state = adam_update(params, grads, state, hparams)
        >>> params["w"], state.step
        (tensor([ 0.9000, -1.9000]), tensor(1.))

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980, Algorithm 1, in the order of `torch.optim.Adam`.
    """
    given = flatten_arguments(params, grads, state, hparams, grad_scale, found_inf)
    return run_update(params, given, select_way(given, kernel, donate=donate), state, donate=donate)


def run_update(
    params: TensorTree, given: Arguments, way: Way, state: AdamState, *, donate: bool
) -> tuple[TensorTree, AdamState]:
    """What `adam_update` does once its arguments are read and checked; `params` and `state` are those of `given`."""
    if way.watched_by is None:
        buffers, steps = _run_kernel(given, way, donate=donate)
    else:
        buffers, steps = _run_watched(given._replace(steps=checked_steps(given)) if donate else given, way)
        if donate:
            for old, new in zip((*given.buffers.flat, *given.steps), (*buffers.flat, *steps), strict=True):
                old.copy_(new)
            buffers, steps = given.buffers, given.steps
    like_params, treespec = given.treespec.unflatten, given.treespec
    new_params, masters = _rounded(given, way, buffers.params, donate=donate)
    return like_params(new_params), AdamState(
        step=steps[0] if given.is_step_shared else unflatten(treespec, steps, params),
        exp_avg=like_params(buffers.exp_avgs),
        exp_avg_sq=like_params(buffers.exp_avg_sqs),
        max_exp_avg_sq=like_params(buffers.max_exp_avg_sqs) if buffers.max_exp_avg_sqs else state.max_exp_avg_sq,
        master_params=unflatten(treespec, masters, params) if given.narrow else state.master_params,
    )


def _run_kernel(given: Arguments, way: Way, *, donate: bool) -> tuple[Buffers, list[Tensor]]:
    """In place, on the buffers if they are donated, else on copies."""
    old, found_inf, traits = given.buffers, way.found_inf, given.traits
    new = old if donate else old.with_flat(copies(old.flat, are_small=traits is not None and traits.are_small))
    if donate and traits is not None and len(given.steps) > 1:
        # They are copied to the old memory in the end, so that one tensor can hold all of them.
        advanced = [*(torch.stack(given.steps) + 1).unbind(0)]
    else:
        advanced = [step + 1 for step in given.steps]
    steps = _next_steps(given, advanced, found_inf)
    leaf_steps = steps * len(given.grads) if given.is_step_shared else steps
    moving, grads = new, cast("list[Tensor]", given.grads)
    scalars = way.scalars
    if not given.has_all_grads:
        indices = [index for index, grad in enumerate(given.grads) if grad is not None]
        moving, grads, leaf_steps = new.take(indices), [grads[i] for i in indices], [leaf_steps[i] for i in indices]
        scalars = [scalars[i] for i in indices]
    if found_inf is not True and grads:
        if traits is None:
            moving, grads = local_shards(moving, grads)
        run_kernel(
            way.kernel,
            moving,
            grads,
            leaf_steps,
            scalars,
            grad_scale=way.grad_scale,
            found_inf=found_inf if isinstance(found_inf, Tensor) else None,
            is_ready=traits is not None and traits.is_ready and len(given.scalar_sets) == 1,
        )
    if donate:
        # Or autograd would not notice what the fused kernel has written.
        torch.autograd.graph.increment_version(new.flat)
        if moving is not new:
            torch.autograd.graph.increment_version(moving.flat)  # a DTensor and its shard count apart
        steps = replace_steps_(given.steps, steps)
        if traits is None or not traits.is_bare:
            new = new._replace(params=release(new.params))
    return new, steps


def _rounded(given: Arguments, way: Way, wide: list[Tensor], *, donate: bool) -> tuple[list[Tensor], list[Any]]:
    """The new parameters, those with a master as its rounding, and the new masters."""
    params = list(wide)
    masters: list[Any] = [()] * len(wide)
    for index, old in given.narrow.items():
        masters[index] = wide[index]
        # Where nothing moves, nothing is rounded either.
        is_skipped = given.grads[index] is None or way.found_inf is True
        new = old if is_skipped else _where(way.found_inf, wide[index], old)
        # The layout is that of the parameter, whatever that of its master is.
        if donate:
            params[index] = release([old.copy_(new.to(old.dtype) if old.is_neg() else new)])[0]
        elif way.watched_by is None:
            params[index] = torch.empty_like(old).copy_(new)
        else:
            params[index] = old.clone() if is_skipped else with_layout_of(new.to(old.dtype), old)
    return params, masters


def _run_watched(given: Arguments, way: Way) -> tuple[Buffers, list[Tensor]]:
    """Out of place: a kernel within an autograd.Function, or the equations where no Function can go."""
    found_inf = given.found_inf
    # What a skipped update computes is not used, but a derivative of 0 times infinity would be NaN: it computes on 1.
    buffers = given.buffers if found_inf is None else given.buffers.map(lambda x: _where(found_inf, x, 1))
    scale = None if given.grad_scale is None else _where(found_inf, given.grad_scale, 1)
    rows = [*buffers.rows()]
    grads = {i: _where(found_inf, grad, 1) for i, grad in enumerate(given.grads) if grad is not None}
    if way.kernel == EQUATIONS:
        steps = [step + 1 for step in given.steps]
        for index, grad in grads.items():
            step = steps[0 if given.is_step_shared else index]
            rows[index] = update_leaf(rows[index], grad, step, given.scalars[index], scale)
    else:
        steps = [advance(step) for step in given.steps]
        traits = given.traits
        if traits is not None and given.has_all_grads and found_inf is None and len(given.scalar_sets) == 1:
            every, h = [*grads.values()], given.scalar_sets[0]
            new = differentiable_update(way.kernel, buffers, every, given.steps, h, scale, is_ready=traits.is_ready)
            return new, steps
        moving = [*grads]
        for group in group_leaves(buffers.take(moving), [given.scalars[i] for i in moving]):
            indices = [moving[i] for i in group.indices]
            new = differentiable_update(
                way.kernel,
                buffers.take(indices),
                [grads[i] for i in indices],
                given.steps if given.is_step_shared else [given.steps[i] for i in indices],
                given.scalars[indices[0]],
                scale,
                is_ready=False,
            )
            for i, row in zip(indices, new.rows(), strict=True):
                rows[i] = row
    result = Buffers([], [], [], [])
    for index, (old, new) in enumerate(zip(given.buffers.rows(), rows, strict=True)):
        for column, before, after in zip(result, old, new, strict=True):
            if before is not None and after is not None:
                stands = index not in grads
                column.append(before.clone() if stands else _where(found_inf, after, before))
    return result, _next_steps(given, steps, found_inf)


def _next_steps(given: Arguments, advanced: list[Tensor], found_inf: Tensor | bool | None) -> list[Tensor]:
    """The steps after this update, in fresh memory; a skipped update, or a leaf without gradient, is not counted."""
    if given.has_all_grads and found_inf is None:
        return advanced
    # With a shared step all gradients are there, except that of a bare tensor, whose step is its own.
    grads = given.grads[:1] or [None] if given.is_step_shared else given.grads
    is_counted = [grad is not None or not given.grads for grad in grads]
    return [
        _where(found_inf, new, old) if counted and found_inf is not True else old.clone()
        for old, new, counted in zip(given.steps, advanced, is_counted, strict=True)
    ]


def _where(found_inf: Tensor | bool | None, new: Tensor, old: Tensor | float) -> Tensor:
    """`new`, or `old` if the update is skipped."""
    return torch.where(found_inf.to(new.device), old, new) if isinstance(found_inf, Tensor) else new
