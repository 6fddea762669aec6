"""What TFE weighs and TSE finds hard, class by class, and when that is worth a warning.

XOR takes the task loss from what both networks find hard. With a teacher that is not much better
than the student that may be whole classes: then RDD ends behind the student alone, and the
curves of the losses do not show why.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.distillation.methods import Method
from rdd_pipeline.losses.class_counts import PixelsOfClass

SEEN = {
    "valid": ("hard_student", "hard_teacher", "chosen", "hard_both"),
    "weighed": ("weight_low", "weight_middle"),
}
"""What is counted of which pixels; a curve is called `chosen.CLASS`."""

MANY = 0.5
"""A teacher that finds more than this share of the training pixels hard decides too much."""
HARD, FEW = 0.5, 0.02
"""A class is left out if the student finds the first share of it hard, and the second is chosen."""
_LEAST_POINTS = 2


class Difficulty:
    """Adds up the pixels of each class between two points of the curves.

    Args:
        names: Of the classes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums = torch.zeros(len(PixelsOfClass._fields), len(self.names), dtype=torch.float64)

    def add(self, counts: Tensor) -> None:
        """Count the pixels (fields of `PixelsOfClass`, classes) of one step."""
        self._sums += counts.cpu().double()

    def close(self) -> dict[str, float]:
        """Shares of each class's pixels by name of the curve; absent classes have none."""
        sums = dict(zip(PixelsOfClass._fields, self._sums.tolist(), strict=True))
        shares = {
            f"{what}.{name}": count / pixels
            for whole, parts in SEEN.items()
            for what in parts
            for name, count, pixels in zip(self.names, sums[what], sums[whole], strict=True)
            if pixels > 0
        }
        self._sums.zero_()
        return shares


def training_notes(
    history: Sequence[Mapping[str, float]], *, method: Method, labels: LabelSet
) -> list[str]:
    """Sentences that belong below every table with the result of a training.

    Args:
        history: Of the whole training, oldest row first (`TrainingResult.history`).
        method: What was trained, with the run's weights and options.
        labels: Its classes.
    """
    return difficulty_notes(history, labels.names) if method.uses_rdd else []


def difficulty_notes(history: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[str]:
    """What a person should know of how TSE chose: a sentence for each fault, or none.

    Args:
        history: Rows of the curves, oldest first; those of TSE count.
        names: Of the classes.
    """
    rows = [row for row in history if _known(row, "hard_teacher")]
    rows = rows[len(rows) // 2 :] if len(rows) > 2 * _LEAST_POINTS else rows
    if len(rows) < _LEAST_POINTS:
        return []
    notes = []
    hard = statistics.fmean(row["hard_teacher"] for row in rows)
    if hard > MANY:
        notes.append(
            f"In the TSE stage {100 * hard:.0f} % of the labeled pixels were hard for the teacher: "
            "it is not good enough yet to tell noise from what can be learned. Train it longer or "
            "take a stronger one; until then rdd.mode=or, or CWD beside RDD, is the safer choice."
        )
    left_out = []
    for name in names:
        seen = [row for row in rows if _known(row, f"chosen.{name}")]
        if len(seen) < _LEAST_POINTS:
            continue
        mean = {
            what: statistics.fmean(row[f"{what}.{name}"] for row in seen)
            for what in ("hard_student", "chosen")
        }
        if mean["hard_student"] > HARD and mean["chosen"] < FEW:
            left_out.append(f"'{name}'")
    if left_out:
        which = f"class {left_out[0]}" if len(left_out) == 1 else f"classes {', '.join(left_out)}"
        notes.append(
            f"In the TSE stage next to no pixel of {which} was chosen: student and teacher both "
            "find them hard, and the task loss does not teach what both find hard. A better "
            "teacher cures that; rdd.class_floor=0.2 or rdd.mode=or bring such pixels back."
        )
    return notes


def _known(row: Mapping[str, float], name: str) -> bool:
    """Whether the row has a number there; tables fill gaps with NaN."""
    return row.get(name) is not None and row[name] == row[name]
