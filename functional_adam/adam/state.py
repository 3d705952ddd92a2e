"""AdamState, and how it begins."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_adam.adam.hparams import AdamHparams, check_flag, check_hparams_type
from functional_adam.tensors.leaves import DTYPES, MASTER_DTYPES, check_params
from functional_adam.tensors.printing import shown
from functional_adam.tensors.trees import TensorTree, flatten, labels_of, leaves_of, path_of, unflatten


class AdamState(NamedTuple):
    """What Adam remembers between two updates: an immutable pytree, made by :func:`adam_init`.

    Absent is `()`, since `torch.func.vmap` rejects None. The parameters have the unit U, the loss has L. Printing a
    state shows the dtypes and shapes of its tensors; print a tensor of it for values.

    Example:
        >>> state = adam_init(torch.ones(2, 3), AdamHparams())
        >>> state
        AdamState(step=f32[], exp_avg=f32[2, 3], exp_avg_sq=f32[2, 3], max_exp_avg_sq=(), master_params=())
        >>> state._replace(step=torch.tensor(7.0)).step
        tensor(7.)

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980, Algorithm 1; `max_exp_avg_sq` is AMSGrad's,
    https://openreview.net/forum?id=ryQu7f-RZ.
    """

    step: TensorTree
    """(), float32, on the device of its leaf: updates applied so far. One for all leaves, or a tree like params."""
    exp_avg: TensorTree
    """Like params: running mean of the gradients g, in L/U."""
    exp_avg_sq: TensorTree
    """Like params: running mean of g * g, in L^2/U^2."""
    max_exp_avg_sq: TensorTree = ()
    """Like params: largest exp_avg_sq so far, in L^2/U^2. () without amsgrad."""
    master_params: TensorTree = ()
    """Like params: float32 copies of parameters of less precision, in U; () for any other leaf. () without copies."""

    def __repr__(self) -> str:
        # The memory of a donated state holds the values of another one.
        is_donated = any(map(is_spent, leaves_of(self.step)))
        texts = ["donated" if is_donated and text != "()" else text for text in map(shown, self)]
        return f"AdamState({', '.join(f'{name}={text}' for name, text in zip(self._fields, texts, strict=True))})"


_serialization: Any = torch.serialization
_serialization.add_safe_globals([AdamState, AdamHparams])  # for torch.load(..., weights_only=True)


def is_spent(step: Any) -> bool:
    """Whether `step` belongs to a state that was donated: `replace_steps_` has emptied it."""
    return isinstance(step, Tensor) and step.shape == (0,)


def adam_init(
    params: TensorTree,
    hparams: AdamHparams,
    *,
    per_leaf_step: bool = False,
    moment_dtype: torch.dtype | None = None,
    master_params: bool = False,
) -> AdamState:
    """The state before the first update: step 0, all moments 0.

    Moments have the shape, device, layout (and DTensor placement) of their parameters. Their dtype is that of the
    parameter, or of its master copy if it has one, unless `moment_dtype` is given. An update computes in the wider of
    both.

    Args:
        params: pytree of floating or complex tensors of any shape, in units U.
        hparams: decides, by `amsgrad`, whether the largest exp_avg_sq is kept.
        per_leaf_step: count updates leaf by leaf. Needed when leaves live on several devices, and for gradients
            that are None, whose leaves then stand still.
        moment_dtype: floating dtype of all moments; those of complex parameters have its complex form.
        master_params: keep float32 copies of parameters of less precision. The copies are updated, and the parameters
            are the copies, rounded: changes too small for the parameters add up.

    Returns:
        An `AdamState`; `step` is a float32 tensor of shape (), or a tree of them with `per_leaf_step`.

    Raises:
        TypeError: a leaf is not a dense floating or complex tensor, `hparams` is not `AdamHparams`, or `moment_dtype`
            is no floating dtype.
        ValueError: leaves live on several devices and `per_leaf_step` is False.

    Example:
        >>> state = adam_init({"w": torch.ones(2, 3)}, AdamHparams())
        >>> state.step, state.exp_avg["w"].shape
        (tensor(0.), torch.Size([2, 3]))
        >>> state = adam_init({"w": torch.ones(2, dtype=torch.bfloat16)}, AdamHparams(), master_params=True)
        >>> state.master_params
        {'w': tensor([1., 1.])}

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980, Algorithm 1.
    """
    check_hparams_type(hparams)
    check_flag(per_leaf_step, "per_leaf_step")
    check_flag(master_params, "master_params")
    leaves, treespec = flatten(params)
    check_params(leaves, labels_of(treespec))
    with torch.no_grad():
        if per_leaf_step:
            step: TensorTree = unflatten(treespec, [_zero_step(leaf.device) for leaf in leaves], params)
        else:
            device = leaves[0].device if leaves else torch.device("cpu")
            for index, leaf in enumerate(leaves):
                if leaf.device != device:
                    raise ValueError(
                        f"{path_of(treespec, index, 'params')} is on {leaf.device}, but "
                        f"{path_of(treespec, 0, 'params')} is on {device}. A shared step has one device: "
                        "pass per_leaf_step=True."
                    )
            step = _zero_step(device)
        dtypes = [_moment_dtype(leaf, moment_dtype, has_master=master_params) for leaf in leaves]

        def zeros() -> TensorTree:
            return treespec.unflatten([torch.zeros_like(x, dtype=d) for x, d in zip(leaves, dtypes, strict=True)])

        return AdamState(
            step=step,
            exp_avg=zeros(),
            exp_avg_sq=zeros(),
            max_exp_avg_sq=zeros() if hparams.amsgrad else (),
            master_params=unflatten(treespec, [_master_of(leaf) for leaf in leaves], params) if master_params else (),
        )


def _zero_step(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=device)


def _moment_dtype(param: Tensor, chosen: Any, *, has_master: bool) -> torch.dtype:
    if chosen is None:
        return MASTER_DTYPES.get(param.dtype, param.dtype) if has_master else param.dtype
    if not isinstance(chosen, torch.dtype) or chosen not in DTYPES or chosen.is_complex:
        raise TypeError(f"moment_dtype is {chosen!r}. Expected a floating dtype, such as torch.float32, or None.")
    if not param.is_complex():
        return chosen
    if chosen is torch.bfloat16:
        raise TypeError("moment_dtype is torch.bfloat16, which has no complex form for complex parameters.")
    return chosen.to_complex()


def _master_of(param: Tensor) -> Any:
    wide = MASTER_DTYPES.get(param.dtype)
    return () if wide is None else param.detach().to(wide)
