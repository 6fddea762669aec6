"""Whether what a training computes is still a number: gradients before a step, weights after it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all values together, a float32 scalar on their device, which is not waited for.

    NaN or infinite where any value is, and where the squares of large ones leave float32: whatever
    that is the norm of (gradients, weights, an optimizer's means of squares) is lost then, too.
    """
    norm: Tensor = nn.utils.get_total_norm(list(tensors))
    return norm.float()


def changed_by_step(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Floating tensors that a step leaves behind: weights, statistics, memories of optimizers.

    They are all on one device: an optimizer's count of steps, which Adam keeps on the CPU, is none.
    """
    kept = [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step" and isinstance(value, Tensor)
    ]
    tensors = [*module.parameters(), *module.buffers(), *kept]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
