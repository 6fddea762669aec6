"""Layers of the losses that are trained with the student.

They take any floating type: outside of autocast they compute in float32 (on CUDA in TF32 where the
process allows it, as in the networks), inside they follow it.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.maps import as_float

Adapter = Literal["always", "unless_equal"]
"""Whether a student of the teacher's width gets an adapter, too."""


class ChannelAdapter(nn.Conv2d):
    """1x1 convolution without bias that brings the student's feature to the teacher's width.

    It is trained with the student: it belongs under DDP and into the checkpoint.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        """A layer for features of the given widths."""
        super().__init__(student_channels, teacher_channels, kernel_size=1, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Feature (N, Dt, h, w) from (N, Ds, h, w) of any floating type."""
        return super().forward(as_float(feature))


def make_adapter(adapter: Adapter, narrow: int, wide: int) -> nn.Module:
    """`ChannelAdapter` where one is wanted, else nothing."""
    return ChannelAdapter(narrow, wide) if needs_adapter(adapter, narrow, wide) else nn.Identity()


def needs_adapter(adapter: Adapter, narrow: int, wide: int) -> bool:
    """Whether a student's feature goes through a layer to the teacher's width.

    Raises:
        UserError: There is no such choice.
    """
    if adapter not in get_args(Adapter):
        raise UserError(f"adapter is {adapter!r}; expected one of {', '.join(get_args(Adapter))}.")
    return adapter == "always" or narrow != wide


class ProjectionHead(nn.Sequential):
    """conv1x1 - batch norm - ReLU - conv1x1, to the teacher's width. Trained with the student."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        """Layers for features of the given widths."""
        super().__init__(
            nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(teacher_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=1, bias=False),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Projected feature (N, Dt, h, w) from (N, Ds, h, w) of any floating type."""
        projected: Tensor = super().forward(as_float(feature))  # type: ignore[no-untyped-call]
        return projected
