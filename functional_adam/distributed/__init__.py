"""The adapters inside torch.distributed: registration, DDP overlap, steps in backward, RPC."""

from functional_adam.distributed.backward import step_in_backward
from functional_adam.distributed.optim import distributed_optimizer, register, unregister
from functional_adam.distributed.overlap import hook_then_step, step_in_ddp

__all__ = ["distributed_optimizer", "hook_then_step", "register", "step_in_backward", "step_in_ddp", "unregister"]
