"""What the tests of tests/gpu share. `python -m pytest -m gpu tests/gpu` runs them on one GPU.

They need torch, torchvision, timm, pydantic, safetensors, rich and pytest only. Who works on them
without a GPU says RDD_TEST_DEVICE=cpu: all but those that are about CUDA itself run there, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.launching.test_main import write_job  # noqa: F401 - a fixture
from tests.training.conftest import (  # noqa: F401 - fixtures
    _shapes_are_computed_once,
    blocks,
    make_job,
    teacher,
)

DEVICE = torch.device(os.environ.get("RDD_TEST_DEVICE", "cuda"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the code under test computes; what it is compared with is computed on the CPU."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device (RDD_TEST_DEVICE=cpu takes the CPU instead)")
    return DEVICE


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for tests that are about CUDA itself."""
    if device.type != "cuda":
        pytest.skip("about CUDA itself")
    return device


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    """On a machine with a GPU nothing else wants the cores."""
    before = torch.get_num_threads()
    if DEVICE.type == "cuda":
        torch.set_num_threads(min(8, os.cpu_count() or 1))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _settings_as_before() -> Iterator[None]:
    """`set_up` and the tests change what holds for the whole process: full float32 at the start."""
    _matrix_products("highest", allow_tf32=False)
    yield
    _matrix_products("highest", allow_tf32=False)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def reckless(device: torch.device) -> Iterator[None]:
    """Every switch that trades precision for speed is on, and bfloat16 autocast encloses all."""
    _matrix_products("medium", allow_tf32=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield


def _matrix_products(precision: str, *, allow_tf32: bool) -> None:
    """As users set them, in the older of torch's two ways."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    if allow_tf32:
        torch.set_float32_matmul_precision(precision)
