"""DTensors: what lies in this process of them, and how gradients come to be placed like their parameters.

Adam is elementwise, so that the update of the shards is the update.
"""

from typing import Any

import torch
from torch import Tensor

PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_dtensor(x: object) -> bool:
    """Whether `x` is a DTensor. By capability: torch.distributed.tensor is slow to import, and not in every build."""
    return type(x) not in PLAIN and hasattr(x, "device_mesh")


def local_shard(x: Any) -> Tensor:
    """What lies in this process of a DTensor, on the same memory; any other tensor as it is. Call under no_grad."""
    return x.to_local() if is_dtensor(x) else x


def placed_like(grad: Any, param: Tensor) -> Tensor:
    """`grad`, brought to the placements of `param`."""
    placements = placement_change(grad, param)
    return grad if placements is None else grad.redistribute(placements=placements)


def placement_change(grad: Any, param: Any) -> Any:
    """The placements that `grad` is to be brought to, those of its parameter, or None if it is placed like it."""
    return None if not is_dtensor(param) or grad.placements == param.placements else param.placements


def full_value(x: Any) -> Any:
    """A DTensor as a plain tensor of its full value, the same in each process; anything else as it is."""
    if not is_dtensor(x):
        return x
    with torch.no_grad():
        return x.full_tensor()


def placement_fault(tensor: Any, param: Any, *, is_grad: bool) -> str | None:
    """Why a DTensor cannot be updated shard by shard, or None. Gradients may be placed differently."""
    if is_dtensor(tensor) != is_dtensor(param):
        a, b = (f"a DTensor on {x.device_mesh}" if is_dtensor(x) else "no DTensor" for x in (tensor, param))
        return f"is {a}, but {{param}} is {b}. Convert it with distribute_tensor() or full_tensor()."
    if not is_dtensor(param):
        return None
    got, expected = tensor.placements, param.placements
    if tensor is param:
        if any(placement.is_partial() for placement in got):
            return f"is placed as {got}, a sum that is still to be made. Convert it with redistribute()."
        return None
    if tensor.device_mesh != param.device_mesh:
        return f"is on {tensor.device_mesh}, but {{param}} is on {param.device_mesh}. Put both on one mesh."
    if got != expected:
        return None if is_grad else f"is placed as {got}, but {{param}} as {expected}. Convert it with redistribute()."
    got, expected = (tuple(local_shard(x).shape) for x in (tensor, param))
    if got != expected:
        return f"has a local shard of shape {got}, but {{param}} has {expected}. Split both alike."
    return None
