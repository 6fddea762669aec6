"""Colors of classes that people may take for one another, and names in pictures against that.

Suffixes: N colors, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy import ndimage

from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.reporting.figures import PANEL_WIDTH, plain

CLOSE = 30.0
"""CIELAB distance (1976) below which small regions of two colors are taken for one another."""

# What is seen without one kind of cones, of linear RGB: Machado et al. 2009, severity 1.
_VISION = (
    np.eye(3),
    np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
)
_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_WHITE = _TO_XYZ.sum(1)
_FONT_SIZE = 5.5


def confusable(colors: Sequence[tuple[int, int, int]]) -> set[int]:
    """Positions of the colors that are close to another one, with any kind of color vision."""
    close = np.zeros((len(colors), len(colors)), bool)
    for vision in _VISION:
        lab = _lab(np.asarray(colors, np.float64) / 255, vision)
        close |= np.linalg.norm(lab[:, None] - lab[None], axis=-1) < CLOSE
    np.fill_diagonal(close, False)
    return set(np.flatnonzero(close.any(1)).tolist())


def name_classes(
    axes: Axes, label_HW: NDArray[np.integer], labels: LabelSet, *, inches: float = PANEL_WIDTH
) -> None:
    """Write the names of classes with confusable colors on their widest spots, where they fit.

    Args:
        axes: With the picture from (0, 0) to (1, 1).
        label_HW: Train ids.
        labels: Names and colors.
        inches: Width of the picture.
    """
    height, width = label_HW.shape
    for number in sorted(confusable(labels.colors) & set(np.unique(label_HW).tolist())):
        name = plain(labels.names[number])
        # Rows and columns are padded: a region ends at the edge of the image.
        depth = ndimage.distance_transform_edt(np.pad(label_HW == number, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        inch = inches / width
        needed = 0.35 * _FONT_SIZE / 72, 0.2 * _FONT_SIZE / 72 * len(name)
        if depth[row, column] * inch < max(needed[0], min(needed[1], 0.12)):
            continue
        axes.text(
            (column + 0.5) / width,
            1 - (row + 0.5) / height,
            name,
            ha="center",
            va="center",
            fontsize=_FONT_SIZE,
            color="white",
            path_effects=[effects.withStroke(linewidth=1.2, foreground="black")],
            clip_on=True,
        )


def _lab(colors_N3: NDArray[np.float64], vision: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB (D65) of sRGB colors in [0, 1], as seen."""
    linear = np.where(colors_N3 <= 0.04045, colors_N3 / 12.92, ((colors_N3 + 0.055) / 1.055) ** 2.4)
    xyz = (linear @ vision.T).clip(0, 1) @ _TO_XYZ.T / _WHITE
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root.T
    lab: NDArray[np.float64] = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
    return lab
