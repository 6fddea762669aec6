"""Nodes that turn a folder of labeled images into a checked index."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from rdd_pipeline.config import DataParams
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.evaluation.figures import dataset_preview
from rdd_pipeline.pipelines._shared import images_root, label_set_of, read_sample, samples_of
from rdd_pipeline.segmentation.index import build_index, index_digest, of_split, to_rows
from rdd_pipeline.segmentation.layouts import get_layout
from rdd_pipeline.segmentation.scenes import write_scenes
from rdd_pipeline.segmentation.statistics import label_statistics

logger = logging.getLogger(__name__)

PREVIEWED = 6


def index_images(
    raw_images: Path, data: DataParams
) -> tuple[pd.DataFrame, dict[str, Any], pd.DataFrame, dict[str, str]]:
    """Look at every image and mask once; the layout `scenes` is generated first.

    Args:
        raw_images: Folder of the images unless `data.path` names another.
        data: Layout and reading.

    Returns:
        The index (one row for each image), the label set, statistics by split and class, and tags
        that identify the data.

    Raises:
        DataProblem: Anything is wrong with the images; all problems in one message.
    """
    root = images_root(raw_images, data)
    layout = get_layout(data.layout, root)
    if data.layout == "scenes":
        rendered = write_scenes(root, data.scenes)
        if rendered:
            logger.info("Rendered %d road scenes into %s.", rendered, root)
    workers = None if data.workers == "auto" else data.workers
    index = build_index(root, layout, workers=workers)
    if not of_split(index.samples, "train"):
        raise DataProblem(f"{root} has no training image. Expected: {layout.expected}")
    for warning in index.warnings:
        logger.warning(warning)
    tags = {
        "data_digest": index_digest(index.samples),
        "layout": data.layout,
        "images": str(len(index.samples)),
    }
    statistics = pd.DataFrame(label_statistics(index, layout.labels))
    return (
        pd.DataFrame(to_rows(index.samples)),
        layout.labels.model_dump(mode="json"),
        statistics,
        tags,
    )


def preview_images(
    raw_images: Path, raw_index: pd.DataFrame, label_set: dict[str, Any], data: DataParams
) -> Figure:
    """Show a few training images with their labels."""
    labels = label_set_of(label_set)
    chosen = of_split(samples_of(raw_index), "train")[:PREVIEWED]
    root = images_root(raw_images, data)
    pairs = [
        (sample.name, *read_sample(root, sample, labels, data.image_size)) for sample in chosen
    ]
    return dataset_preview(pairs, labels)
