"""Tiny tensors: one thread is faster than two that wait for each other."""

import pytest
import torch

from rdd_pipeline.losses import memory_bank
from tests.losses.reference import NAMES, Reference


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=NAMES)
def reference(request):
    return Reference(request.param)


@pytest.fixture
def in_order(monkeypatch):
    """Every random choice takes the first ones, as in the reference."""
    monkeypatch.setattr(memory_bank, "random_slots", lambda _, count, device: torch.arange(count))
    monkeypatch.setattr(
        memory_bank,
        "random_order",
        lambda shape, device: torch.arange(float(shape[-1])).expand(shape),
    )
