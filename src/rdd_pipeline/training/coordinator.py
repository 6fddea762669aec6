"""What the ranks of a training agree on: states, flags, gradients. `collectives` is for losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from rdd_pipeline.collectives import Collectives
from rdd_pipeline.training.state import TrainState


class Coordinator:
    """The ranks of a training, seen from one of them.

    All methods must be called by all ranks, in the same order. One rank alone communicates nothing.

    Args:
        ranks: Who trains together.
        device: Where what they exchange has to be.
        has_store: Whether this rank has a work folder. The first one that has writes for all.

    Attributes:
        is_writer: Whether this rank writes and reads the work folder.
        on_one_machine: Whether all ranks have the folder, or none.
    """

    def __init__(self, ranks: Collectives, device: torch.device, *, has_store: bool) -> None:
        self._ranks = ranks
        self._device = device
        have = torch.zeros(ranks.size, device=device)
        have[ranks.rank] = has_store
        have = ranks.total(have)
        self._writer = int(have.argmax())
        self.is_writer = ranks.rank == self._writer
        self.on_one_machine = bool(have.all()) or not have.any()

    def from_writer(self, find: Callable[[], TrainState | None]) -> TrainState | None:
        """What `find` finds on the writing rank, for all of them: they may be on other machines."""
        state = find() if self.is_writer else None
        group = self._ranks.group
        if group is None:
            return state
        data = state.to_bytes() if state is not None else b""
        length = torch.tensor(len(data), device=self._device)
        source = dist.get_global_rank(group, self._writer)
        dist.broadcast(length, source, group=group)
        if not length:
            return None
        sent = torch.empty(int(length), dtype=torch.uint8)
        if self.is_writer:
            sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        sent = sent.to(self._device)
        dist.broadcast(sent, source, group=group)
        return state if self.is_writer else TrainState.from_bytes(sent.cpu().numpy().tobytes())

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """What DDP does; it wants one forward and one backward pass, parts are several."""
        if self._ranks.group is None:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = self._ranks.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        first = 0
        for gradient in gradients:
            mean = together[first : first + gradient.numel()]
            gradient.copy_(mean.view_as(gradient))
            first += gradient.numel()

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which of the flags are set on any rank, by one message.

        What ranks do together must not hang on what one of them alone knows (a signal, a clock):
        they would wait for ever.
        """
        if self._ranks.group is None:
            return flags  # a tensor would wait for the device
        found = self._ranks.total(torch.tensor(flags, dtype=torch.float32, device=self._device))
        return tuple(count > 0 for count in found.tolist())

    def wait(self) -> None:
        """Until all ranks are here: none looks into the work folder before all is written."""
        if self._ranks.group is not None:
            dist.barrier(self._ranks.group)
