"""DIST: the correlation of both networks' predictions, between and within classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.losses.base import DistillationLoss, FunctionalLoss, LossContext
from rdd_pipeline.losses.maps import paired_logits
from rdd_pipeline.networks import NetworkOutput


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    ranks: Collectives = ALONE,
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


def build_dist(
    context: LossContext, *, inter_weight: float = 1.0, intra_weight: float = 1.0
) -> DistillationLoss:
    """`dist_loss` of the logits, and with the auxiliary weight of the auxiliary ones."""

    def of(student: Tensor, teacher: Tensor) -> Tensor:
        return dist_loss(
            student,
            teacher,
            inter_weight=inter_weight,
            intra_weight=intra_weight,
            ranks=context.related,
        )

    def loss(student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Tensor:
        main = of(student.logits, teacher.logits)
        if student.aux_logits is None or teacher.aux_logits is None:
            return main
        return main + context.aux_weight * of(student.aux_logits, teacher.aux_logits)

    return FunctionalLoss(loss)


def _pearson(a: Tensor, b: Tensor, *, dim: int, ranks: Collectives = ALONE) -> Tensor:
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
