"""adam_update: read, plan, run, write."""

from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from functional_adam.adam.kernels import KERNELS, KernelName
from functional_adam.adam.pytrees import AdamHparams, AdamState
from functional_adam.autodiff.function import advance, differentiable_update, rounded
from functional_adam.call.arguments import Arguments, read_arguments
from functional_adam.call.plan import Plan, plan_update
from functional_adam.tensors.batch import Batch
from functional_adam.tensors.leaves import local_shard, placed_like
from functional_adam.tensors.overlap import checked_step
from functional_adam.tensors.staging import Run, copied, emptied, finish, finish_together
from functional_adam.tensors.trees import Scalar, TensorTree, unflatten

Params = TypeVar("Params")


def adam_update(
    params: Params,
    grads: TensorTree,
    state: AdamState,
    hparams: AdamHparams,
    *,
    kernel: KernelName = "auto",
    donate: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
) -> tuple[Params, AdamState]:
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
    given, treespec = read_arguments(params, grads, state, hparams, grad_scale, found_inf)
    plan, given = plan_update(given, kernel, donate=donate)
    new, new_params, masters = run_plan(plan, given, donate=donate)
    like_params = treespec.unflatten
    return cast("Params", like_params(new_params)), AdamState(
        step=new.steps[0] if isinstance(state.step, Tensor) else unflatten(treespec, new.steps, params),
        exp_avg=like_params(new.exp_avgs),
        exp_avg_sq=like_params(new.exp_avg_sqs),
        max_exp_avg_sq=like_params(new.max_exp_avg_sqs) if new.max_exp_avg_sqs else state.max_exp_avg_sq,
        master_params=unflatten(treespec, masters, params) if given.narrow else state.master_params,
    )


def run_plan(plan: Plan, given: Arguments, *, donate: bool) -> tuple[Batch, list[Tensor], Sequence[object]]:
    """Execute `plan`: the batch after the update, the parameters, and the masters, which are () where there is none."""
    if plan.watched_by is None:
        new = _run_kernel(plan, given, donate=donate)
    elif donate:
        new = _run_watched(plan, _checked(given))
        for old, value in zip((*given.batch.buffers, *given.batch.steps), (*new.buffers, *new.steps), strict=True):
            old.copy_(value)
        new = given.batch
    else:
        new = _run_watched(plan, given)
    if not given.narrow:
        return new, new.params, ()
    return new, *_rounded(plan, given, new.params, donate=donate)


def _checked(given: Arguments) -> Arguments:
    """The arguments of a traced donation, with steps that the graph has only where no memory overlaps."""
    written, read, steps = given.written(), given.read(), given.batch.steps
    names = [given.name(root, index) for root, index, _ in written + read]
    checked = [checked_step(step, [x for *_, x in written], [x for *_, x in read], names) for step in steps[:1]]
    return given._replace(batch=given.batch._replace(steps=[*checked, *steps[1:]]))


def _run_kernel(plan: Plan, given: Arguments, *, donate: bool) -> Batch:
    """In place, on the buffers if they are donated, else on copies."""
    old, facts, found_inf = given.batch, plan.facts, given.found_inf
    is_streamed = plan.is_streamed and found_inf is not True
    new = old if donate else emptied(old) if is_streamed else copied(old, largest=facts.largest)
    if donate and facts.is_ready and len(old.steps) > 1:
        # They are copied to the old memory in the end, so that one tensor can hold all of them.
        advanced = [*(torch.stack(old.steps) + 1).unbind(0)]
    else:
        advanced = [step + 1 for step in old.steps]
    steps = _next_steps(plan, given, advanced)
    new = new._replace(steps=steps)
    if found_inf is not True:
        _run_groups(plan, given, old._replace(steps=steps) if is_streamed else new, new)
    if donate:
        # Or autograd would not notice what the fused kernel has written.
        torch.autograd.graph.increment_version(new.buffers)
        if facts.has_shards:
            with torch.no_grad():  # a DTensor and its shard count apart
                torch.autograd.graph.increment_version([*map(local_shard, new.buffers)])
        steps = _replace_steps_(given.batch.steps, steps)
        if not facts.is_bare:
            new = new._replace(params=_release(new.params))
    return new._replace(steps=steps)


def _run_groups(plan: Plan, given: Arguments, old: Batch, new: Batch) -> None:
    """Let the kernel fill or update the buffers of `new`; steps count this update."""
    kernel, found = KERNELS[plan.kernel], given.found_inf
    runs: list[Iterator[None]] = []
    for group in plan.groups:
        is_whole = len(group.indices) == len(old.params)
        batch = old if is_whole else old.take(group.indices)
        results = batch if new is old else new if is_whole else new.take(group.indices)
        reasons = group.reasons
        if plan.facts.has_shards:
            results = batch = _local(batch)
            reasons = group.stage.reasons(batch)
        device = batch.params[0].device
        scale = given.grad_scale.to(device) if isinstance(given.grad_scale, Tensor) else given.grad_scale
        found_inf = found.to(device) if isinstance(found, Tensor) else None
        call = kernel.on(device, given.sets[given.places[group.indices[0]]], scale, found_inf)
        divisor = None if kernel.takes_found_inf else scale
        run = Run(batch, results, group.stage, reasons)
        if plan.is_streamed:
            for part in run.cut():
                finish(part.start(call, divisor, found_inf))
        else:
            runs.append(run.start(call, divisor, found_inf))
    # All memory is there before the first write: running out of it changes nothing.
    finish_together(runs)


@torch.no_grad()
def _local(batch: Batch) -> Batch:
    """The local shards, on the same memory, with gradients brought to the placements of parameters."""
    grads = [local_shard(placed_like(grad, param)) for grad, param in zip(batch.grads, batch.params, strict=True)]
    return batch.map(local_shard)._replace(grads=grads)


def _rounded(plan: Plan, given: Arguments, wide: list[Tensor], *, donate: bool) -> tuple[list[Tensor], list[object]]:
    """The new parameters, those with a master as its rounding, and the new masters."""
    params = list(wide)
    masters: list[object] = [()] * len(wide)
    moving = {*given.moving}
    for index, old in given.narrow.items():
        masters[index] = wide[index]
        # Where nothing moves, nothing is rounded either.
        is_skipped = index not in moving or given.found_inf is True
        new = old if is_skipped else _where(given.found_inf, wide[index], old)
        # The layout is that of the parameter, whatever that of its master is.
        if donate:
            params[index] = _release([old.copy_(new.to(old.dtype) if old.is_neg() else new)])[0]
        elif plan.watched_by is None:
            params[index] = torch.empty_like(old).copy_(new)
        else:
            params[index] = old.clone() if is_skipped else rounded(new, old)
    return params, masters


def _run_watched(plan: Plan, given: Arguments) -> Batch:
    """Out of place: a kernel within an autograd.Function, or the equations where no Function can go."""
    found_inf = given.found_inf
    # What a skipped update computes is not used, but a derivative of 0 times infinity would be NaN: it computes on 1.
    batch = given.batch
    scale = given.grad_scale
    if found_inf is not None:
        grads = [x if x is None else _where(found_inf, x, 1) for x in batch.grads]  # pyright: ignore[reportUnnecessaryComparison]
        batch = batch.map(lambda x: _where(found_inf, x, 1))._replace(grads=grads)
        scale = scale if scale is None else _where(found_inf, torch.as_tensor(scale), 1)
    advanced = [advance(step, plan.kernel) for step in batch.steps]
    if found_inf is None and len(plan.groups) == 1 and plan.moves_all:
        h = given.sets[given.places[0]]
        return differentiable_update(plan.kernel, batch, h, scale, is_ready=plan.facts.is_ready)._replace(
            steps=advanced
        )
    rows = [*batch.rows()]
    for group in plan.groups:
        part, h = batch.take(group.indices), given.sets[given.places[group.indices[0]]]
        new = differentiable_update(plan.kernel, part, h, scale, is_ready=False)
        for index, row in zip(group.indices, new.rows(), strict=True):
            rows[index] = row
    moving = {*given.moving}
    flat: list[Tensor] = []
    for olds, news in zip(zip(*given.batch.rows(), strict=True), zip(*rows, strict=True), strict=True):
        for index, (old, new) in enumerate(zip(olds, news, strict=True)):
            if old is not None and new is not None:
                flat.append(_where(found_inf, new, old) if index in moving else old.clone())
    return given.batch.with_buffers(flat)._replace(steps=_next_steps(plan, given, advanced))


def _next_steps(plan: Plan, given: Arguments, advanced: list[Tensor]) -> list[Tensor]:
    """The steps after this update, in fresh memory; a skipped update, or a leaf without gradient, is not counted."""
    found_inf, grads, steps = given.found_inf, given.batch.grads, given.batch.steps
    if found_inf is None and plan.moves_all:
        return advanced
    moving = range(len(steps)) if plan.moves_all else {*given.moving}
    # With a shared step all gradients are there, except that of a bare tensor, whose step is its own.
    return [
        _where(found_inf, new, old) if (i in moving or not grads) and found_inf is not True else old.clone()
        for i, (old, new) in enumerate(zip(steps, advanced, strict=True))
    ]


def _where(found_inf: Tensor | bool | None, new: Tensor, old: Tensor | float) -> Tensor:
    """`new`, or `old` if the update is skipped."""
    return torch.where(found_inf.to(new.device), old, new) if isinstance(found_inf, Tensor) else new


def _replace_steps_(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Fresh tensor objects with the values of `new` on the memory of `old`; the old objects are emptied.

    CUDA graphs replay on memory, so the memory stays. The next use of the donated state meets an empty step, and is
    noticed without reading a value.
    """
    fresh = [step.detach() for step in old]
    for step, value in zip(fresh, new, strict=True):
        step.copy_(value)
    for step in old:
        step.set_()  # pyright: ignore[reportCallIssue] (the overload without arguments has no stub)
    return fresh


def _release(params: list[Tensor]) -> list[Tensor]:
    """`params` as results: plain tensors outside autograd, on the same memory."""
    return [x.detach() if x.requires_grad or isinstance(x, torch.nn.Parameter) else x for x in params]
