"""Curves of a training: losses, validation, shares of pixels, learning rate.

Figures are `matplotlib.figure.Figure` objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from colorsys import hsv_to_rgb
from functools import cache
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from rdd_pipeline.distillation.methods import METHODS
from rdd_pipeline.reporting.figures import (
    BLUE,
    BOTH,
    CHOSEN,
    GRAY,
    GREEN,
    LINES,
    NORMAL,
    ORANGE,
    SMALL,
    STUDENT_ONLY,
    TEACHER_ONLY,
    empty_figure,
    plain,
)

Handovers = Sequence[tuple[int, str, str]]
"""Last iteration of a stage, its name and that of the next one."""


def training_curves(history: Sequence[Mapping[str, float]], handovers: Handovers = ()) -> Figure:
    """Losses, validation mIoU, shares of pixels, learning rate over the iterations.

    A panel without anything to show is left out, and a curve of one point is a point. Shares of
    single classes are `difficulty_figure`'s.

    Args:
        history: Rows with `iteration` and any of `loss`, the losses, `lr`, the shares of the
            stages' task losses (`tfe_share`, 1: TFE, 0: TSE), `val.miou` and statistics of the
            pixels (shares in [0, 1]); missing or NaN values are gaps.
        handovers: Get a dashed line.
    """
    series = series_of(history)
    if not series:
        return empty_figure("No training history: the weights were imported.")
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    losses = sorted(filter(is_loss, series), key=lambda name: (name != "loss", name != "task"))
    if losses:
        height = max(3.0, 0.2 * len(losses))
        panels.append((height, lambda axes: _draw_losses(axes, {n: series[n] for n in losses})))
    if "val.miou" in series:
        panels.append((2.0, lambda axes: _draw_miou(axes, *series["val.miou"])))
    shares = {name: points for name, points in series.items() if _is_share(name, points[1])}
    for heads, title in _HEADS.items():
        of_heads = {n: points for n, points in shares.items() if n.startswith("aux_") == heads}
        if of_heads:
            height = max(2.0, 0.2 * len(of_heads))
            panels.append((height, lambda a, s=of_heads, t=title: _draw_shares(a, s, t)))  # type: ignore[misc]
    if "lr" in series:
        panels.append((1.0, lambda axes: _draw_rate(axes, *series["lr"])))
    if not panels:
        return empty_figure("The training history holds nothing to draw.")
    heights = [height for height, _ in panels]
    figure = Figure(figsize=(9.5, 0.4 + 1.05 * sum(heights)), layout="constrained")
    areas = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (_, draw) in zip(areas, panels, strict=True):
        draw(axes)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=SMALL)
        mark_handovers(axes, handovers, named=axes is areas[0])
    areas[-1].set_xlabel("iteration", fontsize=NORMAL)
    return figure


def is_loss(name: str) -> bool:
    """Whether a curve is a loss in the sense of the objective.

    That is the total, the task loss, a method's distillation loss, or a cross-entropy that is
    watched. What else a training says of its pixels is a share.
    """
    return name in {"loss", "task", "dice", "lovasz"} | _distillation_losses() or name.endswith(
        "_ce"
    )


def series_of(history: Sequence[Mapping[str, float]]) -> dict[str, Points]:
    """(iterations, values) by name, gaps left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in history:
        for name, value in row.items():
            if name != "iteration" and isinstance(value, int | float) and math.isfinite(value):
                # TSE and TFE call the same loss by two names.
                key = _SAME.get(name, name)
                found.setdefault(key, []).append((float(row["iteration"]), float(value)))
    return {
        name: (np.array([p[0] for p in points]), np.array([p[1] for p in points]))
        for name, points in found.items()
    }


def mark_handovers(axes: Axes, handovers: Handovers, *, named: bool) -> None:
    """A dashed line where one stage ends, with the names of both above it."""
    place = axes.get_xaxis_transform()
    for last, before, after in handovers:
        line = axes.axvline(last + 0.5, color="black", linestyle="--", linewidth=0.8)
        line.set_path_effects([withStroke(linewidth=2.0, foreground="white")])  # on dark areas
        for text, side in ((f"{before}  ", "right"), (f"  {after}", "left")) if named else ():
            axes.text(last + 0.5, 1.01, text, ha=side, transform=place, fontsize=SMALL)


# ---- parts

Points = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Iterations and values of a curve."""

_HEADS = {False: "% of the pixels", True: "auxiliary heads,\n% of the pixels"}
_NO_SHARES = {"lr", "images_per_second", "gradient_norm"}
_SAME = {"aux_student_ce": "student_aux_ce"}
_LABELS = {
    "loss": "total loss",
    "task": "task loss",
    "kd": "KD",
    "dice": "Dice",
    "lovasz": "Lovász",
    "student_ce": "student's cross-entropy",
    "student_aux_ce": "student's auxiliary cross-entropy",
    "teacher_ce": "teacher's cross-entropy",
    "aux_teacher_ce": "teacher's auxiliary cross-entropy",
    "hard_student": "hard for the student",
    "hard_teacher": "hard for the teacher",
    "chosen": "chosen by TSE",
    "chosen_none": "batches with none chosen",
    "teacher_confidence": "mean weight of TFE in %",
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
    if is_loss(name) or name in _NO_SHARES or name.startswith("val.") or "." in name:
        return False
    if name.endswith("_share") and not ((values > 0) & (values < 1)).any():
        return False  # the dashed line says it
    return bool(((values >= 0) & (values <= 1 + 1e-6)).all())


def _label(name: str) -> str:
    """The name in words."""
    if name in _LABELS:
        return _LABELS[name]
    if name.endswith("_share"):
        return f"share of the {name.removesuffix('_share').upper()} loss"
    bare = name.removeprefix("aux_")
    return _LABELS.get(bare, bare.replace("_", " "))


def _curve(axes: Axes, points: Points, **style: Any) -> None:
    """A line, or a mark where there is one point only."""
    axes.plot(*points, marker="o" if len(points[0]) == 1 else "", markersize=4, **style)


def _legend(axes: Axes) -> None:
    """Beside the curves, not over them."""
    axes.legend(fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def _colors(names: Sequence[str], fixed: Mapping[str, str]) -> dict[str, Any]:
    """A color for each curve, no two of them alike."""
    rest = [name for name in names if name not in fixed]
    spare: list[Any] = [color for color in LINES if color not in fixed.values()]
    if len(rest) > len(spare):
        spare = [hsv_to_rgb(n / len(rest), 0.85, 0.8 - 0.3 * (n % 2)) for n in range(len(rest))]
    return {**fixed, **dict(zip(rest, spare, strict=False))}


def _draw_losses(axes: Axes, series: Mapping[str, Points]) -> None:
    colors = _colors(list(series), {"loss": "black"})
    # What learns without a teacher is not called the student: it may be the teacher.
    alone = series.keys() <= {"loss", "task", "dice", "lovasz", "student_ce", "student_aux_ce"}
    for name, points in series.items():
        label = _label(name).removeprefix("student's ") if alone else _label(name)
        _curve(
            axes,
            points,
            color=colors[name],
            linewidth=2.2 if name == "loss" else 1.0,  # it is seen below the task loss
            # Dotted: cross-entropies that are watched but not trained on.
            linestyle=":" if name.endswith("_ce") else "-",
            label=plain(label),
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
    bare = {name: name.removeprefix("aux_") for name in series}
    colors = _colors(list(bare.values()), _SHARE_COLORS)
    for number, (name, (steps, values)) in enumerate(series.items()):
        _curve(
            axes,
            (steps, 100 * values),
            color=colors[bare[name]],
            linewidth=max(2.6 - 0.5 * number, 0.8),  # equal ones lie over each other
            label=plain(_label(name)),
        )
    _legend(axes)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel(title, fontsize=NORMAL)


def _draw_rate(axes: Axes, steps: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    _curve(axes, (steps, values), color=GRAY, linewidth=1.2)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel("learning rate", fontsize=NORMAL)
