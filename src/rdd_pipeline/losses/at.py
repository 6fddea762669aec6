"""Attention transfer (AT): feature distillation by maps of where a network looks."""

from __future__ import annotations

from torch import Tensor

from rdd_pipeline.losses.maps import attention, mean_square, paired_maps


def at_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Attention transfer: mean squared difference of the two maps of attention.

    Attention is the mean of the squared channels, L2-normalized over the positions of an image;
    the mean runs over images and positions. Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928,
    in the form of the field's tables (the paper takes the norm of the difference).

    Args:
        student_feature: (N, Ds, h, w).
        teacher_feature: (N, Dt, h', w').

    Raises:
        UserError: Batches differ.
    """
    student, teacher = paired_maps(student_feature, teacher_feature, "features")
    return mean_square(attention(student) - attention(teacher))
