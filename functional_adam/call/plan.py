"""Plan: who is watching an update, which kernel runs, on which leaves together, on copies of what, and why.

A plan follows from what the tensors are and not from what they hold. Every check of tensors happens while it is made.
It is made once, and remembered for tensors alike. The update executes it, `explain` prints it, errors quote it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_adam.adam.equations import EQUATIONS, compute_dtype
from functional_adam.adam.kernels import KERNELS, check_kernel_name, check_numbers, select_kernel
from functional_adam.call.arguments import Arguments
from functional_adam.call.facts import Facts, Memory, find_facts
from functional_adam.tensors.leaves import check_flag, full_value, is_dtensor, local_shard, placement_change
from functional_adam.tensors.overlap import are_apart_by_address, check_apart
from functional_adam.tensors.staging import COLUMNS, RUN, Reasons, Stage
from functional_adam.tensors.tracking import (
    forward_levels,
    is_compiled_here,
    is_readable,
    is_tracing,
    is_transformed,
    readable,
    requires_grad,
)

TRACER = "a compiler or tracer"
_TRANSFORM = "a torch.func transform or a forward-mode dual level"
_NESTED = "forward mode within forward mode"
_AUTOGRAD = "autograd (an input requires grad and grad mode is on)"
_CHOSEN = "is chosen by found_inf, whose value is not read"


class Group(NamedTuple):
    """Leaves that one call of a kernel takes: of one device, computed in one dtype, with one set of numbers."""

    indices: Sequence[int]
    stage: Stage
    reasons: Reasons
    """What the kernel gets copies of, and why. Within an autograd.Function that is seen when the kernel runs."""


class Plan(NamedTuple):
    """How an update is computed."""

    facts: Facts
    watched_by: str | None
    """Who needs differentiable, mappable, traceable operations."""
    kernel: str
    """Or `EQUATIONS`."""
    why: dict[str, str]
    """For `explain`: why each kernel computes or does not, the fastest first."""
    groups: list[Group]
    """Of the leaves that have a gradient."""
    moves_all: bool
    """Whether all leaves have one."""
    is_streamed: bool
    """Whether results are filled run by run, each in the cache."""


_plans: Memory[Plan] = Memory(8)


def plan_update(given: Arguments, kernel: str, *, donate: bool, is_explained: bool = False) -> tuple[Plan, Arguments]:
    """The plan of an update, and its arguments with those numbers read that can be; raise if it cannot be computed.

    `is_explained`: with all reasons, which an update that is watched does not look for beforehand.
    """
    check_kernel_name(kernel)
    check_flag(donate, "donate")
    given = given if is_tracing() or is_transformed() else given.map_numbers(_read)
    tensors = given.tensors
    key = _key(given, kernel, donate=donate)
    plan = None if is_explained else _plans.recall(key, tensors)
    if plan is None:
        plan = _make(given, tensors, kernel, donate=donate, is_explained=is_explained)
        if plan.facts.are_plain and not is_explained:
            _plans.remember(key, tensors, plan)
    if plan.watched_by is None:
        steps = given.batch.steps
        check_numbers(given.sets, steps if plan.facts.can_be_read else readable(steps))
        if donate and not _are_surely_apart(tensors, plan.facts):
            written, others = given.written(), given.read()
            owners = [(root, index) for root, index, _ in written + others]
            check_apart([x for *_, x in written], [x for *_, x in others], lambda place: given.name(*owners[place]))
        given = given._replace(grad_scale=_read(given.grad_scale), found_inf=_read(given.found_inf))
    return plan, given


def _are_surely_apart(tensors: Sequence[Tensor], facts: Facts) -> bool:
    """Whether all tensors of a call can be seen, at one look, to share no memory."""
    if not facts.are_contiguous:
        return False
    starts = [*map(Tensor.data_ptr, tensors)]
    if starts != facts.disjoint:
        if not are_apart_by_address(starts, facts.nbytes):
            return False
        facts.disjoint = starts
    return True


def _read(x: Any) -> Any:
    """`x` as a Python number where that costs nothing and hides nothing."""
    x = full_value(x)
    return x.item() if isinstance(x, Tensor) and is_readable(x) else x


def _key(given: Arguments, kernel: str, *, donate: bool) -> tuple[object, ...]:
    """What a plan follows from beside the tensors; no number is, so that a schedule makes no new plan."""
    batch, sets, found_inf = given.batch, given.sets, given.found_inf
    moving = tuple(given.moving) if type(None) in {*map(type, batch.grads)} else True
    numbers = [(h[5:], [*map(type, h)]) for h in sets]
    extras = given.grad_scale is None, isinstance(found_inf, Tensor) and is_readable(found_inf), found_inf is None
    counts = len(batch.params), len(batch.steps), len(given.others), given.has_own_steps, tuple(given.narrow)
    return kernel, donate, counts, moving, numbers, given.places if len(sets) > 1 else (), extras


def _make(given: Arguments, tensors: Sequence[Tensor], kernel: str, *, donate: bool, is_explained: bool) -> Plan:
    given.check()
    batch, facts = given.batch, find_facts(given.batch, tensors)
    watched_by = _watcher(facts)
    if donate:
        _check_donation(given, facts, watched_by)
    if watched_by not in (None, TRACER) and facts.has_shards:
        index = next(i for i, x in enumerate(batch.params) if is_dtensor(x))
        raise RuntimeError(
            f"{given.label('params', index)} is a DTensor, and the update is watched by {watched_by}. "
            "DTensors are updated shard by shard, without derivatives: use torch.no_grad(), or detach, or update "
            "plain tensors (full_tensor())."
        )
    # torch has a silent zero for forward over forward mode through any autograd.Function.
    if watched_by in (TRACER, _NESTED):
        chosen, why = EQUATIONS, dict.fromkeys(KERNELS, f"is opaque to {watched_by}")
        why[EQUATIONS] = "plain operations, which every watcher can follow"
    else:
        chosen = select_kernel(kernel, facts.devices, given.sets).name
        why = _why(given, facts, chosen, kernel, watched_by) if is_explained else {}
    found_inf = given.found_inf
    keeps_found_inf = isinstance(found_inf, Tensor) and not (watched_by is None and is_readable(found_inf))
    groups = _groups(given, facts, chosen, is_chosen=keeps_found_inf)
    if chosen != EQUATIONS and (watched_by is None or is_explained):
        is_watched = watched_by is not None
        groups = [x._replace(reasons=_reasons(given, x, donate=donate, is_watched=is_watched)) for x in groups]
    moves_all = len(given.moving) == len(batch.params)
    is_on_host = facts.are_contiguous and {x.type for x in facts.devices} == {"cpu"}
    is_large = sum(x.numel() for x in batch.params) > RUN
    is_streamed = watched_by is None and not donate and moves_all and is_on_host and is_large
    return Plan(facts, watched_by, chosen, why, groups, moves_all, is_streamed)


def _watcher(facts: Facts) -> str | None:
    if is_tracing():
        return TRACER
    if is_transformed():
        return _NESTED if forward_levels() > 1 else _TRANSFORM
    return _AUTOGRAD if facts.requires_grad and torch.is_grad_enabled() else None


def _check_donation(given: Arguments, facts: Facts, watched_by: str | None) -> None:
    if watched_by == TRACER and requires_grad(given.tensors):
        watched_by = _AUTOGRAD  # a tracer may donate
    if watched_by not in (None, TRACER):
        raise RuntimeError(
            f"Cannot donate: the update is watched by {watched_by}, which would miss the old values. "
            "Update without donate, or detach, or leave the transform, or use torch.no_grad()."
        )
    if watched_by == TRACER and not is_compiled_here():
        raise RuntimeError(
            "Cannot donate in a graph that is exported or traced (torch.export, make_fx, torch.jit.trace): it cannot "
            "check whether the tensors that it is run on share memory. Update without donate, and copy the results."
        )
    if (
        facts.is_inference
        and not torch.is_inference_mode_enabled()
        and any(x.is_inference() for *_, x in given.written())
    ):
        raise RuntimeError(
            "Cannot donate tensors made under torch.inference_mode() outside of it. "
            "Update them under inference_mode, or without donate."
        )


def _groups(given: Arguments, facts: Facts, kernel: str, *, is_chosen: bool) -> list[Group]:
    """The leaves that have a gradient, in as few groups as possible."""
    batch, moving = given.batch, given.moving
    if not moving:
        return []
    if facts.is_ready and len(given.sets) == 1:
        together = {(batch.params[0].device, batch.params[0].dtype, 0): moving}
    else:
        together: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
        rows = [*batch.rows()]
        for i in moving:
            key = batch.params[i].device, compute_dtype(*rows[i]), given.places[i]
            together.setdefault(key, []).append(i)
    has_scale = given.grad_scale is not None
    record = KERNELS.get(kernel)
    needs = () if record is None else (record.needs_one_layout, has_scale, is_chosen and not record.takes_found_inf)
    # Half types are computed in float32 by the equations.
    return [
        Group(indices, Stage(torch.promote_types(dtype, torch.float32) if record is None else dtype, *needs), {})
        for (_, dtype, _), indices in together.items()
    ]


@torch.no_grad()
def _reasons(given: Arguments, group: Group, *, donate: bool, is_watched: bool) -> Reasons:
    """What the kernel gets copies of. Without donation it gets copies of buffers already, which are dense."""
    batch = given.batch.take(group.indices)
    if is_watched and given.found_inf is not None:
        # Gradients are replaced, and results chosen, outside of the kernel.
        return {(root, i): _CHOSEN for root, column in zip(COLUMNS, batch, strict=False) for i in range(len(column))}
    pairs = [*zip(batch.grads, batch.params, strict=True)]
    redistributed = [i for i, pair in enumerate(pairs) if placement_change(*pair) is not None]
    grads = [param if i in redistributed else grad for i, (grad, param) in enumerate(pairs)]
    local = batch.map(local_shard)._replace(grads=[*map(local_shard, grads)])
    if not donate and not all(x.is_contiguous() for x in local.buffers):
        local = local.map(lambda x: torch.empty_like(x, device="meta"))
    why = dict.fromkeys((("grads", i) for i in redistributed), "is redistributed to the placements of its parameter")
    return {**group.stage.reasons(local), **why}


def _why(given: Arguments, facts: Facts, chosen: str, asked: str, watched_by: str | None) -> dict[str, str]:
    """Why each kernel computes or does not."""
    within = f", within an autograd.Function: watched by {watched_by}" if watched_by else ""
    why = {chosen: ("the fastest that can" if asked == "auto" else "asked for") + within}
    other = f"{chosen} is faster" if asked == "auto" else f"{chosen} was asked for"
    return {x.name: why.get(x.name) or x.obstacle(facts.devices, given.sets) or other for x in KERNELS.values()}
