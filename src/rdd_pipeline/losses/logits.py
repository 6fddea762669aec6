"""Distillation losses on logits: KD, CWD, DIST, BPKD.

Logits have the shape (N, C, h, w) and are compared where they are, without upsampling, at all
positions, ignored ones too (as published). A student of another stride is resized to the
teacher's size. Computing is done in float32 (float64 stays), whatever comes in and whatever
autocast and the TF32 switches say. No gradient reaches the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.collectives import ALONE, Ranks
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.maps import paired_logits
from rdd_pipeline.losses.pixelwise import pixel_labels


class BpkdTerms(NamedTuple):
    """Unweighted terms of BPKD; the paper's weights are 50 (edge) and 20 (body)."""

    edge: Tensor
    body: Tensor


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Pixel-wise distillation: KL(teacher || student) over classes, in nats.

    ``T^2 * mean over images and positions of sum_c p_t (log p_t - log p_s)`` with
    p = softmax(z / T). Hinton et al. 2015, section 2. Not `reduction="mean"`, which divides by the
    number of classes too.

    Args:
        student_logits: (N, C, h, w).
        teacher_logits: (N, C, h', w').
        temperature: T.

    Raises:
        UserError: Batches or class counts differ.
    """
    student, teacher = paired_logits(student_logits, teacher_logits)
    positions = teacher.shape[0] * teacher.shape[2] * teacher.shape[3]
    total = _kl_sum(student / temperature, teacher / temperature, dim=1)
    return temperature**2 * total / max(positions, 1)


def cwd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation: KL(teacher || student) over positions, for each class, in nats.

    ``T^2 / (N * C) * sum over images and classes of KL`` with p = softmax over the h * w positions
    of z / T. Shu et al., ICCV 2021, arXiv 2011.13256.

    Args:
        student_logits: (N, C, h, w).
        teacher_logits: (N, C, h', w').
        temperature: T.

    Raises:
        UserError: Batches or class counts differ.
    """
    student, teacher = paired_logits(student_logits, teacher_logits)
    return spatial_kl(student, teacher, temperature=temperature) / max(1, teacher.shape[1])


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    ranks: Ranks = ALONE,
) -> Tensor:
    """DIST: one minus Pearson's correlation of the predictions, between and within classes.

    With both softmaxes as matrices of N * h * w pixels and C classes:
    ``inter_weight * (1 - mean over pixels of the correlation over classes) +
    intra_weight * (1 - mean over classes of the correlation over pixels)``.
    Huang et al., NeurIPS 2022, arXiv 2205.10536. The pixels of all images are one population:
    without that reshape, as in several published copies, it is another loss. Between two classes
    there is no relation to learn: that part has a gradient of 0 then.

    Args:
        student_logits: (N, C, h, w).
        teacher_logits: (N, C, h', w').
        inter_weight: Weight of the relations between the classes of one pixel.
        intra_weight: Weight of the relations between the pixels of one class.
        ranks: Processes whose images are one population.

    Raises:
        UserError: Batches or class counts differ.
    """
    student, teacher = paired_logits(student_logits, teacher_logits)
    student_PC = student.softmax(1).movedim(1, -1).flatten(0, -2)
    teacher_PC = teacher.softmax(1).movedim(1, -1).flatten(0, -2)
    if len(student_PC) == 0:
        return student.sum()
    inter = 1 - _pearson(student_PC, teacher_PC, dim=1).mean()
    intra = 1 - _pearson(student_PC, teacher_PC, dim=0, ranks=ranks).mean()
    return inter_weight * inter + intra_weight * intra


def bpkd_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    kernel: int = 7,
    ignore_index: int = 255,
) -> BpkdTerms:
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
    return BpkdTerms(edge, body)


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


def spatial_kl(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """``T^2 / N * sum over images and channels of KL(teacher || student) over positions``, in nats.

    Args:
        student: (N, D, h, w), of one precision with the teacher's.
        teacher: (N, D, h, w).
        temperature: T of the softmax over the h * w positions.
    """
    total = _kl_sum(student.flatten(2) / temperature, teacher.flatten(2) / temperature, dim=2)
    return temperature**2 * total / max(1, teacher.shape[0])


def _kl_sum(student: Tensor, teacher: Tensor, *, dim: int) -> Tensor:
    """Sum of KL(teacher || student) of the softmaxes along a dimension."""
    return F.kl_div(
        student.log_softmax(dim), teacher.log_softmax(dim), reduction="sum", log_target=True
    )


def _pearson(a: Tensor, b: Tensor, *, dim: int, ranks: Ranks = ALONE) -> Tensor:
    """Correlation along a dimension, that of all ranks; 0 where one of the two is constant.

    Of two values it is 1 or -1, whatever they are. Its gradient is then 0, and not what rounding
    leaves of a difference divided by a tiny length, hundreds in float32.
    """
    if a.shape[dim] * ranks.size <= 2 and a.requires_grad:
        return _pearson(a.detach(), b, dim=dim, ranks=ranks) + 0 * a.sum(dim)
    # Ranks hold equally many.
    a = a - ranks.sum(a.mean(dim, keepdim=True)) / ranks.size
    b = b - ranks.sum(b.mean(dim, keepdim=True)) / ranks.size
    if ranks.size == 1:
        return F.cosine_similarity(a, b, dim=dim, eps=1e-8)
    sums = ranks.sum(torch.stack([(a * b).sum(dim), a.square().sum(dim), b.square().sum(dim)]))
    # As cosine_similarity: no length below eps.
    squares = sums[1:].clamp(min=1e-16)
    return sums[0] / (squares[0] * squares[1]).sqrt()
