"""KD of standardized logits: the order and relations of the classes, whatever their scale."""

from __future__ import annotations

from torch import Tensor

from rdd_pipeline.losses.kd import kd_loss
from rdd_pipeline.losses.maps import paired_logits

SMALLEST = 1e-3
"""Standard deviation below which logits are divided by this one instead."""


def standardized_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0
) -> Tensor:
    """`kd_loss` of the logits' z-scores over the classes, position by position.

    ``z -> (z - mean) / standard deviation`` (of C - 1 degrees of freedom) for both networks, then
    ``T^2 * mean over images and positions of KL(teacher || student)``, in nats. A student need not
    match the size of the teacher's logits. Sun et al., CVPR 2024, arXiv 2403.01427, for the
    classification of images; T = 2 as there. Where there the deviation is added to 1e-7, here one
    below 1e-3 counts as 1e-3: positions at which a new student says the same of all classes would
    have gradients of millions otherwise.

    Args:
        student_logits: (N, C, h, w); with a single class there is no loss.
        teacher_logits: (N, C, h', w').
        temperature: T.

    Raises:
        UserError: Batches or class counts differ.
    """
    student, teacher = paired_logits(student_logits, teacher_logits)
    return kd_loss(_z_score(student), _z_score(teacher), temperature=temperature)


def _z_score(logits: Tensor) -> Tensor:
    centered = logits - logits.mean(1, keepdim=True)
    if logits.shape[1] < 2:
        return centered
    variance = centered.square().sum(1, keepdim=True) / (logits.shape[1] - 1)
    # The root's own gradient is infinite at 0: the bound belongs below it.
    return centered / variance.clamp(min=SMALLEST**2).sqrt()
