"""timm's SAME padding for exported programs, in which height and width are free.

Networks in the manner of TensorFlow (``tf_*``) pad by formulas of the size, layer after layer; in a
program with free sizes they grow until torch's symbolic arithmetic no longer ends.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

_USERS = ("conv2d_same", "pool2d_same", "mixed_conv2d", "std_conv", "cond_conv2d", "padding")


@contextmanager
def exportable_padding() -> Iterator[None]:
    """Inside the block timm's layers pad by `pad_same`: same values, formulas that stay short."""
    with ExitStack() as stack:
        for name in _USERS:
            module = importlib.import_module(f"timm.layers.{name}")
            if hasattr(module, "pad_same"):
                stack.enter_context(patch.object(module, "pad_same", pad_same))
        yield


def pad_same(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    value: float = 0,
) -> Tensor:
    """`timm.layers.padding.pad_same`, for strides of 1 and 2 without the size in the padding.

    With r = (kernel - 1) * dilation, stride 1 pads by r. Stride 2 pads by r - 1 (even sizes) or r
    (odd ones), the smaller half in front. Where r is odd, one more pixel at the end is never
    looked at. Where it is even, even sizes leave out the first pixel of a symmetric padding.

    Args:
        x: (N, C, H, W).
        kernel_size: Rows and columns; the others likewise.
        stride: Of the convolution or pooling that comes next.
        dilation: Of the same.
        value: What is padded with.
    """
    if any(step not in (1, 2) for step in stride):
        return _by_size(x, kernel_size, stride, dilation, value)
    reach = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
    (top, bottom), (left, right) = [(r // 2, r - r // 2) for r in reach]
    padded = F.pad(x, (left, right, top, bottom), value=value)
    for dim, (r, step) in enumerate(zip(reach, stride, strict=True), start=2):
        size = x.shape[dim]
        if step == 2 and r > 0 and r % 2 == 0:
            # By index: the length of a slice would carry the parity on into every later layer.
            length = (size + 1) // 2 * 2 - 1 + r
            kept = torch.arange(length, device=x.device) + (1 - size % 2)
            padded = padded.index_select(dim, kept)
    return padded


def _by_size(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Any, value: float
) -> Tensor:
    totals = [
        max((size + s - 1) // s * s - s + (k - 1) * d + 1 - size, 0)
        for size, k, s, d in zip(x.shape[-2:], kernel_size, stride, dilation, strict=True)
    ]
    (top, bottom), (left, right) = [(total // 2, total - total // 2) for total in totals]
    return F.pad(x, (left, right, top, bottom), value=value)
