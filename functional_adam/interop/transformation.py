"""Adam in the shape of optax and TorchOpt: a pair (init, update), and apply_updates."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from functional_adam.adam.kernels import KernelName, check_kernel_name
from functional_adam.adam.pytrees import AdamHparams, AdamState, adam_init
from functional_adam.call.update import adam_update
from functional_adam.tensors.leaves import check_fit, check_flag, check_params, tensor_fault, wrong_type
from functional_adam.tensors.overlap import check_apart
from functional_adam.tensors.trees import (
    Scalar,
    TensorTree,
    flatten,
    flatten_like,
    in_kind_of,
    labels_of,
    leaves_of,
    map_leaves,
)

Params = TypeVar("Params")


class Init(Protocol):
    """The first half of a transformation: the state before the first update."""

    def __call__(self, params: TensorTree) -> AdamState:
        """Like `adam_init`."""
        ...


class Update(Protocol):
    """The second half of a transformation: what to add to the parameters, and the next state."""

    def __call__(
        self, grads: TensorTree, state: AdamState, params: TensorTree | None = None, *, inplace: bool = False
    ) -> tuple[TensorTree, AdamState]:
        """See `adam`."""
        ...


class GradientTransformation(NamedTuple):
    """An optimizer as a pair of pure functions, in the shape of optax and TorchOpt; made by :func:`adam`.

    Example:
        >>> from functional_adam import transformation
        >>> init, update = transformation.adam(lr=0.1)
        >>> updates, state = update(torch.tensor([2.0, -2.0]), init(torch.zeros(2)))
        >>> updates
        tensor([-0.1000,  0.1000])

    Source: `optax.GradientTransformation`, `torchopt.base.GradientTransformation`.
    """

    init: Init
    update: Update


def adam(
    lr: Scalar = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    kernel: KernelName = "auto",
    per_leaf_step: bool = False,
) -> GradientTransformation:
    """Adam as a gradient transformation: `init(params)` and `update(grads, state, params=None, *, inplace=False)`.

    The state is the `AdamState` of `adam_init`, and depends on no number: for a schedule make an `adam(lr=...)` a step.

    `update` returns what to add to the parameters, in U, of the dtype of `params` (without them: of the moments).
    Without weight decay it needs no `params`, and is the update of a parameter that is 0, exactly rounded; with it, it
    is the difference of the new and the old parameters. `apply_updates(params, updates)` then gives what `adam_update`
    does, up to one rounding of the update and one of the sum. With `inplace` the tensors of `state` are written,
    `state` itself is returned, and nothing is recorded. Gradients are never written. As in TorchOpt, a list may stand
    for a tuple at the root of a tree.

    Args:
        lr: learning rate, in U. This and the following are those of `AdamHparams`.
        betas: decay rates of the running means, without unit.
        eps: added to the denominator, in L/U.
        weight_decay: in L/U^2, or 1/U if decoupled. Unless it is the number 0, `update` needs `params`.
        amsgrad: divide by the largest exp_avg_sq so far. optax corrects the bias before it takes the maximum.
        maximize: ascend instead of descend.
        decoupled_weight_decay: AdamW.
        kernel: as in `adam_update`.
        per_leaf_step: as in `adam_init`: needed for gradients that are None, whose updates are then 0.

    Raises:
        TypeError: as `AdamHparams`.
        ValueError: as `AdamHparams`, or an unknown kernel; from `update`: weight decay without `params`, or a state
            with master parameters, which updates are not added to.
        RuntimeError: from `update` with `inplace`: the gradients or the state are tracked.

    Example:
        >>> from functional_adam import transformation
        >>> optimizer = transformation.adam(lr=0.1, weight_decay=0.5, decoupled_weight_decay=True)
        >>> params = torch.tensor([1.0, -2.0])
        >>> optimizer.update(torch.tensor([2.0, -4.0]), optimizer.init(params), params)[0]
        tensor([-0.1500,  0.2000])

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980; the shape is that of `optax.adam` and `torchopt.adam`.
    """
    check_kernel_name(kernel)
    flags = {"amsgrad": amsgrad, "maximize": maximize, "decoupled_weight_decay": decoupled_weight_decay}
    hparams = AdamHparams(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **flags)
    optimizer = _Adam(hparams, kernel, per_leaf_step)
    return GradientTransformation(optimizer.init, optimizer.update)


class _Adam(NamedTuple):
    """What `adam` was called with."""

    hparams: AdamHparams
    kernel: KernelName
    per_leaf_step: bool

    def init(self, params: TensorTree) -> AdamState:
        return adam_init(params, self.hparams, per_leaf_step=self.per_leaf_step)

    def update(
        self, grads: TensorTree, state: AdamState, params: TensorTree | None = None, *, inplace: bool = False
    ) -> tuple[TensorTree, AdamState]:
        weight_decay = self.hparams.weight_decay
        # A tensor may be traced, or lie on an accelerator: it is not read.
        has_decay = isinstance(weight_decay, Tensor) or weight_decay != 0
        if has_decay and params is None:
            raise ValueError(f"params is None, but weight_decay is {weight_decay}. Call update(grads, state, params).")
        check_flag(inplace, "inplace")
        if not isinstance(state, AdamState):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise wrong_type("state", state, "the AdamState of init. The order is update(grads, state, params)")
        if leaves_of(state.master_params):
            raise ValueError(
                "state.master_params is given, but updates are added to the parameters, not to their copies. "
                "Use adam_update, or a state without copies."
            )
        like = in_kind_of(state.exp_avg, state.exp_avg if params is None else params)
        if inplace and has_decay:
            like = _map_tensors(Tensor.detach, like)
        # Without weight decay an update does not depend on the parameter: that of 0 is the update itself, not rounded.
        copy = torch.clone if has_decay else torch.zeros_like
        old = _map_tensors(copy, like) if inplace or not has_decay else like
        # Donation empties the step of its state, but the caller may go on with it.
        own = state._replace(step=_map_tensors(torch.clone, state.step)) if inplace else state
        new, result = adam_update(old, grads, own, self.hparams, kernel=self.kernel, donate=inplace)
        if inplace:
            steps, treespec = flatten(state.step)
            for step, counted in zip(steps, flatten_like(treespec, result.step, "step", state.step), strict=True):
                step.copy_(counted)
        updates = map_leaves(torch.sub, new, like) if has_decay else new
        return in_kind_of(grads, updates), state if inplace else result


def apply_updates(params: Params, updates: TensorTree, *, inplace: bool = False) -> Params:
    """`params + updates`, leaf by leaf.

    Args:
        params: pytree of tensors, in U.
        updates: like params, in U. A leaf that is None leaves its parameter alone.
        inplace: write into `params` instead, unseen by autograd, and return them.

    Returns:
        A pytree like `params`, of its dtypes.

    Raises:
        TypeError: a leaf is no floating or complex tensor.
        ValueError: `updates` has another structure than `params`, or a leaf another shape or device.
        RuntimeError: `inplace`, and leaves share memory.

    Example:
        >>> from functional_adam import transformation
        >>> transformation.apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([0.5, -0.5])})["w"]
        tensor([1.5000, 0.5000])

    Source: `optax.apply_updates`, `torchopt.apply_updates`.
    """
    check_flag(inplace, "inplace")
    leaves, treespec = flatten(params)
    changes = flatten_like(treespec, updates, "updates", params)
    label = labels_of(treespec)
    check_params(leaves, label)
    for index, (leaf, change) in enumerate(zip(leaves, changes, strict=True)):
        if change is not None:
            check_fit(change, leaf, label, "updates", index, "Updates must match params leaf by leaf.", is_grad=True)
    if inplace:
        check_apart(leaves, (), partial(label, "params"), verb="write", option="inplace")
        with torch.no_grad():
            for leaf, change in zip(leaves, changes, strict=True):
                if change is not None:
                    leaf.add_(change)
        return params
    new = [p if u is None else (p + u).to(p.dtype) for p, u in zip(leaves, changes, strict=True)]
    return cast("Params", treespec.unflatten(new))


def _map_tensors(function: Callable[[Tensor], Tensor], tree: TensorTree) -> TensorTree:
    """`function` of each leaf. What cannot be one stays as it is, for adam_update to say so."""

    def map_one(x: Tensor) -> Tensor:
        return x if tensor_fault(x) else function(x)

    return map_leaves(map_one, tree)
