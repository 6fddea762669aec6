"""DSD, double similarity distillation: similarity of attention, and of the classes' maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import (
    REFERENCE_POSITIONS,
    DistillationLoss,
    FunctionalLoss,
    LossContext,
    positions,
)
from rdd_pipeline.losses.maps import (
    as_float,
    attention,
    matrix_product,
    mean_square,
    paired_logits,
    paired_maps,
    resize,
)
from rdd_pipeline.networks import NetworkOutput


def psd_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """DSD's pixel-wise similarity: how attention changes from one map of a network to another.

    Q is the attention of `at_loss` for each map; residuals R = normalize(Q_m - Q_n) for all pairs
    n < m; mean over pairs, images and positions of the squared difference of the two networks'
    residuals. Feng et al., IEEE TIP 2021, "Double similarity distillation".

    Args:
        student_maps: At least two maps (N, D, h, w) of any widths and sizes, by convention
            auxiliary logits, feature, logits.
        teacher_maps: As many. All maps are resized to the size of the first of these.

    Raises:
        UserError: Fewer than two maps, different numbers of maps, or batches differ.
    """
    if len(student_maps) != len(teacher_maps) or len(student_maps) < 2:
        raise UserError(
            f"Got {len(student_maps)} maps of the student and {len(teacher_maps)} of the teacher; "
            "expected the same number, at least two."
        )
    size = (teacher_maps[0].shape[-2], teacher_maps[0].shape[-1])
    student_attention, teacher_attention = [], []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        student, teacher = paired_maps(student_map, resize(as_float(teacher_map), size), "maps")
        student_attention.append(attention(student))
        teacher_attention.append(attention(teacher))
    differences = [
        mean_square(
            F.normalize(student_attention[m] - student_attention[n], dim=1)
            - F.normalize(teacher_attention[m] - teacher_attention[n], dim=1)
        )
        for n, m in combinations(range(len(student_maps)), 2)
    ]
    return torch.stack(differences).mean()


def csd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """DSD's category-wise similarity: how alike the classes' maps are.

    Logits are average-pooled 2x2, P = softmax over positions of z / T for each class; mean squared
    difference of the matrices P P^T (C x C) over images and entries. Feng et al., IEEE TIP 2021.

    Args:
        student_logits: (N, C, h, w).
        teacher_logits: (N, C, h', w').
        temperature: T.

    Raises:
        UserError: Batches or class counts differ.
    """
    student, teacher = paired_logits(student_logits, teacher_logits)

    def similarity(logits: Tensor) -> Tensor:
        pooled = F.avg_pool2d(logits, 2, ceil_mode=True).flatten(2)
        p_NCP = (pooled / temperature).softmax(2)
        return matrix_product(p_NCP, p_NCP.mT)

    return mean_square(similarity(student) - similarity(teacher))


def build_psd(context: LossContext) -> DistillationLoss:
    """`psd_loss`; without two auxiliary heads over feature and logits only."""
    context.require("feature")

    def loss(student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Tensor:
        students, teachers = [student.feature, student.logits], [teacher.feature, teacher.logits]
        if student.aux_logits is not None and teacher.aux_logits is not None:
            students.insert(0, student.aux_logits)
            teachers.insert(0, teacher.aux_logits)
        return psd_loss(students, teachers)

    return FunctionalLoss(loss)


def csd_scale(context: LossContext) -> float:
    """`csd_loss` squares products of two distributions over positions (pooled)."""
    return (positions(context.teacher.logits, 2) / (REFERENCE_POSITIONS / 4)) ** 2
