"""KD: the student's class distribution close to the teacher's, pixel by pixel."""

from __future__ import annotations

from torch import Tensor

from rdd_pipeline.losses.maps import kl_sum, paired_logits


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
    total = kl_sum(student / temperature, teacher / temperature, dim=1)
    return temperature**2 * total / max(positions, 1)
