"""One training step: what is computed for a batch, on any device, with or without ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rdd_pipeline.distillation.objective import Objective, ObjectiveOutput
from rdd_pipeline.networks import NetworkOutput, Preprocessing, SegmentationNetwork


class TrainingStep(nn.Module):
    """Student, objective and frozen teacher as one module: wrap it, and all of it is wrapped.

    The teacher is deliberately no submodule. It is neither trained nor saved with the state, and a
    wrapper for several devices must not touch it.

    Args:
        student: The network in training.
        objective: Its losses.
        teacher: Frozen network, or None when the method needs none.
        student_preprocessing: Applied to the uint8 images the student sees.
        teacher_preprocessing: Applied to the uint8 images the teacher sees.
        autocast: Data type the networks compute in; losses are always float32.
    """

    def __init__(
        self,
        student: SegmentationNetwork,
        objective: Objective,
        *,
        teacher: SegmentationNetwork | None,
        student_preprocessing: Preprocessing,
        teacher_preprocessing: Preprocessing | None,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self._teacher = (teacher,)  # a tuple hides it from nn.Module
        self._student_preprocessing = student_preprocessing
        self._teacher_preprocessing = teacher_preprocessing
        self._autocast = autocast

    def forward(self, images: Tensor, labels: Tensor, iteration: int) -> ObjectiveOutput:
        """Losses of one batch.

        Args:
            images: (B, 3, H, W) uint8 RGB.
            labels: (B, H, W) train ids.
            iteration: Counts from 1; decides the RDD stage.
        """
        teacher = self._teach(images)
        with torch.autocast(
            images.device.type, dtype=self._autocast, enabled=self._autocast is not None
        ):
            student = self.student(self._student_preprocessing.normalize(images))
        return self.objective(student, teacher, labels, iteration)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _teach(self, images: Tensor) -> NetworkOutput | None:
        (teacher,) = self._teacher
        if teacher is None or self._teacher_preprocessing is None:
            return None
        with torch.autocast(
            images.device.type, dtype=self._autocast, enabled=self._autocast is not None
        ):
            output: NetworkOutput = teacher(self._teacher_preprocessing.normalize(images))
        return output
