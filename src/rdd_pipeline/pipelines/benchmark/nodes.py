"""Nodes that time every network that was trained for this data set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd
from matplotlib.figure import Figure

from rdd_pipeline.commands import kedro_command
from rdd_pipeline.config import BenchmarkParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.errors import UserError
from rdd_pipeline.export.speed import Row, measure_speed, require_any
from rdd_pipeline.inference.files import find_network
from rdd_pipeline.networks import load_checkpoint
from rdd_pipeline.reporting.caption import captioned, provenance
from rdd_pipeline.reporting.pareto import pareto_figure

logger = logging.getLogger(__name__)


def measure_networks(
    images: Images,
    models_folder: Path,
    trained_metrics: Sequence[Mapping[str, Any]],
    benchmark: BenchmarkParams,
) -> pd.DataFrame:
    """One row for each network and way to run it; each architecture is timed once.

    Columns: ``method``, ``title``, ``network``, ``split`` and ``miou`` (in %, newest of the first
    seed), and those of `measure_speed`.

    Raises:
        UserError: No network was trained, or none can be timed.
    """
    scores = _scores(trained_metrics)
    entries = sorted([*models_folder.glob("teacher"), *models_folder.glob("student_*")])
    timed: dict[str, list[Row]] = {}
    rows: list[Row] = []
    for entry in entries:
        method = entry.name.removeprefix("student_")
        if method not in scores:
            continue
        checkpoint = load_checkpoint(find_network(entry))
        architecture = checkpoint.header.architecture()
        if architecture not in timed:
            name = checkpoint.header.network.name
            logger.info("Timing %s (%s).", name, method)
            size = benchmark.image_size or images.input_size
            timed[architecture] = list(measure_speed(checkpoint, size, benchmark))
        rows += [{**scores[method], **row} for row in timed[architecture]]
    if not scores:
        raise UserError(f"No network was trained here. Train one: {kedro_command('distill_tse')}")
    require_any(rows)
    for row in rows:
        logger.info(
            "%s, %s, %s, %s threads: %.1f ms (%.1f to %.1f), %.1f images/s",
            *(row["title"], row["runtime"], row["device"], row["threads"]),
            *(row["latency"], row["lower"], row["upper"], row["throughput"]),
        )
    return pd.DataFrame(rows)


def draw_pareto(speed_table: pd.DataFrame) -> Figure:
    """MIoU over latency of all networks, with those that none beats in both."""
    rows = cast(list[dict[str, Any]], speed_table.to_dict("records"))
    networks = dict.fromkeys(str(row["network"]) for row in rows)
    splits = dict.fromkeys(str(row["split"]) for row in rows)
    line = provenance(network=", ".join(networks), split=", ".join(splits))
    return captioned(pareto_figure(rows), line)


def _scores(trained_metrics: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """By method, the newest scores of its first seed on the last split."""
    found: dict[str, tuple[int, Row]] = {}
    for result in trained_metrics:
        about, splits = result["about"], result["splits"]
        if not splits:
            continue
        split, scores = list(splits.items())[-1]
        seed = int(about["seed"] or 0)
        row = {key: about[key] for key in ("method", "title", "network")}
        row |= {"split": split, "miou": 100 * scores["miou"]}
        if about["method"] not in found or seed <= found[about["method"]][0]:
            found[about["method"]] = seed, row
    return {method: row for method, (_, row) in found.items()}
