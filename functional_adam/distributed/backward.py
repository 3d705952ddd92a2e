"""Each parameter is updated as soon as its gradient is there, and the gradient freed."""

from contextlib import ExitStack

import torch

from functional_adam.interop.adapter import _FunctionalAdam, check_adapter


def step_in_backward(optimizer: _FunctionalAdam) -> ExitStack:
    """Let every `backward()` update the parameters of `optimizer` as it goes, and free their gradients.

    Only the gradients of the layers at work exist at a time. The result is that of `backward()` and then
    `optimizer.step()`. Each `backward()` is one step: gradients are neither summed over several, nor clipped by their
    common norm. For `DistributedDataParallel`, which reduces gradients later, use :func:`step_in_ddp`.

    Args:
        optimizer: with parameters. Those that require no grad now are left alone.

    Returns:
        What undoes it, by `.close()`, or at the end of a `with` statement.

    Raises:
        TypeError: `optimizer` is of another type.
        ValueError: none of the optimizer's parameters requires grad.

    Example:
        >>> from functional_adam.distributed import step_in_backward
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> with step_in_backward(_FunctionalAdam([weight], lr=0.5)):
        ...     (weight**2).sum().backward()
        >>> weight.detach(), weight.grad
        (tensor([ 0.5000, -1.5000]), None)

    Source: the contract of `torch.Tensor.register_post_accumulate_grad_hook`.
    """
    check_adapter(optimizer)

    def step(param: torch.Tensor) -> None:
        optimizer.step_param(param, param.grad)
        param.grad = None

    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    if not params:
        raise ValueError("The optimizer has no parameters that require grad. Construct it with those of the model.")
    handles = ExitStack()
    for param in params:
        handles.callback(param.register_post_accumulate_grad_hook(step).remove)
    return handles
