"""The task loss without RDD, and what all task losses share.

Logits have the shape (N, C, h, w) at the network's stride, labels (N, H, W); logits are upsampled
bilinearly with aligned corners.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.class_counts import PixelsOfClass
from rdd_pipeline.losses.maps import as_float
from rdd_pipeline.losses.pixelwise import PixelLabels, log_prob_of_label, pixel_labels


class TaskLoss(NamedTuple):
    """A task loss with what training logs of it.

    Attributes:
        loss: Scalar with gradient.
        statistics: Detached 0-dim tensors by name, on the loss's device.
        pixels_of_class: Of RDD where it was asked for.
        pixel_weights: (N, H, W), how much of each pixel it looks at, class weights left out; 0 for
            ignored pixels. Without gradient; for the main head.
    """

    loss: Tensor
    statistics: dict[str, Tensor]
    pixels_of_class: PixelsOfClass | None = None
    pixel_weights: Tensor | None = None


def cross_entropy_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    student_aux_logits: Tensor | None = None,
    class_weights: Tensor | None = None,
    aux_weight: float = 0.4,
    focal_gamma: float = 0.0,
    ignore_index: int = 255,
    ranks: Collectives = ALONE,
) -> TaskLoss:
    """Mean cross-entropy over valid pixels, of both heads: the task loss without RDD.

    ``mean(CE(up logits)) + aux_weight * mean(CE(up aux))``, in nats; with class weights the
    weighted mean, as `torch.nn.functional.cross_entropy`. Without a valid pixel (or with zero
    weight on all of them) the loss is 0 and so is its gradient.

    Args:
        student_logits: (N, C, h, w).
        labels: (N, H, W), any integer type.
        student_aux_logits: (N, C, h, w), or None for a student without auxiliary head.
        class_weights: (C,), or None for 1 everywhere.
        aux_weight: Weight of the auxiliary head's loss.
        focal_gamma: See `focal`; 0: cross-entropy.
        ignore_index: Label of ignored pixels.
        ranks: Processes that share the batch: the means are those of all ranks' pixels.

    Returns:
        The loss; statistics `student_ce` and `student_aux_ce`, unweighted means over valid pixels.

    Raises:
        UserError: Shapes, labels or class weights do not fit.
    """
    pixels = pixel_labels(labels, num_classes=student_logits.shape[1], ignore_index=ignore_index)
    weight = class_weight_map(class_weights, pixels, pixels.valid, student_logits)
    log_p = log_prob_of_label(student_logits, pixels)
    total = ranks.share(weight.sum())
    valid_count = ranks.divisor(pixels.valid.count_nonzero())
    loss = weighted_mean_ce(focal(log_p, focal_gamma), weight, total)
    statistics = {"student_ce": -log_p.detach().sum() / valid_count}
    if student_aux_logits is not None:
        aux_log_p = log_prob_of_label(student_aux_logits, pixels)
        loss = loss + aux_weight * weighted_mean_ce(focal(aux_log_p, focal_gamma), weight, total)
        statistics["student_aux_ce"] = -aux_log_p.detach().sum() / valid_count
    return TaskLoss(loss, statistics, pixel_weights=as_float(pixels.valid))


def focal(log_p: Tensor, gamma: float) -> Tensor:
    """``(1 - p)**gamma * log p``: pixels that are certain weigh less. Lin et al., ICCV 2017.

    Args:
        log_p: Log-probabilities of the labels, of any shape; 0 or less.
        gamma: 0: as they are.
    """
    if gamma == 0:
        return log_p
    # Below 1 the power has no slope at 0, where ignored pixels lie.
    wrong = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return wrong**gamma * log_p


def class_weight_map(
    class_weights: Tensor | None, pixels: PixelLabels, selected: Tensor, logits: Tensor
) -> Tensor:
    """Weight of each pixel (N, H, W): that of its class where it is selected, 0 elsewhere."""
    if class_weights is None:
        return as_float(selected)
    if class_weights.shape != (logits.shape[1],):
        raise UserError(
            f"class_weights have shape {tuple(class_weights.shape)}, expected one for each of the "
            f"{logits.shape[1]} classes."
        )
    weights_C = as_float(class_weights.detach()).to(logits.device)
    return weights_C[torch.where(selected, pixels.labels, 0).long()] * selected


def weighted_mean_ce(log_p_NHW: Tensor, weight_NHW: Tensor, total: Tensor) -> Tensor:
    """Mean of -log p with weights of the given sum; 0 with zero gradient when all are 0."""
    return -(weight_NHW * log_p_NHW).sum() / torch.where(total > 0, total, 1)
