"""Relative Difficulty Distillation: the teacher decides which pixels the task loss looks at.

Liang et al., SCIS 2024, arXiv 2407.03719. Stage one (TFE, "teacher-full evaluated") weighs each
pixel with the agreement of the teacher's two heads; stage two (TSE, "teacher-student evaluated")
learns the pixels that are hard for one of the networks and easy for the other. Both replace the
task loss only: every other distillation loss can stand beside them.

Logits have the shape (N, C, h, w) at the network's stride, labels (N, H, W); logits are upsampled
bilinearly with aligned corners. Whatever comes in, and whatever autocast and the TF32 switches say,
computing is done in float32 (float64 stays).

Each task loss exists twice: `..._task_loss` returns the scalar, `..._task_terms` also what a
training log wants, as detached 0-dim tensors that were computed on the way. The latter also know of
other processes that share the batch (`ranks`, see `collectives`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.collectives import ALONE, Ranks
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.maps import as_float, resize
from rdd_pipeline.losses.pixelwise import PixelLabels, log_prob_of_label, pixel_labels

Mode = Literal["xor", "or", "and", "ohem"]
Reduction = Literal["paper", "valid"]
Scope = Literal["local", "global"]

_CHOOSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "xor": torch.logical_xor,
    "or": torch.logical_or,
    "and": torch.logical_and,
    "ohem": lambda hard_student, _: hard_student,
}


class PixelsOfClass(NamedTuple):
    """How many pixels of each class are what to TSE, (C,) int64 each, those of all ranks.

    Under `ohem` the teacher is not evaluated, and `hard_teacher` is 0.
    """

    valid: Tensor
    hard_student: Tensor
    hard_teacher: Tensor
    chosen: Tensor


class TaskTerms(NamedTuple):
    """A task loss with what training logs of it.

    Attributes:
        loss: Scalar with gradient.
        statistics: Detached 0-dim tensors by name, on the loss's device.
        pixels_of_class: Of TSE where it was asked for.
    """

    loss: Tensor
    statistics: dict[str, Tensor]
    pixels_of_class: PixelsOfClass | None = None


class ChosenPixels(NamedTuple):
    """Masks (N, H, W) of TSE-RDD: what is hard for whom, and what the task loss looks at."""

    hard_student: Tensor
    hard_teacher: Tensor
    chosen: Tensor


def teacher_confidence(
    teacher_logits: Tensor, teacher_aux_logits: Tensor, *, size: tuple[int, int]
) -> Tensor:
    """Weight map of TFE-RDD: 1 where the teacher's two heads agree, towards 0 where they do not.

    ``up(exp(-KL(auxiliary || main)))``, the exponential before the upsampling.

    Args:
        teacher_logits: Main head, (N, C, h, w).
        teacher_aux_logits: Auxiliary head, (N, C, h, w).
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


def hard_pixels(
    logits: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.7,
    min_kept: int | float = 100_000,
    ignore_index: int = 255,
) -> Tensor:
    """Pixels whose true class gets a low probability.

    A valid pixel is hard when its probability p is at most ``max(threshold, p_(k))``, with p_(k)
    the k-th smallest p of the batch (1 for ignored pixels) and k = `min_kept`. Ties are kept.

    Args:
        logits: (N, C, h, w) of either network.
        labels: (N, H, W), any integer type.
        threshold: Probability up to which a pixel is hard.
        min_kept: At least so many pixels of the batch are hard, as far as there are valid ones: a
            count (int) or a fraction of the batch's pixels (float in [0, 1]).
        ignore_index: Label of pixels that are never hard.

    Returns:
        (N, H, W) bool.

    Raises:
        UserError: Shapes, labels, threshold or min_kept are out of range.
    """
    with torch.no_grad():
        pixels = pixel_labels(labels, num_classes=logits.shape[1], ignore_index=ignore_index)
        return _hard(log_prob_of_label(logits, pixels), pixels, threshold, min_kept, ALONE).mask


def chosen_pixels(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mode: Mode = "xor",
    threshold: float = 0.7,
    min_kept: int | float = 100_000,
    ignore_index: int = 255,
) -> ChosenPixels:
    """The masks behind `tse_task_loss`, for figures. Arguments and errors as there."""
    choose = _chooser(mode)
    hard_student, hard_teacher = (
        hard_pixels(
            logits, labels, threshold=threshold, min_kept=min_kept, ignore_index=ignore_index
        )
        for logits in (student_logits, teacher_logits)
    )
    return ChosenPixels(hard_student, hard_teacher, choose(hard_student, hard_teacher))


def cross_entropy_task_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    student_aux_logits: Tensor | None = None,
    class_weights: Tensor | None = None,
    aux_weight: float = 0.4,
    ignore_index: int = 255,
) -> Tensor:
    """Mean cross-entropy over valid pixels, of both heads: the task loss without RDD.

    ``mean(CE(up logits)) + aux_weight * mean(CE(up aux))``, in nats; with class weights the
    weighted mean, as `torch.nn.functional.cross_entropy`. Without a valid pixel (or with zero
    weight on all of them) the loss is 0 and so is its gradient.

    Args:
        student_logits: (N, C, h, w).
        labels: (N, H, W), any integer type.
        student_aux_logits: (N, C, h, w), or None for a student without auxiliary head.
        class_weights: (C,), or None for 1 everywhere.
        aux_weight: Weight of the auxiliary head's loss.
        ignore_index: Label of ignored pixels.

    Raises:
        UserError: Shapes, labels or class weights do not fit.
    """
    return cross_entropy_task_terms(
        student_logits,
        labels,
        student_aux_logits=student_aux_logits,
        class_weights=class_weights,
        aux_weight=aux_weight,
        ignore_index=ignore_index,
    ).loss


def cross_entropy_task_terms(
    student_logits: Tensor,
    labels: Tensor,
    *,
    student_aux_logits: Tensor | None = None,
    class_weights: Tensor | None = None,
    aux_weight: float = 0.4,
    ignore_index: int = 255,
    ranks: Ranks = ALONE,
) -> TaskTerms:
    """`cross_entropy_task_loss` of the ranks' batch and its statistics.

    They are `student_ce` and `student_aux_ce`.
    """
    pixels = pixel_labels(labels, num_classes=student_logits.shape[1], ignore_index=ignore_index)
    weight = _class_weight_map(class_weights, pixels, pixels.valid, student_logits)
    log_p = log_prob_of_label(student_logits, pixels)
    total = ranks.share(weight.sum())
    valid_count = ranks.divisor(pixels.valid.count_nonzero())
    loss = _weighted_mean_ce(log_p, weight, total)
    statistics = {"student_ce": -log_p.detach().sum() / valid_count}
    if student_aux_logits is not None:
        aux_log_p = log_prob_of_label(student_aux_logits, pixels)
        loss = loss + aux_weight * _weighted_mean_ce(aux_log_p, weight, total)
        statistics["student_aux_ce"] = -aux_log_p.detach().sum() / valid_count
    return TaskTerms(loss, statistics)


def tfe_task_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    teacher_logits: Tensor,
    teacher_aux_logits: Tensor,
    student_aux_logits: Tensor | None = None,
    class_weights: Tensor | None = None,
    aux_weight: float = 0.4,
    reduction: Reduction = "paper",
    ignore_index: int = 255,
) -> Tensor:
    """Task loss of RDD's first stage: cross-entropy weighted by the teacher's agreement.

    ``sum over valid pixels of w * (CE(up logits) + aux_weight * CE(up aux)) / count`` with
    w = `teacher_confidence`, in nats. One w serves both heads. With class weights c the mean is a
    weighted one, ``sum w * c * CE / sum c``, as in all other task losses here; the published code
    weighs the classes in the second stage only.

    Args:
        student_logits: (N, C, h, w).
        labels: (N, H, W), any integer type.
        teacher_logits: (N, C, h', w').
        teacher_aux_logits: (N, C, h', w').
        student_aux_logits: (N, C, h, w), or None for a student without auxiliary head.
        aux_weight: Weight of the auxiliary head's loss.
        class_weights: (C,), or None for 1 everywhere.
        reduction: The count is that of all pixels, ignored ones too (`paper`, as published), or of
            the valid ones (`valid`), which does not shrink with padding. With class weights
            ignored pixels count with the mean weight of the valid ones.
        ignore_index: Label of ignored pixels.

    Returns:
        Scalar; 0 with zero gradient when no pixel is valid.

    Raises:
        UserError: Shapes or labels do not fit, or the reduction is unknown.
    """
    return tfe_task_terms(
        student_logits,
        labels,
        teacher_logits=teacher_logits,
        teacher_aux_logits=teacher_aux_logits,
        student_aux_logits=student_aux_logits,
        class_weights=class_weights,
        aux_weight=aux_weight,
        reduction=reduction,
        ignore_index=ignore_index,
    ).loss


def tfe_task_terms(
    student_logits: Tensor,
    labels: Tensor,
    *,
    teacher_logits: Tensor,
    teacher_aux_logits: Tensor,
    student_aux_logits: Tensor | None = None,
    class_weights: Tensor | None = None,
    aux_weight: float = 0.4,
    reduction: Reduction = "paper",
    ignore_index: int = 255,
    ranks: Ranks = ALONE,
) -> TaskTerms:
    """`tfe_task_loss` of the ranks' batch and its statistics.

    They are `student_ce`, `student_aux_ce` (unweighted means over valid pixels) and
    `teacher_confidence` (mean weight of the valid pixels).
    """
    if reduction not in get_args(Reduction):
        raise UserError(
            f"Unknown reduction {reduction!r} of the TFE loss. Choose one of "
            f"{', '.join(get_args(Reduction))}."
        )
    _check_classes(student_logits, teacher_logits)
    pixels = pixel_labels(labels, num_classes=student_logits.shape[1], ignore_index=ignore_index)
    height, width = labels.shape[-2:]
    confidence = teacher_confidence(teacher_logits, teacher_aux_logits, size=(height, width))
    valid_count = ranks.divisor(pixels.valid.count_nonzero())
    count: Tensor | int = max(1, labels.numel()) if reduction == "paper" else valid_count

    # Ignored pixels have log-probability 0, but a teacher's NaN there would survive the product.
    confidence = confidence.masked_fill(~pixels.valid, 0)
    weight = confidence
    log_p = log_prob_of_label(student_logits, pixels)
    if class_weights is not None:
        of_class = _class_weight_map(class_weights, pixels, pixels.valid, student_logits)
        weight = confidence * of_class
        mean_weight = ranks.share(of_class.sum()).to(log_p.dtype) / valid_count
        count = torch.where(mean_weight > 0, count * mean_weight, 1)
    loss = -(weight * log_p).sum() / count
    statistics = {
        "student_ce": -log_p.detach().sum() / valid_count,
        "teacher_confidence": confidence.sum() / valid_count,
    }
    if student_aux_logits is not None:
        aux_log_p = log_prob_of_label(student_aux_logits, pixels)
        loss = loss - aux_weight * (weight * aux_log_p).sum() / count
        statistics["student_aux_ce"] = -aux_log_p.detach().sum() / valid_count
    return TaskTerms(loss, statistics)


def tse_task_loss(
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
    ignore_index: int = 255,
) -> Tensor:
    """Task loss of RDD's second stage: cross-entropy of the pixels that the networks disagree on.

    For the main heads, and again times `aux_weight` for the auxiliary heads: the mean (with class
    weights: weighted mean) cross-entropy in nats over the chosen pixels, against their labels.
    Chosen are, from the `hard_pixels` of student and teacher,

    * `xor`: those hard for exactly one of them (the paper's choice),
    * `or`, `and`: for at least one, for both,
    * `ohem`: for the student, whatever the teacher says (online hard example mining).

    A `class_floor` above 0 is ours, not the paper's: of each class at least that share of its
    pixels is chosen, as far as there are pixels that the student finds hard; those that are least
    hard for the teacher come first. XOR alone may leave a class without any.

    Args:
        student_logits: (N, C, h, w).
        labels: (N, H, W), any integer type.
        teacher_logits: (N, C, h', w').
        student_aux_logits: (N, C, h, w), or None for a student without auxiliary head.
        teacher_aux_logits: (N, C, h', w'); needed when the student has an auxiliary head, except
            for `ohem`.
        mode: Which pixels are chosen.
        threshold: A pixel is hard up to this probability of its label.
        min_kept: At least so many pixels of the batch are hard: a count (int) or a fraction of the
            batch's pixels (float).
        class_floor: Share of each class's pixels that is chosen at least, see above; 0: off.
        class_weights: (C,), or None for 1 everywhere.
        aux_weight: Weight of the auxiliary head's loss.
        ignore_index: Label of ignored pixels.

    Returns:
        Scalar; 0 with zero gradient when no pixel is valid or none is chosen.

    Raises:
        UserError: Shapes, labels, mode, threshold, min_kept, class_floor or class weights do not
            fit.
    """
    return tse_task_terms(
        student_logits,
        labels,
        teacher_logits=teacher_logits,
        student_aux_logits=student_aux_logits,
        teacher_aux_logits=teacher_aux_logits,
        mode=mode,
        threshold=threshold,
        min_kept=min_kept,
        class_floor=class_floor,
        class_weights=class_weights,
        aux_weight=aux_weight,
        ignore_index=ignore_index,
    ).loss


def tse_task_terms(
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
    ignore_index: int = 255,
    ranks: Ranks = ALONE,
    scope: Scope = "local",
    by_class: bool = False,
) -> TaskTerms:
    """`tse_task_loss` of the ranks' batch and its statistics.

    `scope` says among which pixels the `min_kept` hardest are looked for: each rank's own, as
    published, or those of all ranks (`global`). The mean is taken over the chosen pixels of all
    ranks in either case. A `class_floor` counts each rank's own pixels.

    The statistics are, for the main heads and with the prefix `aux_` for the auxiliary ones:
    `student_ce` and `teacher_ce` (unweighted means over valid pixels), `hard_student`,
    `hard_teacher` and `chosen` (fractions of the valid pixels), and `chosen_none` (1 when no pixel
    was chosen, else 0). Mode `ohem` does not evaluate the teacher and leaves out its two. With
    `by_class`, `TaskTerms.pixels_of_class` counts the pixels of the main heads.
    """
    choose = _chooser(mode)
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

    def head(student: Tensor, teacher: Tensor | None, prefix: str) -> TaskTerms:
        log_p = log_prob_of_label(student, pixels)
        hard_student = hard_teacher = _hard(log_p.detach(), pixels, threshold, min_kept, among)
        counts = {"hard_student": hard_student.size}
        statistics = {"student_ce": -log_p.detach().sum() / valid_count}
        teacher_log_p = None
        if teacher is not None and mode != "ohem":
            teacher_log_p = log_prob_of_label(teacher.detach(), pixels)
            hard_teacher = _hard(teacher_log_p, pixels, threshold, min_kept, among)
            counts["hard_teacher"] = hard_teacher.size
            statistics["teacher_ce"] = -teacher_log_p.sum() / valid_count
        chosen = choose(hard_student.mask, hard_teacher.mask)
        if class_floor > 0 and teacher_log_p is not None:
            rest = hard_student.mask & ~chosen
            chosen = chosen | _floor(chosen, rest, teacher_log_p, pixels, class_floor, classes)
        weight = _class_weight_map(class_weights, pixels, chosen, student)
        counts["chosen"] = weight.sum() if class_weights is None else chosen.count_nonzero()
        chosen_count = ranks.share(counts["chosen"])
        total = chosen_count if class_weights is None else ranks.share(weight.sum())
        statistics |= {name: count / valid_count for name, count in counts.items()}
        statistics["chosen_none"] = (chosen_count == 0).to(log_p.dtype)
        named = {prefix + name: value for name, value in statistics.items()}
        of_class = None
        if by_class and not prefix:
            teachers = hard_teacher.mask if teacher_log_p is not None else chosen & False
            masks = [pixels.valid, hard_student.mask, teachers, chosen]
            found = ranks.total(torch.stack(_counts_of_class(masks, pixels, classes)))
            of_class = PixelsOfClass(*found)
        return TaskTerms(_weighted_mean_ce(log_p, weight, total), named, of_class)

    loss, statistics, of_class = head(student_logits, teacher_logits, "")
    if student_aux_logits is not None:
        aux = head(student_aux_logits, teacher_aux_logits, "aux_")
        loss = loss + aux_weight * aux.loss
        statistics |= aux.statistics
    return TaskTerms(loss, statistics, of_class)


def _chooser(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    if mode not in _CHOOSE:
        raise UserError(
            f"Unknown mode {mode!r} of the TSE loss. Choose one of {', '.join(_CHOOSE)}."
        )
    return _CHOOSE[mode]


@torch.no_grad()
def _floor(
    chosen: Tensor,
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
    have, of_all = _counts_of_class([chosen, pixels.valid], pixels, classes)
    # In float64 a third of 3 pixels is 1 and not 2.
    wanted = (share * of_all.double() - 1e-9).ceil().long() - have
    missing = torch.cat([wanted, wanted.new_zeros(1)])
    added = torch.zeros_like(labels, dtype=torch.bool)
    return added.scatter_(0, order, place < missing[ordered]).view_as(chosen)


def _counts_of_class(masks: Sequence[Tensor], pixels: PixelLabels, classes: int) -> list[Tensor]:
    """Pixels of each class (C,) in each mask."""
    # Class by class: bincount looks at the largest label, for which it waits for the device.
    of_class = [pixels.labels == number for number in range(classes)]
    return [torch.stack([(mask & here).count_nonzero() for here in of_class]) for mask in masks]


class _Hard(NamedTuple):
    mask: Tensor
    size: Tensor


def _hard(
    log_p_NHW: Tensor,
    pixels: PixelLabels,
    threshold: float,
    min_kept: int | float,
    ranks: Ranks,
) -> _Hard:
    """`hard_pixels` from log-probabilities (0, that is p = 1, where ignored), and their number.

    The mask and the number are this rank's, `min_kept` counts the pixels of all given ranks.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}; it is a probability, between 0 and 1.")
    if min_kept < 0 or (isinstance(min_kept, float) and min_kept > 1):
        raise UserError(
            f"min_kept is {min_kept}; expected a count (integer, at least 0) or a fraction of the "
            "batch's pixels (float between 0 and 1)."
        )
    total = log_p_NHW.numel() * ranks.size
    kept = min(total, round(min_kept * total) if isinstance(min_kept, float) else min_kept)
    hard_NHW = (log_p_NHW <= (math.log(threshold) if threshold > 0 else -math.inf)) & pixels.valid
    count = hard_NHW.count_nonzero()
    on_cpu = log_p_NHW.device.type == "cpu"
    # Sorting millions of probabilities is what made the published loss slow. Mostly the count
    # decides; where looking at it means waiting for the device, the selection alone is cheap.
    if kept > 0 and not (on_cpu and int(ranks.total(count)) >= kept):
        p = log_p_NHW.exp()
        kth = _smallest(p.flatten(), kept, ranks, on_cpu=on_cpu)
        hard_NHW = ((p <= kth) & pixels.valid).logical_or_(hard_NHW)
        count = hard_NHW.count_nonzero()
    return _Hard(hard_NHW, count)


def _smallest(values: Tensor, k: int, ranks: Ranks, *, on_cpu: bool) -> Tensor:
    """The k-th smallest of all ranks' values, of which each has as many."""
    if ranks.size > 1:
        # Each rank's k smallest are enough to know it.
        values = ranks.gather(values.topk(min(k, len(values)), largest=False, sorted=False).values)
    # On CUDA, kthvalue has one block search millions of values.
    if on_cpu:
        return values.kthvalue(k).values
    return values.topk(k, largest=False, sorted=False).values.max()


def _class_weight_map(
    class_weights: Tensor | None, pixels: PixelLabels, chosen: Tensor, logits: Tensor
) -> Tensor:
    """Weight of each pixel (N, H, W): that of its class where it is chosen, 0 elsewhere."""
    if class_weights is None:
        return as_float(chosen)
    if class_weights.shape != (logits.shape[1],):
        raise UserError(
            f"class_weights have shape {tuple(class_weights.shape)}, expected one for each of the "
            f"{logits.shape[1]} classes."
        )
    weights_C = as_float(class_weights.detach()).to(logits.device)
    return weights_C[torch.where(chosen, pixels.labels, 0).long()] * chosen


def _weighted_mean_ce(log_p_NHW: Tensor, weight_NHW: Tensor, total: Tensor) -> Tensor:
    """Mean of -log p with weights of the given sum; 0 with zero gradient when all are 0."""
    return -(weight_NHW * log_p_NHW).sum() / torch.where(total > 0, total, 1)


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
