"""Difficulty over a run, class by class: weights of TFE, hard for whom, chosen by TSE.

It is the analysis of the paper (arXiv 2407.03719, section 4) for every class of a training. What
it shows is recorded by `training.difficulty`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from rdd_pipeline.losses.class_counts import LITTLE, MUCH
from rdd_pipeline.reporting.curves import Handovers, Points, mark_handovers, series_of
from rdd_pipeline.reporting.figures import (
    BOTH,
    CHOSEN,
    NEITHER,
    NORMAL,
    SMALL,
    STUDENT_ONLY,
    TEACHER_ONLY,
    empty_figure,
    plain,
    shorten,
)

MOST = 24
"""Panels; of more classes those with the most pixels that are hard and not chosen have one."""
COLUMNS = 4
BINS = 60
"""Steps of a panel; of a longer run each is the mean over several points."""

_LOW, _MIDDLE, _HIGH = "#00593F", "#4DB892", "#D6EFE6"


def difficulty_figure(
    history: Sequence[Mapping[str, float]], names: Sequence[str], handovers: Handovers = ()
) -> Figure:
    """A panel for each class: 100 % are its labeled pixels, from left to right the run.

    Under TFE they are divided by their weight, under TSE by whom they are hard for; a line says
    how many the task loss of TSE looks at.

    Args:
        history: Rows with `iteration` and shares by class (`chosen.CLASS`, in [0, 1]); those of
            versions that did not count what is hard for both have lines for each network instead.
        names: Of the classes.
        handovers: Get a dashed line.
    """
    series = series_of(history)
    classes = [found for name in names if (found := _Class.of(name, series))]
    if not classes:
        return empty_figure("No pixel was counted by class: the run was too short, or has no RDD.")
    shown = classes
    if len(classes) > MOST:
        worst = sorted(classes, key=lambda one: -one.missed)[:MOST]
        shown = [one for one in classes if one in worst]
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(0.6 + 2.5 * max(columns, 3), 0.9 + 1.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    end = max(float(row["iteration"]) for row in history)
    for number, (axes, one) in enumerate(zip(panels, shown, strict=False)):
        one.draw(axes)
        axes.set(xlim=(0, end), ylim=(0, 100))
        axes.tick_params(labelsize=SMALL - 1, length=2)
        axes.set_title(plain(shorten(one.name, 24)), fontsize=SMALL, loc="left", pad=3)
        if one.chosen is not None:
            mean = 100 * one.chosen[1].mean()
            axes.set_title(f"{mean:.0f} % chosen", fontsize=SMALL - 1, loc="right", pad=3)
        mark_handovers(axes, handovers, named=False)
        if number + columns >= len(shown):
            axes.tick_params(labelbottom=True)
        if number // columns == rows - 1:
            axes.set_xlabel("iteration", fontsize=SMALL)
        if number % columns == 0:
            axes.set_ylabel("% of the pixels", fontsize=SMALL)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    if len(shown) < len(classes):
        figure.suptitle(
            f"{len(shown)} of {len(classes)} classes: most pixels hard and not chosen",
            fontsize=NORMAL,
        )
    figure.legend(
        handles=_legend(classes),
        loc="outside lower center",
        ncols=4 if columns > 2 else 3,
        frameon=False,
        fontsize=SMALL,
    )
    return figure


# ---- parts


@dataclass(frozen=True)
class _Class:
    """Shares of one class over the iterations; None: there are none."""

    name: str
    weights: tuple[Points, Points] | None
    hard: tuple[Points, Points] | None
    both: Points | None
    chosen: Points | None

    @classmethod
    def of(cls, name: str, series: Mapping[str, Points]) -> _Class | None:
        low, middle, student, teacher, both, chosen = (
            series.get(f"{what}.{name}")
            for what in (
                *("weight_low", "weight_middle"),
                *("hard_student", "hard_teacher", "hard_both", "chosen"),
            )
        )
        weights = None if low is None or middle is None else (low, middle)
        hard = None if student is None or teacher is None else (student, teacher)
        return None if weights is None and hard is None else cls(name, weights, hard, both, chosen)

    @property
    def missed(self) -> float:
        """Mean share that is hard for the student and not chosen; without TSE, of little weight."""
        if self.hard is None or self.chosen is None:
            return float(self.weights[0][1].mean()) if self.weights else 0.0
        return float(self.hard[0][1].mean() - self.chosen[1].mean())

    def draw(self, axes: Axes) -> None:
        begin = 0.0
        if self.weights is not None:
            (steps, low), (_, middle) = self.weights
            _stack(axes, begin, steps, {_LOW: low, _MIDDLE: middle, _HIGH: 1 - low - middle})
            begin = steps[-1]
        if self.hard is None:
            return
        (steps, student), (_, teacher) = self.hard
        if begin >= steps[0]:  # annealed: both at once
            begin = 0.0
        if self.both is not None and len(self.both[0]) == len(steps):
            both = self.both[1]
            parts = {STUDENT_ONLY: student - both, TEACHER_ONLY: teacher - both, BOTH: both}
            _stack(axes, begin, steps, {**parts, NEITHER: 1 - student - teacher + both})
        else:
            for values, color in ((student, STUDENT_ONLY), (teacher, TEACHER_ONLY)):
                _line(axes, begin, (steps, values), color)
        if self.chosen is not None:
            _line(axes, begin, self.chosen, CHOSEN)


def _stack(
    axes: Axes,
    begin: float,
    steps: NDArray[np.float64],
    parts: Mapping[str, NDArray[np.float64]],
) -> None:
    """Areas on top of one another, by color."""
    below: NDArray[np.float64] | None = None
    for color, values in parts.items():
        edges, heights = _binned(begin, (steps, values))
        above = heights.clip(0) if below is None else below + heights.clip(0)
        axes.fill_between(
            edges, 0 if below is None else below, above, step="pre", color=color, linewidth=0
        )
        below = above


def _line(axes: Axes, begin: float, points: Points, color: str) -> None:
    edges, heights = _binned(begin, points)
    # White below it: it crosses areas of every color.
    for wide, paint in ((2.4, "white"), (1.2, color)):
        axes.step(edges, heights, where="pre", color=paint, linewidth=wide)


def _binned(begin: float, points: Points) -> Points:
    """Edges of the bins and heights in %, the first one twice.

    A point is the mean since the one before; the first one since `begin`.
    """
    steps, values = points
    bins = _bins(len(steps))
    means = 100 * np.add.reduceat(values, bins) / np.diff([*bins, len(steps)])
    ends = steps[np.append(bins[1:], len(steps)) - 1]
    return np.append(begin, ends), np.append(means[0], means)


def _bins(count: int) -> NDArray[np.int64]:
    """Where at most `BINS` groups of neighbors begin."""
    return np.unique(np.arange(min(count, BINS)) * count // min(count, BINS))


def _legend(classes: Sequence[_Class]) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = []
    if any(one.weights for one in classes):
        handles += [
            Patch(color=_LOW, label=f"TFE: weight below {LITTLE:g}"),
            Patch(color=_MIDDLE, label=f"TFE: weight {LITTLE:g} to {MUCH:g}"),
            Patch(color=_HIGH, label=f"TFE: weight from {MUCH:g}"),
        ]
    if any(one.both for one in classes):
        handles += [
            Patch(color=STUDENT_ONLY, label="TSE: hard for the student only"),
            Patch(color=TEACHER_ONLY, label="TSE: hard for the teacher only"),
            Patch(color=BOTH, label="TSE: hard for both"),
            Patch(color=NEITHER, label="TSE: easy for both"),
        ]
    elif any(one.hard for one in classes):
        handles += [
            Line2D([], [], color=STUDENT_ONLY, label="TSE: hard for the student"),
            Line2D([], [], color=TEACHER_ONLY, label="TSE: hard for the teacher"),
        ]
    if any(one.chosen for one in classes):
        handles.append(Line2D([], [], color=CHOSEN, label="TSE: chosen"))
    return handles
