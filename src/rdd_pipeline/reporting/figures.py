"""Figures as `matplotlib.figure.Figure` objects; nothing here opens a window or a pyplot state.

Suffixes: C classes, H rows, W columns of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.distillation.methods import METHODS

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
        axes[0].set_ylabel(plain(_shorten(row.name)), fontsize=SMALL)
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
        axes[0].set_ylabel(plain(_shorten(name)), fontsize=SMALL)
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
    shown = list(map(plain, names))
    axes.set_xticks(range(classes), shown, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(classes), shown)
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
    """Losses, validation mIoU, shares of pixels, learning rate over the iterations.

    A dashed line marks where a stage takes over from the one before. A panel without anything to
    show is left out, and a curve of one point is a point.

    Args:
        history: Rows with `iteration` and any of `loss`, the losses, `lr`, the shares of the
            stages' task losses (`tfe_share`, 1: TFE, 0: TSE), `val.miou` and statistics of the
            pixels (shares in [0, 1]); missing or NaN values are gaps.
    """
    series = _series(history)
    if not series:
        return empty_figure("No training history: the weights were imported.")
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    losses = sorted(filter(is_loss, series), key=lambda name: (name != "loss", name != "task"))
    if losses:
        panels.append((3.0, lambda axes: _draw_losses(axes, {n: series[n] for n in losses})))
    if "val.miou" in series:
        panels.append((2.0, lambda axes: _draw_miou(axes, *series["val.miou"])))
    shares = {name: points for name, points in series.items() if _is_share(name, points[1])}
    whole = {name: points for name, points in shares.items() if _class_of(name) is None}
    by_class = {name: points for name, points in shares.items() if name not in whole}
    if whole:
        height = max(2.0, 0.17 * len(whole))
        panels.append((height, lambda axes: _draw_shares(axes, whole, "% of the pixels")))
    for what, classes in _maps_of(by_class).items():
        height = 0.6 + 0.17 * len(classes)
        panels.append((height, lambda axes, w=what, c=classes: _draw_map(axes, w, c)))  # type: ignore[misc]
    if "lr" in series:
        panels.append((1.0, lambda axes: _draw_rate(axes, *series["lr"])))
    if not panels:
        return empty_figure("The training history holds nothing to draw.")
    heights = [height for height, _ in panels]
    figure = Figure(figsize=(9.5, 0.4 + 1.05 * sum(heights)), layout="constrained")
    areas = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    boundaries = _boundaries(series)
    for axes, (_, draw) in zip(areas, panels, strict=True):
        draw(axes)
        if not axes.collections:
            axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=SMALL)
        for boundary, _, _ in boundaries:
            axes.axvline(boundary, color="black", linestyle="--", linewidth=0.8)
    areas[-1].set_xlabel("iteration", fontsize=NORMAL)
    place = areas[0].get_xaxis_transform()
    for boundary, before, after in boundaries:
        areas[0].text(boundary, 1.01, f"{before}  ", ha="right", transform=place, fontsize=SMALL)
        areas[0].text(boundary, 1.01, f"  {after}", ha="left", transform=place, fontsize=SMALL)
    return figure


def is_loss(name: str) -> bool:
    """Whether a curve is a loss in the sense of the objective.

    That is the total, the task loss, a method's distillation loss, or a cross-entropy that is
    watched. What else a training says of its pixels is a share.
    """
    return name in {"loss", "task", "dice", "lovasz"} | _distillation_losses() or name.endswith(
        "_ce"
    )


def colorize(label: Tensor, labels: LabelSet) -> NDArray[np.uint8]:
    """(H, W, 3) picture of a label map; ignored pixels are white."""
    palette = np.full((256, 3), 255, np.uint8)
    palette[: labels.num_classes] = labels.colors
    picture: NDArray[np.uint8] = palette[_array(label).astype(np.uint8)]
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
    _note(axes, text)
    return figure


# ---- parts

Points = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Iterations and values of a curve."""

_ROWS_OF_A_MAP = 20
_NO_SHARES = {"lr", "images_per_second", "gradient_norm"}
_LABELS = {
    "loss": "total loss",
    "task": "task loss",
    "kd": "KD",
    "student_ce": "student's cross-entropy",
    "student_aux_ce": "student's auxiliary cross-entropy",
    "teacher_ce": "teacher's cross-entropy",
    "hard_student": "hard for the student",
    "hard_teacher": "hard for the teacher",
    "chosen": "chosen by TSE",
    "chosen_none": "batches with none chosen",
    "teacher_confidence": "mean weight of TFE",
}
_SHARE_COLORS = {
    "hard_student": STUDENT_ONLY,
    "hard_teacher": TEACHER_ONLY,
    "chosen": CHOSEN,
    "chosen_none": BOTH,
    "teacher_confidence": GREEN,
    "tfe_share": GRAY,
}


@cache
def _distillation_losses() -> frozenset[str]:
    return frozenset(name for method in METHODS.values() for name in method.weights)


def _is_share(name: str, values: NDArray[np.float64]) -> bool:
    if is_loss(name) or name in _NO_SHARES or name.startswith("val."):
        return False
    if name.endswith("_share") and not ((values > 0) & (values < 1)).any():
        return False  # the dashed line says it
    return bool(((values >= 0) & (values <= 1 + 1e-6)).all())


def _class_of(name: str) -> tuple[str, str] | None:
    """Share and class of a share of one class, as in `chosen_road`; None for other names."""
    bare = name.removeprefix("aux_")
    if bare in _SHARE_COLORS:
        return None
    stems = (stem for stem in ("hard_student", "hard_teacher", "chosen") if bare.startswith(stem))
    return next(((stem, bare[len(stem) :].lstrip("_.")) for stem in stems), None)


def _label(name: str) -> str:
    """The name in words."""
    if name in _LABELS:
        return _LABELS[name]
    if name.endswith("_share"):
        return f"share of the {name.removesuffix('_share').upper()} loss"
    bare = name.removeprefix("aux_")
    of_class = _class_of(name)
    text = (
        f"{of_class[1]}: {_LABELS[of_class[0]]}"
        if of_class
        else _LABELS.get(bare, bare.replace("_", " "))
    )
    return text + (" (auxiliary heads)" if bare != name else "")


def _curve(axes: Axes, points: Points, **style: Any) -> None:
    """A line, or a mark where there is one point only."""
    axes.plot(*points, marker="o" if len(points[0]) == 1 else "", markersize=4, **style)


def _legend(axes: Axes) -> None:
    """Beside the curves, not over them."""
    axes.legend(fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def _draw_losses(axes: Axes, series: Mapping[str, Points]) -> None:
    others = [name for name in series if name != "loss"]
    for name, points in series.items():
        round_, number = divmod(others.index(name), len(LINES)) if name in others else (0, 0)
        _curve(
            axes,
            points,
            color="black" if name == "loss" else LINES[number],
            linewidth=1.4 if name == "loss" else 0.9,
            # Dotted: cross-entropies that are watched but not trained on.
            linestyle=":" if name.endswith("_ce") else ("-", "-.", (0, (5, 1)))[round_ % 3],
            label=plain(_label(name)),
        )
    _legend(axes)
    values = np.concatenate([points[1] for points in series.values()])
    # Terms differ by orders of magnitude; zeros (a term switched off) forbid a log axis.
    if values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
    axes.set_ylabel("loss", fontsize=NORMAL)


def _draw_miou(axes: Axes, steps: NDArray[np.float64], shares: NDArray[np.float64]) -> None:
    values = 100 * shares
    best = int(np.argmax(values))
    axes.plot(steps, values, color=BLUE, marker="o", markersize=3, linewidth=1.2)
    axes.plot(steps[best], values[best], "o", color=ORANGE, markersize=6)
    axes.text(
        1.0,
        1.02,
        f"best {values[best]:.2f} at iteration {steps[best]:.0f}",
        transform=axes.transAxes,
        ha="right",
        fontsize=SMALL,
        color="#9A6700",
    )
    low, high = float(values.min()), float(values.max())
    if high - low < 1:  # a point of mIoU is seen as little, not as a collapse
        axes.set_ylim((low + high) / 2 - 0.6, (low + high) / 2 + 0.6)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel("val mIoU in %", fontsize=NORMAL)


def _draw_shares(axes: Axes, series: Mapping[str, Points], title: str) -> None:
    spare: list[Any] = [color for color in LINES if color not in _SHARE_COLORS.values()]
    bare = dict.fromkeys(name.removeprefix("aux_") for name in series)
    rest = [name for name in bare if name not in _SHARE_COLORS]
    colors: dict[str, Any] = dict(_SHARE_COLORS)
    if len(rest) > len(spare):
        spare = [hsv_to_rgb(n / len(rest), 0.85, 0.8 - 0.3 * (n % 2)) for n in range(len(rest))]
    colors |= dict(zip(rest, spare, strict=False))
    for name, (steps, values) in sorted(
        series.items(), key=lambda item: item[0].startswith("aux_")
    ):
        auxiliary = name.startswith("aux_")
        _curve(
            axes,
            (steps, 100 * values),
            color=colors[name.removeprefix("aux_")],
            linewidth=1.0,
            linestyle="--" if auxiliary else "-",
            label=plain(_label(name)),
        )
    _legend(axes)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel(title, fontsize=NORMAL)


def _maps_of(by_class: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """Curves of classes by what they are a share of: hard for whom, or chosen."""
    found: dict[str, dict[str, Points]] = {}
    for name, points in by_class.items():
        stem, class_name = cast(tuple[str, str], _class_of(name))
        auxiliary = " (auxiliary heads)" * name.startswith("aux_")
        found.setdefault(_LABELS[stem] + auxiliary, {})[class_name] = points
    chosen = _LABELS["chosen"]
    return {
        what: _telling(classes, chosen=what.startswith(chosen)) for what, classes in found.items()
    }


def _telling(classes: dict[str, Points], *, chosen: bool) -> dict[str, Points]:
    """All of some classes; of many those of which the least is chosen, or the most is hard."""
    by_share = sorted(classes, key=lambda name: float(classes[name][1].mean()), reverse=not chosen)
    kept = set(by_share[:_ROWS_OF_A_MAP])
    return {name: points for name, points in classes.items() if name in kept}


def _draw_map(axes: Axes, what: str, classes: Mapping[str, Points]) -> None:
    """A row for each class, dark where the share is large; gaps where the class was not seen."""
    steps = np.unique(np.concatenate([points[0] for points in classes.values()]))
    shares = np.full((len(classes), len(steps)), np.nan)
    for row, (at, values) in enumerate(classes.values()):
        shares[row, np.searchsorted(steps, at)] = 100 * values
    half = np.diff(steps).min() / 2 if len(steps) > 1 else 0.5
    edges = np.concatenate([[steps[0] - half], (steps[1:] + steps[:-1]) / 2, [steps[-1] + half]])
    picture = axes.pcolormesh(
        edges, np.arange(len(classes) + 1), shares, vmin=0, vmax=100, cmap="Blues", rasterized=True
    )
    axes.set_yticks(np.arange(len(classes)) + 0.5, list(map(plain, classes)))
    axes.invert_yaxis()
    axes.set_ylabel(f"{what},\n% of the class", fontsize=SMALL)
    bar = axes.inset_axes((1.02, 0.0, 0.02, 1.0))
    cast(Figure, axes.figure).colorbar(picture, cax=bar)
    bar.tick_params(labelsize=SMALL)


def _draw_rate(axes: Axes, steps: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    _curve(axes, (steps, values), color=GRAY, linewidth=1.2)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel("learning rate", fontsize=NORMAL)


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
        Patch(facecolor=_hex(labels.colors[number]), label=plain(labels.names[number]))
        for number in shown
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


def _boundaries(
    series: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> list[tuple[float, str, str]]:
    """Where the share of a stage falls below one: iteration, the stage and the next one."""
    chains = sorted({method.stages for method in METHODS.values()}, key=len)
    logged = [c for c in chains if all(f"{stage.name}_share" in series for stage in c[:-1])]
    found = []
    for stage, following in pairwise(logged[-1]):
        steps, shares = series[f"{stage.name}_share"]
        later = np.flatnonzero(shares < 1.0)
        if len(later) and later[0] > 0:
            boundary = float((steps[later[0] - 1] + steps[later[0]]) / 2)
            found.append((boundary, stage.name.upper(), following.name.upper()))
    return found


def _share(mask: NDArray[np.bool_], whole: NDArray[np.bool_]) -> str:
    total = int(whole.sum())
    return f"{100 * int(mask.sum()) / total:.1f} %" if total else "0 %"


def _shorten(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else f"…{name[-limit + 1 :]}"


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.asarray(tensor.detach().cpu().numpy())
