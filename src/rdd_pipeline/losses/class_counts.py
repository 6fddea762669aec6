"""How many pixels of each class are what to RDD, for the curves.

Suffixes: N images, H rows, W columns, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

LITTLE, MUCH = 0.5, 0.9
"""TFE weights below the first are little, from the second on much."""


class PixelsOfClass(NamedTuple):
    """Pixels of each class, (C,) int64 each, those of all ranks; 0 in what does not apply.

    Under `ohem` the teacher is not evaluated, and `hard_teacher` and `hard_both` are 0.

    Attributes:
        valid: Labeled pixels that TSE looked at.
        hard_student: Of them, hard for the student.
        hard_teacher: Hard for the teacher.
        chosen: In the task loss.
        hard_both: Hard for both networks.
        weighed: Labeled pixels that TFE looked at.
        weight_low: Of them, with a weight below `LITTLE`.
        weight_middle: From there to below `MUCH`.
    """

    valid: Tensor
    hard_student: Tensor
    hard_teacher: Tensor
    chosen: Tensor
    hard_both: Tensor
    weighed: Tensor
    weight_low: Tensor
    weight_middle: Tensor

    @classmethod
    def of_tse(cls, counts: Tensor) -> Self:
        """Of the first five fields (5, C)."""
        return cls(*counts, *torch.zeros_like(counts[:3]))

    @classmethod
    def of_tfe(cls, counts: Tensor) -> Self:
        """Of the last three fields (3, C)."""
        return cls(*torch.zeros_like(counts[[0, 0, 0, 0, 0]]), *counts)

    def plus(self, other: PixelsOfClass | None) -> PixelsOfClass:
        """The sum; None: nothing is added."""
        if other is None:
            return self
        return PixelsOfClass(*(mine + its for mine, its in zip(self, other, strict=True)))


def counts_of_class(
    masks_NHW: Sequence[Tensor], labels_NHW: Tensor, valid_NHW: Tensor, classes: int
) -> Tensor:
    """Pixels of each class: all valid ones, then those in each mask, (1 + masks, C) int64."""
    # Bincount looks at the largest label, for which it waits for the device.
    count = _all_at_once if labels_NHW.device.type == "cpu" else _class_by_class
    return count(masks_NHW, labels_NHW, valid_NHW, classes)


def _class_by_class(masks: Sequence[Tensor], labels: Tensor, valid: Tensor, classes: int) -> Tensor:
    counts = []
    for number in range(classes):
        here = valid & (labels == number)
        counts += [here.count_nonzero(), *((mask & here).count_nonzero() for mask in masks)]
    return torch.stack(counts).view(classes, -1).T


def _all_at_once(masks: Sequence[Tensor], labels: Tensor, valid: Tensor, classes: int) -> Tensor:
    kinds = 2 ** len(masks)
    code = torch.where(valid, labels, classes).to(torch.int32) * kinds
    for bit, mask in enumerate(masks):
        code += mask * (1 << bit)
    table = torch.bincount(code.flatten(), minlength=(classes + 1) * kinds)
    table = table.view(classes + 1, kinds)[:classes]
    in_mask = [[kind for kind in range(kinds) if kind >> bit & 1] for bit in range(len(masks))]
    return torch.stack([table.sum(1), *(table[:, some].sum(1) for some in in_mask)])
