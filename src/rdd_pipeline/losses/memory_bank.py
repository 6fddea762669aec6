"""Memory bank: queues of the teacher's vectors from earlier batches, as ring buffers.

CIRKD and CIRKDv2 compare a batch with far more pixels, regions and channels than it has itself.
The queues are buffers of the losses, so a checkpoint holds them. Processes that share a batch
(`ranks`, see `collectives`) write all that any of them enqueues, hence the queues are identical on
all ranks. Under DDP set ``broadcast_buffers=False``: with 19 classes the queues are 400 MB that
would otherwise be sent at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_slots(slots: int, count: int, device: torch.device) -> Tensor:
    """Up to `count` different numbers below `slots`, (count,) int64, from the global generator."""
    return torch.randperm(slots, device=device)[:count]


def random_order(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random numbers whose order decides which pixels are enqueued."""
    return torch.rand(shape, device=device)


def write(queue: Tensor, pointer: Tensor, vectors: Tensor, keep: Tensor) -> None:
    """Write vectors into ring buffers, in order, leaving out those that are not kept.

    Without waiting for the device: what is left out is sent to slots behind the others, where it
    writes back what is there.

    Args:
        queue: (C, S, D), changed in place.
        pointer: (C,) the slot of each queue that is written next, moved on in place.
        vectors: (C, M, D) with M <= S.
        keep: (C, M) bool.
    """
    count_C1 = keep.sum(1, keepdim=True)
    rank_kept = keep.cumsum(1) - 1
    rank_left_out = count_C1 + (~keep).cumsum(1) - 1
    slot_CM = pointer.unsqueeze(1) + torch.where(keep, rank_kept, rank_left_out)
    index_CMD = (slot_CM % queue.shape[1]).unsqueeze(2).expand(-1, -1, queue.shape[2])
    vectors = torch.where(keep.unsqueeze(2), vectors.to(queue.dtype), queue.gather(1, index_CMD))
    queue.scatter_(1, index_CMD, vectors)
    pointer.copy_((pointer + count_C1.squeeze(1)) % queue.shape[1])
