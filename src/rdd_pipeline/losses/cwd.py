"""CWD, channel-wise distillation: where in the image each channel is active.

Of the logits' channels, the classes, and of the features'.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import DistillationLoss, LossContext
from rdd_pipeline.losses.layers import Adapter, make_adapter
from rdd_pipeline.losses.maps import paired_features, paired_logits, spatial_kl
from rdd_pipeline.networks import NetworkOutput


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


def cwd_feature_loss(
    adapted_feature: Tensor,
    teacher_feature: Tensor,
    *,
    temperature: float = 4.0,
    student_channels: int | None = None,
) -> Tensor:
    """Channel-wise distillation of features: KL(teacher || student) over positions, in nats.

    ``T^2 / (N * D) * sum over images and channels of KL`` with p = softmax over positions of f / T.
    Shu et al., ICCV 2021, arXiv 2011.13256.

    Args:
        adapted_feature: The student's, (N, Dt, h, w), after `ChannelAdapter`.
        teacher_feature: (N, Dt, h', w').
        temperature: T.
        student_channels: D of the divisor. None: Dt, as the paper has it. The student's width
            before the adapter: what the code behind the published tables does.

    Raises:
        UserError: Batches or widths differ.
    """
    student, teacher = paired_features(adapted_feature, teacher_feature)
    channels = teacher.shape[1] if student_channels is None else student_channels
    return spatial_kl(student, teacher, temperature=temperature) / max(1, channels)


class CWDFeatureLoss(DistillationLoss):
    """CWD on features, the student's adapted to the teacher's width."""

    def __init__(
        self,
        context: LossContext,
        *,
        temperature: float = 4.0,
        divisor: Literal["teacher", "student"] = "teacher",
        adapter: Adapter = "always",
    ) -> None:
        super().__init__()
        if divisor not in ("teacher", "student"):
            raise UserError(f"divisor of cwd_feature is {divisor!r}; expected teacher or student.")
        narrow, wide = context.feature_widths
        self.temperature = temperature
        self.channels = narrow if divisor == "student" else wide
        self.adapter = make_adapter(adapter, narrow, wide)

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Tensor:
        """See `DistillationLoss.forward`."""
        return cwd_feature_loss(
            self.adapter(student.feature),
            teacher.feature,
            temperature=self.temperature,
            student_channels=self.channels,
        )
