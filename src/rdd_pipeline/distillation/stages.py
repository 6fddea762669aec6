"""Stages: stretches of a training with a task loss of their own.

A further stage is a `Stage` with its task loss here, the field of `RddParams` that says where the
one before it ends, and its place in the stages of the methods that have it
(`distillation/methods.py`). Jobs, curves, comparisons and reports follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rdd_pipeline.config import RddParams
from rdd_pipeline.lazy import Lazy

if TYPE_CHECKING:
    from torch import Tensor

    from rdd_pipeline.collectives import Collectives
    from rdd_pipeline.losses.cross_entropy import TaskLoss, cross_entropy_loss
    from rdd_pipeline.losses.rdd import tfe_loss, tse_loss
    from rdd_pipeline.networks import NetworkOutput
else:  # the table of methods is read by every command, torch is needed by a training
    cross_entropy_loss = Lazy("rdd_pipeline.losses.cross_entropy.cross_entropy_loss")
    tfe_loss = Lazy("rdd_pipeline.losses.rdd.tfe_loss")
    tse_loss = Lazy("rdd_pipeline.losses.rdd.tse_loss")


class TaskInputs(NamedTuple):
    """What a task loss may look at: a batch, and the settings that all of them share.

    `mirrored_logits` are the teacher's of the mirrored images, mirrored back, where
    `Stage.looks_at_mirrored`; `class_weights` hold for TFE only with `weighted_tfe`; `by_class`
    asks for the pixels of each class, too.
    """

    student: NetworkOutput
    teacher: NetworkOutput | None
    labels: Tensor
    mirrored_logits: Tensor | None
    rdd: RddParams
    aux_weight: float
    class_weights: Tensor | None
    weighted_tfe: bool
    ignore_index: int
    ranks: Collectives
    by_class: bool
    focal_gamma: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A stretch of a training with a task loss of its own.

    Attributes:
        name: What jobs (`TrainingJob.stage`), pipelines and curves (``tfe_share``) call it.
        loss: Its task loss.
        end: First iteration of the next stage, of the settings and the run's length; None: the
            stage lasts to the end of the run.
        settings: Fields of `RddParams` that decide the weights at its end; None: all of them.
        needs_teacher: Whether its loss looks at the teacher.
        looks_at_mirrored: Whether, by the settings, it looks at the teacher's mirrored logits.
    """

    name: str
    loss: Callable[[TaskInputs], TaskLoss]
    end: Callable[[RddParams, int], int] | None = None
    settings: tuple[str, ...] | None = None
    needs_teacher: bool = True
    looks_at_mirrored: Callable[[RddParams], bool] = lambda rdd: False


def _cross_entropy(given: TaskInputs) -> TaskLoss:
    return cross_entropy_loss(
        given.student.logits,
        given.labels,
        student_aux_logits=given.student.aux_logits,
        class_weights=given.class_weights,
        aux_weight=given.aux_weight,
        focal_gamma=given.focal_gamma,
        ignore_index=given.ignore_index,
        ranks=given.ranks,
    )


def _tfe(given: TaskInputs) -> TaskLoss:
    assert given.teacher is not None
    return tfe_loss(
        given.student.logits,
        given.labels,
        teacher_logits=given.teacher.logits,
        teacher_aux_logits=_second_opinion(given, given.teacher),
        student_aux_logits=given.student.aux_logits,
        class_weights=given.class_weights if given.weighted_tfe else None,
        aux_weight=given.aux_weight,
        focal_gamma=given.focal_gamma,
        reduction=given.rdd.reduction,
        ignore_index=given.ignore_index,
        ranks=given.ranks,
        by_class=given.by_class,
    )


def _second_opinion(given: TaskInputs, teacher: NetworkOutput) -> Tensor | None:
    """Logits with which those of the teacher have to agree; None: its entropy decides."""
    if given.rdd.confidence == "entropy":
        return None
    second = given.mirrored_logits if given.rdd.confidence == "flip" else teacher.aux_logits
    assert second is not None, "checked before the training starts"
    return second


def _tse(given: TaskInputs) -> TaskLoss:
    teacher = given.teacher
    assert teacher is not None
    # The student's auxiliary head has nobody else to be compared with where that one has none.
    aux_logits = teacher.logits if teacher.aux_logits is None else teacher.aux_logits
    return tse_loss(
        given.student.logits,
        given.labels,
        teacher_logits=teacher.logits,
        student_aux_logits=given.student.aux_logits,
        teacher_aux_logits=aux_logits,
        mode=given.rdd.mode,
        threshold=given.rdd.threshold,
        min_kept=given.rdd.min_kept,
        class_floor=given.rdd.class_floor,
        class_weights=given.class_weights,
        aux_weight=given.aux_weight,
        focal_gamma=given.focal_gamma,
        ignore_index=given.ignore_index,
        ranks=given.ranks,
        scope=given.rdd.min_kept_scope,
        by_class=given.by_class,
    )


PLAIN = (Stage("plain", _cross_entropy, needs_teacher=False),)
"""Cross-entropy on all valid pixels, throughout."""

RDD = (
    Stage(
        "tfe",
        _tfe,
        end=RddParams.warmup_iterations,
        settings=("tfe_length", "reduction", "confidence"),
        looks_at_mirrored=lambda rdd: rdd.confidence == "flip",
    ),
    Stage("tse", _tse),
)
"""Relative Difficulty Distillation: TFE, then TSE."""


def stage_span(
    stages: Sequence[Stage], name: str, rdd: RddParams, iterations: int
) -> tuple[int, int]:
    """First and last iteration of a stage; the last is below the first when the stage is empty.

    Args:
        stages: Those of the method.
        name: Of one of them; ``whole`` is all of them.
        rdd: Settings of RDD.
        iterations: Length of the run; iterations count from 1.
    """
    if name == "whole":
        return 1, iterations
    first = 1
    for stage in stages:
        last = iterations if stage.end is None else max(stage.end(rdd, iterations) - 1, 0)
        if stage.name == name:
            return first, last
        first = last + 1
    raise KeyError(name)


def stage_before(stages: Sequence[Stage], name: str) -> str | None:
    """The stage that a stage goes on from; None of the first one and of ``whole``."""
    names = [stage.name for stage in stages]
    place = 0 if name == "whole" else names.index(name)
    return names[place - 1] if place else None


def stage_shares(
    stages: Sequence[Stage], rdd: RddParams, iteration: int, iterations: int
) -> dict[str, float]:
    """Weight of each stage's task loss at an iteration, by name; they add up to 1.

    1 for the stage that the iteration lies in. Annealed, the loss of the stage before fades out:
    its weight falls linearly from 1 at the stage's first iteration to 0 at its end.

    Args:
        stages: Those of the method.
        rdd: Settings of RDD.
        iteration: Counts from 1.
        iterations: Length of the run.
    """
    ends = [iterations if s.end is None else s.end(rdd, iterations) for s in stages]
    now = sum(iteration >= end for end in ends[:-1])
    shares = {stage.name: 0.0 for stage in stages}
    shares[stages[now].name] = 1.0
    if rdd.annealed and now > 0 and ends[now] > ends[now - 1]:
        fade = (ends[now] - iteration) / (ends[now] - ends[now - 1])
        shares |= {stages[now - 1].name: fade, stages[now].name: 1.0 - fade}
    return shares
