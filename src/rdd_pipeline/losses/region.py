"""Losses of regions instead of pixels, beside the task loss: soft Dice and Lovasz-softmax.

Both compare what a network gives to a class with where the class is, over all pixels of a batch at
once, and so look more like the intersection over union that is reported. They need the
probabilities of all classes at full size: 20 bytes for each pixel and class, about 3 GB at 512 x
1024, 16 images and 19 classes. With several processes each relates its own images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rdd_pipeline.losses.maps import as_float, full_precision, resize
from rdd_pipeline.losses.pixelwise import pixel_labels

_SMOOTH = 1.0
"""Pixels that are added above and below: a class of a few pixels does not decide alone."""


def dice_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, ignore_index: int = 255
) -> Tensor:
    """Soft Dice loss, mean over the classes that occur; Milletari et al. 2016, arXiv 1606.04797.

    ``1 - (2 sum w p y + 1) / (sum w (p + y) + 1)`` for each class with probabilities p of the
    upsampled logits, y = 1 at its pixels, and the pixels' weights w.

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W), any integer type.
        weights: (N, H, W), of each pixel, 0 or more; None: 1. RDD's: the teacher's agreement in
            TFE, 1 for the chosen pixels in TSE.
        ignore_index: Label of ignored pixels.

    Returns:
        Scalar from 0 to 1; 0 with zero gradient where no pixel counts.

    Raises:
        UserError: Shapes or labels do not fit.
    """
    probabilities, one_hot, weight = _flat(logits, labels, weights, ignore_index)
    weighted = probabilities * weight
    common = (weighted * one_hot).sum(1)
    of_class = (one_hot * weight).sum(1)
    both = weighted.sum(1) + of_class
    present = of_class > 0
    loss_C = (1 - (2 * common + _SMOOTH) / (both + _SMOOTH)) * present
    return loss_C.sum() / present.count_nonzero().clamp(min=1)


def lovasz_loss(
    logits: Tensor, labels: Tensor, selected: Tensor | None = None, *, ignore_index: int = 255
) -> Tensor:
    """Lovasz-softmax, mean over the classes that occur; Berman et al., CVPR 2018, 1705.08790.

    The Lovasz extension of each class's Jaccard loss at the errors ``|y - p|`` of all pixels: a
    convex surrogate of 1 - IoU.

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W), any integer type.
        selected: (N, H, W) bool, pixels that count; None: all valid ones. Weights between 0 and 1
            are not defined for it.
        ignore_index: Label of ignored pixels.

    Returns:
        Scalar from 0 to 1; 0 with zero gradient where no pixel counts.

    Raises:
        UserError: Shapes or labels do not fit.
    """
    probabilities, one_hot, weight = _flat(logits, labels, selected, ignore_index)
    # Pixels that do not count have no error and are of no class: they come last and change nothing.
    errors = (one_hot - probabilities).abs() * weight
    errors, order = errors.sort(dim=1, descending=True)
    of_class = (one_hot * weight).gather(1, order)
    counted = weight.expand_as(one_hot).gather(1, order)
    total = of_class.sum(1, keepdim=True)
    intersection = total - of_class.cumsum(1)
    union = total + (counted - of_class).cumsum(1)
    jaccard = 1 - intersection / union.clamp(min=1)
    slope = torch.cat((jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]), 1)
    present = total[:, 0] > 0
    loss_C = (errors * slope.detach()).sum(1) * present
    return loss_C.sum() / present.count_nonzero().clamp(min=1)


def _flat(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities and labels (C, pixels), weights (1, pixels), 0 for ignored pixels."""
    classes = logits.shape[1]
    pixels = pixel_labels(labels, num_classes=classes, ignore_index=ignore_index)
    with full_precision(logits):
        height, width = labels.shape[-2:]
        probabilities = resize(as_float(logits), (height, width)).softmax(1)
    by_class = probabilities.transpose(0, 1).flatten(1)
    known = torch.where(pixels.valid, pixels.labels, 0).long().flatten()
    one_hot = torch.arange(classes, device=logits.device).unsqueeze(1) == known
    weight = as_float(pixels.valid)
    if weights is not None:
        weight = torch.where(pixels.valid, weights.detach(), 0).to(weight.dtype)
    # Not even a NaN of an ignored pixel counts.
    by_class = torch.where(weight.flatten() > 0, by_class, 0)
    return by_class, one_hot.to(by_class.dtype), weight.flatten().unsqueeze(0)
