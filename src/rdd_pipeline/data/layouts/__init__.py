"""How the folders of a labeled data set are organized: which image belongs to which mask.

A further data set is one file here, with its label set and a function that lists its pairs, and one
entry of `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rdd_pipeline.config import DataParams
from rdd_pipeline.data.layouts.ade20k import ADE20K_LAYOUT
from rdd_pipeline.data.layouts.base import (
    IMAGE_SUFFIXES,
    Layout,
    Listing,
    Pair,
    Problem,
    check_root,
    list_pairs,
    raise_problems,
    refuse_download,
    some_of,
)
from rdd_pipeline.data.layouts.camvid import CAMVID_LAYOUT
from rdd_pipeline.data.layouts.cityscapes import CITYSCAPES_LAYOUT
from rdd_pipeline.data.layouts.coco_stuff import COCO_STUFF_LAYOUT
from rdd_pipeline.data.layouts.folders import FOLDERS, folders_layout
from rdd_pipeline.data.layouts.scenes import SCENES_LAYOUT
from rdd_pipeline.data.layouts.voc import VOC_LAYOUT
from rdd_pipeline.errors import UserError

__all__ = [
    "IMAGE_SUFFIXES",
    "LAYOUTS",
    "Layout",
    "Listing",
    "Pair",
    "Problem",
    "get_layout",
    "list_pairs",
    "prepare",
    "raise_problems",
    "some_of",
]

LAYOUTS: dict[str, Layout | Callable[[Path], Layout]] = {
    "scenes": SCENES_LAYOUT,
    "camvid": CAMVID_LAYOUT,
    "cityscapes": CITYSCAPES_LAYOUT,
    "voc": VOC_LAYOUT,
    "ade20k": ADE20K_LAYOUT,
    "coco_stuff": COCO_STUFF_LAYOUT,
    "folders": folders_layout,
}
"""A function makes the layout whose labels stand in a file of the data set's folder."""


def get_layout(name: str, root: Path | None = None) -> Layout:
    """The layout of that name.

    Args:
        name: A key of `LAYOUTS`.
        root: The data set's folder; the layout `folders` reads its labels there.

    Raises:
        UserError: There is no such layout (the message names the choices), or it needs a folder.
        DataProblem: The table of labels in the folder is missing or wrong.
    """
    layout = _find(name)
    if isinstance(layout, Layout):
        return layout
    if root is None:
        raise UserError(
            f"The layout '{name}' has its labels in the folder with the images. Set `data.path`."
        )
    return layout(root)


def check_source(root: Path, data: DataParams) -> None:
    """Refuse what cannot be ingested whatever the images are; none of them is looked at.

    Raises:
        UserError: There is no such layout, or a program cannot get its data set.
        DataProblem: The folder with the images, or the table of labels in it, is missing.
    """
    layout = _find(data.layout)
    if isinstance(layout, Layout) and layout.prepare is not None:
        return  # it makes the folder
    prepare(root, data)
    check_root(root, get_layout(data.layout, root).expected)


def prepare(root: Path, data: DataParams) -> Path:
    """Make the data set be there: download or generate it, where that can be done.

    Args:
        root: The folder given for it.
        data: Which layout, and what it wants.

    Returns:
        Folder of the data set: `root`, or one below it that holds what `data` asks for.

    Raises:
        UserError: There is no such layout, or a program cannot get its data set; the message says
            where it is to be had and which folders are expected.
        DataProblem: The data set cannot be made.
    """
    layout = _find(data.layout)
    if isinstance(layout, Layout) and layout.prepare is not None:
        return layout.prepare(root, data)
    if data.download:
        expected = layout.expected if isinstance(layout, Layout) else FOLDERS
        refuse_download(data.layout, root, expected)
    return root


def _find(name: str) -> Layout | Callable[[Path], Layout]:
    if name not in LAYOUTS:
        raise UserError(
            f"Unknown layout '{name}'. Set `data.layout` to one of: {', '.join(LAYOUTS)}."
        )
    return LAYOUTS[name]
