"""What a distillation loss is to the objective: a module from both networks' outputs to scalars.

Most losses hold no state: a pure function of tensors, which `compare` or `FunctionalLoss` gives its
maps. Adapters, projection heads, discriminators and memory banks are ordinary submodules and
buffers: they are trained, moved and checkpointed with the student. Every width and size is read
from the networks' own outputs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.config import Option
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.maps import resize, size_of
from rdd_pipeline.networks import NetworkOutput

Losses = Tensor | dict[str, Tensor]
"""Unweighted float32 scalars: one, or several by name."""


class TeacherLacksError(UserError):
    """A loss compares maps that the teacher does not give."""


@dataclass(frozen=True)
class LossContext:
    """What the losses of a training are built for.

    Attributes:
        student: Outputs for one training sample; only the shapes count (meta device).
        teacher: The same of the teacher.
        ignore_index: Label that is not looked at.
        aux_weight: Weight of the auxiliary heads beside the main ones.
        ranks: Processes that share the batches.
        cross_image: Whether images are related to those of all ranks, or of their own only.
        compare_at: Whose maps are resized; at `student`, `teacher` is of the student's sizes.
    """

    student: NetworkOutput
    teacher: NetworkOutput
    ignore_index: int = 255
    aux_weight: float = 0.4
    ranks: Collectives = ALONE
    cross_image: Literal["global", "local"] = "global"
    compare_at: Literal["teacher", "student"] = "teacher"

    @property
    def related(self) -> Collectives:
        """Processes whose images are related to one another."""
        return self.ranks if self.cross_image == "global" else ALONE

    def require(self, maps: Literal["logits", "feature", "stages"]) -> None:
        """Refuse a teacher of other code that does not give these maps.

        Raises:
            TeacherLacksError: It does not.
        """
        there = {
            "logits": self.teacher.logits,
            "feature": self.teacher.feature,
            "stages": self.teacher.stages[1],
        }
        if there[maps].shape[1] == 0:
            given = " and ".join(name for name, found in there.items() if found.shape[1])
            raise TeacherLacksError(
                f"It compares the networks' `{maps}`, and the teacher's module gives {given} only."
            )

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""
        return self.student.logits.shape[1]

    @property
    def feature_widths(self) -> tuple[int, int]:
        """Channels of both networks' features, the student's first."""
        self.require("feature")
        return self.student.feature.shape[1], self.teacher.feature.shape[1]

    @property
    def stage_widths(self) -> tuple[int, int]:
        """Channels of both backbones' last stages, the student's first."""
        self.require("stages")
        return self.student.stages[1].shape[1], self.teacher.stages[1].shape[1]


def at_size_of(teacher: NetworkOutput, student: NetworkOutput) -> NetworkOutput:
    """The teacher's maps at the sizes of the student's."""
    pairs = zip(teacher.stages, student.stages, strict=True)
    early, late = (resize(theirs, size_of(ours)) for theirs, ours in pairs)
    aux, size = teacher.aux_logits, size_of(student.logits)
    return NetworkOutput(
        resize(teacher.logits, size),
        None if aux is None else resize(aux, size),
        resize(teacher.feature, size_of(student.feature)),
        (early, late),
    )


class DistillationLoss(nn.Module):
    """Base of the losses with layers or buffers: built from the `LossContext` and the options."""

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """Return the loss, or several by name.

        Args:
            student: Outputs of the trained network for the batch.
            teacher: Outputs of the frozen network for the same batch, without graph.
            labels: (B, H, W) train ids.
        """
        raise NotImplementedError

    def adversaries(self) -> Iterator[nn.Module]:
        """Submodules with an optimizer of their own, see `training.schedule`."""
        return iter(())


class FunctionalLoss(DistillationLoss):
    """A loss without state: a function of both outputs and the labels."""

    def __init__(self, function: Callable[[NetworkOutput, NetworkOutput, Tensor], Losses]) -> None:
        super().__init__()
        self._function = function

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """See `DistillationLoss.forward`."""
        return self._function(student, teacher, labels)


def compare(
    maps: Literal["logits", "feature"], function: Callable[..., Tensor]
) -> Callable[..., DistillationLoss]:
    """How to build the loss ``function(student's maps, teacher's maps, **options)``.

    Args:
        maps: Field of `NetworkOutput` that the function compares.
        function: Takes both networks' maps; its keyword arguments are the loss's options.
    """

    def build(context: LossContext, **options: Option) -> DistillationLoss:
        inspect.signature(function).bind(None, None, **options)  # an unknown option: TypeError
        context.require(maps)
        return FunctionalLoss(
            lambda student, teacher, _: function(
                getattr(student, maps), getattr(teacher, maps), **options
            )
        )

    return build


# --- losses whose size depends on the number of positions ---

REFERENCE_POSITIONS = 64 * 128
"""Positions for which the published weights hold: maps of crops of 512 x 1024 at stride 8."""


def positions(maps: Tensor, pool: int = 1) -> int:
    """Positions of a map, of one that is pooled rounded up."""
    return math.ceil(maps.shape[2] / pool) * math.ceil(maps.shape[3] / pool)


def unit_map_scale(context: LossContext) -> float:
    """A mean of squares of maps of unit length falls with the number of positions."""
    return positions(context.teacher.feature) / REFERENCE_POSITIONS
