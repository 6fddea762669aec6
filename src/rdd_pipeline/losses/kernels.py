"""Where the Triton kernels run."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def fused_kernels(values: Tensor, module: str = "fused") -> Any:
    """A module of `losses` where its kernels run: float32 on CUDA, where Triton is there."""
    return _kernels(module) if values.is_cuda and values.dtype == torch.float32 else None


@lru_cache
def _kernels(module: str) -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"rdd_pipeline.losses.{module}")
