"""Accuracy over latency: which network none beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rdd_pipeline.reporting.comparison import place
from rdd_pipeline.reporting.figures import GRAY, NORMAL, SMALL, empty_figure, plain

Rows = Sequence[Mapping[str, Any]]

MARKERS = {"eager": "o", "compiled": "s", "onnx": "^", "int8": "v"}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (latency, score) that no other beats in both, by latency."""
    best: list[tuple[float, float]] = []
    for latency, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((latency, score))
    return best


def pareto_figure(rows: Rows) -> Figure:
    """MIoU over the latency of one image, one panel for each device and number of threads.

    The mIoU of int8 is the float network's: what a file loses is in its export's verdict.

    Args:
        rows: Of the pipeline `benchmark`.
    """
    places = sorted({place(row) for row in rows})
    if not places:
        return empty_figure("Nothing was timed.")
    figure = Figure(figsize=(7.5, 3.4 * len(places)), layout="constrained")
    panels = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    for axes, where in zip(panels, places, strict=True):
        chosen = [row for row in rows if place(row) == where]
        points = [(float(row["latency"]), float(row["miou"])) for row in chosen]
        best = front(points)
        axes.plot(*zip(*best, strict=True), color=GRAY, linewidth=0.8, drawstyle="steps-post")
        for runtime, marker in MARKERS.items():
            own = [row for row in chosen if row["runtime"] == runtime]
            if own:
                axes.errorbar(
                    [row["latency"] for row in own],
                    [row["miou"] for row in own],
                    xerr=[
                        [row["latency"] - row["lower"] for row in own],
                        [row["upper"] - row["latency"] for row in own],
                    ],
                    fmt=marker,
                    label=runtime,
                )
        for row, point in zip(chosen, points, strict=True):
            if point in best:
                axes.annotate(
                    plain(str(row["title"])), point, xytext=(4, 4), textcoords="offset points",
                    fontsize=SMALL,
                )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_title(where, fontsize=NORMAL, loc="left")
        axes.set_ylabel(f"{plain(str(chosen[0]['split']))} mIoU in %", fontsize=NORMAL)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=SMALL, length=2, which="both")
    panels[0].legend(fontsize=SMALL, frameon=False)
    panels[-1].set_xlabel(
        "ms an image, median and quartiles (less is better); int8 at the float network's mIoU",
        fontsize=NORMAL,
    )
    return figure
