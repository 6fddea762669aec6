"""Nodes that put everything trained so far side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pandas as pd
import rich
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from rdd_pipeline.commands import kedro_command
from rdd_pipeline.config import EvaluationParams
from rdd_pipeline.drawing import Drawing
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.confusion import METRICS
from rdd_pipeline.files import json_digest
from rdd_pipeline.reporting.caption import captioned, provenance
from rdd_pipeline.reporting.comparison import (
    compare,
    compare_classes,
    counted,
    finished,
    metric_title,
    mixed_settings,
    notes_on,
    side_by_side,
    split_names,
)
from rdd_pipeline.reporting.comparison_figures import (
    as_svg,
    class_figure,
    cost_figure,
    iou_bars,
    reliability_figure,
    shorten,
)
from rdd_pipeline.reporting.gallery import Gallery
from rdd_pipeline.reporting.report import (
    Picture,
    gain_text,
    mean_text,
    millions,
    number,
    render_report,
    size_text,
)
from rdd_pipeline.training.store import RunStore, is_fingerprint

logger = logging.getLogger(__name__)


def compare_methods(
    trained_metrics: list[dict[str, Any]], evaluation: EvaluationParams
) -> pd.DataFrame:
    """One row for each method: mean and spread of `evaluation.metric` over seeds, gain, cost.

    Raises:
        UserError: Nothing has been trained, or there is no such metric.
    """
    if evaluation.metric not in METRICS:
        raise UserError(
            f"evaluation.metric is {evaluation.metric!r}; expected one of {', '.join(METRICS)}."
        )
    rows = compare(trained_metrics, evaluation.metric)
    if not rows:
        raise UserError(
            "Nothing has been trained for this data set yet. Run "
            f"{kedro_command('distill_tse')} or {kedro_command('distill_baselines')} first."
        )
    _print(rows, notes_on(counted(trained_metrics)))
    return pd.DataFrame(rows)


def compare_by_class(trained_metrics: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each method: IoU of every class on the last split, mean over seeds."""
    rows = compare_classes(trained_metrics)
    # Without rows a file would have no header and could not be read again.
    return pd.DataFrame(
        rows, columns=None if rows else ["method", "protocol_digest", "data_digest"]
    )


def draw_comparison(comparison_table: pd.DataFrame) -> Drawing:
    """The metric of every method with the spread over seeds."""
    rows = _rows(comparison_table)
    return _drawing(lambda: iou_bars(rows), ["comparison", rows], rows)


def draw_classes(class_table: pd.DataFrame) -> Drawing:
    """IoU of every class and method, colored by the gain over the student alone."""
    rows = _rows(class_table)
    return _drawing(lambda: class_figure(rows), ["classes", rows], rows)


def draw_cost(comparison_table: pd.DataFrame) -> Drawing:
    """The metric over the speed of training."""
    rows = _rows(comparison_table)
    return _drawing(lambda: cost_figure(rows), ["cost", rows], rows)


def write_report(
    trained_metrics: list[dict[str, Any]],
    comparison_table: pd.DataFrame,
    class_table: pd.DataFrame,
    work_folder: Path,
    reporting_folder: Path | None = None,
    examples: Mapping[str, Gallery] = MappingProxyType({}),
) -> str:
    """Tables, figures and how to read them, as one HTML page that needs no other file.

    Where the pipeline `benchmark` was run,
    its newest table in `reporting_folder` says what the networks take.

    Results that share a table but were not trained alike are named there and in the log.
    """
    rows, class_rows = _rows(comparison_table), _rows(class_table)
    metric = metric_title(rows)
    jobs = _jobs(trained_metrics, work_folder)
    for sentence in mixed_settings(trained_metrics, jobs):
        logger.warning("%s", sentence)
    pictures = [
        Picture(
            f"{metric} of every method",
            "Points are means over the seeds, whiskers one standard deviation, circles single "
            "seeds. The axis does not start at 0.",
            as_svg(iou_bars(rows)),
        ),
        Picture(
            "IoU of every class",
            "Numbers are IoU in %, colors the mean difference to the student alone with the same "
            "seeds. Gray rows are compared with nothing.",
            as_svg(class_figure(class_rows)),
        ),
        Picture(
            "Calibration",
            "First seed of each method, last split: how often pixels are right by the probability "
            "of their class; below the diagonal a network is surer than it should be.",
            as_svg(reliability_figure(counted(trained_metrics))),
        ),
        Picture(
            "Accuracy over training speed",
            f"{metric} over images/s of training; whiskers are one standard deviation over the "
            "seeds. What the network takes in use is in the table.",
            as_svg(cost_figure(rows)),
        ),
    ]
    return render_report(
        rows,
        class_rows,
        results=trained_metrics,
        jobs=jobs,
        pictures=pictures,
        speeds=_speeds(reporting_folder),
        galleries=examples,
    )


def draw_calibration(trained_metrics: list[dict[str, Any]]) -> Drawing:
    """Reliability of every method's first seed."""
    counts = counted(trained_metrics)
    abouts = [result["about"] for result in trained_metrics]
    shows = ["calibration", json_digest(counts)]
    return _drawing(lambda: reliability_figure(counts), shows, abouts)


# ---- parts


def _drawing(draw: Callable[[], Figure], shows: Any, rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """With networks and environment below it; methods, seeds and splits are in the figure."""
    networks = dict.fromkeys(str(row["network"]) for row in rows if row.get("network"))
    line = provenance(network=", ".join(networks))
    return Drawing(lambda: captioned(draw(), line), shows=[shows, line])


def _speeds(folder: Path | None) -> list[dict[str, Any]]:
    """Newest table of the pipeline `benchmark`; none where it was not run."""
    tables = sorted((folder / "speed.csv").glob("2*/speed.csv")) if folder else []
    return cast(list[dict[str, Any]], pd.read_csv(tables[-1]).to_dict("records")) if tables else []


def _jobs(results: list[dict[str, Any]], work_folder: Path) -> dict[str, dict[str, Any]]:
    """What the work behind the results was, by fingerprint; imported networks have none."""
    found = {}
    named = {str(result["about"].get("fingerprint", "")) for result in results}
    for fingerprint in filter(is_fingerprint, named):
        job = RunStore(work_folder, fingerprint).description()
        if job is not None:
            found[fingerprint] = job
    return found


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as they were before the table was written to a file."""
    rows = cast(list[dict[str, Any]], table.to_dict("records"))
    for row in rows:
        for name in ("network", "seeds", "protocol_digest", "data_digest"):
            # An imported teacher has no seed, and an empty cell is read as NaN.
            row[name] = "" if pd.isna(row.get(name)) else str(row[name])
    return rows


def _print(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    console = rich.get_console()
    blocks = [finished(block) for block in side_by_side(rows)]
    # A narrow terminal gets fewer columns: comparison.csv and the report have all of them.
    for cost in (("images/s", "memory"), ("images/s",), ()):
        tables = [_as_table(block, cost) for block in blocks]
        if max(_width(console, table) for table in tables) <= console.width:
            break
    else:
        tables = [_as_table(block, (), fold=True) for block in blocks]
    for table in tables:
        console.print(table)
    names = ", ".join(split_names(rows)[-1:])
    console.print(
        f"Mean over the seeds (standard deviation). vs. student alone: mean difference on {names} "
        "over the common seeds ± half of its 95 % interval (paired t); n.s.: the interval covers "
        "0, these seeds cannot tell the two apart; (n.s.): nor with all methods counted (Holm). "
        "val picks the checkpoint, test is reported. No interval covers another teacher, or that "
        "settings were chosen on val.",
        highlight=False,
    )
    for note in notes:
        console.print(note, highlight=False, markup=False)


def _width(console: Console, table: Table) -> int:
    """Characters it takes when nothing is broken or cut."""
    return console.measure(table, options=console.options.update(width=1000)).maximum


def _as_table(
    block: Sequence[Mapping[str, Any]], cost: Sequence[str], *, fold: bool = False
) -> Table:
    """Methods that can be compared, with these columns of cost; `fold`: cells of several lines."""
    splits, metric = split_names(block), metric_title(block)
    last = block[-1]  # a student, where there is one
    table = Table(
        title=f"{metric} in %: {last['network']}, {millions(last['parameters'])} parameters",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", overflow="fold", no_wrap=not fold)
    for name in ("seeds", *splits, "vs. student alone", *cost):
        table.add_column(name, justify="right", overflow="fold", no_wrap=not fold)
    for row in block:
        title = str(row["title"])
        costs = {
            "images/s": number(row["images_per_second"], 1),
            "memory": size_text(row["peak_memory_bytes"], "B"),
        }
        table.add_row(
            f"{title} {shorten(row['network'])}" if row["method"] == "teacher" else title,
            str(row["seed_count"]),
            *(mean_text(row, split) for split in splits),
            gain_text(row, splits[-1]) if splits else "–",
            *(costs[name] for name in cost),
        )
    return table
