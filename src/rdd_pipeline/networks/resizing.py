"""Resizing whose gradient is repeatable on GPUs, where torch has none that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


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
        named = dict(zip(_ARGUMENTS, args, strict=False), **(kwargs or {}))
        if func is not F.interpolate or not _is_unrepeatable(named):
            return func(*args, **(kwargs or {}))
        size = named["size"]
        return _resize(
            named["input"],
            (size, size) if isinstance(size, int) else tuple(size),
            mode=named["mode"],
            align_corners=named.get("align_corners"),
            antialias=named.get("antialias", False),
        )


_ARGUMENTS = ("input", "size", "scale_factor", "mode", "align_corners")


def _is_unrepeatable(named: Mapping[str, Any]) -> bool:
    x = named["input"] if isinstance(named.get("input"), Tensor) else None
    return (
        x is not None
        and x.dim() == 4
        and x.requires_grad
        and named.get("size") is not None
        and (named.get("mode") == "bicubic" or bool(named.get("antialias")))
    )


def _resize(x_NCHW: Tensor, size: tuple[int, ...], **how: Any) -> Tensor:
    rows, columns = (
        _matrix(old, new, x_NCHW, **how) for old, new in zip(x_NCHW.shape[2:], size, strict=True)
    )
    with torch.autocast(x_NCHW.device.type, enabled=False):
        y_NCHW: Tensor = rows @ x_NCHW.to(rows.dtype) @ columns.T
    return y_NCHW.to(x_NCHW.dtype)


def _matrix(old: int, new: int, like: Tensor, **how: Any) -> Tensor:
    """(new, old): the columns of the unit matrix, resized."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    unit_OO = torch.eye(old, dtype=dtype, device=like.device)
    return F.interpolate(unit_OO[None, None], size=(new, old), **how)[0, 0]
