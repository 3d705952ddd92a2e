"""explain: which kernel would compute an update, on which leaves together, and on copies of what."""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from functional_adam.adam.equations import Scalars, compute_dtype
from functional_adam.adam.hparams import AdamHparams, Scalar
from functional_adam.adam.planning import FASTEST_FIRST, KernelName, Plan, group_leaves, obstacle
from functional_adam.adam.state import AdamState, TensorTree
from functional_adam.call.arguments import Arguments, flatten_arguments
from functional_adam.call.dispatch import EQUATIONS, Way, select_way
from functional_adam.tensors.leaves import BUFFER_NAMES, local_shard, placement_change
from functional_adam.tensors.trees import flatten


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
    given = flatten_arguments(params, grads, state, hparams, grad_scale, found_inf)
    way = select_way(given, kernel, donate=donate)
    moving = [] if way.found_inf is True else [i for i, grad in enumerate(given.grads) if grad is not None]
    paths = given.treespec.accessors()
    groups: list[LeafGroup] = []
    for group in group_leaves(given.buffers.take(moving), [way.scalars[i] for i in moving]):
        indices = [moving[i] for i in group.indices]
        leaves = given.buffers.take(indices).params
        names = [paths[i].codify("params") for i in indices]
        elements = sum(_local(x).numel() for x in leaves)
        h = _hparams_of(way.scalars[indices[0]])
        # Half types are computed in float32 by the equations.
        dtype = torch.promote_types(group.dtype, torch.float32) if way.kernel == EQUATIONS else group.dtype
        groups.append(LeafGroup(leaves[0].device, dtype, names, elements, h))
    is_moving = {*moving}
    still = [path.codify("params") for i, path in enumerate(paths) if i not in is_moving]
    found: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for root, index, nbytes, why in (*_results(given, way, donate=donate), *_copies(given, way, moving, donate=donate)):
        found.setdefault((root, why), []).append((paths[index].codify(root), nbytes))
    memory = [NewMemory([name for name, _ in x], sum(n for _, n in x), why) for (_, why), x in found.items()]
    return Explanation(way.watched_by, way.kernel, _reasons(given, way, kernel), groups, still, memory)


def _hparams_of(h: Scalars) -> AdamHparams:
    tree: Any = AdamHparams(amsgrad=h.amsgrad, maximize=h.maximize, decoupled_weight_decay=h.decoupled_weight_decay)
    lr, beta1, beta2, eps, weight_decay = h[:5]
    # By unflatten, which checks no values: what the update takes can be explained.
    return cast("Any", flatten(tree)[1].unflatten((lr, beta1, beta2, eps, weight_decay)))


def _reasons(given: Arguments, way: Way, asked: str) -> dict[str, str]:
    if way.kernel == EQUATIONS:
        opaque = f"is opaque to {way.watched_by}"
        return {**dict.fromkeys(FASTEST_FIRST, opaque), EQUATIONS: "plain operations, which every watcher can follow"}
    devices, sets = {x.device for x in given.buffers.params}, [*{id(h): h for h in way.scalars}.values()]
    reasons: dict[str, str] = {}
    for name in FASTEST_FIRST:
        if name == way.kernel:
            why = "the fastest that can" if asked == "auto" else "asked for"
            within = f", within an autograd.Function: watched by {way.watched_by}"
            reasons[name] = why + (within if way.watched_by else "")
        else:
            other = f"{way.kernel} is faster" if asked == "auto" else f"{way.kernel} was asked for"
            reasons[name] = obstacle(name, devices, sets) or other
    return reasons


_Found: TypeAlias = Iterator[tuple[str, int, int, str]]
"""Root and index of a leaf, bytes, reason."""


def _results(given: Arguments, way: Way, *, donate: bool) -> _Found:
    """The tensors that an update without donation returns, and those in which a watched one computes."""
    why = "is a result, and old values stay: nothing is donated"
    if donate and way.watched_by:
        why = f"is computed apart, then copied into donated memory: watched by {way.watched_by}"
    if not donate or way.watched_by:
        for root, column in zip(BUFFER_NAMES, given.buffers, strict=True):
            for index, x in enumerate(column):
                yield _owner(given, root, index), index, _local(x).nbytes, why
    for index, x in given.narrow.items():
        if given.grads[index] is not None:
            yield "params", index, _local(x).nbytes, "is rounded from its master"
        elif not donate:
            yield "params", index, _local(x).nbytes, why


def _copies(given: Arguments, way: Way, moving: list[int], *, donate: bool) -> _Found:
    """What the kernel cannot take as it is."""
    if way.kernel == EQUATIONS:
        return
    for index in moving:
        given_row = [given.buffers.params[index], *(column[index] for column in given.buffers[1:] if column)]
        grad: Any = given.grads[index]
        dtype, has_found_inf = compute_dtype(*given_row), isinstance(way.found_inf, Tensor)
        plan = Plan(way.kernel, dtype, has_grad_scale=way.grad_scale is not None, has_found_inf=has_found_inf)
        # Where somebody watches, gradients are zeroed and results chosen outside of the kernel.
        chosen = "is chosen by found_inf, whose value is not read" if way.watched_by and has_found_inf else None
        # Without donation the kernel gets copies already, which are dense.
        row = [_local(x, is_copy=not donate) for x in given_row]
        for root, x in zip(BUFFER_NAMES, row, strict=False):
            why = chosen or plan.why_copied(x, row[0], is_grad=False)
            if why:
                yield _owner(given, root, index), index, x.numel() * dtype.itemsize, why
        if placement_change(grad, given_row[0]) is None:
            why = chosen or plan.why_copied(_local(grad), row[0], is_grad=True)
        else:
            why = "is redistributed to the placements of its parameter"
        if why:
            yield "grads", index, row[0].numel() * dtype.itemsize, why


def _local(x: Tensor, *, is_copy: bool = False) -> Tensor:
    with torch.no_grad():
        x = local_shard(x)
        return torch.empty_like(x, device="meta") if is_copy else x


def _owner(given: Arguments, root: str, index: int) -> str:
    """Among the buffers a master stands for its parameter."""
    return "state.master_params" if root == "params" and index in given.narrow else root


def _listed(paths: list[str]) -> str:
    others = len(paths) - 1
    return paths[0] + (f" and {others:,} other{'s' if others > 1 else ''}" if others else "")


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cell(text: str, width: int) -> str:
        return text.rjust(width) if text[:1].isdigit() else text.ljust(width)

    return "\n".join("  ".join(map(cell, row, widths)).rstrip() for row in rows)
