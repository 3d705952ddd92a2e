"""Is anything watching the tensors of an update: autograd, torch.func, forward-mode duals, a tracer?

All private torch names that answer it stand here. Each is looked up by capability; without one the answer
errs towards "tracked", which costs speed and never a derivative.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_C: Any = getattr(torch, "_C", None)
_is_functorch_active: Callable[[], bool] = getattr(_C, "_are_functorch_transforms_active", lambda: True)


def is_tracing() -> bool:
    """Whether this call is being recorded into a graph (compile, export, make_fx) and not run."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def is_transformed() -> bool:
    """Whether a torch.func transform or a forward-mode dual level is open."""
    # Dynamo cannot trace the question, and has its own way with transforms.
    if torch.compiler.is_compiling():
        return False
    return _is_functorch_active() or getattr(forward_ad, "_current_level", 0) >= 0


def requires_grad(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd would record an operation on `tensors`."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def is_readable(tensor: Tensor) -> bool:
    """Whether the value can be read now, for free, and without hiding it from anybody who watches."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and not is_tracing()
        and not is_transformed()
        and not requires_grad((tensor,))
    )
