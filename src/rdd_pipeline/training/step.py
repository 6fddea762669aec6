"""One training step: what is computed for a batch, on any device, with or without ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rdd_pipeline.distillation.objective import Objective, ObjectiveOutput
from rdd_pipeline.networks import Network, NetworkOutput, Preprocessing, SegmentationNetwork
from rdd_pipeline.training.profile import phase
from rdd_pipeline.training.synchronized import MicroBatches

Call = Callable[[Tensor], NetworkOutput]


class Teacher:
    """The frozen network as a step asks it: without gradients, in the students' precision.

    Args:
        network: Frozen.
        preprocessing: Applied to the uint8 images it sees.
        autocast: Data type it computes in.

    Attributes:
        network: The same.
        call: How it is called: itself, or what torch compiled of it.
    """

    def __init__(
        self,
        network: Network,
        preprocessing: Preprocessing,
        autocast: torch.dtype | None,
    ) -> None:
        self.network, self._preprocessing, self._autocast = network, preprocessing, autocast
        self.call: Call = network
        self._said: dict[tuple[int, int, bool], NetworkOutput] | None = None

    def remember(self) -> None:
        """Forget everything; each images that are shown from now on are computed only once.

        Images are known by where they lie, so those of a step have to stay until the next call.
        """
        self._said = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, *, mirrored: bool = False) -> NetworkOutput:
        """What it says of (B, 3, H, W) uint8 images; nobody may change it in place.

        `mirrored`: of the mirrored ones, as it is.
        """
        shown = images.flip(-1) if mirrored else images
        if self._said is None:
            return self._ask(shown)
        place = images.data_ptr(), len(images), mirrored
        if place not in self._said:
            self._said[place] = self._ask(shown)
        return self._said[place]

    def _ask(self, images: Tensor) -> NetworkOutput:
        with torch.autocast(
            images.device.type, dtype=self._autocast, enabled=self._autocast is not None
        ):
            output = self.call(self._preprocessing.normalize(images))
        return output


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
        teacher: Network | None,
        student_preprocessing: Preprocessing,
        teacher_preprocessing: Preprocessing | None,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.teacher: Teacher | None = None
        if teacher is not None and teacher_preprocessing is not None:
            self.teacher = Teacher(teacher, teacher_preprocessing, autocast)
        self._calls: tuple[Call] = (student,)  # a tuple hides it from nn.Module
        self._student_preprocessing = student_preprocessing
        self._autocast = autocast

    def compile_networks(self, *, student: bool) -> None:
        """Have torch compile the teacher, and the student if asked, at their next call.

        Only in the step: validation calls the student itself, whose images have other sizes.
        """
        from rdd_pipeline.training.compiling import compiled  # torch's compiler takes seconds

        if student:
            self._calls = (compiled(self.student),)
        if self.teacher is not None and self.teacher.call is self.teacher.network:
            self.teacher.call = compiled(self.teacher.network)

    def forward(self, images: Tensor, labels: Tensor, iteration: int) -> ObjectiveOutput:
        """Losses of one batch.

        Args:
            images: (B, 3, H, W) uint8 RGB.
            labels: (B, H, W) train ids.
            iteration: Counts from 1; decides the RDD stage.
        """
        with phase("teacher"):
            teacher = None if self.teacher is None else self.teacher(images)
            mirrored = self._mirrored_logits(images, iteration)
        with phase("student"):
            student = self._student_forward(images)
        with phase("losses"):
            output: ObjectiveOutput = self.objective(student, teacher, labels, iteration, mirrored)
        return output

    def backward_in_parts(
        self, images: Tensor, labels: Tensor, iteration: int, parts: MicroBatches, seed: int
    ) -> ObjectiveOutput:
        """Losses and gradients of one batch, with memory for a part of it.

        The student's outputs are computed part by part without a graph; the objective sees all of
        them, as if they had come from one pass, and says what gradient each wants; then each part
        is recomputed with autograd and back-propagates its share of the gradient. So losses that
        relate images to one another, or divide by a count, are those of the whole batch. Only
        batch norm's statistics are those of a part.

        Args:
            images: (B, 3, H, W) uint8 RGB.
            labels: (B, H, W) train ids.
            iteration: Counts from 1; decides the RDD stage.
            parts: Says how many, and is told which one is computed.
            seed: Set before each part, so that its dropout is the same in both passes.
        """
        pieces = images.chunk(parts.parts)
        buffers = [buffer.clone() for buffer in self.student.buffers()]
        outputs: list[NetworkOutput] = []
        teacher_outputs: list[NetworkOutput] = []
        mirrored: list[Tensor | None] = []
        for number, piece in enumerate(pieces):
            if self.teacher is not None:
                teacher_outputs.append(self.teacher(piece))
            mirrored.append(self._mirrored_logits(piece, iteration))
            parts.current = number
            torch.manual_seed(seed)
            with torch.no_grad():
                outputs.append(self._student_forward(piece))
        for buffer, before in zip(self.student.buffers(), buffers, strict=True):
            buffer.copy_(before)  # statistics are counted once, in the pass that is to come

        whole = [tensor.requires_grad_() for tensor in _joined(outputs)]
        teacher = _output(_joined(teacher_outputs)) if teacher_outputs else None
        there = [logits for logits in mirrored if logits is not None]
        second = torch.cat(there) if there else None
        result: ObjectiveOutput = self.objective(_output(whole), teacher, labels, iteration, second)
        result.total.backward()  # type: ignore[no-untyped-call]

        output_grads = [tensor.grad for tensor in whole]
        for number, piece in enumerate(pieces):
            parts.current = number
            torch.manual_seed(seed)
            first = number * len(pieces[0])
            pairs = [
                (tensor, grad[first : first + len(piece)])
                for tensor, grad in zip(
                    _flat(self._student_forward(piece)), output_grads, strict=True
                )
                if grad is not None
            ]
            torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
        return result

    def _mirrored_logits(self, images: Tensor, iteration: int) -> Tensor | None:
        """The teacher's logits of the mirrored images, mirrored back, where they are looked at."""
        if self.teacher is None or not self.objective.looks_at_mirrored(iteration):
            return None
        return self.teacher(images, mirrored=True).logits.flip(-1)

    def _student_forward(self, images: Tensor) -> NetworkOutput:
        with torch.autocast(
            images.device.type, dtype=self._autocast, enabled=self._autocast is not None
        ):
            output = self._calls[0](self._student_preprocessing.normalize(images))
        return output


def _flat(output: NetworkOutput) -> list[Tensor]:
    """The tensors of an output, those that are there."""
    logits, aux_logits, feature, stages = output
    return [logits, feature, *stages, *([] if aux_logits is None else [aux_logits])]


def _joined(outputs: Sequence[NetworkOutput]) -> list[Tensor]:
    """`_flat` of one output for the images of all."""
    return [torch.cat(tensors) for tensors in zip(*map(_flat, outputs), strict=True)]


def _output(tensors: Sequence[Tensor]) -> NetworkOutput:
    """Inverse of `_flat`."""
    logits, feature, early, late, *aux_logits = tensors
    return NetworkOutput(logits, aux_logits[0] if aux_logits else None, feature, (early, late))
