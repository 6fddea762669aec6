"""Figures as `matplotlib.figure.Figure` objects; nothing here opens a window or a pyplot state.

Suffixes: C classes, H rows, W columns of an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline.segmentation.labels import LabelSet

# Colors that people with any kind of color vision tell apart (Okabe and Ito 2008).
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072B2", "#E69F00", "#009E73", "#AA4499", "#888888"
STUDENT_ONLY, TEACHER_ONLY, BOTH, CHOSEN = BLUE, ORANGE, "#303030", PURPLE
LINES = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#D55E00", "#332288", "#999933")

PANEL_WIDTH = 2.5
"""Inches of one picture in a grid."""

SMALL, NORMAL = 8, 9
"""Font sizes in points."""


@dataclass(frozen=True)
class RddRow:
    """One image of `rdd_figure`.

    Attributes:
        name: Shown beside the row.
        image: (3, h, w) uint8 RGB; its size may differ from the label's.
        label: (H, W) train ids.
        prediction: (H, W) the student's classes.
        confidence: (H, W) weight map of TFE-RDD; None: the teacher has no auxiliary head.
        hard_student: (H, W) bool, hard for the student.
        hard_teacher: (H, W) bool, hard for the teacher.
        chosen: (H, W) bool, what TSE-RDD's task loss looks at.
    """

    name: str
    image: Tensor
    label: Tensor
    prediction: Tensor
    confidence: Tensor | None
    hard_student: Tensor
    hard_teacher: Tensor
    chosen: Tensor


def rdd_figure(rows: Sequence[RddRow], labels: LabelSet) -> Figure:
    """What RDD sees: one row per image, from the image to the pixels the loss looks at.

    Columns: image, label, the student's prediction, the teacher's weight map, pixels hard for the
    student only, the teacher only and both, and the chosen pixels.
    """
    if not rows:
        return empty_figure("No image was asked for (evaluation.figure_images is 0).")
    titles = (
        "image",
        "label",
        "student's prediction",
        "TFE weight",
        "hard pixels",
        "chosen by TSE",
    )
    figure, panels, legends = _grid(rows[0].image, len(rows), titles, legends=(3, 3))
    for row, axes in zip(rows, panels, strict=True):
        valid = _array(row.label) != labels.ignore_index
        student, teacher = _array(row.hard_student), _array(row.hard_teacher)
        backdrop = _faded(row.image)
        _show(axes[0], _rgb(row.image))
        _show(axes[1], colorize(row.label, labels))
        _show(axes[2], colorize(row.prediction, labels))
        if row.confidence is None:
            _note(axes[3], "the teacher has no\nauxiliary head")
        else:
            axes[3].imshow(
                _array(row.confidence), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto"
            )
        _show(axes[4], backdrop)
        _overlay(axes[4], student & ~teacher, STUDENT_ONLY)
        _overlay(axes[4], teacher & ~student, TEACHER_ONLY)
        _overlay(axes[4], student & teacher, BOTH)
        _show(axes[5], backdrop)
        _overlay(axes[5], _array(row.chosen), CHOSEN)
        right = _share((_array(row.prediction) == _array(row.label)) & valid, valid)
        axes[0].set_ylabel(_shorten(row.name), fontsize=SMALL)
        axes[2].set_xlabel(f"{right} of the pixels right", fontsize=SMALL)
        axes[4].set_xlabel(
            f"student {_share(student, valid)}, teacher {_share(teacher, valid)}", fontsize=SMALL
        )
        axes[5].set_xlabel(f"{_share(_array(row.chosen), valid)} of the pixels", fontsize=SMALL)
    _class_legend(
        legends[0], labels, [row.label for row in rows] + [row.prediction for row in rows]
    )
    legends[1].legend(
        handles=[
            Patch(color=STUDENT_ONLY, label="hard for the student only"),
            Patch(color=TEACHER_ONLY, label="hard for the teacher only"),
            Patch(color=BOTH, label="hard for both"),
            Patch(color=CHOSEN, label="chosen"),
        ],
        loc="upper right",
        ncols=2,
        frameon=False,
        fontsize=SMALL,
    )
    bar = figure.colorbar(
        ScalarMappable(Normalize(0.0, 1.0), cmap="viridis"),
        cax=legends[1].inset_axes((0.02, 0.45, 0.3, 0.16)),
        orientation="horizontal",
    )
    bar.ax.tick_params(labelsize=SMALL - 1, length=2)
    bar.ax.set_title("TFE weight", fontsize=SMALL)
    return figure


def dataset_preview(samples: Sequence[tuple[str, Tensor, Tensor]], labels: LabelSet) -> Figure:
    """A few images with their labels: plain, as an overlay, and the label alone.

    Args:
        samples: Name, (3, h, w) uint8 image and (H, W) train ids of each.
        labels: Names and colors.
    """
    if not samples:
        return empty_figure("The data set has no training images.")
    titles = ("image", "label over image", "label")
    figure, panels, legends = _grid(samples[0][1], len(samples), titles, legends=(3,), width=3.0)
    for (name, image, label), axes in zip(samples, panels, strict=True):
        _show(axes[0], _rgb(image))
        _show(axes[1], _faded(image, keep=0.8))
        rgba = np.dstack([colorize(label, labels), np.full(label.shape, 140, np.uint8)])
        rgba[_array(label) == labels.ignore_index, 3] = 0
        _show(axes[1], rgba)
        _show(axes[2], colorize(label, labels))
        ignored = _array(label) == labels.ignore_index
        axes[0].set_ylabel(_shorten(name), fontsize=SMALL)
        axes[2].set_xlabel(f"{_share(ignored, np.ones_like(ignored))} ignored", fontsize=SMALL)
    _class_legend(legends[0], labels, [label for _, _, label in samples])
    return figure


def confusion_figure(matrix: Tensor, names: Sequence[str]) -> Figure:
    """Confusion matrix with every row divided by its label's pixels, and the IoU of each class.

    Args:
        matrix: (C, C) counts, rows are labels.
        names: C class names.

    Raises:
        ValueError: As many names as classes are needed.
    """
    counts = _array(matrix).astype(np.float64)
    if counts.shape != (len(names), len(names)):
        raise ValueError(
            f"A confusion matrix of shape {counts.shape} needs {len(counts)} class names, found "
            f"{len(names)}."
        )
    if not counts.sum():
        return empty_figure("No labeled pixel was evaluated.")
    classes = len(names)
    with np.errstate(invalid="ignore"):
        shares = counts / counts.sum(1, keepdims=True)
        hits = counts.diagonal()
        iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    side = max(3.5, 0.42 * classes + 1.5) if classes <= 30 else 10.0 + 0.07 * classes
    figure = Figure(figsize=(side + 2.0, side), layout="constrained")
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=(classes, max(2, classes // 4)))
    picture = axes.imshow(shares, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
    if classes <= 30:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                axes.text(
                    column,
                    row,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=SMALL - 1,
                    color="white" if share > 0.6 else "black",
                )
    font = SMALL if classes <= 30 else max(4.5, 220 / classes)
    axes.set_xticks(range(classes), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(classes), names)
    axes.tick_params(labelsize=font, length=2)
    axes.set_xlabel("prediction", fontsize=NORMAL)
    axes.set_ylabel("label", fontsize=NORMAL)
    axes.set_title("% of the label's pixels", fontsize=NORMAL)
    bars.barh(range(classes), np.nan_to_num(100 * iou), color=BLUE, height=0.7)
    for row, value in enumerate(iou if classes <= 60 else ()):
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
    figure.colorbar(picture, ax=[axes, bars], shrink=0.4, aspect=30, pad=0.01, ticks=[0, 0.5, 1])
    return figure


def training_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Losses, validation mIoU, hard and chosen pixels, learning rate over the iterations.

    A dashed line marks where TSE-RDD takes over from TFE-RDD.

    Args:
        history: Rows with `iteration` and any of `loss`, the loss terms, `lr`, `tfe_share`
            (1: TFE, 0: TSE), `hard_student`, `hard_teacher`, `chosen` (shares) and `val.miou`;
            missing or NaN values are gaps.
    """
    series = _series(history)
    if not series:
        return empty_figure("No training history: the weights were imported.")
    shares = [name for name in _SHARES if name in series]
    figure = Figure(figsize=(8.0, 6.4 + (1.6 if shares else 0.0)), layout="constrained")
    heights = (3, 2, 1.5, 1) if shares else (3, 2, 1)
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    losses, miou, rate = panels[0], panels[1], panels[-1]
    terms = [name for name in series if name not in _NOT_LOSSES and not name.startswith("val.")]
    for number, name in enumerate(sorted(terms, key=lambda name: name != "loss")):
        losses.plot(
            *series[name],
            color="black" if name == "loss" else LINES[(number - 1) % len(LINES)],
            linewidth=1.4 if name == "loss" else 0.9,
            # Cross-entropies that are watched but not trained on.
            linestyle=":" if name.endswith("_ce") else "-",
            label=_LABELS.get(name, name),
        )
    if losses.lines:
        losses.legend(fontsize=SMALL, frameon=False, ncols=3)
        values = np.concatenate([np.asarray(line.get_ydata()) for line in losses.lines])
        # Terms differ by orders of magnitude; zeros (a term switched off) forbid a log axis.
        if values.min() > 0 and values.max() > 30 * values.min():
            losses.set_yscale("log")
    losses.set_ylabel("loss", fontsize=NORMAL)
    for name in shares:
        steps, values = series[name]
        panels[2].plot(steps, 100 * values, color=_SHARES[name], linewidth=1.0, label=_LABELS[name])
    if shares:
        panels[2].legend(fontsize=SMALL, frameon=False, ncols=3)
        panels[2].set_ylabel("% of the pixels", fontsize=NORMAL)
    if "val.miou" in series:
        steps, values = series["val.miou"]
        best = int(np.argmax(values))
        miou.plot(steps, 100 * values, color=BLUE, marker="o", markersize=3, linewidth=1.2)
        miou.plot(steps[best], 100 * values[best], "o", color=ORANGE, markersize=6)
        miou.annotate(
            f"best {100 * values[best]:.2f}",
            (steps[best], 100 * values[best]),
            xytext=(-6, -12),
            textcoords="offset points",
            fontsize=SMALL,
            ha="right",
        )
    miou.set_ylabel("val mIoU in %", fontsize=NORMAL)
    if "lr" in series:
        rate.plot(*series["lr"], color=GRAY, linewidth=1.2)
    rate.set_ylabel("learning rate", fontsize=NORMAL)
    rate.set_xlabel("iteration", fontsize=NORMAL)
    boundary = _boundary(series)
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=SMALL)
        if boundary is not None:
            axes.axvline(boundary, color="black", linestyle="--", linewidth=0.8)
    if boundary is not None:
        place = losses.get_xaxis_transform()
        losses.text(boundary, 1.01, "TFE  ", ha="right", transform=place, fontsize=SMALL)
        losses.text(boundary, 1.01, "  TSE", ha="left", transform=place, fontsize=SMALL)
    return figure


def class_shares(statistics: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of the labeled pixels of every class, one bar per split, on a logarithmic axis.

    Args:
        statistics: Rows of `segmentation.statistics.label_statistics`: `split`, `class`, `share`.
    """
    rows = [row for row in statistics if not str(row["class"]).startswith("(")]
    if not rows:
        return empty_figure("The data set has no labeled pixels.")
    splits = list(dict.fromkeys(str(row["split"]) for row in rows))
    names = list(dict.fromkeys(str(row["class"]) for row in rows))
    shares = {(str(row["split"]), str(row["class"])): float(row["share"]) for row in rows}
    present = [share for share in shares.values() if share > 0]
    figure = Figure(figsize=(6.5, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(splits)
    floor = 100 * min(present, default=1.0) / 2
    for number, split in enumerate(splits):
        values = np.array([100 * shares.get((split, name), 0.0) for name in names])
        places = np.arange(len(names)) + (number - (len(splits) - 1) / 2) * height
        axes.barh(
            places,
            np.maximum(values - floor, 0),
            height,
            left=floor,
            color=LINES[number % len(LINES)],
            label=split,
        )
        for place, value in zip(places, values, strict=True):
            if not value:
                axes.text(floor, place, " none", va="center", fontsize=SMALL - 2, color="#B00020")
    axes.set_xscale("log")
    axes.set_xlim(floor, 100)
    axes.set_yticks(range(len(names)), names, fontsize=SMALL)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    axes.set_xlabel("share of the labeled pixels", fontsize=NORMAL)
    axes.legend(fontsize=SMALL, frameon=False)
    return figure


def colorize(label: Tensor, labels: LabelSet) -> NDArray[np.uint8]:
    """(H, W, 3) picture of a label map; ignored pixels are white."""
    palette = np.full((256, 3), 255, np.uint8)
    palette[: labels.num_classes] = labels.colors
    picture: NDArray[np.uint8] = palette[_array(label).astype(np.uint8)]
    return picture


def empty_figure(text: str) -> Figure:
    """A figure that says why there is nothing to see."""
    figure = Figure(figsize=(5.0, 1.2))
    axes = figure.subplots()
    axes.axis("off")
    _note(axes, text)
    return figure


# ---- parts

_SHARES = {"hard_student": STUDENT_ONLY, "hard_teacher": TEACHER_ONLY, "chosen": CHOSEN}
_NOT_LOSSES = {"lr", "tfe_share", "images_per_second", "chosen_none", *_SHARES}
_LABELS = {
    "loss": "total loss",
    "task": "task loss",
    "kd": "KD",
    "student_ce": "student's cross-entropy",
    "student_aux_ce": "student's auxiliary cross-entropy",
    "teacher_ce": "teacher's cross-entropy",
    "hard_student": "hard for the student",
    "hard_teacher": "hard for the teacher",
    "chosen": "chosen",
}


def _grid(
    image: Tensor, rows: int, titles: Sequence[str], *, legends: Sequence[int], width: float = 0.0
) -> tuple[Figure, list[list[Axes]], list[Axes]]:
    """A grid of pictures without ticks, and below it areas for legends, `legends` columns wide."""
    width = width or PANEL_WIDTH
    height = width * image.shape[-2] / image.shape[-1]
    bottom = 0.7
    figure = Figure(
        figsize=(len(titles) * (width + 0.08) + 0.3, rows * (height + 0.22) + 0.3 + bottom),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr,call-arg]
    grid = GridSpec(rows + 1, len(titles), figure, height_ratios=[height + 0.22] * rows + [bottom])
    panels = [
        [figure.add_subplot(grid[row, column]) for column in range(len(titles))]
        for row in range(rows)
    ]
    for line in panels:
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=NORMAL)
    areas, start = [], 0
    for columns in legends:
        area = figure.add_subplot(grid[rows, start : start + columns])
        area.axis("off")
        areas.append(area)
        start += columns
    return figure, panels, areas


def _show(axes: Axes, picture: NDArray[np.uint8]) -> None:
    """Fill the axes: image and label may differ in size, and lie over each other all the same."""
    axes.imshow(picture, aspect="auto", extent=(0, 1, 0, 1), interpolation="nearest")


def _overlay(axes: Axes, mask: NDArray[np.bool_], color: str) -> None:
    rgba = np.zeros((*mask.shape, 4), np.float32)
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    rgba[mask] = (red, green, blue, 1.0)
    axes.imshow(rgba, aspect="auto", extent=(0, 1, 0, 1), interpolation="nearest")


def _rgb(image: Tensor) -> NDArray[np.uint8]:
    return _array(image).transpose(1, 2, 0).astype(np.uint8)


def _faded(image: Tensor, keep: float = 0.35) -> NDArray[np.uint8]:
    """The image in pale gray, so that colors over it are seen."""
    gray = _rgb(image).mean(axis=2, keepdims=True)
    pale = 255 - keep * (255 - gray)
    return np.repeat(pale, 3, axis=2).astype(np.uint8)


def _class_legend(area: Axes, labels: LabelSet, maps: Sequence[Tensor]) -> None:
    """Name the colors; of a large label set only the classes that are seen, the commonest first."""
    values, counts = np.unique(
        np.concatenate([_array(label).ravel() for label in maps]), return_counts=True
    )
    frequency = dict(zip(values.tolist(), counts.tolist(), strict=True))
    shown = list(range(labels.num_classes))
    if len(shown) > 24:
        seen = [number for number in shown if number in frequency]
        shown = sorted(sorted(seen, key=lambda number: -frequency[number])[:24])
    handles = [
        Patch(facecolor=_hex(labels.colors[number]), label=labels.names[number]) for number in shown
    ]
    if labels.ignore_index in frequency:
        handles.append(
            Patch(facecolor="white", edgecolor="black", linewidth=0.5, label="(ignored)")
        )
    area.legend(
        handles=handles,
        loc="upper left",
        ncols=6,
        frameon=False,
        fontsize=SMALL,
        columnspacing=1.0,
        handlelength=1.2,
    )


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=SMALL, transform=axes.transAxes)


def _series(
    history: Sequence[Mapping[str, float]],
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(iterations, values) by name, gaps left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in history:
        for name, value in row.items():
            if name != "iteration" and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append((float(row["iteration"]), float(value)))
    return {
        name: (np.array([p[0] for p in points]), np.array([p[1] for p in points]))
        for name, points in found.items()
    }


def _boundary(
    series: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> float | None:
    """Iteration at which the share of TFE falls below one; None if there is no such point."""
    if "tfe_share" not in series:
        return None
    steps, shares = series["tfe_share"]
    later = np.flatnonzero(shares < 1.0)
    if not len(later) or later[0] == 0:
        return None
    return float((steps[later[0] - 1] + steps[later[0]]) / 2)


def _share(mask: NDArray[np.bool_], whole: NDArray[np.bool_]) -> str:
    total = int(whole.sum())
    return f"{100 * int(mask.sum()) / total:.1f} %" if total else "0 %"


def _shorten(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else f"…{name[-limit + 1 :]}"


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.asarray(tensor.detach().cpu().numpy())
