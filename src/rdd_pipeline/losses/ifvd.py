"""IFVD: how the features of a class vary around their mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.losses.base import DistillationLoss, FunctionalLoss, LossContext
from rdd_pipeline.losses.maps import mean_square, paired_maps, resize_labels, rows_of
from rdd_pipeline.losses.pixelwise import PixelLabels, pixel_labels


def ifvd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    ignore_index: int = 255,
) -> Tensor:
    """Intra-class feature variation: how similar each pixel is to the mean of its class.

    Mean squared difference, over images and positions, of the two networks' cosines between a
    pixel's feature and the mean feature of its class in its image. Labels are resized to the
    features by nearest neighbor; an ignored pixel is its own mean. Wang et al., ECCV 2020.

    Args:
        student_feature: (N, Ds, h, w).
        teacher_feature: (N, Dt, h', w').
        labels: (N, H, W), any integer type.
        num_classes: C.
        ignore_index: Label of ignored pixels.

    Raises:
        UserError: Batches differ or the labels are out of range.
    """
    student, teacher = paired_maps(student_feature, teacher_feature, "features")
    pixels = pixel_labels(
        resize_labels(labels, (teacher.shape[2], teacher.shape[3])),
        num_classes=num_classes,
        ignore_index=ignore_index,
    )
    student_cos = _cosine_to_class_mean(student, pixels, num_classes)
    return mean_square(student_cos - _cosine_to_class_mean(teacher, pixels, num_classes))


def build_ifvd(context: LossContext) -> DistillationLoss:
    """`ifvd_loss` of both networks' features."""
    context.require("feature")
    return FunctionalLoss(
        lambda student, teacher, labels: ifvd_loss(
            student.feature,
            teacher.feature,
            labels,
            num_classes=context.num_classes,
            ignore_index=context.ignore_index,
        )
    )


def _cosine_to_class_mean(feature_NDhw: Tensor, pixels: PixelLabels, num_classes: int) -> Tensor:
    """Cosine of each position's feature with the mean of its class in its image, (N * h * w,)."""
    images, _, height, width = feature_NDhw.shape
    feature_PD = rows_of(feature_NDhw).flatten(0, 1)
    valid_P = pixels.valid.flatten()
    image_P = torch.arange(images, device=valid_P.device).repeat_interleave(height * width)
    # One row for each class of each image, and a last one that takes the ignored pixels.
    row_P = image_P * num_classes + pixels.labels.flatten()
    row_P = torch.where(valid_P, row_P, images * num_classes)
    sums = feature_PD.new_zeros(images * num_classes + 1, feature_PD.shape[1])
    sums = sums.index_add(0, row_P, feature_PD)
    counts = sums.new_zeros(len(sums)).index_add(0, row_P, torch.ones_like(feature_PD[:, 0]))
    means = sums / (counts.unsqueeze(1) + 1e-6)
    # index_select rather than means[row_P]: its gradient is an index_add, too.
    mean_PD = torch.where(valid_P.unsqueeze(1), means.index_select(0, row_P), feature_PD)
    return F.cosine_similarity(feature_PD, mean_PD, dim=1)
