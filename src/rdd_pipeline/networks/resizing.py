"""Resizing: the one of all maps, and gradients that are repeatable where torch has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def bilinear(maps_NCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (N, C, *size), bilinear with aligned corners: how all maps are resized here."""
    return F.interpolate(maps_NCHW, size=tuple(size), mode="bilinear", align_corners=True)


def repeatable_resizing(device: torch.device) -> AbstractContextManager[object]:
    """`RepeatableResizing` where it is needed, else nothing.

    It is needed off the CPU when ``torch.use_deterministic_algorithms`` is on: torch's kernels for
    the gradients of bicubic and of antialiased resizing then raise an error. Vision transformers
    resize their position embedding so.
    """
    if device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        return RepeatableResizing()
    return nullcontext()


class RepeatableResizing(TorchFunctionMode):
    """Inside the block, `F.interpolate` computes bicubic and antialiased resizing as R x C^T.

    R and C are the one-dimensional resizings, as matrices. Same values and gradients up to
    rounding. Everything else passes through, plain bilinear resizing too: torch has a repeatable
    way for it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each of its functions."""
        if func is F.interpolate:
            func = _interpolate  # in here the mode is off
        return func(*args, **(kwargs or {}))


def _interpolate(
    x: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """`F.interpolate`, repeatable where it is not."""
    repeatable = mode != "bicubic" and not antialias
    if repeatable or size is None or x.dim() != 4 or not x.requires_grad:
        return F.interpolate(
            x, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
        )
    height, width = (size, size) if isinstance(size, int) else size
    how = {"mode": mode, "align_corners": align_corners, "antialias": antialias}
    rows = _matrix(x.shape[2], height, x, **how)
    columns = _matrix(x.shape[3], width, x, **how)
    with torch.autocast(x.device.type, enabled=False):
        resized = rows @ x.to(rows.dtype) @ columns.T
    return resized.to(x.dtype)


def _matrix(old: int, new: int, like: Tensor, **how: Any) -> Tensor:
    """(new, old): the columns of the unit matrix, resized."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    unit_OO = torch.eye(old, dtype=dtype, device=like.device)
    return F.interpolate(unit_OO[None, None], size=(new, old), **how)[0, 0]
