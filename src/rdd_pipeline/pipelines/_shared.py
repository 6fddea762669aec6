"""What the nodes of several pipelines have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from kedro.utils import find_kedro_project
from torch import Tensor

from rdd_pipeline.config import DataParams, NetworkParams, Size, TeacherParams
from rdd_pipeline.data.index import Sample, from_rows
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.data.reading import read_image, read_mask


def from_project(path: Path) -> Path:
    """Make a user's path absolute: `~` is expanded, a relative one starts at the project."""
    path = path.expanduser()
    return path if path.is_absolute() else (find_kedro_project(Path.cwd()) or Path.cwd()) / path


def images_root(raw_images: Path, data: DataParams) -> Path:
    """Folder the paths of the index start at."""
    return raw_images if data.path is None else from_project(data.path)


def local_network(network: NetworkParams) -> NetworkParams:
    """The same network with the path of its backbone weights made absolute."""
    if isinstance(network.pretrained, Path):
        return network.model_copy(update={"pretrained": from_project(network.pretrained)})
    return network


def local_teacher(teacher: TeacherParams) -> TeacherParams:
    """The same teacher with absolute paths."""
    weights = None if teacher.weights is None else from_project(teacher.weights)
    return teacher.model_copy(
        update={"network": local_network(teacher.network), "weights": weights}
    )


def packs_folder(packed_images: dict[str, Any]) -> Path | None:
    """Folder with the packs that ingestion made; None: images are read from their files."""
    folder = packed_images["folder"]
    return None if folder is None else Path(folder)


def samples_of(raw_index: pd.DataFrame) -> list[Sample]:
    """Rows of the index table as samples."""
    return list(from_rows(rows_of(raw_index)))


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as dictionaries by column name."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def label_set_of(label_set: dict[str, Any]) -> LabelSet:
    """The label set as ingestion saved it."""
    return LabelSet.model_validate(label_set)


def read_sample(
    root: Path, sample: Sample, labels: LabelSet, image_size: Size | None
) -> tuple[Tensor, Tensor]:
    """Image (3, H, W) and train ids (H, W) of one sample, both uint8 and of the same size."""
    return (
        read_image(root / sample.image, image_size=image_size, bits=sample.bits),
        read_mask(root / sample.mask, labels.lookup, image_size=image_size),
    )
