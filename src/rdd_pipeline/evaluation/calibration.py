"""Calibration: whether a network is right as often as its confidence says.

Guo et al. 2017, arXiv 1706.04599, sec. 2: pixels are put into bins of equal width by the
probability of the predicted class; the expected calibration error is the mean gap between
confidence and accuracy, weighted by the bins' pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def calibration_counts(confidence: Tensor, right: Tensor, valid: Tensor) -> Tensor:
    """Sums over the pixels of each bin, to be added up over a split.

    Args:
        confidence: Probability of the predicted class in [0, 1], any shape.
        right: Bool, same shape.
        valid: Bool, same shape; others count nowhere.

    Returns:
        (3, `BINS`) float64: pixels, their confidence, how many are right. A bin has its lower
        bound, the last one its upper bound too.
    """
    # Another bin takes the others: boolean indexing would be slower.
    place = (confidence * BINS).to(torch.int32).clamp_(0, BINS - 1)
    place = torch.where(valid, place, BINS).flatten()
    pixels = place.bincount(minlength=BINS + 1)[:BINS]
    hits = torch.where(right.flatten(), place, BINS).bincount(minlength=BINS + 1)[:BINS]
    # Added up in float64: a split has more pixels than float32 can count.
    weights = confidence.flatten()
    sums = place.bincount(weights if _has_no_float64(weights) else weights.double(), BINS + 1)
    return torch.stack([part.cpu().double() for part in (pixels, sums[:BINS], hits)])


def expected_calibration_error(counts: Tensor) -> float:
    """In [0, 1], of the sums of `calibration_counts`; NaN without a pixel."""
    pixels, confidence, hits = counts.cpu().double()
    return float((confidence - hits).abs().sum() / pixels.sum())


def _has_no_float64(tensor: Tensor) -> bool:
    return tensor.device.type == "mps"
