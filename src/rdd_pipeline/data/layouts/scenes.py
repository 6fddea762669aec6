"""Generated road scenes with CamVid's classes and folders, made when they are asked for."""

from __future__ import annotations

import logging
from pathlib import Path

from rdd_pipeline.config import DataParams
from rdd_pipeline.data.layouts.base import Layout, refuse_download
from rdd_pipeline.data.layouts.camvid import CAMVID, CAMVID_FOLDERS, list_camvid
from rdd_pipeline.scenes.write import check_folder, scenes_digest, write_scenes

logger = logging.getLogger(__name__)

SCENES = CAMVID.model_copy(
    update={
        "name": "scenes",
        # Square root of (median share / share of the class) over the 240 default training scenes:
        # without it a run of a few hundred iterations never gets to the thin and small classes.
        "class_weights": (0.46, 0.5, 1.42, 0.37, 0.95, 0.6, 2.1, 1.43, 1.0, 2.12, 1.99),
    }
)
_EXPECTED = f"{CAMVID_FOLDERS} The data_ingestion pipeline generates these scenes."


def _prepare(root: Path, data: DataParams) -> Path:
    """The scenes of these parameters, in a folder of their own: others may be wanted meanwhile."""
    if data.download:
        refuse_download(data.layout, root, _EXPECTED)
    check_folder(root)
    folder = root / scenes_digest(data.scenes)
    rendered = write_scenes(folder, data.scenes)
    if rendered:
        logger.info("Rendered %d road scenes into %s.", rendered, folder)
    return folder


SCENES_LAYOUT = Layout(SCENES, list_camvid, _EXPECTED, _prepare)
