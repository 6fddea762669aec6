"""Figures over the rows of `comparison`: scores, classes, accuracy over cost; and as SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from rdd_pipeline.distillation.methods import STAGES
from rdd_pipeline.reporting.comparison import (
    finished,
    metric_title,
    seed_values,
    side_by_side,
    split_names,
    verdict,
)
from rdd_pipeline.reporting.figures import BLUE, GRAY, NORMAL, ORANGE, SMALL, empty_figure, plain

Rows = Sequence[Mapping[str, Any]]

MOST_CLASSES = 40
"""Columns of the class figure; of more classes those that differ most are shown."""


def iou_bars(table: Rows) -> Figure:
    """Every method's metric with the spread over seeds; one panel per comparison and split.

    The gain over the student alone, trained with the same seeds, is in parentheses; ``n.s.``: its
    interval covers 0. Weights on the way (the TFE stage) are left out beside finished students.

    Args:
        table: Rows of `comparison.compare`, also after they were read from a file.
    """
    groups = [finished(group) for group in side_by_side(table)]
    if not groups:
        return empty_figure("Nothing has been trained yet.")
    splits = split_names(row for group in groups for row in group)
    if not splits:
        return empty_figure("Nothing was evaluated.")
    sizes = [len(group) for group in groups]
    figure = Figure(
        figsize=(2.2 + 4.0 * len(splits), 1.1 + sum(0.7 + 0.28 * size for size in sizes)),
        layout="constrained",
    )
    panels = figure.subplots(
        len(groups), len(splits), squeeze=False, height_ratios=[size + 1.5 for size in sizes]
    )
    for group, line in zip(groups, panels, strict=True):
        for split, axes in zip(splits, line, strict=True):
            _bar_panel(axes, group, split)
            heading = f"{plain(split)} {metric_title(group)} in %"
            if len(groups) > 1 and axes is line[0]:
                heading = f"{_network(group)}\n{heading}"
            axes.set_title(heading, fontsize=NORMAL, loc="left")
            if axes is not line[0]:
                axes.set_yticklabels([])
    _bar_legend(figure, [row for group in groups for row in group], len(splits))
    return figure


def class_figure(table: Rows) -> Figure:
    """IoU of every class and method as numbers, colored by the gain over the student alone.

    Rows that are compared with nothing (teacher, student alone) stay gray.

    Args:
        table: Rows of `comparison.compare_classes`, also after they were read from a file.
    """
    groups = [finished(group) for group in side_by_side(table)]
    if not groups:
        return empty_figure("No method was evaluated by class.")
    names = [_class_names(group) for group in groups]
    columns = max(map(len, names))
    longest = max(len(name) for shown in names for name in shown)
    heights = [0.27 * len(group) + 0.07 * longest + 0.6 for group in groups]
    figure = Figure(
        figsize=(max(3.0 + 0.44 * columns, 6.0), sum(heights) + 0.5), layout="constrained"
    )
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    gains = [
        abs(value)
        for group, shown in zip(groups, names, strict=True)
        for value in _matrix(group, shown, "gain").ravel()
        if math.isfinite(value)
    ]
    # At least one point: noise is not to look like an effect.
    limit = max(1.0, *gains) if gains else 1.0
    colors = ScalarMappable(Normalize(-limit, limit), cmap="RdBu")
    for axes, group, shown in zip(panels, groups, names, strict=True):
        _class_panel(axes, group, shown, colors)
    if gains:
        bar = figure.colorbar(colors, ax=list(panels), shrink=0.8, aspect=25, pad=0.01)
        bar.set_label("points of IoU more than the student alone", fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL, length=2)
    return figure


def cost_figure(table: Rows) -> Figure:
    """Accuracy over speed of training, one panel per comparison; students only.

    Args:
        table: Rows of `comparison.compare`, also after they were read from a file.
    """
    groups = []
    for group in side_by_side(table):
        splits = split_names(group)
        if not splits:
            continue
        points = [
            (float(row["images_per_second"]), float(row[f"{splits[-1]}_score"]), row)
            for row in finished(group)
            if row["method"] != "teacher"
            and math.isfinite(float(row.get("images_per_second") or math.nan))
            and math.isfinite(float(row.get(f"{splits[-1]}_score", math.nan)))
        ]
        if points:
            groups.append((splits[-1], points))
    if not groups:
        return empty_figure("No student's speed of training is known.")
    heights = [max(2.6, 0.6 + 0.2 * len(points)) for _, points in groups]
    figure = Figure(figsize=(7.5, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (split, points) in zip(panels, groups, strict=True):
        _cost_panel(axes, split, points)
        if len(groups) > 1:
            axes.set_title(_network([points[0][2]]), fontsize=NORMAL, loc="left")
    panels[-1].set_xlabel("images/s of training (more is cheaper)", fontsize=NORMAL)
    return figure


def reliability_figure(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over confidence of each method's first seed on its last split; one panel each.

    Bars are the bins' accuracy, the gray line is what a calibrated network has, the orange steps
    are the share of the pixels in the bins.

    Args:
        results: Metrics files; those without calibration are left out.
    """
    shown: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {}
    for result in results:
        about = result["about"]
        *_, (split, scores) = result["splits"].items()
        if about["method"] not in STAGES and scores.get("calibration"):
            title = f"{_label({**about, 'title': about.get('title', about['method'])})}, {split}"
            shown.setdefault((about["method"], about["protocol_digest"]), (title, scores))
    if not shown:
        return empty_figure("No network was scored with its calibration.")
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(2.5 * columns + 0.4, 2.6 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in panels[len(shown) :]:
        axes.axis("off")
    for axes, (title, scores) in zip(panels, shown.values(), strict=False):
        bins = scores["calibration"]
        pixels = np.array([row[0] for row in bins], float)
        accuracy = [math.nan if row[2] is None else 100 * row[2] for row in bins]
        edges = np.linspace(0, 100, len(bins) + 1)
        axes.bar(edges[:-1], accuracy, width=np.diff(edges), align="edge", color=BLUE, ec="white")
        axes.plot([0, 100], [0, 100], color=GRAY, linewidth=1)
        axes.stairs(100 * pixels / pixels.sum(), edges, color=ORANGE, linewidth=1.2)
        error = f"ECE {100 * scores['calibration_error']:.1f} %"
        axes.set_title(f"{title}\n{error}", fontsize=SMALL)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.tick_params(labelsize=SMALL, length=2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("probability of the predicted class in %", fontsize=NORMAL)
    figure.supylabel("% right (bars), % of the pixels (line)", fontsize=NORMAL)
    return figure


def as_svg(figure: Figure) -> bytes:
    """The figure as an SVG file that looks the same everywhere; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rdd_pipeline"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


# ---- parts


def _network(rows: Rows) -> str:
    return plain(str(rows[-1]["network"]))


def _label(row: Mapping[str, Any]) -> str:
    title = str(row["title"])
    if row["method"] == "teacher":
        title += f" · {shorten(str(row['network']))}"
    return plain(title)


def shorten(name: str, limit: int = 24) -> str:
    """Cut the middle: networks differ at both ends."""
    if len(name) <= limit:
        return name
    front = (limit - 1) // 2
    return f"{name[:front]}…{name[front + 1 - limit :]}"


def _color(row: Mapping[str, Any]) -> str:
    return {"teacher": GRAY, "baseline": ORANGE}.get(str(row["method"]), BLUE)


def _bar_legend(figure: Figure, rows: Rows, columns: int) -> None:
    several = any(int(row["seed_count"]) > 1 for row in rows)
    color = BLUE if any(_color(row) == BLUE for row in rows) else _color(rows[-1])

    def entry(label: str, color: str = color, **style: Any) -> Line2D:
        return Line2D([], [], color=color, label=label, **{"linestyle": "", **style})

    handles = [entry("mean over the seeds" if several else "one seed", marker="o", ms=6)]
    if several:
        handles.append(entry("± standard deviation", marker="|", ms=6, linestyle="-"))
        handles.append(entry("one seed", marker="o", mfc="none", ms=4))
    if any(row["method"] == "baseline" for row in rows):
        handles.append(entry("student alone", ORANGE, linestyle="--"))
    if any(row["method"] == "teacher" for row in rows):
        handles.append(entry("teacher", GRAY, marker="o"))
    note = None
    if any(math.isfinite(row[name]) for row in rows for name in row if name.endswith("_gain")):
        note = "in parentheses: difference to the student alone"
        note += "\n" if columns == 1 else ", "
        note += "n.s.: its 95 % interval covers 0" if several else "one seed has no interval"
    figure.legend(
        handles=handles,
        title=note,
        title_fontsize=SMALL,
        loc="outside lower center",
        ncols=3 if columns == 1 else 5,
        fontsize=SMALL,
        frameon=False,
    )


def _bar_panel(axes: Axes, rows: Rows, split: str) -> None:
    values = np.array([float(row.get(f"{split}_score", math.nan)) for row in rows])
    spread = np.nan_to_num([float(row.get(f"{split}_sd", math.nan)) for row in rows])
    alone = [value for row, value in zip(rows, values, strict=True) if row["method"] == "baseline"]
    if alone:
        axes.axvline(alone[0], color=ORANGE, linestyle="--", linewidth=0.8, zorder=0)
    ends = [(value - half, value + half) for value, half in zip(values, spread, strict=True)]
    # Points, not bars: the axis does not start at zero.
    for place, (row, value, half) in enumerate(zip(rows, values, spread, strict=True)):
        color = _color(row)
        if not math.isfinite(value):
            continue
        axes.errorbar(value, place, xerr=half or None, fmt="o", color=color, capsize=3, ms=6)
        singles = [single for single in seed_values(row, split) if math.isfinite(single)]
        if len(singles) > 1:
            # Beside the whisker: on it nobody could tell them apart.
            axes.plot(
                singles,
                [place + 0.27] * len(singles),
                "o",
                mfc="none",
                mew=0.8,
                ms=3.5,
                color=color,
            )
            ends[place] = (min(ends[place][0], *singles), max(ends[place][1], *singles))
    finite = [end for end in ends if math.isfinite(end[0])]
    low = max(0.0, min((end[0] for end in finite), default=0.0))
    high = max((end[1] for end in finite), default=1.0)
    room = max(high - low, 1.0)  # at least one point: noise must not look large
    for place, row in enumerate(rows):
        text, edge = "not evaluated", low
        if math.isfinite(values[place]):
            edge = ends[place][1]
            text = f"{values[place]:.2f}"
            gain = float(row.get(f"{split}_gain", math.nan))
            if math.isfinite(gain):
                mark = ", n.s." if verdict(row, split) == "open" else ""
                text += f"  ({gain:+.2f}{mark})"
        axes.text(edge + 0.04 * room, place, text, va="center", fontsize=SMALL)
    axes.set_xlim(low - 0.1 * room, high + 0.65 * room)
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=SMALL)
    axes.tick_params(labelsize=SMALL, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def _matrix(rows: Rows, names: Sequence[str], kind: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(
        [[float(row.get(f"{kind}.{name}", math.nan)) for name in names] for row in rows]
    )


def _class_names(rows: Rows) -> list[str]:
    """Classes that occur; of very many those with the largest differences, in their own order."""
    columns = dict.fromkeys(name for row in rows for name in row if name.startswith("iou."))
    names = [name.removeprefix("iou.") for name in columns]
    names = [name for name in names if np.isfinite(_matrix(rows, [name], "iou")).any()]
    if len(names) <= MOST_CLASSES:
        return names
    size = {name: np.nan_to_num(np.abs(_matrix(rows, [name], "gain"))).max() for name in names}
    kept = set(sorted(names, key=lambda name: -size[name])[:MOST_CLASSES])
    return [name for name in names if name in kept]


def _class_panel(axes: Axes, rows: Rows, names: Sequence[str], colors: ScalarMappable) -> None:
    scores, gains = _matrix(rows, names, "iou"), _matrix(rows, names, "gain")
    for (place, column), score in np.ndenumerate(scores):
        gain = gains[place, column]
        face = colors.to_rgba(gain) if math.isfinite(gain) else (0.93, 0.93, 0.93, 1.0)
        axes.add_patch(
            Rectangle((column - 0.5, place - 0.5), 1, 1, facecolor=face, edgecolor="white", lw=0.8)
        )
        luminance = 0.299 * face[0] + 0.587 * face[1] + 0.114 * face[2]
        axes.text(
            column,
            place,
            f"{score:.1f}" if math.isfinite(score) else "–",
            ha="center",
            va="center",
            fontsize=SMALL - 1,
            color="white" if luminance < 0.5 else "black",
        )
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(
        range(len(names)), list(map(plain, names)), rotation=50, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.tick_params(labelsize=SMALL, length=0)
    axes.spines[:].set_visible(False)
    total = sum(name.startswith("iou.") for name in {name for row in rows for name in row})
    chosen = f", the {len(names)} classes that differ most" if len(names) == MOST_CLASSES else ""
    chosen = chosen if total > MOST_CLASSES else ""
    title = f"{plain(str(rows[-1]['split']))} IoU in %{chosen}\nstudents: {_network(rows)}"
    axes.set_title(title, fontsize=NORMAL, loc="left")


def _cost_panel(
    axes: Axes, split: str, points: Sequence[tuple[float, float, Mapping[str, Any]]]
) -> None:
    """Points with their names in a column at the right edge, so that none covers another."""
    points = sorted(points, key=lambda point: -point[1])
    speeds, scores = [point[0] for point in points], [point[1] for point in points]
    spread = np.nan_to_num([float(row.get(f"{split}_sd", math.nan)) for _, _, row in points])
    bottom, top = float((np.array(scores) - spread).min()), float((np.array(scores) + spread).max())
    margin = 0.08 * max(top - bottom, 1.0)
    missing = max(0.0, 1.0 - (top - bottom)) / 2  # at least one point: noise must not look large
    low, high = bottom - margin - missing, top + margin + missing
    axes.set_ylim(low, high)
    if max(speeds) > 5 * min(speeds):
        axes.set_xscale("log")
        axes.set_xlim(min(speeds) / 1.3, max(speeds) * 1.3)
    else:
        margin = 0.08 * max(max(speeds) - min(speeds), 0.1 * max(speeds))
        axes.set_xlim(min(speeds) - margin, max(speeds) + margin)
    for (speed, score, row), half in zip(points, spread, strict=True):
        color = _color(row)
        axes.errorbar(speed, score, yerr=half or None, fmt="o", color=color, ms=6, elinewidth=0.8)
    wanted = [(score - low) / (high - low) for score in scores]
    for place, (speed, score, row) in zip(_apart(wanted), points, strict=True):
        axes.annotate(
            _label(row),
            (speed, score),
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            arrowprops={"arrowstyle": "-", "color": GRAY, "linewidth": 0.5, "shrinkB": 3},
        )
    metric = metric_title(row for *_, row in points)
    axes.set_ylabel(f"{plain(split)} {metric} in %", fontsize=NORMAL)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL, length=2)


def _apart(wanted: Sequence[float]) -> list[float]:
    """Places in [0, 1] near those wanted (falling), far enough from each other to be read."""
    gap = min(0.09, 1.0 / max(len(wanted) - 1, 1))
    places: list[float] = []
    for place in wanted:
        places.append(min(place, places[-1] - gap) if places else place)
    # What was pushed below the edge comes back up, and pushes those above it.
    floor = 0.0
    for number in range(len(places) - 1, -1, -1):
        places[number] = max(places[number], floor)
        floor = places[number] + gap
    return places
