"""FitNet: feature distillation by the squared difference of the features."""

from __future__ import annotations

from torch import Tensor

from rdd_pipeline.losses.base import DistillationLoss, LossContext
from rdd_pipeline.losses.layers import ChannelAdapter
from rdd_pipeline.losses.maps import mean_square, paired_features
from rdd_pipeline.networks import NetworkOutput


def fitnet_loss(adapted_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """FitNet: mean squared difference of the features, over all axes.

    Romero et al., ICLR 2015, arXiv 1412.6550.

    Args:
        adapted_feature: The student's, (N, D, h, w), after `ChannelAdapter`.
        teacher_feature: (N, D, h', w').

    Raises:
        UserError: Batches or widths differ.
    """
    student, teacher = paired_features(adapted_feature, teacher_feature)
    return mean_square(student - teacher)


class FitNetLoss(DistillationLoss):
    """The student's adapted feature close to the teacher's."""

    def __init__(self, context: LossContext) -> None:
        super().__init__()
        self.adapter = ChannelAdapter(*context.feature_widths)

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Tensor:
        """See `DistillationLoss.forward`."""
        return fitnet_loss(self.adapter(student.feature), teacher.feature)
