"""Is anything watching the tensors of an update: autograd, torch.func, forward-mode duals, a tracer?

All private torch names that answer it stand here. Each is looked up by capability; without one the answer
errs towards "tracked", which costs speed and never a derivative.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_C = getattr(torch, "_C", None)
_functorch = getattr(_C, "_functorch", None)
_is_functorch_active: Callable[[], bool] = getattr(_C, "_are_functorch_transforms_active", lambda: True)

_is_jit_tracing: Callable[[], bool] = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]
_subclasses = getattr(torch, "_subclasses", None)
_FakeTensor = getattr(_subclasses, "FakeTensor", ())
_FunctionalTensor = getattr(getattr(_subclasses, "functional_tensor", None), "FunctionalTensor", ())
_no_dispatch = getattr(Tensor, "__torch_dispatch__")  # noqa: B009 (torch gives it no type)
# Without these: everything is wrapped and nothing can be unwrapped, and forward mode may be nested wherever it may be.
_is_wrapped: Callable[[Tensor], bool] = getattr(_functorch, "is_functorch_wrapped_tensor", lambda _: True)
_is_grad_wrapper: Callable[[Tensor], bool] = getattr(_functorch, "is_gradtrackingtensor", lambda _: False)
_is_legacy_batched: Callable[[Tensor], bool] = getattr(_functorch, "is_legacy_batchedtensor", lambda _: True)
_count_dispatch_modes: Callable[[], int] = getattr(_C, "_len_torch_dispatch_stack", lambda: 1)
_can_unwrap = hasattr(_functorch, "is_functorch_wrapped_tensor")
_unwrap: Callable[[Tensor], Tensor] | None = getattr(_functorch, "get_unwrapped", None) if _can_unwrap else None
_interpreter_stack = getattr(_functorch, "get_interpreter_stack", None)


def is_tracing() -> bool:
    """Whether this call is being recorded into a graph (compile, export, make_fx, torch.jit.trace) and not run."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None or _is_jit_tracing()


def is_compiled_here() -> bool:
    """Whether torch.compile traces this call, so that the graph is run in this process, by the same package."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def is_transformed() -> bool:
    """Whether a torch.func transform or a forward-mode dual level is open. Under a compiler, ask `is_tracing` first."""
    return _is_functorch_active() or getattr(forward_ad, "_current_level", 0) >= 0


def is_single_vmap() -> bool:
    """Whether one `vmap` is the only transform that is open."""
    if _interpreter_stack is None or getattr(forward_ad, "_current_level", 0) >= 0:
        return False
    stack = _interpreter_stack() or ()
    return len(stack) == 1 and stack[0].key().name == "Vmap"


def requires_grad(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd would record an operation on `tensors`."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def is_host_value(tensor: Tensor) -> bool:
    """Whether the value lies in the host's memory, where reading it costs nothing."""
    return is_host_memory(tensor) and not is_tracing() and not _is_wrapped(tensor)


def is_host_memory(tensor: Tensor) -> bool:
    """Whether the value, or all the values that are mapped over, lie in the host's memory."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu


def is_constant(tensor: Tensor, *, may_be_mapped: bool = False) -> bool:
    """Whether nobody differentiates with respect to `tensor`, or maps over it unless that may be, at any level."""
    while _is_wrapped(tensor):
        if _unwrap is None or not (may_be_mapped or _is_grad_wrapper(tensor)) or _is_differentiated(tensor):
            return False
        tensor = _unwrap(tensor)
    return not _is_differentiated(tensor)


def may_be_differentiated(tensor: Tensor) -> bool:
    """Whether somebody differentiates with respect to `tensor`, at any level, or may do so in a graph."""
    return is_tracing() or not is_constant(tensor, may_be_mapped=True)


def is_readable(tensor: Tensor) -> bool:
    """Whether the value can be read now, for free, and without hiding it from anybody who watches."""
    return bool(readable((tensor,)))


def readable(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of `tensors` that are readable, as `is_readable` says."""
    if is_tracing() or is_transformed():
        return []
    is_recorded = torch.is_grad_enabled()
    return [x for x in tensors if is_host_memory(x) and not _is_wrapped(x) and not (is_recorded and x.requires_grad)]


def is_batched_by_engine(tensor: Tensor) -> bool:
    """Whether `tensor` is a cotangent of `torch.autograd.grad(..., is_grads_batched=True)`, which is no transform."""
    return _is_legacy_batched(tensor)


def is_intercepted() -> bool:
    """Whether a TorchDispatchMode sees each operation, and may keep what it returns."""
    return _count_dispatch_modes() > 0


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` is a FakeTensor, which has no memory."""
    return isinstance(tensor, _FakeTensor)


def class_fault(tensor: Tensor) -> str | None:
    """Why no kernel may meet a tensor of this class, or None.

    A class with a `__torch_dispatch__` may run an operation once for each of the tensors that it holds. A kernel would
    then update the plain tensors among its arguments as many times. Of the classes let through it is known otherwise.
    """
    kind = type(tensor)
    if (
        is_tracing()  # into operations that write to none of their arguments
        or getattr(kind, "__torch_dispatch__") is _no_dispatch  # noqa: B009 (torch gives it no type)
        or isinstance(tensor, (_FakeTensor, _FunctionalTensor))
        or hasattr(kind, "device_mesh")  # a DTensor
        or hasattr(kind, "trigger_wait")  # the result of a collective, which may still be under way
    ):
        return None
    return (
        f"is of type {kind.__name__}, whose __torch_dispatch__ may update a plain tensor several times. "
        "Expected a plain tensor or a DTensor: unwrap it."
    )


def forward_levels() -> int:
    """How many levels of forward-mode differentiation are open."""
    if _interpreter_stack is None:
        return 2 if is_transformed() else 0
    jvp_levels = sum(interpreter.key().name == "Jvp" for interpreter in _interpreter_stack() or ())
    return jvp_levels or int(getattr(forward_ad, "_current_level", 0) >= 0)


def _is_differentiated(tensor: Tensor) -> bool:
    """Whether somebody differentiates with respect to `tensor`, at its outermost level."""
    level = getattr(forward_ad, "_current_level", None)
    unpack_dual = getattr(forward_ad, "unpack_dual")  # noqa: B009 (torch gives it no type)
    return tensor.requires_grad or level is None or (level >= 0 and unpack_dual(tensor).tangent is not None)
