"""Boundary IoU (Cheng et al. 2021, arXiv 2103.16562): how well edges are met.

IoU is ruled by the inside of large regions. Here only pixels count that lie near an edge of their
own region, in the label or in the prediction.

Suffixes: H rows, W columns, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RATIO = 0.02
"""Share of an image's diagonal that is near an edge, as in the paper."""


def boundary_distance(size: tuple[int, int]) -> int:
    """How many pixels from an edge its boundary reaches in an image of (rows, columns)."""
    return max(1, round(RATIO * math.hypot(*size)))


def boundary(regions_HW: Tensor, distance: int) -> Tensor:
    """Pixels with another value, or the image's border, at most `distance` rows and columns away.

    For each value these are its mask without the mask eroded `distance` times by 3 x 3 pixels, with
    nothing outside of the image, as the paper's code has it. Running sums tell whether the square
    around a pixel has one value only, so that the time depends neither on the distance nor on the
    number of values.

    Args:
        regions_HW: Values of any type.
        distance: At least 1.

    Returns:
        (H, W) bool.
    """
    height, width = regions_HW.shape
    near = torch.ones_like(regions_HW, dtype=torch.bool)
    if min(height, width) <= 2 * distance:
        return near
    # A change between columns x and x + 1 lies in the square of each row's inner pixel ...
    across = _any(regions_HW[:, 1:] != regions_HW[:, :-1], 2 * distance, dim=1)
    # ... and in the column of a pixel: with the rows around it without one, all are of one value.
    middle = regions_HW[:, distance : width - distance]
    down = _any(middle[1:] != middle[:-1], 2 * distance, dim=0)
    near[distance : height - distance, distance : width - distance] = (
        _any(across, 2 * distance + 1, dim=0) | down
    )
    return near


def boundary_counts(
    prediction_HW: Tensor, label_HW: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    """Pixels of the boundaries of one image by class, to be added up over a split.

    Ignored pixels belong to no class, whatever is predicted there: their edge is one in both maps.

    Returns:
        (3, C) int64: in the boundaries of label and prediction alike, of the label, of the
        prediction.
    """
    ignored = label_HW == ignore_index
    label = torch.where(ignored, num_classes, label_HW.to(torch.int16))
    prediction = torch.where(ignored, num_classes, prediction_HW.to(torch.int16))
    distance = boundary_distance((label.shape[0], label.shape[1]))
    of_label, of_prediction = (boundary(regions, distance) for regions in (label, prediction))
    both = of_label & of_prediction & (label == prediction)
    return torch.stack(
        [
            torch.where(mask, regions, num_classes)
            .flatten()
            .bincount(minlength=num_classes + 1)[:num_classes]
            for mask, regions in ((both, label), (of_label, label), (of_prediction, prediction))
        ]
    )


def boundary_iou(counts_3C: Tensor) -> Tensor:
    """(C,) float64 in [0, 1] of the sums of `boundary_counts`; NaN for a class without a pixel."""
    both, label, prediction = counts_3C.cpu().double().unbind()
    return both / (label + prediction - both)


def _any(found: Tensor, length: int, dim: int) -> Tensor:
    """Whether a window of `length` along `dim` holds a True; one entry for each window."""
    sums = found.cumsum(dim, dtype=torch.int32)
    total = sums.shape[dim]
    windows = sums.narrow(dim, length - 1, total - length + 1).clone()
    windows.narrow(dim, 1, total - length).sub_(sums.narrow(dim, 0, total - length))
    return windows > 0
