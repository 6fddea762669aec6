"""Paths that users name in parameters."""

from __future__ import annotations

import os
from pathlib import Path

from kedro.utils import find_kedro_project

from rdd_pipeline.config import DataParams, NetworkParams


def from_project(path: Path) -> Path:
    """Make a user's path absolute: `~` is expanded, a relative one starts at the project."""
    path = Path(os.path.expanduser(path))
    return path if path.is_absolute() else (find_kedro_project(Path.cwd()) or Path.cwd()) / path


def images_root(raw_images: Path, data: DataParams) -> Path:
    """Folder the paths of the index start at."""
    return raw_images if data.path is None else from_project(data.path)


def local_network(network: NetworkParams) -> NetworkParams:
    """The same network with the path of its backbone weights made absolute."""
    if isinstance(network.pretrained, Path):
        return network.model_copy(update={"pretrained": from_project(network.pretrained)})
    return network
