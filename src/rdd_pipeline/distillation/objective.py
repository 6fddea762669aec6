"""The objective of a method: task loss (plain or RDD) plus weighted distillation losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.config import RddParams
from rdd_pipeline.distillation.methods import Method
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import DistillationLoss, LossContext
from rdd_pipeline.losses.cross_entropy import PixelsOfClass, TaskLoss, cross_entropy_loss
from rdd_pipeline.losses.rdd import tfe_loss, tse_loss
from rdd_pipeline.networks import NetworkOutput


@dataclass(frozen=True)
class ObjectiveOutput:
    """What one batch costs.

    Attributes:
        total: Scalar that is minimized.
        parts: Every unweighted loss by name, detached scalars; `task` is always there.
        statistics: Other scalars worth a curve (share of selected pixels, ...), detached.
        pixels_of_class: What TSE found in each class, every `COUNT_EVERY` iterations.
    """

    total: Tensor
    parts: dict[str, Tensor]
    statistics: dict[str, Tensor]
    pixels_of_class: PixelsOfClass | None = None


COUNT_EVERY = 5
"""Iterations between counts of pixels by class, which cost a pass over the masks."""


class Objective(nn.Module):
    """Adds up a method's losses; holds what they train and their memory banks.

    Args:
        method: Task loss and distillation losses.
        rdd: Settings of the RDD task loss; unused by the plain task.
        warmup: First iteration of the TSE stage.
        iterations: Length of the whole run, TFE stage included.
        aux_weight: Weight of the auxiliary head in the task loss.
        class_weights: (C,) weights of the task loss, or None.
        ignore_index: Label that is not looked at.
        context: What the distillation losses are built for; None: the method has none.
        scale_by_positions: Whether `LossSpec.scales` are on top of the weights.
        ranks: Processes that share the batches.

    Raises:
        UserError: A loss does not suit the networks.
    """

    def __init__(
        self,
        method: Method,
        *,
        rdd: RddParams,
        warmup: int,
        iterations: int,
        aux_weight: float,
        class_weights: Tensor | None,
        ignore_index: int,
        context: LossContext | None = None,
        scale_by_positions: bool = True,
        ranks: Collectives = ALONE,
    ) -> None:
        super().__init__()
        self.method = method
        self.ranks = ranks
        self.rdd = rdd
        self.warmup = warmup
        self.iterations = iterations
        self.aux_weight = aux_weight
        self.ignore_index = ignore_index
        self.class_weights: Tensor | None
        # Not persistent: the weights belong to the label set, not to the training state.
        self.register_buffer("class_weights", class_weights, persistent=False)
        assert context is not None or not method.losses
        # Called `terms` in checkpoints.
        self.terms = nn.ModuleDict(
            {spec.name: spec.module(context) for spec in method.losses if context}
        )
        scales: dict[str, float] = {}
        if scale_by_positions and context is not None:
            for spec in method.losses:
                scales |= spec.scales(context)
        self.weights = {
            name: weight * scales.get(name, 1.0) for name, weight in method.weights.items()
        }

    def forward(
        self,
        student: NetworkOutput,
        teacher: NetworkOutput | None,
        labels: Tensor,
        iteration: int,
    ) -> ObjectiveOutput:
        """Losses of one batch; `labels` is (B, H, W), `iteration` counts from 1."""
        if self.method.task == "rdd":
            assert teacher is not None
            task, statistics, of_class = self._rdd_task(student, teacher, labels, iteration)
        else:
            task, statistics, of_class = self._plain_task(student, labels)
        total, parts = task, {"task": task.detach()}
        for spec in self.method.losses:
            assert teacher is not None
            losses = spec.by_name(self.terms[spec.name](student, teacher, labels))
            for name in spec.weights:
                parts[name] = losses[name].detach()
                total = total + self.weights[name] * losses[name]
        return ObjectiveOutput(total, parts, statistics, of_class)

    def adversaries(self) -> list[nn.Module]:
        """Modules that learn against the student and have an optimizer of their own."""
        return [
            module
            for loss in self.terms.values()
            if isinstance(loss, DistillationLoss)
            for module in loss.adversaries()
        ]

    def _plain_task(self, student: NetworkOutput, labels: Tensor) -> TaskLoss:
        return cross_entropy_loss(
            student.logits,
            labels,
            student_aux_logits=student.aux_logits,
            class_weights=self.class_weights,
            aux_weight=self.aux_weight,
            ignore_index=self.ignore_index,
            ranks=self.ranks,
        )

    def _rdd_task(
        self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor, iteration: int
    ) -> TaskLoss:
        """TFE before the warm-up ends; TSE, or a fade from TFE to TSE, after it."""
        fade = tfe_share(self.rdd, iteration, self.warmup, self.iterations)
        task = torch.zeros((), device=labels.device)
        statistics: dict[str, Tensor] = {}
        of_class = None
        if fade > 0.0:
            assert teacher.aux_logits is not None, "checked before the training starts"
            tfe, statistics, _ = tfe_loss(
                student.logits,
                labels,
                teacher_logits=teacher.logits,
                teacher_aux_logits=teacher.aux_logits,
                student_aux_logits=student.aux_logits,
                class_weights=self.class_weights if self.method.weighted_tfe else None,
                aux_weight=self.aux_weight,
                reduction=self.rdd.reduction,
                ignore_index=self.ignore_index,
                ranks=self.ranks,
            )
            task = task + fade * tfe
        if fade < 1.0:
            tse, tse_statistics, of_class = tse_loss(
                student.logits,
                labels,
                teacher_logits=teacher.logits,
                student_aux_logits=student.aux_logits,
                teacher_aux_logits=teacher.aux_logits,
                mode=self.rdd.mode,
                threshold=self.rdd.threshold,
                min_kept=self.rdd.min_kept,
                class_floor=self.rdd.class_floor,
                class_weights=self.class_weights,
                aux_weight=self.aux_weight,
                ignore_index=self.ignore_index,
                ranks=self.ranks,
                scope=self.rdd.min_kept_scope,
                by_class=iteration % COUNT_EVERY == 0,
            )
            task = task + (1.0 - fade) * tse
            statistics |= tse_statistics
        return TaskLoss(task, statistics, of_class)


def tfe_share(rdd: RddParams, iteration: int, warmup: int, iterations: int) -> float:
    """Weight of the TFE loss at `iteration`; the TSE loss has the rest.

    1 before the warm-up ends, then 0; annealed: falls linearly from 1 at `warmup` to 0 at the end.
    """
    if iteration < warmup:
        return 1.0
    if not rdd.annealed or iterations <= warmup:
        return 0.0
    return (iterations - iteration) / (iterations - warmup)


def check_auxiliary_heads(
    rdd: RddParams, *, warmup: int, iterations: int, teacher: bool, student: bool
) -> None:
    """Refuse a run whose RDD task loss would compare heads that are not there.

    Args:
        rdd: Settings of the task loss.
        warmup: First iteration of the TSE stage.
        iterations: Length of the whole run.
        teacher: Whether the teacher has an auxiliary head.
        student: Whether the student has one.

    Raises:
        UserError: TFE without the teacher's, or TSE with the student's only.
    """
    if teacher:
        return
    if warmup > 1 or (rdd.annealed and warmup < iterations):
        raise UserError(
            "TFE compares the teacher's two heads, but the teacher has no auxiliary head. Set "
            "teacher.network.auxiliary=true, or rdd.tfe_length=0 and rdd.annealed=false."
        )
    if student and rdd.mode != "ohem":
        raise UserError(
            "TSE compares the student's heads with the teacher's, but only the student has an "
            "auxiliary head. Set teacher.network.auxiliary=true, student.auxiliary=false or "
            "rdd.mode=ohem."
        )


def check_losses(method: Method, context: LossContext) -> None:
    """Refuse a method whose losses do not suit the networks, before anything is trained.

    Raises:
        UserError: As `LossSpec.module`.
    """
    with torch.device("meta"):  # CIRKD's queues alone are hundreds of megabytes
        for spec in method.losses:
            spec.module(context)
