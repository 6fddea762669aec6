"""What figures share: colors, sizes, grids of pictures, names as they stand; confusion matrices.

Figures are `matplotlib.figure.Figure` objects; nothing here opens a window or a pyplot state.
Suffixes: C classes, H rows, W columns of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline.data.labels import LabelSet, hex_of

# Colors that people with any kind of color vision tell apart (Okabe and Ito 2008).
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072B2", "#E69F00", "#009E73", "#AA4499", "#888888"
STUDENT_ONLY, TEACHER_ONLY, BOTH, CHOSEN = BLUE, ORANGE, "#303030", PURPLE
NEITHER = "#C9C9C9"
LINES = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#D55E00", "#332288", "#999933")

PANEL_WIDTH = 2.5
"""Inches of one picture in a grid."""

MOST_NAMED = 24
"""Classes in a legend."""

SMALL, NORMAL = 8, 9
"""Font sizes in points."""


def confusion_figure(matrix: Tensor, names: Sequence[str]) -> Figure:
    """Confusion matrix with every row divided by its label's pixels, and the IoU of each class.

    Args:
        matrix: (C, C) counts, rows are labels.
        names: C class names.

    Raises:
        ValueError: As many names as classes are needed.
    """
    counts = array(matrix).astype(np.float64)
    if counts.shape != (len(names), len(names)):
        raise ValueError(
            f"A confusion matrix of shape {counts.shape} needs {len(counts)} class names, found "
            f"{len(names)}."
        )
    if not counts.sum():
        return empty_figure("No labeled pixel was evaluated.")
    classes = len(names)
    with np.errstate(invalid="ignore"):
        shares = 100 * counts / counts.sum(1, keepdims=True)
        hits = counts.diagonal()
        iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    few = classes <= 30
    side = max(3.2, 0.42 * classes + 1.5) if few else 4.0 + 0.13 * classes
    font = SMALL if few else 6.5
    ratio = (max(classes, 3), 2.5 if few else classes / 8)
    figure = Figure(figsize=(side * (1 + ratio[1] / ratio[0]), side), layout="constrained")
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=ratio)
    picture = axes.imshow(shares, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if share >= (0.5 if few else 10):  # of many classes only what matters has room
            axes.text(
                column,
                row,
                f"{share:.0f}",
                ha="center",
                va="center",
                fontsize=SMALL - 1 if few else 4.5,
                color="white" if share > 60 else "black",
            )
    shown = list(map(plain, names))
    axes.set_xticks(range(classes), shown, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(classes), shown)
    axes.tick_params(labelsize=font, length=2)
    axes.set_xlabel("prediction", fontsize=NORMAL)
    axes.set_ylabel("label", fontsize=NORMAL)
    axes.set_title("% of the label's pixels", fontsize=NORMAL)
    bars.barh(range(classes), np.nan_to_num(100 * iou), color=BLUE, height=0.7)
    for row, value in enumerate(iou):
        text = "absent" if math.isnan(value) else f"{100 * value:.1f}"
        bars.text(
            np.nan_to_num(100 * value) + 2, row, text, va="center", fontsize=font, color="black"
        )
    bars.set_xlim(0, 135)
    bars.set_xticks([0, 50, 100])
    bars.tick_params(labelsize=SMALL, length=2, labelleft=False)
    bars.spines[["top", "right"]].set_visible(False)
    present = iou[np.isfinite(iou)]
    bars.set_title(f"IoU in %\nmean {100 * present.mean():.2f}", fontsize=NORMAL)
    bar = figure.colorbar(
        picture, ax=[axes, bars], shrink=0.4, aspect=12 if few else 30, pad=0.01, ticks=[0, 50, 100]
    )
    bar.ax.tick_params(labelsize=SMALL, length=2)
    bar.set_label("%", fontsize=SMALL)
    return figure


def colorize(label: Tensor, labels: LabelSet) -> NDArray[np.uint8]:
    """(H, W, 3) picture of a label map; ignored pixels are white."""
    palette = np.full((256, 3), 255, np.uint8)
    palette[: labels.num_classes] = labels.colors
    picture: NDArray[np.uint8] = palette[array(label).astype(np.uint8)]
    return picture


def plain(text: str) -> str:
    """A name that matplotlib shows as it stands.

    It takes what is between two dollar signs for a formula, which may be none, and leaves what
    begins with an underscore out of legends: a hair space is put before that.
    """
    return "\u200a" * text.startswith("_") + text.replace("$", r"\$")


def empty_figure(text: str) -> Figure:
    """A figure that says why there is nothing to see."""
    figure = Figure(figsize=(5.0, 1.2))
    axes = figure.subplots()
    axes.axis("off")
    note(axes, text)
    return figure


class Grid:
    """Pictures in rows and columns without ticks, each in its own proportions; legends below.

    Args:
        ratios: Height over width of the pictures of each row.
        columns: Pictures in a row.
        legends: How many columns wide each area for a legend is.
        titles: Above the first row; empty: none.
        width: Inches of a picture.
        footer: Inches of the legends' height.

    Attributes:
        figure: With a constrained layout.
        panels: By row and column.
        areas: For legends.
    """

    def __init__(
        self,
        ratios: Sequence[float],
        columns: int,
        *,
        legends: Sequence[int],
        titles: Sequence[str] = (),
        width: float = PANEL_WIDTH,
        footer: float = 0.7,
    ) -> None:
        # A portrait is made narrower rather than a page long.
        heights = [width * min(max(ratio, 0.1), 1.5) + 0.22 for ratio in ratios]
        self.figure = figure = Figure(
            figsize=(columns * (width + 0.08) + 0.3, sum(heights) + 0.3 + footer),
            layout="constrained",
        )
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr,call-arg]
        grid = GridSpec(len(ratios) + 1, columns, figure, height_ratios=[*heights, footer])
        self.panels = [
            [figure.add_subplot(grid[row, column]) for column in range(columns)]
            for row in range(len(ratios))
        ]
        for ratio, line in zip(ratios, self.panels, strict=True):
            for axes in line:
                axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
                axes.set_aspect(ratio)
        for axes, title in zip(self.panels[0], titles, strict=False):
            axes.set_title(title, fontsize=NORMAL)
        self.areas, start = [], 0
        for wide in legends:
            area = figure.add_subplot(grid[len(ratios), start : start + wide])
            area.axis("off")
            self.areas.append(area)
            start += wide


def show(axes: Axes, picture: NDArray[Any], **how: Any) -> None:
    """Fill the axes: image and label may differ in size, and lie over each other all the same."""
    aspect = axes.get_aspect()
    axes.imshow(picture, extent=(0, 1, 0, 1), interpolation="nearest", aspect=aspect, **how)


def overlay(axes: Axes, mask: NDArray[np.bool_], color: str) -> None:
    """Paint the pixels of an (H, W) mask."""
    rgba = np.zeros((*mask.shape, 4), np.float32)
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    rgba[mask] = (red, green, blue, 1.0)
    show(axes, rgba)


def rgb(image: Tensor) -> NDArray[np.uint8]:
    """(H, W, 3) of a (3, H, W) image."""
    return array(image).transpose(1, 2, 0).astype(np.uint8)


def faded(image: Tensor, keep: float = 0.35) -> NDArray[np.uint8]:
    """The image in pale gray, so that colors over it are seen."""
    gray = rgb(image).mean(axis=2, keepdims=True)
    pale = 255 - keep * (255 - gray)
    return np.repeat(pale, 3, axis=2).astype(np.uint8)


def ratio_of(image: Tensor) -> float:
    """Height over width."""
    return image.shape[-2] / image.shape[-1]


def class_legend(area: Axes, labels: LabelSet, maps: Sequence[Tensor], *, inches: float) -> None:
    """Name the colors; of a large label set only the classes that are seen, the commonest first.

    Args:
        area: Of the legend.
        labels: Names and colors.
        maps: Of classes, where the colors are seen.
        inches: Width of the area.
    """
    values, counts = np.unique(
        np.concatenate([array(label).ravel() for label in maps]), return_counts=True
    )
    frequency = dict(zip(values.tolist(), counts.tolist(), strict=True))
    shown = list(range(labels.num_classes))
    if len(shown) > MOST_NAMED:
        seen = [number for number in shown if number in frequency]
        shown = sorted(sorted(seen, key=lambda number: -frequency[number])[:MOST_NAMED])
    handles = [
        Patch(facecolor=hex_of(labels.colors[number]), label=plain(labels.names[number]))
        for number in shown
    ]
    if labels.ignore_index in frequency:
        handles.append(
            Patch(facecolor="white", edgecolor="black", linewidth=0.5, label="(ignored)")
        )
    area.legend(
        handles=handles,
        loc="upper left",
        ncols=_legend_columns(labels, inches),
        frameon=False,
        fontsize=SMALL,
        columnspacing=1.0,
        handlelength=1.2,
    )


def legend_height(labels: LabelSet, inches: float) -> float:
    """Inches that `class_legend` takes at most."""
    rows = math.ceil((min(labels.num_classes, MOST_NAMED) + 1) / _legend_columns(labels, inches))
    return 0.2 + 0.17 * rows


def note(axes: Axes, text: str) -> None:
    """A sentence where a picture would be."""
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=SMALL, transform=axes.transAxes)


def share_text(mask: NDArray[np.bool_], whole: NDArray[np.bool_]) -> str:
    """How many of some pixels a mask has, in %."""
    total = int(whole.sum())
    return f"{100 * int(mask.sum()) / total:.1f} %" if total else "0 %"


def shorten(name: str, limit: int = 28) -> str:
    """The end of a name, which tells more than its folders."""
    return name if len(name) <= limit else f"…{name[-limit + 1 :]}"


def array(tensor: Tensor) -> NDArray[Any]:
    """The same as an array of the host."""
    return np.asarray(tensor.detach().cpu().numpy())


# ---- parts


def _legend_columns(labels: LabelSet, inches: float) -> int:
    longest = max(map(len, labels.names))
    return max(1, min(8, int(inches / (0.4 + 0.065 * longest))))
