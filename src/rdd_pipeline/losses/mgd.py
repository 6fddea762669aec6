"""MGD, masked generative distillation: the teacher's feature from a part of the student's."""

from __future__ import annotations

from torch import Tensor, nn

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import (
    REFERENCE_POSITIONS,
    DistillationLoss,
    LossContext,
    positions,
)
from rdd_pipeline.losses.layers import Adapter, needs_adapter
from rdd_pipeline.losses.maps import as_float, paired_features, resize
from rdd_pipeline.networks import NetworkOutput


class MaskedGeneration(nn.Module):
    """The student's feature, most positions hidden, completed to look like the teacher's.

    1x1 convolution to the teacher's width, positions zeroed at random (one pattern per image for
    all channels), conv3x3-ReLU-conv3x3. Shared by MGD and Af-DCD. Its layers are trained with the
    student. The pattern comes from torch's global generator of the feature's device.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        mask_ratio: float = 0.75,
        align: bool = True,
        ranks: Collectives = ALONE,
    ) -> None:
        """Layers for features of the given widths.

        Args:
            student_channels: Ds.
            teacher_channels: Dt.
            mask_ratio: Share of the positions that are zeroed.
            align: Whether there is a convolution to the teacher's width; without, Ds is Dt.
            ranks: Processes that share the batches, each image's pattern stays what it is in one.

        Raises:
            UserError: The ratio is not a probability.
        """
        super().__init__()
        if not 0 <= mask_ratio <= 1:
            raise UserError(f"mask_ratio is {mask_ratio}; expected a share between 0 and 1.")
        self.mask_ratio = mask_ratio
        self.ranks = ranks
        self.align = (
            nn.Conv2d(student_channels, teacher_channels, kernel_size=1) if align else nn.Identity()
        )
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
        )

    def forward(self, student_feature: Tensor, size: tuple[int, int]) -> Tensor:
        """Completed feature (N, Dt, *size) from the student's (N, Ds, h, w)."""
        aligned = resize(self.align(as_float(student_feature)), size)
        kept = self.ranks.rand(len(aligned), 1, *size, device=aligned.device) >= self.mask_ratio
        completed: Tensor = self.generation(aligned * kept)
        return completed


def mgd_loss(completed_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Masked generative distillation: squared error of the completed feature, sum / N.

    Yang et al., ECCV 2022, arXiv 2205.01529.

    Args:
        completed_feature: From `MaskedGeneration`, (N, Dt, h, w).
        teacher_feature: (N, Dt, h, w).

    Raises:
        UserError: Batches or widths differ.
    """
    student, teacher = paired_features(completed_feature, teacher_feature)
    return (student - teacher).square().sum() / max(1, teacher.shape[0])


class MGDLoss(DistillationLoss):
    """MGD: the backbone's last stage completed from a quarter of its positions."""

    def __init__(
        self, context: LossContext, *, mask_ratio: float = 0.75, adapter: Adapter = "always"
    ) -> None:
        super().__init__()
        self.generator = make_generator(context, mask_ratio, adapter)

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Tensor:
        """See `DistillationLoss.forward`."""
        return mgd_loss(complete(self.generator, student, teacher), teacher.stages[1])


def make_generator(
    context: LossContext, mask_ratio: float, adapter: Adapter = "always"
) -> MaskedGeneration:
    """The generator for the last stages of a training's backbones."""
    return MaskedGeneration(
        *context.stage_widths,
        mask_ratio=mask_ratio,
        align=needs_adapter(adapter, *context.stage_widths),
        ranks=context.ranks,
    )


def complete(generator: MaskedGeneration, student: NetworkOutput, teacher: NetworkOutput) -> Tensor:
    """The student's last stage, completed at the teacher's size."""
    height, width = teacher.stages[1].shape[2:]
    completed: Tensor = generator(student.stages[1], (height, width))
    return completed


def mgd_scale(context: LossContext) -> float:
    """`mgd_loss` is a sum over the positions of the last stage."""
    return REFERENCE_POSITIONS / positions(context.teacher.stages[1])
