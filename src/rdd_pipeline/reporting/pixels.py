"""What RDD sees in a few images: predictions, errors, weights, hard and chosen pixels.

Suffixes: H rows, W columns of a label map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.evaluation.confusion import Scores, confusion_matrix
from rdd_pipeline.reporting.figures import (
    BOTH,
    CHOSEN,
    NEITHER,
    NORMAL,
    PANEL_WIDTH,
    SMALL,
    STUDENT_ONLY,
    TEACHER_ONLY,
    Grid,
    array,
    class_legend,
    colorize,
    empty_figure,
    faded,
    legend_height,
    note,
    overlay,
    plain,
    ratio_of,
    rgb,
    share_text,
    shorten,
    show,
)
from rdd_pipeline.reporting.palette import name_classes


@dataclass(frozen=True)
class RddRow:
    """One image of `rdd_figure`.

    Attributes:
        name: Shown beside it.
        image: (3, h, w) uint8 RGB; its size may differ from the label's.
        label: (H, W) train ids.
        student: (H, W) the student's classes.
        teacher: (H, W) the teacher's classes.
        confidence: (H, W) weight map of TFE-RDD; None: the teacher has no auxiliary head.
        hard_student: (H, W) bool, hard for the student.
        hard_teacher: (H, W) bool, hard for the teacher.
        chosen: (H, W) bool, what TSE-RDD's task loss looks at.
    """

    name: str
    image: Tensor
    label: Tensor
    student: Tensor
    teacher: Tensor
    confidence: Tensor | None
    hard_student: Tensor
    hard_teacher: Tensor
    chosen: Tensor


def rdd_figure(rows: Sequence[RddRow], labels: LabelSet) -> Figure:
    """Eight pictures for each image, from the image to the pixels the loss looks at.

    Above: image, label, what student and teacher predict, with the scores of this image. Below: who
    is wrong where, the teacher's weight map, what is hard for whom, the chosen pixels.
    """
    if not rows:
        return empty_figure("No image was asked for (evaluation.figure_images is 0).")
    ratios = [ratio_of(row.image) for row in rows for _ in range(2)]
    grid = Grid(ratios, 4, legends=(2, 2), footer=max(1.1, legend_height(labels, 2 * PANEL_WIDTH)))
    for number, row in enumerate(rows):
        _draw_networks(grid.panels[2 * number], row, labels)
        _draw_difficulty(grid.panels[2 * number + 1], row, labels)
    class_legend(
        grid.areas[0],
        labels,
        [m for row in rows for m in (row.label, row.student, row.teacher)],
        inches=2 * PANEL_WIDTH,
    )
    _legend(grid.areas[1])
    bar = grid.figure.colorbar(
        ScalarMappable(Normalize(0.0, 1.0), cmap="viridis"),
        cax=grid.areas[1].inset_axes((0.62, 0.55, 0.34, 0.14)),
        orientation="horizontal",
    )
    bar.ax.tick_params(labelsize=SMALL - 1, length=2)
    bar.ax.set_title("TFE weight", fontsize=SMALL)
    return grid.figure


# ---- parts


def _draw_networks(panels: Sequence[Axes], row: RddRow, labels: LabelSet) -> None:
    maps = {"label": row.label, "student's prediction": row.student}
    maps["teacher's prediction"] = row.teacher
    panels[0].set_title("image", fontsize=NORMAL)
    panels[0].set_ylabel(plain(shorten(row.name)), fontsize=SMALL)
    show(panels[0], rgb(row.image))
    for axes, (title, classes) in zip(panels[1:], maps.items(), strict=True):
        axes.set_title(title, fontsize=NORMAL)
        show(axes, colorize(classes, labels))
        name_classes(axes, array(classes), labels)
        if classes is not row.label:
            axes.set_xlabel(_scores(classes, row.label, labels), fontsize=SMALL)
    ignored = array(row.label) == labels.ignore_index
    if ignored.any():
        panels[1].set_xlabel(
            f"{share_text(ignored, np.ones_like(ignored))} ignored", fontsize=SMALL
        )


def _draw_difficulty(panels: Sequence[Axes], row: RddRow, labels: LabelSet) -> None:
    label = array(row.label)
    valid = label != labels.ignore_index
    wrong = [valid & (array(classes) != label) for classes in (row.student, row.teacher)]
    hard = [valid & array(row.hard_student), valid & array(row.hard_teacher)]
    for axes, title, (student, teacher) in (
        (panels[0], "errors", wrong),
        (panels[2], "hard pixels", hard),
    ):
        axes.set_title(title, fontsize=NORMAL)
        _who(axes, row.image, valid, student, teacher)
        axes.set_xlabel(
            f"student {share_text(student, valid)}, teacher {share_text(teacher, valid)}",
            fontsize=SMALL,
        )
    panels[1].set_title("TFE weight", fontsize=NORMAL)
    if row.confidence is None:
        note(panels[1], "the teacher has no\nauxiliary head")
    else:
        weight = array(row.confidence)
        show(panels[1], np.where(valid, weight, np.nan), vmin=0.0, vmax=1.0, cmap="viridis")
        if valid.any():
            panels[1].set_xlabel(f"mean {weight[valid].mean():.2f}", fontsize=SMALL)
    chosen = valid & array(row.chosen)
    panels[3].set_title("chosen by TSE", fontsize=NORMAL)
    show(panels[3], faded(row.image))
    overlay(panels[3], chosen, CHOSEN)
    overlay(panels[3], ~valid, "#FFFFFF")
    panels[3].set_xlabel(f"{share_text(chosen, valid)} of the pixels", fontsize=SMALL)


def _who(
    axes: Axes,
    image: Tensor,
    valid: NDArray[np.bool_],
    student: NDArray[np.bool_],
    teacher: NDArray[np.bool_],
) -> None:
    """Whose pixels are these: one color for each network, one for both."""
    show(axes, faded(image))
    overlay(axes, student & ~teacher, STUDENT_ONLY)
    overlay(axes, teacher & ~student, TEACHER_ONLY)
    overlay(axes, student & teacher, BOTH)
    overlay(axes, ~valid, "#FFFFFF")


def _scores(classes: Tensor, label: Tensor, labels: LabelSet) -> str:
    """Of one image; its mIoU is the mean over the classes that label or prediction have."""
    matrix = confusion_matrix(classes, label, labels.num_classes, labels.ignore_index)
    if not matrix.sum():
        return "no labeled pixel"
    scores = Scores.from_matrix(matrix)
    return f"mIoU {100 * scores.miou:.1f} %, {100 * scores.pixel_accuracy:.1f} % right"


def _legend(area: Axes) -> None:
    area.legend(
        handles=[
            Patch(color=STUDENT_ONLY, label="wrong or hard: student only"),
            Patch(color=TEACHER_ONLY, label="wrong or hard: teacher only"),
            Patch(color=BOTH, label="wrong or hard: both"),
            Patch(color=NEITHER, label="right or easy: both"),
            Patch(color=CHOSEN, label="chosen by TSE"),
            Patch(facecolor="white", edgecolor="black", linewidth=0.5, label="ignored"),
        ],
        loc="upper left",
        frameon=False,
        fontsize=SMALL,
    )
