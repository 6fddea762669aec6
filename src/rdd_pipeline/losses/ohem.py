"""OHEM, online hard example mining: the pixels that a network does not know yet.

RDD's second stage asks it of student and teacher; mode `ohem` of `rdd.tse_loss` of the student
alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.kernels import fused_kernels
from rdd_pipeline.losses.pixelwise import (
    PixelLabels,
    log_prob_of_label,
    pixel_labels,
)


def ohem_mask(
    logits: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.7,
    min_kept: int | float = 100_000,
    ignore_index: int = 255,
) -> Tensor:
    """Hard examples: pixels whose true class gets a low probability.

    A valid pixel is hard when its probability p is at most ``max(threshold, p_(k))``, with p_(k)
    the k-th smallest p of the batch (1 for ignored pixels) and k = `min_kept`. Ties are kept.
    Shrivastava et al., CVPR 2016, arXiv 1604.03540, in the form of the field's segmentation code.

    Args:
        logits: (N, C, h, w) of either network.
        labels: (N, H, W), any integer type.
        threshold: Probability up to which a pixel is hard.
        min_kept: At least so many pixels of the batch are hard, as far as there are valid ones: a
            count (int) or a fraction of the batch's pixels (float in [0, 1]).
        ignore_index: Label of pixels that are never hard.

    Returns:
        (N, H, W) bool.

    Raises:
        UserError: Shapes, labels, threshold or min_kept are out of range.
    """
    with torch.no_grad():
        pixels = pixel_labels(labels, num_classes=logits.shape[1], ignore_index=ignore_index)
        return hard_pixels_of(
            log_prob_of_label(logits, pixels), pixels, threshold, min_kept, ALONE
        ).mask


class HardPixels(NamedTuple):
    """Mask (N, H, W) of the hard pixels and their number, a 0-dim tensor."""

    mask: Tensor
    size: Tensor


def hard_pixels_of(
    log_p_NHW: Tensor,
    pixels: PixelLabels,
    threshold: float,
    min_kept: int | float,
    ranks: Collectives,
) -> HardPixels:
    """`ohem_mask` from log-probabilities (0, that is p = 1, where ignored), and their number.

    The mask and the number are this rank's, `min_kept` counts the pixels of all given ranks.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}; it is a probability, between 0 and 1.")
    if min_kept < 0 or (isinstance(min_kept, float) and min_kept > 1):
        raise UserError(
            f"min_kept is {min_kept}; expected a count (integer, at least 0) or a fraction of the "
            "batch's pixels (float between 0 and 1)."
        )
    total = log_p_NHW.numel() * ranks.size
    kept = min(total, round(min_kept * total) if isinstance(min_kept, float) else min_kept)
    hard_NHW = (log_p_NHW <= (math.log(threshold) if threshold > 0 else -math.inf)) & pixels.valid
    count = hard_NHW.count_nonzero()
    on_cpu = log_p_NHW.device.type == "cpu"
    # Sorting millions of probabilities is what made the published loss slow. Mostly the count
    # decides; where looking at it means waiting for the device, the selection alone is cheap.
    if kept > 0 and not (on_cpu and int(ranks.total(count)) >= kept):
        p = log_p_NHW.exp()
        kth = _smallest(p.flatten(), kept, ranks, on_cpu=on_cpu)
        hard_NHW = ((p <= kth) & pixels.valid).logical_or_(hard_NHW)
        count = hard_NHW.count_nonzero()
    return HardPixels(hard_NHW, count)


def _smallest(values: Tensor, k: int, ranks: Collectives, *, on_cpu: bool) -> Tensor:
    """The k-th smallest of all ranks' values, of which each has as many."""
    fused = fused_kernels(values)
    if fused is not None:
        found: Tensor = fused.kth_smallest(values, k, ranks)
        return found
    if ranks.size > 1:
        # Each rank's k smallest are enough to know it.
        values = ranks.gather(values.topk(min(k, len(values)), largest=False, sorted=False).values)
    # On CUDA, kthvalue has one block search millions of values.
    if on_cpu:
        return values.kthvalue(k).values
    return values.topk(k, largest=False, sorted=False).values.max()
