"""The same few images over a run: what the network predicts at some validations.

Suffixes: H rows, W columns of a label map; h, w of a prediction, which may be smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.reporting.figures import (
    SMALL,
    Grid,
    array,
    class_legend,
    colorize,
    empty_figure,
    legend_height,
    plain,
    ratio_of,
    rgb,
    shorten,
    show,
)
from rdd_pipeline.reporting.palette import name_classes

WIDTH = 1.7
"""Inches of a picture."""


@dataclass(frozen=True)
class ProgressRow:
    """One image of `progress_figure`.

    Attributes:
        name: Shown beside the row.
        image: (3, H, W) uint8 RGB.
        label: (H, W) train ids.
        predictions: (h, w) classes, one map for each title, in their order.
    """

    name: str
    image: Tensor
    label: Tensor
    predictions: Sequence[Tensor]


def progress_figure(rows: Sequence[ProgressRow], titles: Sequence[str], labels: LabelSet) -> Figure:
    """A row for each image: itself, its label, then the predictions from left to right.

    Args:
        rows: The images.
        titles: Of the predictions, such as "iteration 160".
        labels: Names and colors.
    """
    if not rows or not titles:
        return empty_figure(
            "No predictions were kept: the weights were given, there\nis no split `val`, or it was "
            "not predicted in this stage\n(recipe.validate_every)."
        )
    columns = 2 + len(titles)
    inches = columns * WIDTH
    grid = Grid(
        [ratio_of(row.image) for row in rows],
        columns,
        legends=(columns,),
        titles=("image", "label", *titles),
        width=WIDTH,
        footer=legend_height(labels, inches),
    )
    for row, axes in zip(rows, grid.panels, strict=True):
        axes[0].set_ylabel(plain(shorten(row.name, 18)), fontsize=SMALL)
        show(axes[0], rgb(row.image))
        show(axes[1], colorize(row.label, labels))
        name_classes(axes[1], array(row.label), labels, inches=WIDTH)
        for place, classes in zip(axes[2:], row.predictions, strict=True):
            show(place, colorize(classes, labels))
            place.set_xlabel(_right(classes, row.label, labels), fontsize=SMALL)
    class_legend(
        grid.areas[0],
        labels,
        [m for row in rows for m in (row.label, *row.predictions)],
        inches=inches,
    )
    return grid.figure


# ---- parts


def _right(classes: Tensor, label: Tensor, labels: LabelSet) -> str:
    """Share of the labeled pixels that are right, at the size of the prediction."""
    rows, columns = (
        (torch.arange(small) * 2 + 1) * large // (2 * small)
        for small, large in zip(classes.shape, label.shape, strict=True)
    )
    there = label[rows][:, columns]
    valid = there != labels.ignore_index
    if not valid.any():
        return "no labeled pixel"
    share = (classes == there)[valid].double().mean().item()
    return f"{100 * share:.0f} % right"
