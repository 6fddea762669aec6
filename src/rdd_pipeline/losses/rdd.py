"""Relative Difficulty Distillation: the teacher decides which pixels the task loss looks at.

Liang et al., SCIS 2024, arXiv 2407.03719. Stage one (TFE, "teacher-full evaluated") weighs each
pixel with the agreement of the teacher's two heads; stage two (TSE, "teacher-student evaluated")
learns the pixels that are hard for one of the networks and easy for the other. Both replace the
task loss only: every other distillation loss can stand beside them.

Logits have the shape (N, C, h, w) at the network's stride, labels (N, H, W); logits are upsampled
bilinearly with aligned corners. Whatever comes in, and whatever autocast and the TF32 switches say,
computing is done in float32 (float64 stays).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.class_counts import LITTLE, MUCH, PixelsOfClass, counts_of_class
from rdd_pipeline.losses.cross_entropy import (
    TaskLoss,
    class_weight_map,
    focal,
    weighted_mean_ce,
)
from rdd_pipeline.losses.maps import as_float, resize
from rdd_pipeline.losses.ohem import hard_pixels_of, ohem_mask
from rdd_pipeline.losses.pixelwise import PixelLabels, log_prob_of_label, pixel_labels

Mode = Literal["xor", "or", "and", "ohem"]
Reduction = Literal["paper", "valid"]
Scope = Literal["local", "global"]

_SELECT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "xor": torch.logical_xor,
    "or": torch.logical_or,
    "and": torch.logical_and,
    "ohem": lambda hard_student, _: hard_student,
}


class SelectedPixels(NamedTuple):
    """Masks (N, H, W) of TSE: what is hard for whom, and what the task loss looks at."""

    hard_student: Tensor
    hard_teacher: Tensor
    selected: Tensor


def teacher_confidence(
    teacher_logits: Tensor, teacher_aux_logits: Tensor, *, size: tuple[int, int]
) -> Tensor:
    """Weight map of TFE-RDD: 1 where the teacher's two heads agree, towards 0 where they do not.

    ``up(exp(-KL(auxiliary || main)))``, the exponential before the upsampling.

    Args:
        teacher_logits: Main head, (N, C, h, w).
        teacher_aux_logits: Auxiliary head, (N, C, h, w); or any other second opinion.
        size: (H, W) of the weight map.

    Returns:
        (N, H, W), in (0, 1], without gradient.

    Raises:
        UserError: The two heads' shapes differ.
    """
    if teacher_logits.dim() != 4 or teacher_logits.shape != teacher_aux_logits.shape:
        raise UserError(
            f"The teacher's logits {tuple(teacher_logits.shape)} and auxiliary logits "
            f"{tuple(teacher_aux_logits.shape)} must have one shape (batch, classes, height, "
            "width). Both heads belong to the same network and batch."
        )
    with torch.no_grad():
        main = as_float(teacher_logits).log_softmax(1)
        aux = as_float(teacher_aux_logits).log_softmax(1)
        divergence = F.kl_div(main, aux, reduction="none", log_target=True).sum(1, keepdim=True)
        # Rounding may leave a divergence of -1e-7, a weight above 1.
        return resize(divergence.clamp_(min=0).neg_().exp_(), size).squeeze(1)


def entropy_confidence(teacher_logits: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Weight map for a teacher with one head: 1 where it is sure, 0 where all classes are equal.

    ``up(1 - H(p) / log C)`` with the entropy H of its class distribution p; 1 for a single class.
    Ours, not the paper's. As the published weight it lies between 0 and 1, is 1 where nothing is
    in doubt, and is taken before the upsampling.

    Args:
        teacher_logits: (N, C, h, w).
        size: (H, W) of the weight map.

    Returns:
        (N, H, W), in [0, 1], without gradient.
    """
    with torch.no_grad():
        log_p = as_float(teacher_logits).log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
        largest = math.log(max(teacher_logits.shape[1], 2))
        return resize((1 - entropy / largest).clamp_(0, 1), size).squeeze(1)


def selected_pixels(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mode: Mode = "xor",
    threshold: float = 0.7,
    min_kept: int | float = 100_000,
    ignore_index: int = 255,
) -> SelectedPixels:
    """The masks behind `tse_loss`, for figures. Arguments and errors as there."""
    select = _selector(mode)
    hard_student, hard_teacher = (
        ohem_mask(logits, labels, threshold=threshold, min_kept=min_kept, ignore_index=ignore_index)
        for logits in (student_logits, teacher_logits)
    )
    return SelectedPixels(hard_student, hard_teacher, select(hard_student, hard_teacher))


def tfe_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    teacher_logits: Tensor,
    teacher_aux_logits: Tensor | None,
    student_aux_logits: Tensor | None = None,
    class_weights: Tensor | None = None,
    aux_weight: float = 0.4,
    reduction: Reduction = "paper",
    focal_gamma: float = 0.0,
    ignore_index: int = 255,
    ranks: Collectives = ALONE,
    by_class: bool = False,
) -> TaskLoss:
    """Task loss of RDD's first stage: cross-entropy weighted by the teacher's agreement.

    ``sum over valid pixels of w * (CE(up logits) + aux_weight * CE(up aux)) / count`` with
    w = `teacher_confidence` (or `entropy_confidence`), in nats. One w serves both heads. With class
    weights c the mean is a weighted one, ``sum w * c * CE / sum c``, as in all other task losses
    here; the published code weighs the classes in the second stage only.

    Args:
        student_logits: (N, C, h, w).
        labels: (N, H, W), any integer type.
        teacher_logits: (N, C, h', w').
        teacher_aux_logits: (N, C, h', w') of its auxiliary head, as published, or another second
            opinion: its logits of the mirrored image, mirrored back. None: its entropy decides.
        student_aux_logits: (N, C, h, w), or None for a student without auxiliary head.
        aux_weight: Weight of the auxiliary head's loss.
        class_weights: (C,), or None for 1 everywhere.
        reduction: The count is that of all pixels, ignored ones too (`paper`, as published), or of
            the valid ones (`valid`), which does not shrink with padding. With class weights
            ignored pixels count with the mean weight of the valid ones.
        focal_gamma: See `cross_entropy.focal`; RDD's weight comes on top.
        ignore_index: Label of ignored pixels.
        ranks: Processes that share the batch: the means are those of all ranks' pixels.
        by_class: Whether the pixels are counted by class and weight, too
            (`TaskLoss.pixels_of_class`).

    Returns:
        The loss, 0 with zero gradient when no pixel is valid. Statistics: `student_ce`,
        `student_aux_ce` (unweighted means over valid pixels) and `teacher_confidence` (mean weight
        of the valid pixels).

    Raises:
        UserError: Shapes or labels do not fit, or the reduction is unknown.
    """
    if reduction not in get_args(Reduction):
        raise UserError(
            f"Unknown reduction {reduction!r} of the TFE loss. Choose one of "
            f"{', '.join(get_args(Reduction))}."
        )
    _check_classes(student_logits, teacher_logits)
    pixels = pixel_labels(labels, num_classes=student_logits.shape[1], ignore_index=ignore_index)
    height, width = labels.shape[-2:]
    size = height, width
    if teacher_aux_logits is None:
        confidence = entropy_confidence(teacher_logits, size=size)
    else:
        confidence = teacher_confidence(teacher_logits, teacher_aux_logits, size=size)
    valid_count = ranks.divisor(pixels.valid.count_nonzero())
    count: Tensor | int = max(1, labels.numel()) if reduction == "paper" else valid_count

    # Ignored pixels have log-probability 0, but a teacher's NaN there would survive the product.
    confidence = confidence.masked_fill(~pixels.valid, 0)
    weight = confidence
    log_p = log_prob_of_label(student_logits, pixels)
    if class_weights is not None:
        of_class = class_weight_map(class_weights, pixels, pixels.valid, student_logits)
        weight = confidence * of_class
        mean_weight = ranks.share(of_class.sum()).to(log_p.dtype) / valid_count
        count = torch.where(mean_weight > 0, count * mean_weight, 1)
    loss = -(weight * focal(log_p, focal_gamma)).sum() / count
    statistics = {
        "student_ce": -log_p.detach().sum() / valid_count,
        "teacher_confidence": confidence.sum() / valid_count,
    }
    if student_aux_logits is not None:
        aux_log_p = log_prob_of_label(student_aux_logits, pixels)
        loss = loss - aux_weight * (weight * focal(aux_log_p, focal_gamma)).sum() / count
        statistics["student_aux_ce"] = -aux_log_p.detach().sum() / valid_count
    counted = None
    if by_class:
        masks = [confidence < LITTLE, (confidence >= LITTLE) & (confidence < MUCH)]
        counts = counts_of_class(masks, pixels.labels, pixels.valid, student_logits.shape[1])
        counted = PixelsOfClass.of_tfe(ranks.total(counts))
    return TaskLoss(loss, statistics, counted, pixel_weights=confidence)


def tse_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    teacher_logits: Tensor,
    student_aux_logits: Tensor | None = None,
    teacher_aux_logits: Tensor | None = None,
    mode: Mode = "xor",
    threshold: float = 0.7,
    min_kept: int | float = 100_000,
    class_floor: float = 0.0,
    class_weights: Tensor | None = None,
    aux_weight: float = 0.4,
    focal_gamma: float = 0.0,
    ignore_index: int = 255,
    ranks: Collectives = ALONE,
    scope: Scope = "local",
    by_class: bool = False,
) -> TaskLoss:
    """Task loss of RDD's second stage: cross-entropy of the pixels that the networks disagree on.

    For the main heads, and again times `aux_weight` for the auxiliary heads: the mean (with class
    weights: weighted mean) cross-entropy in nats over the selected pixels, against their labels.
    Selected are, from the hard pixels (`ohem_mask`) of student and teacher,

    * `xor`: those hard for exactly one of them (the paper's choice),
    * `or`, `and`: for at least one, for both,
    * `ohem`: for the student, whatever the teacher says (online hard example mining).

    A `class_floor` above 0 is ours, not the paper's: of each class at least that share of its
    pixels is selected, as far as there are pixels that the student finds hard; those that are least
    hard for the teacher come first. XOR alone may leave a class without any.

    Args:
        student_logits: (N, C, h, w).
        labels: (N, H, W), any integer type.
        teacher_logits: (N, C, h', w').
        student_aux_logits: (N, C, h, w), or None for a student without auxiliary head.
        teacher_aux_logits: (N, C, h', w'); needed when the student has an auxiliary head, except
            for `ohem`.
        mode: Which pixels are selected.
        threshold: A pixel is hard up to this probability of its label.
        min_kept: At least so many pixels of the batch are hard: a count (int) or a fraction of the
            batch's pixels (float).
        class_floor: Share of each class's pixels that is selected at least, see above; 0: off.
        class_weights: (C,), or None for 1 everywhere.
        aux_weight: Weight of the auxiliary head's loss.
        focal_gamma: See `cross_entropy.focal`; which pixels are hard does not depend on it.
        ignore_index: Label of ignored pixels.
        ranks: Processes that share the batch: the mean is that of all ranks' selected pixels. A
            `class_floor` counts each rank's own pixels.
        scope: Among which pixels the `min_kept` hardest are looked for: each rank's own, as
            published, or those of all ranks (`global`).
        by_class: Whether the pixels of the main heads are counted by class, too
            (`TaskLoss.pixels_of_class`).

    Returns:
        The loss, 0 with zero gradient when no pixel is valid or none is selected. Statistics, for
        the main heads and with the prefix `aux_` for the auxiliary ones: `student_ce` and
        `teacher_ce` (unweighted means over valid pixels), `hard_student`, `hard_teacher` and
        `chosen` (fractions of the valid pixels, those selected), and `chosen_none` (1 when no
        pixel was selected, else 0). Mode `ohem` does not evaluate the teacher and leaves out its
        two.

    Raises:
        UserError: Shapes, labels, mode, threshold, min_kept, class_floor or class weights do not
            fit.
    """
    select = _selector(mode)
    if student_aux_logits is not None and teacher_aux_logits is None and mode != "ohem":
        raise UserError(
            "The student has auxiliary logits, the teacher none to compare them with. Give the "
            "teacher an auxiliary head, train the student without one, or choose mode 'ohem'."
        )
    _check_classes(student_logits, teacher_logits)
    pixels = pixel_labels(labels, num_classes=student_logits.shape[1], ignore_index=ignore_index)
    valid_count = ranks.divisor(pixels.valid.count_nonzero())
    among = ranks if scope == "global" else ALONE
    classes = student_logits.shape[1]
    if not 0 <= class_floor <= 1:
        raise UserError(
            f"class_floor is {class_floor}; it is a share of a class's pixels, between 0 and 1."
        )

    def head(student: Tensor, teacher: Tensor | None, prefix: str) -> TaskLoss:
        log_p = log_prob_of_label(student, pixels)
        hard_student = hard_teacher = hard_pixels_of(
            log_p.detach(), pixels, threshold, min_kept, among
        )
        counts = {"hard_student": hard_student.size}
        statistics = {"student_ce": -log_p.detach().sum() / valid_count}
        teacher_log_p = None
        if teacher is not None and mode != "ohem":
            teacher_log_p = log_prob_of_label(teacher.detach(), pixels)
            hard_teacher = hard_pixels_of(teacher_log_p, pixels, threshold, min_kept, among)
            counts["hard_teacher"] = hard_teacher.size
            statistics["teacher_ce"] = -teacher_log_p.sum() / valid_count
        selected = select(hard_student.mask, hard_teacher.mask)
        if class_floor > 0 and teacher_log_p is not None:
            rest = hard_student.mask & ~selected
            selected = selected | _floor(
                selected, rest, teacher_log_p, pixels, class_floor, classes
            )
        weight = class_weight_map(class_weights, pixels, selected, student)
        counts["chosen"] = weight.sum() if class_weights is None else selected.count_nonzero()
        selected_count = ranks.share(counts["chosen"])
        total = selected_count if class_weights is None else ranks.share(weight.sum())
        statistics |= {name: count / valid_count for name, count in counts.items()}
        statistics["chosen_none"] = (selected_count == 0).to(log_p.dtype)
        named = {prefix + name: value for name, value in statistics.items()}
        of_class = None
        if by_class and not prefix:
            teachers = hard_teacher.mask if teacher_log_p is not None else selected & False
            masks = [hard_student.mask, teachers, selected, hard_student.mask & teachers]
            of_mask = counts_of_class(masks, pixels.labels, pixels.valid, classes)
            of_class = PixelsOfClass.of_tse(ranks.total(of_mask))
        mean = weighted_mean_ce(focal(log_p, focal_gamma), weight, total)
        return TaskLoss(mean, named, of_class, as_float(selected))

    loss, statistics, of_class, selected = head(student_logits, teacher_logits, "")
    if student_aux_logits is not None:
        aux = head(student_aux_logits, teacher_aux_logits, "aux_")
        loss = loss + aux_weight * aux.loss
        statistics |= aux.statistics
    return TaskLoss(loss, statistics, of_class, selected)


def _selector(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    if mode not in _SELECT:
        raise UserError(
            f"Unknown mode {mode!r} of the TSE loss. Choose one of {', '.join(_SELECT)}."
        )
    return _SELECT[mode]


@torch.no_grad()
def _floor(
    selected: Tensor,
    candidates: Tensor,
    teacher_log_p: Tensor,
    pixels: PixelLabels,
    share: float,
    classes: int,
) -> Tensor:
    """The candidates (N, H, W) that bring each class to `share` of its pixels, as far as possible.

    Those of highest teacher probability come first, of equal ones the first in memory. Neither the
    number of candidates nor that of missing pixels is looked at: no wait for the device.
    """
    labels = torch.where(candidates, pixels.labels, classes).flatten().long()
    # By class, then by probability: the later of two stable sorts decides.
    order = teacher_log_p.flatten().argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    ordered = labels[order]
    first = torch.searchsorted(ordered, torch.arange(classes + 1, device=labels.device))
    place = torch.arange(len(order), device=labels.device) - first[ordered]
    of_all, have = counts_of_class([selected], pixels.labels, pixels.valid, classes)
    # In float64 a third of 3 pixels is 1 and not 2.
    wanted = (share * of_all.double() - 1e-9).ceil().long() - have
    missing = torch.cat([wanted, wanted.new_zeros(1)])
    added = torch.zeros_like(labels, dtype=torch.bool)
    return added.scatter_(0, order, place < missing[ordered]).view_as(selected)


def _check_classes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.dim() != 4 or teacher_logits.dim() != 4:
        raise UserError(
            f"Student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} must have four axes (batch, classes, height, width)."
        )
    if student_logits.shape[1] != teacher_logits.shape[1]:
        raise UserError(
            f"The student has {student_logits.shape[1]} classes, the teacher "
            f"{teacher_logits.shape[1]}. RDD compares them class by class: train both on the same "
            "label set."
        )
