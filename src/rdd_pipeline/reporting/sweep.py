"""What a sweep has found: the score over each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rdd_pipeline.reporting.figures import BLUE, GRAY, NORMAL, ORANGE, SMALL, plain

Rows = Sequence[Mapping[str, Any]]

METRICS = {"val.miou": "val mIoU", "val.pixel_accuracy": "val pixel accuracy"}
"""What people call what a sweep chooses by."""

COLUMNS, MOST = 3, 9
"""Panels side by side, and in all."""
WIDE = 30
"""From this ratio of its largest to its smallest value on, an axis is logarithmic."""


def sweep_figure(rows: Rows, parameters: Sequence[str], metric: str) -> Figure:
    """One panel a parameter: the score of every trial, the best marked, failed ones below.

    Args:
        rows: Of the pipeline `sweep`, the best first.
        parameters: Their columns with settings; of many the first `MOST` are shown.
        metric: Their column with the score, in [0, 1].
    """
    names = list(parameters)[:MOST]
    across = min(COLUMNS, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(3.4 * across + 0.4, 2.9 * down + 0.2), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, rows, name, metric)
    for axes in panels[::across]:
        axes.set_ylabel(f"{METRICS[metric]} in %", fontsize=NORMAL)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=SMALL, frameon=False, ncols=3, loc="outside upper right"
    )
    return figure


def _panel(axes: Axes, rows: Rows, name: str, metric: str) -> None:
    places = _places(axes, [str(row[name]) for row in rows])
    good = [number for number, row in enumerate(rows) if not _failed(row)]
    scores = [100 * float(rows[number][metric]) for number in good]
    spread = [100 * float(rows[number].get("deviation", math.nan)) for number in good]
    if any(map(math.isfinite, spread)):
        axes.errorbar(
            [places[n] for n in good], scores, yerr=spread, fmt="none", ecolor=GRAY, linewidth=0.8
        )
    axes.plot([places[n] for n in good], scores, "o", color=BLUE, markersize=5, label="trial")
    axes.plot(
        places[good[0]], scores[0], "*", color=ORANGE, markersize=13, label="best",
        markeredgecolor="black", markeredgewidth=0.5,
    )  # fmt: skip
    failed = [places[number] for number, row in enumerate(rows) if _failed(row)]
    if failed:
        bottom = axes.get_xaxis_transform()
        axes.plot(
            failed, [0.03] * len(failed), "x", color="black", transform=bottom, label="failed"
        )
    axes.set_xlabel(plain(name), fontsize=NORMAL)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL, length=2, which="both")


def _places(axes: Axes, values: Sequence[str]) -> list[float]:
    """Where values stand on the axis: numbers at their place, others side by side."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        different = list(dict.fromkeys(sorted(values)))
        axes.set_xticks(range(len(different)), [plain(value) for value in different])
        axes.set_xlim(-0.5, len(different) - 0.5)
        return [float(different.index(value)) for value in values]
    if min(numbers) > 0 and max(numbers) / min(numbers) >= WIDE:
        axes.set_xscale("log")
    return numbers


def _failed(row: Mapping[str, Any]) -> bool:
    """An empty cell of a table that was read is NaN."""
    return isinstance(row["failed"], str) and bool(row["failed"])
