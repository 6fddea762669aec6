"""Distillation losses on logits: KD.

Logits have the shape (N, C, h, w) and are compared where they are, without upsampling, at all
positions, ignored ones too (as published). A student of another stride is resized to the
teacher's size. Computing is done in float32 (float64 stays), whatever comes in.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.losses.maps import paired_logits


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Pixel-wise distillation: KL(teacher || student) over classes, in nats.

    ``T^2 * mean over images and positions of sum_c p_t (log p_t - log p_s)`` with
    p = softmax(z / T). Hinton et al. 2015, section 2. Not `reduction="mean"`, which divides by the
    number of classes too.

    Args:
        student_logits: (N, C, h, w).
        teacher_logits: (N, C, h', w'), no gradient.
        temperature: T.

    Raises:
        UserError: Batches or class counts differ.
    """
    student, teacher = paired_logits(student_logits, teacher_logits)
    student_log_p = (student / temperature).log_softmax(1)
    teacher_log_p = (teacher / temperature).log_softmax(1)
    total = F.kl_div(student_log_p, teacher_log_p, reduction="sum", log_target=True)
    positions = max(1, teacher.numel() // max(1, teacher.shape[1]))
    return temperature**2 * total / positions
