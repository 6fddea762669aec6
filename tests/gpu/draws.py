"""Random numbers that do not depend on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rdd_pipeline.collectives import Collectives
from rdd_pipeline.losses import memory_bank


def draw_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queues and masks get the same numbers on the CPU and on the GPU."""

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))

    monkeypatch.setattr(
        memory_bank,
        "random_slots",
        lambda slots, count, device: drawn(slots).argsort()[:count].to(device),
    )
    monkeypatch.setattr(memory_bank, "random_order", lambda shape, device: drawn(*shape).to(device))
    monkeypatch.setattr(Collectives, "rand", lambda _, *shape, device: drawn(*shape).to(device))
