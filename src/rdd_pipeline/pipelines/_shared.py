"""What the nodes of several pipelines have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from kedro.utils import find_kedro_project

from rdd_pipeline.config import DataParams, NetworkParams, TeacherParams


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


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as dictionaries by column name."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
