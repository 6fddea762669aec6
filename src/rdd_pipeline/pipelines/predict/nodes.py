"""Nodes that predict the images that `params:predict` names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from rdd_pipeline.commands import kedro_command
from rdd_pipeline.config import DataParams, PredictParams, TrainerParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.inference.files import find_network
from rdd_pipeline.inference.folder import Encoding, check_sources, predict_files
from rdd_pipeline.inference.model import Model, load
from rdd_pipeline.inference.results import MASKS, OVERLAYS, TABLE
from rdd_pipeline.inference.sources import Source, find_sources
from rdd_pipeline.pipelines.paths import from_project

logger = logging.getLogger(__name__)


class PredictionPlan(NamedTuple):
    """What is predicted by what, and where to: nothing of it is read yet but the network."""

    model: Model
    sources: list[Source]
    output: Path


def plan_predictions(
    predict: PredictParams,
    data: DataParams,
    trainer: TrainerParams,
    models_folder: Path,
    predictions_folder: Path,
) -> PredictionPlan:
    """Find network and images, and refuse what cannot be done with them.

    Raises:
        UserError: No network, no images, a device that is not there, or a format that does not fit.
    """
    if predict.images is None:
        raise UserError(
            "predict.images is not set: which images? Name a folder, a glob, a list of files, an "
            "image or a video, such as --params=predict.images=~/photos."
        )
    output = predictions_folder if predict.output is None else from_project(predict.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"predict.output {output} is a file. Name a folder.")
    written = [output / MASKS, output / OVERLAYS]
    sources = find_sources(from_project(Path(predict.images)), written)
    sources = check_sources(sources, predict.format)
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    model = load(_network(predict, models_folder), device=trainer.device)
    model.bits = data.bits
    if predict.image_size != "trained":
        model.image_size = predict.image_size
    Encoding.of(model.header, predict.format)
    return PredictionPlan(model, sources, output)


def _network(predict: PredictParams, models_folder: Path) -> Path:
    if predict.weights is not None:
        return find_network(from_project(predict.weights), predict.seed)
    name = "teacher" if predict.method == "teacher" else f"student_{predict.method}"
    if not (models_folder / name).is_dir():
        trained = sorted(path.name for path in models_folder.glob("student_*") if path.is_dir())
        there = f" There are {', '.join(trained)} (predict.method)." if trained else ""
        raise UserError(
            f"There is no network {models_folder / name}.{there} Run "
            f"{kedro_command('distill_tse')} first, or set predict.weights to a network's file."
        )
    return find_network(models_folder / name, predict.seed)


def predict_images(
    plan: PredictionPlan, predict: PredictParams
) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """Predict all that is not finished; the table of all images and the unreadable files.

    Raises:
        UserError: None of the files can be read, or memory or disk are full.
    """
    outcome = predict_files(plan.model, plan.sources, predict, plan.output)
    table = pd.DataFrame(outcome.rows)
    before = len(outcome.rows) - outcome.predicted
    logger.info(
        "%d images predicted%s, mean confidence %.3f: masks, overlays and %s are in %s",
        outcome.predicted,
        f", {before} were finished before" if before else "",
        table["confidence"].mean(),
        TABLE,
        plan.output,
    )
    return table, outcome.problems
