"""Nodes that put everything trained so far side by side."""

from __future__ import annotations

from typing import Any

import pandas as pd
import rich
from matplotlib.figure import Figure
from rich.table import Table

from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.comparison import compare
from rdd_pipeline.evaluation.comparison_figures import iou_bars
from rdd_pipeline.pipelines._shared import rows_of


def compare_methods(trained_metrics: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each method: mean and spread of the mIoU over seeds, gain, cost.

    Raises:
        UserError: Nothing has been trained.
    """
    if not trained_metrics:
        raise UserError(
            "Nothing has been trained for this data set yet. Run kedro run --pipeline=distill_tse "
            "or --pipeline=distill_baselines first, with the same --env."
        )
    rows = compare(trained_metrics)
    table = pd.DataFrame(rows)
    _print(rows)
    return table


def draw_comparison(comparison_table: pd.DataFrame) -> Figure:
    """MIoU of every method as bars, with the spread over seeds."""
    return iou_bars(rows_of(comparison_table))


def _print(rows: list[dict[str, Any]]) -> None:
    columns = dict.fromkeys(name for row in rows for name in row)
    splits = [name.removesuffix("_miou") for name in columns if name.endswith("_miou")]
    table = Table(title="mIoU in %: mean (standard deviation), gain over the student alone")
    for name in ("method", "network", "seeds", *splits):
        table.add_column(name)
    for row in rows:
        cells = []
        for split in splits:
            mean = row.get(f"{split}_miou")
            if mean is None or mean != mean:
                cells.append("-")
                continue
            spread, gain = row[f"{split}_miou_sd"], row[f"{split}_gain"]
            text = f"{mean:.2f}" + (f" ({spread:.2f})" if spread == spread else "")
            cells.append(text + (f"  {gain:+.2f}" if gain == gain else ""))
        table.add_row(row["title"], row["network"], row["seeds"], *cells)
    rich.get_console().print(table)
