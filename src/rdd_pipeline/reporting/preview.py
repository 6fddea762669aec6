"""A few images of a data set with their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
    faded,
    legend_height,
    plain,
    ratio_of,
    rgb,
    share_text,
    shorten,
    show,
)
from rdd_pipeline.reporting.palette import name_classes


def dataset_preview(samples: Sequence[tuple[str, Tensor, Tensor]], labels: LabelSet) -> Figure:
    """A few images with their labels: plain, as an overlay, and the label alone.

    Args:
        samples: Name, (3, h, w) uint8 image and (H, W) train ids of each.
        labels: Names and colors.
    """
    if not samples:
        return empty_figure("The data set has no training images.")
    titles = ("image", "label over image", "label")
    ratios = [ratio_of(image) for _, image, _ in samples]
    grid = Grid(
        ratios,
        len(titles),
        legends=(3,),
        titles=titles,
        width=3.0,
        footer=legend_height(labels, 9.0),
    )
    for (name, image, label), axes in zip(samples, grid.panels, strict=True):
        show(axes[0], rgb(image))
        show(axes[1], faded(image, keep=0.8))
        rgba = np.dstack([colorize(label, labels), np.full(label.shape, 140, np.uint8)])
        rgba[array(label) == labels.ignore_index, 3] = 0
        show(axes[1], rgba)
        show(axes[2], colorize(label, labels))
        name_classes(axes[2], array(label), labels)
        ignored = array(label) == labels.ignore_index
        axes[0].set_ylabel(plain(shorten(name)), fontsize=SMALL)
        axes[2].set_xlabel(f"{share_text(ignored, np.ones_like(ignored))} ignored", fontsize=SMALL)
    class_legend(grid.areas[0], labels, [label for _, _, label in samples], inches=9.0)
    return grid.figure
