"""explain: which kernel would compute an update, on which leaves together, and on copies of what."""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from functional_adam.adam.kernels import KernelName
from functional_adam.adam.pytrees import AdamHparams, AdamState
from functional_adam.call.arguments import Arguments, read_arguments
from functional_adam.call.plan import Group, Plan, plan_update
from functional_adam.tensors.leaves import local_shard
from functional_adam.tensors.trees import Scalar, TensorTree, flatten


class LeafGroup(NamedTuple):
    """Leaves of one device, dtype and set of hyperparameters, which a kernel takes in one call."""

    device: torch.device
    dtype: torch.dtype
    """What they are computed in: the widest dtype of a parameter and its moments; for equations at least float32."""
    leaves: list[str]
    """Paths, such as `params['w']`."""
    element_count: int
    """Of one member under vmap, and in this process if leaves are DTensors; like `nbytes`."""
    hparams: AdamHparams
    """What holds for these leaves: trees are resolved, and numbers are read where that is free."""


class NewMemory(NamedTuple):
    """Tensors for which an update makes new memory, for one reason."""

    tensors: list[str]
    """Paths, such as `grads['w']`."""
    nbytes: int
    why: str


class Explanation(NamedTuple):
    """What an update would do. `print` shows it as a table."""

    watched_by: str | None
    """Who needs differentiable, mappable or traceable operations, or None."""
    computed_by: str
    """"fused", "foreach", "single", or "equations"."""
    reasons: dict[str, str]
    """For each kernel why it computes or why it does not, the fastest first."""
    groups: list[LeafGroup]
    still: list[str]
    """Paths of the parameters that nothing is computed for: they have no gradient, or found_inf skips the update."""
    new_memory: list[NewMemory]

    def __str__(self) -> str:
        kernels = [("kernel", "runs", "why")]
        kernels += [(name, "yes" if name == self.computed_by else "no", why) for name, why in self.reasons.items()]
        groups = [("group of leaves", "elements", "computed in", "device")]
        groups += [(_listed(x.leaves), f"{x.element_count:,}", str(x.dtype), str(x.device)) for x in self.groups]
        groups += [(_listed(self.still), "", "nothing: stands still", "")] if self.still else []
        copies = [("new memory for", "bytes", "why")]
        copies += [(_listed(x.tensors), f"{x.nbytes:,}", x.why) for x in self.new_memory] or [("nothing", "0", "")]
        return "\n\n".join(map(_table, (kernels, groups, copies)))


def explain(
    params: TensorTree,
    grads: TensorTree,
    state: AdamState,
    hparams: AdamHparams,
    *,
    kernel: KernelName = "auto",
    donate: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
) -> Explanation:
    """What :func:`adam_update` would do with these arguments at this place in the program, without doing it.

    The update itself asks the functions that answer here. Under `vmap` the kernel named is the one that the batching
    rule is given; for numbers or steps of members it may take the equations (see docs/transforms.md).

    Not listed: new steps, of 4 bytes each; intermediate values, of which `single` and `foreach` allocate some of the
    size of the leaves; what derivatives keep.

    Args:
        params: as for :func:`adam_update`, like all others.
        grads: like params.
        state: from `adam_init` or an update.
        hparams: the hyperparameters.
        kernel: "auto", "single", "foreach" or "fused".
        donate: whether the update would be given the memory of `params` and `state`.
        grad_scale: number or 0-dim tensor.
        found_inf: number or 0-dim tensor.

    Returns:
        An `Explanation`; its string is a table.

    Raises:
        TypeError, ValueError, RuntimeError: where the update would raise, with the same message. A grad_scale or
            found_inf that is a DTensor is summed up, so that all processes must call.

    Example:
        >>> params = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
        >>> grads = {"w": torch.ones(3, 2).T, "b": torch.ones(2)}
        >>> hparams = AdamHparams()
        >>> print(explain(params, grads, adam_init(params, hparams), hparams, donate=True))
        kernel   runs  why
        fused    yes   the fastest that can
        foreach  no    fused is faster
        single   no    fused is faster
        <BLANKLINE>
        group of leaves          elements  computed in    device
        params['b'] and 1 other         8  torch.float32  cpu
        <BLANKLINE>
        new memory for  bytes  why
        grads['w']         24  is not laid out like its parameter

    Source: the choice is described in docs/kernels.md.
    """
    given, _ = read_arguments(params, grads, state, hparams, grad_scale, found_inf)
    plan, given = plan_update(given, kernel, donate=donate, is_explained=True)
    groups = [] if given.found_inf is True else plan.groups
    moving = {i for group in groups for i in group.indices}
    still = [given.label("params", i) for i in range(len(given.batch.params)) if i not in moving]
    found: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for root, index, nbytes, why in (*_results(plan, given, donate=donate), *_copies(given, groups)):
        found.setdefault((root, why), []).append((given.label(root, index), nbytes))
    memory = [NewMemory([name for name, _ in x], sum(n for _, n in x), why) for (_, why), x in found.items()]
    leaf_groups = [_leaf_group(given, group) for group in groups]
    return Explanation(plan.watched_by, plan.kernel, plan.why, leaf_groups, still, memory)


def _leaf_group(given: Arguments, group: Group) -> LeafGroup:
    leaves = [given.batch.params[i] for i in group.indices]
    h = given.sets[given.places[group.indices[0]]]
    tree = AdamHparams(amsgrad=h.amsgrad, maximize=h.maximize, decoupled_weight_decay=h.decoupled_weight_decay)
    # By unflatten, which checks no values: what the update takes can be explained.
    numbers = flatten(tree)[1].unflatten(h[:5])
    names = [given.label("params", i) for i in group.indices]
    return LeafGroup(
        leaves[0].device, group.stage.dtype, names, sum(_local(x).numel() for x in leaves), cast("AdamHparams", numbers)
    )


_Found: TypeAlias = Iterator[tuple[str, int, int, str]]
"""Root and index of a leaf, bytes, reason."""


def _results(plan: Plan, given: Arguments, *, donate: bool) -> _Found:
    """The tensors that an update without donation returns, and those in which a watched one computes."""
    why = "is a result, and old values stay: nothing is donated"
    if donate and plan.watched_by:
        why = f"is computed apart, then copied into donated memory: watched by {plan.watched_by}"
    moving = {*given.moving}
    for root, index, x in given.written():
        is_narrow = root == "params" and index in given.narrow
        if is_narrow and index in moving:
            yield root, index, _local(x).nbytes, "is rounded from its master"
        elif root != "state.step" and (not donate or (plan.watched_by and not is_narrow)):
            yield root, index, _local(x).nbytes, why


def _copies(given: Arguments, groups: list[Group]) -> _Found:
    """What the kernel cannot take as it is."""
    for group in groups:
        for (root, place), why in group.reasons.items():
            index = group.indices[place]
            nbytes = _local(given.batch.params[index]).numel() * group.stage.dtype.itemsize
            yield given.owner(root, index), index, nbytes, why


def _local(x: Tensor) -> Tensor:
    with torch.no_grad():
        return local_shard(x)


def _listed(paths: list[str]) -> str:
    others = len(paths) - 1
    return paths[0] + (f" and {others:,} other{'s' if others > 1 else ''}" if others else "")


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cell(text: str, width: int) -> str:
        return text.rjust(width) if text[:1].isdigit() else text.ljust(width)

    return "\n".join("  ".join(map(cell, row, widths)).rstrip() for row in rows)
