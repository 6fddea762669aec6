"""BPKD: the edges of each class distilled apart from its body."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import DistillationLoss, FunctionalLoss, LossContext
from rdd_pipeline.losses.maps import paired_logits, spatial_kl
from rdd_pipeline.losses.pixelwise import pixel_labels
from rdd_pipeline.networks import NetworkOutput


class BPKDLosses(NamedTuple):
    """Unweighted losses of BPKD; the paper's weights are 50 (edge) and 20 (body)."""

    edge: Tensor
    body: Tensor


def bpkd_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    kernel: int = 7,
    ignore_index: int = 255,
) -> BPKDLosses:
    """BPKD: the edges of each class distilled apart from its body.

    M is 1 near the borders of a class: the morphological gradient (dilation minus erosion) of its
    one-hot labels, averaged down to h x w. Ignored pixels belong to no class, so that a class ends
    where they begin, and are no edge themselves.

    * edge: p = softmax over classes of z * M / T;
      ``2 T^2 * mean over images of sum over classes of (sum over positions of M * KL(p_t || p_s)) /
      (sum of M)``,
    * body: p = softmax over positions of z * (1 - M) / T; ``T^2 / C * mean over images of sum over
      classes of KL``.

    Liu et al., WACV 2024, arXiv 2306.08075. No official training code exists: temperature, kernel
    and weights are settings.

    Args:
        student_logits: (N, C, h, w).
        teacher_logits: (N, C, h', w').
        labels: (N, H, W), any integer type.
        temperature: T.
        kernel: Side of the square in which dilation and erosion look, in pixels of the labels; odd.
        ignore_index: Label of ignored pixels.

    Raises:
        UserError: Batches, class counts or labels do not fit, or the kernel is even.
    """
    student, teacher = paired_logits(student_logits, teacher_logits)
    mask = edge_masks(
        labels,
        num_classes=teacher.shape[1],
        size=(teacher.shape[2], teacher.shape[3]),
        kernel=kernel,
        ignore_index=ignore_index,
    ).to(student.dtype)

    student_log_p = (student * mask / temperature).log_softmax(1)
    teacher_log_p = (teacher * mask / temperature).log_softmax(1)
    # Over all classes at each position, then weighed. A class's own summand, weighed by its mask
    # alone, is no divergence: it is negative where the student overrates every class at its edges.
    kl = F.kl_div(student_log_p, teacher_log_p, reduction="none", log_target=True).sum(1, True)
    area = mask.sum((2, 3))
    edge_of_class = (mask * kl).sum((2, 3)) / torch.where(area > 0, area, 1)
    images, classes = max(1, teacher.shape[0]), max(1, teacher.shape[1])
    edge = 2 * temperature**2 * edge_of_class.sum() / images

    body_mask = 1 - mask
    body = spatial_kl(student * body_mask, teacher * body_mask, temperature=temperature) / classes
    return BPKDLosses(edge, body)


def build_bpkd(
    context: LossContext, *, temperature: float = 4.0, kernel: int = 7
) -> DistillationLoss:
    """`bpkd_losses` of both networks' logits."""

    def losses(student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> dict[str, Tensor]:
        found = bpkd_losses(
            student.logits,
            teacher.logits,
            labels,
            temperature=temperature,
            kernel=kernel,
            ignore_index=context.ignore_index,
        )
        return {"bpkd_edge": found.edge, "bpkd_body": found.body}

    return FunctionalLoss(losses)


def edge_masks(
    labels: Tensor, *, num_classes: int, size: tuple[int, int], kernel: int, ignore_index: int
) -> Tensor:
    """How much of each cell lies near a border of the class: (N, C, h, w) in [0, 1], float32.

    Args:
        labels: (N, H, W), any integer type.
        num_classes: C.
        size: (h, w).
        kernel: Side of the square of dilation and erosion; odd.
        ignore_index: Label of pixels that belong to no class.

    Raises:
        UserError: The kernel is even or not positive, or the labels are out of range.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise UserError(f"The kernel's side is {kernel}; it must be odd to have a center, e.g. 7.")
    pixels = pixel_labels(labels, num_classes=num_classes, ignore_index=ignore_index)
    classes_C11 = torch.arange(num_classes, device=labels.device).view(-1, 1, 1)
    masks = []
    # Image by image: one-hot labels at full size are large.
    for labels_HW, valid_HW in zip(*pixels, strict=True):
        one_hot = ((labels_HW == classes_C11) & valid_HW).float()
        both = torch.stack([one_hot, -one_hot])
        for window in ((kernel, 1), (1, kernel)):  # a square's maximum, rows and columns apart
            both = F.max_pool2d(both, window, 1, (window[0] // 2, window[1] // 2))
        gradient = (both[0] + both[1]) * valid_HW  # dilation - erosion
        masks.append(F.adaptive_avg_pool2d(gradient, size))
    if not masks:
        return labels.new_zeros((0, num_classes, *size), dtype=torch.float32)
    return torch.stack(masks)
