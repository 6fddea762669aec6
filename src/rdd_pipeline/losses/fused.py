"""The hot part of the task losses as Triton kernels, for CUDA.

What `pixelwise.log_prob_of_label` computes band by band out of matrix products, which suits a CPU's
cache, one kernel computes here forward and one backward, pixel by pixel: the low-resolution logits
stay in the GPU's cache and nothing of full size but one number for each pixel is written. And the
k-th smallest of millions of probabilities is found by three histograms of their bits, neither
sorted nor looked at from the host.

All is float32 whatever the switches say, and repeats bit for bit: each sum has one place that
gathers it in a fixed order, and what is added atomically are whole numbers. With TRITON_INTERPRET=1
in the environment the kernels run without a GPU, slowly: so the tests hold them to the plain form.

Suffixes: N images, C classes, H rows and W columns of the labels, h and w of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor
from torch.autograd.function import once_differentiable

from rdd_pipeline.collectives import Collectives
from rdd_pipeline.losses.maps import full_precision

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc,unused-ignore"

_TILE = 2048
"""Elements, classes times columns, that a program holds in registers at once."""
_CLASSES_OF_BACKWARD = 32
_VALUES_OF_HISTOGRAM = 4096
_OPTIONS = {"enable_fp_fusion": True}
"""Said aloud: Triton's default changes with its version."""
_DIGITS = 1024
_SHIFTS = (20, 10, 0)
"""The three digits of a float32 from 0 to 1, whose bits grow with it: the first two bits are 0."""


def log_prob_of_label(
    logits_NChw: Tensor, labels_NHW: Tensor, valid_NHW: Tensor, horizontal_Ww: Tensor
) -> Tensor:
    """`pixelwise.log_prob_of_label` of float32 logits.

    Args:
        logits_NChw: (N, C, h, w) float32.
        labels_NHW: (N, H, W), any integer type; any value where a pixel is not valid.
        valid_NHW: (N, H, W) bool.
        horizontal_Ww: (W, w) float32, the interpolation along the columns as a matrix.
    """
    result: Tensor = _LogProbOfLabel.apply(logits_NChw, labels_NHW, valid_NHW, horizontal_Ww)
    return result


class _LogProbOfLabel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NChw: Tensor,
        labels_NHW: Tensor,
        valid_NHW: Tensor,
        horizontal_Ww: Tensor,
    ) -> Tensor:
        logits_NChw, labels_NHW = logits_NChw.contiguous(), labels_NHW.contiguous()
        valid_NHW = valid_NHW.contiguous().view(torch.uint8)
        (_, classes, h, w), (images, height, width) = logits_NChw.shape, labels_NHW.shape
        log_prob_NHW = torch.empty_like(labels_NHW, dtype=torch.float32)
        normalizer_NHW = torch.empty_like(log_prob_NHW)
        if log_prob_NHW.numel():
            tile = triton.next_power_of_2(classes)
            columns = _columns(tile, width)
            _log_prob[(images * height, triton.cdiv(width, columns))](
                logits_NChw,
                labels_NHW,
                valid_NHW,
                log_prob_NHW,
                normalizer_NHW,
                classes,
                h,
                w,
                height,
                width,
                CLASSES=tile,
                COLUMNS=columns,
                **_OPTIONS,
            )
        ctx.save_for_backward(logits_NChw, labels_NHW, valid_NHW, normalizer_NHW, horizontal_Ww)
        return log_prob_NHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHW: Tensor) -> tuple[Tensor | None, None, None, None]:
        logits_NChw, labels_NHW, valid_NHW, normalizer_NHW, horizontal_Ww = ctx.saved_tensors
        (_, classes, h, w), (images, height, width) = logits_NChw.shape, labels_NHW.shape
        if not (labels_NHW.numel() and logits_NChw.numel()):
            return torch.zeros_like(logits_NChw), None, None, None
        wide_NhCW = logits_NChw.new_empty(images, h, classes, width)
        tile = min(_CLASSES_OF_BACKWARD, triton.next_power_of_2(classes))
        columns = _columns(tile, width)
        _rows_of_gradient[(images * h, triton.cdiv(width, columns), triton.cdiv(classes, tile))](
            logits_NChw,
            labels_NHW,
            valid_NHW,
            normalizer_NHW,
            grad_NHW.contiguous(),
            wide_NhCW,
            classes,
            h,
            w,
            height,
            width,
            CLASSES=tile,
            COLUMNS=columns,
            **_OPTIONS,
        )
        with full_precision(wide_NhCW):
            grad_NhCw = wide_NhCW.view(-1, width) @ horizontal_Ww
        return grad_NhCw.view(images, h, classes, w).transpose(1, 2), None, None, None


def _columns(classes: int, width: int) -> int:
    columns: int = max(16, min(_TILE // classes, triton.next_power_of_2(width)))
    return columns


@triton.jit
def _source(output, inputs, outputs):
    """Lower one of the two inputs of linear interpolation, aligned corners; weight of the upper."""
    intervals = tl.maximum(outputs - 1, 1)
    scaled = output * (inputs - 1)
    lower = tl.minimum(scaled // intervals, tl.maximum(inputs - 2, 0))
    return lower, (scaled - lower * intervals).to(tl.float32) / intervals


@triton.jit
def _upsampled(plane, is_class, y, x, inside, h, w, height, width):
    """Logits (CLASSES, COLUMNS) of row `y` and the columns `x`.

    Inputs of weight 0 are not read: a NaN there has no effect.
    """
    top, down = _source(y, h, height)
    left, right = _source(x, w, width)
    corner = plane + top * w + left[None, :]
    here = is_class & inside[None, :]
    beside = here & (right > 0)[None, :]
    below = (down + 0 * right > 0)[None, :]  # not the number alone: the interpreter wants a block
    right = right[None, :]
    upper = (1 - right) * tl.load(corner, here, 0.0) + right * tl.load(corner + 1, beside, 0.0)
    lower = (1 - right) * tl.load(corner + w, here & below, 0.0) + right * tl.load(
        corner + w + 1, beside & below, 0.0
    )
    return (1 - down) * upper + down * lower


@triton.jit
def _log_prob(
    logits,
    labels,
    valid,
    log_prob,
    normalizer,
    classes,
    h,
    w,
    height,
    width,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Log-probability of the label, and log of the sum of exponentials, of a stretch of a row."""
    row = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = x < width
    pixel = row * width + x
    seen = inside & (tl.load(valid + pixel, inside, 0) != 0)
    label = tl.load(labels + pixel, seen, 0).to(tl.int32)
    number = tl.arange(0, CLASSES)[:, None]
    is_class = number < classes
    plane = logits + ((row // height) * classes + number) * h * w
    y = (row % height).to(tl.int32)
    z = _upsampled(plane, is_class, y, x, seen, h, w, height, width)
    largest = tl.max(tl.where(is_class, z, float("-inf")), 0)
    log_sum = tl.log(tl.sum(tl.where(is_class, tl.exp(z - largest[None, :]), 0.0), 0))
    of_label = tl.sum(tl.where(number == label[None, :], z, 0.0), 0) - largest - log_sum
    of_label = tl.where(of_label > 0, 0.0, of_label)  # by rounding; NaN stays
    tl.store(log_prob + pixel, tl.where(seen, of_label, 0.0), inside)
    tl.store(normalizer + pixel, largest + log_sum, inside)


@triton.jit
def _rows_of_gradient(
    logits,
    labels,
    valid,
    normalizer,
    grad,
    wide,
    classes,
    h,
    w,
    height,
    width,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of a row of logits, still as wide as the labels, from all rows interpolated from it.

    d log p_y / dz_c = [c = y] - p_c
    """
    row = tl.program_id(0).to(tl.int64)
    image, i = row // h, (row % h).to(tl.int32)
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = x < width
    number = tl.program_id(2) * CLASSES + tl.arange(0, CLASSES)[:, None]
    is_class = number < classes
    plane = logits + (image * classes + number) * h * w
    # Between the rows i - 1 and i + 1 of the logits.
    gaps, intervals = tl.maximum(h - 1, 1), tl.maximum(height - 1, 1)
    first = (tl.maximum(i - 1, 0) * intervals + gaps - 1) // gaps
    end = tl.where(i >= h - 2, height, ((i + 1) * intervals + gaps - 1) // gaps)
    total = tl.zeros((CLASSES, COLUMNS), tl.float32)
    for y in range(first, end):
        top, down = _source(y, h, height)
        share = tl.where(top == i, 1 - down, tl.where(top + 1 == i, down, 0.0)) + tl.zeros_like(x)
        pixel = (image * height + y) * width + x
        seen = inside & (tl.load(valid + pixel, inside, 0) != 0) & (share > 0)
        label = tl.load(labels + pixel, seen, 0).to(tl.int32)
        z = _upsampled(plane, is_class, y, x, seen, h, w, height, width)
        p = tl.exp(z - tl.load(normalizer + pixel, seen, 0.0)[None, :])
        pull = share * tl.load(grad + pixel, seen, 0.0)
        change = tl.where(number == label[None, :], 1.0, 0.0) - p
        total += tl.where(seen[None, :], pull[None, :] * change, 0.0)
    # In 64 bits as `row` is.
    tl.store(
        wide + (row * classes + number) * width + x[None, :], total, is_class & inside[None, :]
    )


@torch.no_grad()
def kth_smallest(values: Tensor, k: int, ranks: Collectives) -> Tensor:
    """The k-th smallest of all ranks' values, 0-dim; nothing waits for the device.

    Digit by digit: how many values begin with each of the 1024 that are possible says which of them
    the wanted one begins with.

    Args:
        values: Float32 between 0 and 1.
        k: Counts from 1, at most the number of all ranks' values.
        ranks: Their histograms are added.
    """
    values = values.contiguous()
    prefix = torch.zeros((), dtype=torch.int32, device=values.device)
    missing = torch.full((), k, dtype=torch.int64, device=values.device)
    for shift in _SHIFTS:
        counts = ranks.total(_counts_of_digit(values, prefix, shift))
        up_to = counts.cumsum(0)
        digit = (up_to < missing).sum()
        missing = missing - (counts * (up_to < missing)).sum()
        prefix = (prefix * _DIGITS + digit).to(torch.int32)
    return prefix.view(torch.float32)


def _counts_of_digit(values: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """How many of the values that begin with `prefix` have which digit next, (1024,) int32."""
    counts = torch.zeros(_DIGITS, dtype=torch.int32, device=values.device)
    if values.numel():
        programs = triton.cdiv(values.numel(), _VALUES_OF_HISTOGRAM)
        _histogram[(programs,)](
            values,
            prefix,
            counts,
            values.numel(),
            shift,
            DIGITS=_DIGITS,
            VALUES=_VALUES_OF_HISTOGRAM,
            **_OPTIONS,
        )
    return counts


@triton.jit
def _histogram(values, prefix, counts, size, shift, DIGITS: tl.constexpr, VALUES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = at < size
    bits = tl.load(values + at, inside, 0.0).to(tl.int32, bitcast=True) >> shift
    counted = inside & (bits // DIGITS == tl.load(prefix))
    found = tl.histogram(tl.where(counted, bits % DIGITS, 0), DIGITS)
    place = tl.arange(0, DIGITS)
    # What does not count was counted as 0.
    found -= tl.where(place == 0, VALUES - tl.sum(counted.to(tl.int32), 0), 0)
    tl.atomic_add(counts + place, found, found > 0)
