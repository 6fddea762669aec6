"""Losses of a batch that several processes (ranks) share.

Each of W ranks holds consecutive images of the batch. What is a mean over something that every
image has equally much of (positions, say) needs nothing: the mean of the ranks' means, which DDP
makes of their gradients, is the mean over the batch. What divides by a count that differs from rank
to rank (valid pixels, chosen ones) divides by `Collectives.share` of it, and what relates images to
one another gathers them. The mean over ranks is then the loss of the whole batch, however many
there are.

Collectives must be called by all ranks in the same order; no branch may depend on what one rank
alone knows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Collectives:
    """The processes that share a batch.

    Args:
        group: Their group; None: one process, and everything here returns what it is given.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @torch.no_grad()
    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks, element by element, without gradient."""
        if self.group is None:
            return values
        return _all_reduced(values, self.group)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks, element by element, without gradient."""
        return values if self.group is None else self.total(values) / self.size

    def share(self, count: Tensor) -> Tensor:
        """The divisor with which the mean of the ranks' quotients is the quotient of the sums."""
        return self.mean(count)

    def divisor(self, count: Tensor) -> Tensor:
        """`share`, or 1 where nothing was counted."""
        share = self.share(count)
        return torch.where(share > 0, share, 1)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks with gradient: each rank's gradients reach all ranks' values."""
        if self.group is None:
            return values
        result: Tensor = _Sum.apply(values, self.group)
        return result

    def gather(self, images: Tensor) -> Tensor:
        """All ranks' images, (N, ...) to (W * N, ...), with gradient."""
        if self.group is None:
            return images
        result: Tensor = _Gather.apply(images, self.group)
        return result

    def own(self, whole: Tensor) -> Tensor:
        """This rank's images of all, (W * N, ...) to (N, ...)."""
        if self.group is None:
            return whole
        images = len(whole) // self.size
        return whole[self.rank * images : (self.rank + 1) * images]

    def rand(self, *shape: int, device: torch.device) -> Tensor:
        """This rank's (N, ...) of the numbers that one process draws for all W * N images.

        Uniform in [0, 1), from torch's global generator, which has to be in the same state on all
        ranks (the training sets its seed in every iteration).
        """
        return self.own(torch.rand(self.size * shape[0], *shape[1:], device=device))


ALONE = Collectives()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        images = images.contiguous()
        parts = [torch.empty_like(images) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, images, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Collectives(ctx.group).own(_all_reduced(grad, ctx.group)), None


def _all_reduced(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, group=group)
    return values
