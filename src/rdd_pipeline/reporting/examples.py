"""Pictures of single images and what networks made of them: side by side, the worst, wrong labels.

Suffixes: H rows, W columns of a label; h, w of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline.data.labels import LabelSet, hex_of
from rdd_pipeline.evaluation.confusion import Scores, confusion_matrix
from rdd_pipeline.reporting.figures import NORMAL, SMALL, colorize, empty_figure, plain

WRONG = "#D55E00"
"""Color of wrong pixels (Okabe and Ito 2008)."""
_WIDTH = 2.3
"""Inches of a picture."""
_ACROSS = 4
"""Networks beside each other; further ones are put below."""
_MARGIN = 1.0
"""Context around a region that is looked at, in sides of its box."""


@dataclass(frozen=True)
class Example:
    """An image and the predictions of some networks.

    Attributes:
        name: Shown beside it.
        image: (3, h, w) uint8 RGB; its size may differ from the label's.
        label: (H, W) train ids.
        predictions: (H, W) classes by each network.
    """

    name: str
    image: Tensor
    label: Tensor
    predictions: tuple[Tensor, ...]


@dataclass(frozen=True)
class Region:
    """A part of an image whose label may be wrong.

    Attributes:
        example: The image, with one prediction that stands for all.
        box: (top, left, height, width) in pixels of the label.
        mask: (height, width) bool, the region in its box.
        title: What is said of it.
    """

    example: Example
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]
    title: str


def side_by_side_figure(
    examples: Sequence[Example], titles: Sequence[str], labels: LabelSet, rule: str
) -> Figure:
    """Predictions of several networks for the same images, each with its wrong pixels below.

    Args:
        examples: With a prediction by each network.
        titles: Of the networks.
        labels: Classes and their colors.
        rule: How the images were chosen, in words.
    """
    if not examples or not titles:
        return empty_figure("No image was asked for (evaluation.figure_images is 0).")
    groups = [range(i, min(i + _ACROSS, len(titles))) for i in range(0, len(titles), _ACROSS)]
    columns = 1 + min(_ACROSS, len(titles))
    lines = [(example, group) for example in examples for group in groups]
    heights = [_WIDTH * e.label.shape[0] / e.label.shape[1] + 0.2 for e, _ in lines for _ in "ab"]
    figure, grid, legend = _sheet(columns, heights, rule)
    for number, (example, group) in enumerate(lines):
        upper, lower = (
            [figure.add_subplot(grid[2 * number + half, column]) for column in range(columns)]
            for half in (0, 1)
        )
        for axes in (*upper, *lower):
            axes.axis("off")
        if group == groups[0]:
            _picture(upper[0], _rgb(example.image), plain(_shorten(example.name)))
            _picture(lower[0], colorize(example.label, labels), "label")
        for column, place in enumerate(group, start=1):
            prediction = example.predictions[place]
            title = plain(titles[place])
            _picture(upper[column], colorize(prediction, labels), title)
            _errors(lower[column], example, prediction, labels)
    _legend(
        legend, labels, [m for example in examples for m in (example.label, *example.predictions)]
    )
    return figure


def worst_figure(examples: Sequence[Example], labels: LabelSet, rule: str) -> Figure:
    """Image, label, prediction and wrong pixels of one network, one image a line.

    Args:
        examples: With one prediction each, the worst first.
        labels: Classes and their colors.
        rule: What they are the worst of, in words.
    """
    if not examples:
        return empty_figure("No image was evaluated.")
    heights = [_WIDTH * e.label.shape[0] / e.label.shape[1] + 0.2 for e in examples]
    figure, grid, legend = _sheet(4, heights, rule)
    for row, example in enumerate(examples):
        areas = [figure.add_subplot(grid[row, column]) for column in range(4)]
        for axes in areas:
            axes.axis("off")
        _picture(areas[0], _rgb(example.image), plain(_shorten(example.name)))
        _picture(areas[1], colorize(example.label, labels), "label")
        _picture(areas[2], colorize(example.predictions[0], labels), "prediction")
        _errors(areas[3], example, example.predictions[0], labels)
    _legend(legend, labels, [m for e in examples for m in (e.label, *e.predictions)])
    return figure


def regions_figure(
    groups: Sequence[tuple[str, Sequence[Region]]], labels: LabelSet, rule: str
) -> Figure:
    """Regions whose label may be wrong, a line for each group: image, label, teacher's prediction.

    Args:
        groups: Name of a group (a class, say) and its regions, those to look at first in front.
        labels: Classes and their colors.
        rule: How they were ranked, in words.
    """
    groups = [(name, regions) for name, regions in groups if regions]
    if not groups:
        return empty_figure("Both networks agree with every label.")
    most = max(len(regions) for _, regions in groups)
    figure, grid, legend = _sheet(3 * most, [1.5] * len(groups), rule, width=1.3)
    for row, (name, regions) in enumerate(groups):
        for number, region in enumerate(regions):
            areas = [figure.add_subplot(grid[row, 3 * number + part]) for part in range(3)]
            for axes in areas:
                axes.axis("off")
            window = _window(region)
            example = region.example
            pictures = (
                _rgb(example.image),
                colorize(example.label, labels),
                colorize(example.predictions[0], labels),
            )
            for axes, picture, title in zip(
                areas, pictures, (plain(region.title), "label", "teacher"), strict=True
            ):
                _cut(axes, picture, example, window)
                _outline(axes, region, window)
                axes.set_title(title, fontsize=SMALL - 1.5, loc="left", pad=2)
            if number == 0:
                areas[0].text(
                    -0.08, 0.5, plain(_shorten(name)), rotation=90, fontsize=SMALL,
                    ha="right", va="center", transform=areas[0].transAxes,
                )  # fmt: skip
    shown = [m for _, rs in groups for r in rs for m in (r.example.label, *r.example.predictions)]
    _legend(legend, labels, shown, errors=False)
    return figure


# ---- parts


def _sheet(
    columns: int, heights: Sequence[float], rule: str, width: float = _WIDTH
) -> tuple[Figure, GridSpec, Axes]:
    """A figure with a grid of pictures, and an area for the legend below them."""
    bottom = 0.4
    figure = Figure(
        figsize=(columns * (width + 0.06) + 0.3, sum(heights) + 0.6 + bottom), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)  # type: ignore[union-attr,call-arg]
    grid = GridSpec(len(heights) + 1, columns, figure, height_ratios=[*heights, bottom])
    # The line break keeps it apart from the titles of the pictures.
    figure.suptitle(f"{plain(rule)}\n", fontsize=NORMAL, x=0.01, ha="left", linespacing=0.7)
    legend = figure.add_subplot(grid[len(heights), :])
    legend.axis("off")
    return figure, grid, legend


def _picture(axes: Axes, picture: NDArray[np.uint8], title: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(title, fontsize=SMALL, pad=2)


def _errors(axes: Axes, example: Example, prediction: Tensor, labels: LabelSet) -> None:
    """Wrong pixels over the pale image; ignored ones are dotted out by white."""
    label, found = np.asarray(example.label), np.asarray(prediction)
    valid = label != labels.ignore_index
    wrong = valid & (found != label)
    height, width = label.shape
    gray = _rgb(example.image).mean(axis=2, keepdims=True)
    pale = np.repeat(255 - 0.35 * (255 - gray), 3, axis=2).astype(np.uint8)
    axes.imshow(pale, extent=(0, width, height, 0), interpolation="nearest")
    over = np.zeros((height, width, 4), np.float32)
    over[wrong] = (*(int(WRONG[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)
    over[~valid] = (1.0, 1.0, 1.0, 1.0)
    axes.imshow(over, extent=(0, width, height, 0), interpolation="nearest")
    matrix = confusion_matrix(prediction, example.label, labels.num_classes, labels.ignore_index)
    miou = Scores.from_matrix(matrix).miou
    total = int(valid.sum())
    text = (
        f"mIoU {100 * miou:.1f}, {100 * int(wrong.sum()) / total:.1f} % wrong"
        if total
        else "nothing labeled"
    )
    axes.set_title(text, fontsize=SMALL, pad=2)


def _window(region: Region) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) around the box, square where the image allows it."""
    top, left, height, width = region.box
    rows, columns = region.example.label.shape
    side = max(max(height, width) * (1 + 2 * _MARGIN), 24)
    middle = top + height / 2, left + width / 2

    def ends(center: float, whole: int) -> tuple[int, int]:
        length = min(round(side), whole)
        first = min(max(round(center - length / 2), 0), whole - length)
        return first, first + length

    (first, last), (start, stop) = ends(middle[0], rows), ends(middle[1], columns)
    return first, start, last, stop


def _cut(
    axes: Axes, picture: NDArray[np.uint8], example: Example, window: tuple[int, int, int, int]
) -> None:
    rows, columns = example.label.shape
    axes.imshow(picture, extent=(0, columns, rows, 0), interpolation="nearest")
    top, left, bottom, right = window
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _outline(axes: Axes, region: Region, window: tuple[int, int, int, int]) -> None:
    """Line around the region, black on white, so that it is seen on any color."""
    top, left, height, width = region.box
    padded = np.pad(region.mask.astype(float), 1)
    x, y = np.arange(width + 2) + left - 0.5, np.arange(height + 2) + top - 0.5
    for color, line in (("white", 2.0), ("black", 0.8)):
        axes.contour(x, y, padded, levels=[0.5], colors=color, linewidths=line)


def _rgb(image: Tensor) -> NDArray[np.uint8]:
    return np.asarray(image).transpose(1, 2, 0).astype(np.uint8)


def _legend(
    area: Axes, labels: LabelSet, maps: Sequence[Tensor], *, errors: bool = True, most: int = 24
) -> None:
    """Classes that are seen, the commonest of many."""
    counts = sum(np.bincount(np.asarray(m).ravel().astype(np.int64), minlength=256) for m in maps)
    seen = [n for n in range(labels.num_classes) if np.asarray(counts)[n]]
    kept = sorted(sorted(seen, key=lambda n: -np.asarray(counts)[n])[:most])
    handles: list[Patch | Line2D] = [
        Patch(
            facecolor=hex_of(labels.colors[n]),
            edgecolor="#bbbbbb",
            linewidth=0.4,
            label=plain(labels.names[n]),
        )
        for n in kept
    ]
    if np.asarray(counts)[labels.ignore_index]:
        handles.append(Patch(facecolor="white", edgecolor="black", lw=0.5, label="(ignored)"))
    if errors:
        handles.append(Patch(facecolor=WRONG, label="wrong"))
    columns = max(3, int(cast(Figure, area.figure).get_figwidth() / 1.15))
    area.legend(
        handles=handles,
        loc="upper left",
        ncols=columns,
        frameon=False,
        fontsize=SMALL - 1,
        columnspacing=1.0,
        handlelength=1.2,
    )


def _shorten(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else f"…{name[-limit + 1 :]}"
