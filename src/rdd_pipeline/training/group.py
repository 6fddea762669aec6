"""What the ranks of a training agree on: states, flags, gradients. `losses.ranks` is for losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rdd_pipeline.training.checkpoints import State, dumps, loads


class Group:
    """The processes that train together, seen from one of them.

    All methods but `is_writer` must be called by all ranks, in the same order.

    Args:
        group: Their process group; None: this process alone, and nothing is communicated.
        device: Where what they exchange has to be.
        has_work: Whether this rank has a work folder. The first one that has writes for all.

    Attributes:
        is_writer: Whether this rank writes and reads the work folder.
        on_one_machine: Whether all ranks have the folder, or none.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, device: torch.device, *, has_work: bool
    ) -> None:
        self._group = group
        self._device = device
        self._writer, self.on_one_machine = 0, True
        if group is None:
            self.is_writer = True
            return
        have = torch.zeros(dist.get_world_size(group), device=device)
        rank = dist.get_rank(group)
        have[rank] = has_work
        dist.all_reduce(have, group=group)
        self._writer = int(have.argmax())
        self.is_writer = rank == self._writer
        self.on_one_machine = bool(have.all()) or not have.any()

    def from_writer(self, find: Callable[[], State | None]) -> State | None:
        """What `find` finds on the writing rank, for all of them: they may be on other machines."""
        state = find() if self.is_writer else None
        if self._group is None:
            return state
        data = dumps(state) if state is not None else b""
        length = torch.tensor(len(data), device=self._device)
        source = dist.get_global_rank(self._group, self._writer)
        dist.broadcast(length, source, group=self._group)
        if not length:
            return None
        sent = torch.empty(int(length), dtype=torch.uint8)
        if self.is_writer:
            sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        sent = sent.to(self._device)
        dist.broadcast(sent, source, group=self._group)
        return state if self.is_writer else loads(sent.cpu().numpy().tobytes())

    def mean_(self, values: Tensor) -> Tensor:
        """Replace the values by their means over the ranks, element by element."""
        if self._group is not None:
            dist.all_reduce(values, group=self._group)
            values /= dist.get_world_size(self._group)
        return values

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """What DDP does; it wants one forward and one backward pass, parts are several."""
        if self._group is None:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = self.mean_(torch.cat([gradient.flatten() for gradient in gradients]))
        first = 0
        for gradient in gradients:
            mean = together[first : first + gradient.numel()]
            gradient.copy_(mean.view_as(gradient))
            first += gradient.numel()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: they stop at the same iteration or wait for ever."""
        if self._group is None:
            return flag
        votes = torch.tensor(float(flag), device=self._device)
        dist.all_reduce(votes, group=self._group)
        return votes.item() > 0

    def wait(self) -> None:
        """Until all ranks are here: none looks into the work folder before all is written."""
        if self._group is not None:
            dist.barrier(self._group)
