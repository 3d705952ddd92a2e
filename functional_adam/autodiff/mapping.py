"""A batching rule called at once where a single vmap is all that watches.

torch calls the rule of an autograd.Function too, but looks through all arguments as pytrees several times on the way,
which takes longer than the update of small leaves. The private torch names that it takes stand here; without one of
them torch calls the rule.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_adam.tensors.tracking import is_single_vmap


class _Functorch(NamedTuple):
    unwrap: Callable[[Tensor, int], tuple[Tensor, int | None]]
    wrap: Callable[[Tensor, int, int], Tensor]
    current_transform: Callable[[], Any]


def _find_functorch() -> _Functorch | None:
    try:
        functorch: Any = importlib.import_module("torch._C._functorch")
        current: Any = importlib.import_module("torch._functorch.pyfunctorch").retrieve_current_functorch_interpreter
        return _Functorch(functorch._unwrap_batched, functorch._add_batch_dim, current)
    except (AttributeError, ImportError):
        return None


_functorch = _find_functorch()


def call_under_vmap(rule: Callable[..., Any], operands: Sequence[Any]) -> tuple[Any, ...] | None:
    """The results of `rule(size, dims, operands)`, mapped, or None if this is for torch to do.

    `rule` takes the operands of all members, and gives results and their batch dimensions, as `Function.vmap` does.
    """
    if _functorch is None or not is_single_vmap():
        return None
    vmap = _functorch.current_transform()
    level = vmap.level()
    pairs = [_functorch.unwrap(x, level) if isinstance(x, Tensor) else (x, None) for x in operands]
    values, dims = zip(*pairs, strict=True)
    is_recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values)
    if is_recorded or all(dim is None for dim in dims):
        return None
    with vmap.lower():
        results, out_dims = rule(vmap.batch_size(), dims, values)
    return tuple(_functorch.wrap(x, dim, level) for x, dim in zip(results, out_dims, strict=True))
