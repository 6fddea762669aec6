"""Nodes that choose a trained network, export it, and refuse files that deviate."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdd_pipeline.commands import kedro_command
from rdd_pipeline.config import ExportParams, TrainerParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample
from rdd_pipeline.errors import UserError
from rdd_pipeline.export.check import Labeled
from rdd_pipeline.export.files import Exporter, Verdict, require_all_passed
from rdd_pipeline.inference.files import find_network
from rdd_pipeline.networks import NetworkCheckpoint, load_checkpoint
from rdd_pipeline.pipelines.paths import from_project

logger = logging.getLogger(__name__)

Chosen = Mapping[str, NetworkCheckpoint]
"""One network by the name of its files."""


def choose_network(
    images: Images,
    models_folder: Path,
    trained_metrics: Sequence[Mapping[str, Any]],
    export: ExportParams,
) -> Chosen:
    """The network that `export` names.

    Raises:
        UserError: There is none, or it has other classes than the data set.
    """
    if export.weights is not None:
        path = find_network(from_project(export.weights), export.seed)
        name = path.stem
    else:
        method, seed = export.method, export.seed
        if method == "best":
            method, seed = best_by_val(trained_metrics, seed)
        entry = models_folder / ("teacher" if method == "teacher" else f"student_{method}")
        if not entry.is_dir():
            trained = sorted(folder.name for folder in models_folder.glob("student_*"))
            raise UserError(
                f"There is no {entry.name} in {models_folder} (there is "
                f"{', '.join(trained) or 'no student'}). Train it first "
                f"({kedro_command('distill_tse')}), or name another: export.method=METHOD."
            )
        path = find_network(entry, seed)
        name = f"{method}_{path.stem}"
    checkpoint = load_checkpoint(path)
    if checkpoint.header.label_names != images.labels.names:
        raise UserError(
            f"{path} has the classes {', '.join(checkpoint.header.label_names)[:200]}, the data "
            f"set {', '.join(images.labels.names)[:200]}: it cannot be checked on these images. "
            "Choose the --env that it was trained with."
        )
    logger.info("Exporting %s (%s).", path, checkpoint.header.network.name)
    return {name: checkpoint}


def best_by_val(
    trained_metrics: Sequence[Mapping[str, Any]], seed: int | None = None
) -> tuple[str, int]:
    """Method and seed of the student with the best mIoU on val, of each one's newest version.

    Args:
        trained_metrics: Oldest first.
        seed: Of these alone; None: of all.

    Raises:
        UserError: No student was evaluated on val.
    """
    scores: dict[tuple[str, str], float] = {}
    for result in trained_metrics:
        method, own = result["about"]["method"], str(result["about"]["seed"])
        score = result["splits"].get("val", {}).get("miou", math.nan)
        if method != "teacher" and own and seed in (None, int(own)) and not math.isnan(score):
            scores[method, own] = score
    if not scores:
        raise UserError(
            "No student was evaluated on val: there is no best one. Name it (export.method=tse), "
            f"or train: {kedro_command('distill_tse')}"
        )
    method, own = max(scores, key=lambda key: scores[key])
    return method, int(own)


def export_network(
    exported_network: Chosen,
    images: Images,
    export_folder: Path,
    export: ExportParams,
    trainer: TrainerParams,
) -> dict[str, Verdict]:
    """Write the files and check each of them; by format what was found.

    Raises:
        UserError: There are no images to check on, a package is missing, or torch cannot export
            the network.
    """
    ((name, checkpoint),) = exported_network.items()
    exporter = Exporter(
        checkpoint,
        export,
        samples=[
            Labeled(*images.read(sample))
            for sample in _some(images, export.check_split, export.check_images)
        ],
        ignore_index=images.labels.ignore_index,
        calibration=[
            images.read(sample)[0]
            for sample in _some(images, "train", export.calibration_images)
            if "int8" in export.formats
        ],
        threads=trainer.threads,
    )
    verdicts = exporter.write(export_folder, name)
    logger.info("The files and their verdicts are in %s", export_folder)
    return verdicts


def refuse_deviations(export_verdicts: Mapping[str, Verdict]) -> None:
    """Let the run fail where a file deviates beyond its tolerance; all of it is saved by then.

    Raises:
        UserError: One does.
    """
    require_all_passed(export_verdicts)


def _some(images: Images, split: str, count: int) -> list[Sample]:
    """At most so many images of a split, from all over it."""
    samples = images.split(split).samples
    if not samples:
        there = sorted({sample.split for sample in images.samples})
        raise UserError(
            f"The data set has no split {split!r} (it has {', '.join(there)}), on which exports "
            "are checked or calibrated. Set export.check_split."
        )
    step = max(len(samples) / count, 1.0)
    return [samples[int(place * step)] for place in range(min(count, len(samples)))]
