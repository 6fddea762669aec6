"""The objective of a method: task loss (plain or RDD) plus weighted distillation losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.config import RddParams, TaskLossParams
from rdd_pipeline.distillation.methods import Method
from rdd_pipeline.distillation.stages import TaskInputs, stage_shares
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import DistillationLoss, LossContext, at_size_of
from rdd_pipeline.losses.class_counts import PixelsOfClass
from rdd_pipeline.losses.cross_entropy import TaskLoss
from rdd_pipeline.losses.region import dice_loss, lovasz_loss
from rdd_pipeline.networks import NetworkOutput


@dataclass(frozen=True)
class ObjectiveOutput:
    """What one batch costs.

    Attributes:
        total: Scalar that is minimized.
        parts: Every unweighted loss by name, detached scalars; `task` is always there.
        statistics: Other scalars worth a curve (share of selected pixels, ...), detached.
        pixels_of_class: What TFE and TSE found in each class, every `COUNT_EVERY` iterations.
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
        iterations: Length of the whole run, all stages included.
        aux_weight: Weight of the auxiliary head in the task loss.
        class_weights: (C,) weights of the task loss, or None.
        ignore_index: Label that is not looked at.
        context: What the distillation losses are built for; None: the method has none.
        scale_by_positions: Whether `LossSpec.scales` are on top of the weights.
        task_loss: Focal, Dice and Lovasz.
        ranks: Processes that share the batches.

    Raises:
        UserError: A loss does not suit the networks.
    """

    def __init__(
        self,
        method: Method,
        *,
        rdd: RddParams,
        iterations: int,
        aux_weight: float,
        class_weights: Tensor | None,
        ignore_index: int,
        context: LossContext | None = None,
        scale_by_positions: bool = True,
        task_loss: TaskLossParams = TaskLossParams(),  # noqa: B008 - immutable
        ranks: Collectives = ALONE,
    ) -> None:
        super().__init__()
        self.method = method
        self.ranks = ranks
        self.rdd = rdd
        self.iterations = iterations
        self.aux_weight = aux_weight
        self.focal_gamma = task_loss.focal_gamma
        self._regions = [
            (name, weight, loss)
            for name, weight, loss in (
                ("dice", task_loss.dice, dice_loss),
                ("lovasz", task_loss.lovasz, lovasz_loss),
            )
            if weight > 0
        ]
        self.ignore_index = ignore_index
        self.class_weights: Tensor | None
        # Not persistent: the weights belong to the label set, not to the training state.
        self.register_buffer("class_weights", class_weights, persistent=False)
        assert context is not None or not method.losses
        self._at_student = context is not None and context.compare_at == "student"
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
        mirrored_logits: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Losses of one batch.

        Args:
            student: Its outputs.
            teacher: Those of the teacher, if there is one.
            labels: (B, H, W).
            iteration: Counts from 1.
            mirrored_logits: The teacher's of the mirrored images, mirrored back; needed where
                `looks_at_mirrored`.
        """
        given = TaskInputs(
            student,
            teacher,
            labels,
            mirrored_logits=mirrored_logits,
            rdd=self.rdd,
            aux_weight=self.aux_weight,
            class_weights=self.class_weights,
            weighted_tfe=self.method.weighted_tfe,
            ignore_index=self.ignore_index,
            ranks=self.ranks,
            by_class=iteration % COUNT_EVERY == 0,
            focal_gamma=self.focal_gamma,
        )
        task, statistics, of_class, _ = self._task(given, iteration)
        total, parts = task, {"task": task.detach()}
        if self._at_student and teacher is not None:
            teacher = at_size_of(teacher, student)
        for spec in self.method.losses:
            assert teacher is not None
            losses = spec.by_name(self.terms[spec.name](student, teacher, labels))
            for name in spec.weights:
                parts[name] = losses[name].detach()
                total = total + self.weights[name] * losses[name]
        return ObjectiveOutput(total, parts, statistics, of_class)

    def looks_at_mirrored(self, iteration: int) -> bool:
        """Whether the task loss compares the teacher's logits with those of mirrored images."""
        shares = stage_shares(self.method.stages, self.rdd, iteration, self.iterations)
        return any(
            shares[stage.name] > 0 and stage.looks_at_mirrored(self.rdd)
            for stage in self.method.stages
        )

    def adversaries(self) -> list[nn.Module]:
        """Modules that learn against the student and have an optimizer of their own."""
        return [
            module
            for loss in self.terms.values()
            if isinstance(loss, DistillationLoss)
            for module in loss.adversaries()
        ]

    def _task(self, given: TaskInputs, iteration: int) -> TaskLoss:
        """Loss of the stage that the iteration lies in; annealed, a fade from one to the next."""
        shares = stage_shares(self.method.stages, self.rdd, iteration, self.iterations)
        task = torch.zeros((), device=given.labels.device)
        statistics: dict[str, Tensor] = {}
        of_class: PixelsOfClass | None = None
        for stage in self.method.stages:
            if shares[stage.name] > 0.0:
                found = stage.loss(given)
                loss = found.loss
                for name, weight, region_loss in self._regions:
                    of_region = region_loss(
                        given.student.logits,
                        given.labels,
                        found.pixel_weights,
                        ignore_index=self.ignore_index,
                    )
                    loss = loss + weight * of_region
                    statistics[name] = of_region.detach()
                task = task + shares[stage.name] * loss
                statistics |= found.statistics
                if found.pixels_of_class is not None:
                    of_class = found.pixels_of_class.plus(of_class)
        return TaskLoss(task, statistics, of_class)


def check_task_loss(task_loss: TaskLossParams, rdd: RddParams, *, warmup: int) -> None:
    """Refuse a task loss that is not defined for one of RDD's stages.

    Args:
        task_loss: Its settings.
        rdd: Settings of RDD, which the method uses.
        warmup: First iteration of the TSE stage.

    Raises:
        UserError: Lovasz in the TFE stage.
    """
    if task_loss.lovasz > 0 and (warmup > 1 or rdd.annealed):
        raise UserError(
            "recipe.task_loss.lovasz is set, but the Lovasz loss knows no weights of pixels, which "
            "TFE gives. Set rdd.tfe_length=0 and rdd.annealed=false, or take recipe.task_loss.dice."
        )


def check_auxiliary_head(rdd: RddParams, *, warmup: int, iterations: int, teacher: bool) -> None:
    """Refuse a run whose TFE would compare heads that are not there.

    Args:
        rdd: Settings of the task loss.
        warmup: First iteration of the TSE stage.
        iterations: Length of the whole run.
        teacher: Whether the teacher has an auxiliary head.

    Raises:
        UserError: It has none, and TFE is to compare its heads.
    """
    if teacher or rdd.confidence != "heads":
        return
    if warmup > 1 or (rdd.annealed and warmup < iterations):
        raise UserError(
            "TFE compares the teacher's two heads, but the teacher has no auxiliary head. Set "
            "rdd.confidence=flip or entropy, teacher.network.auxiliary=true where it is trained "
            "here, or rdd.tfe_length=0 and rdd.annealed=false."
        )


def check_losses(method: Method, context: LossContext) -> None:
    """Refuse a method whose losses do not suit the networks, before anything is trained.

    Raises:
        UserError: As `LossSpec.module`.
    """
    with torch.device("meta"):  # CIRKD's queues alone are hundreds of megabytes
        for spec in method.losses:
            spec.module(context)
