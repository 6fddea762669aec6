"""Pascal VOC 2012 with the additional training masks of SBD ("aug"), 21 classes."""

from __future__ import annotations

from pathlib import Path

from rdd_pipeline.config import DataParams
from rdd_pipeline.data.download import download_voc
from rdd_pipeline.data.labels import LabelSet, make_lookup
from rdd_pipeline.data.layouts.base import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Layout,
    Listed,
    Listing,
    Problem,
    distinct_colors,
    find_files,
    listed_pairs,
    missing_folders,
    read_names,
)

_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip

VOC = LabelSet(
    name="voc",
    names=_NAMES,
    colors=distinct_colors(21),
    lookup=make_lookup({value: value for value in range(21)}, ignored=(255,)),
)

_FOLDERS = (
    "JPEGImages/NAME.jpg, SegmentationClassAug/NAME.png (training), SegmentationClass/NAME.png "
    "(validation), ImageSets/Segmentation/val.txt and perhaps trainaug.txt."
)
_LISTS = "ImageSets/Segmentation"


def _list(root: Path) -> Listing:
    """Validation: val.txt. Training: trainaug.txt, or all additional masks that val.txt lacks."""
    folders = ("JPEGImages", "SegmentationClassAug", "SegmentationClass", _LISTS)
    problems = missing_folders(root, folders, _FOLDERS)
    if not problems and not (root / _LISTS / "val.txt").is_file():
        text = f"{_LISTS}/val.txt missing. Expected: {_FOLDERS}"
        problems.append(Problem(f"{_LISTS}/val.txt", text, blocks=True))
    if problems:
        return Listing((), tuple(problems))
    images = find_files(root, "JPEGImages", IMAGE_SUFFIXES, problems)
    train_masks = find_files(root, "SegmentationClassAug", MASK_SUFFIXES, problems)
    val_masks = find_files(root, "SegmentationClass", MASK_SUFFIXES, problems)
    folder = {"train": "SegmentationClassAug", "val": "SegmentationClass"}
    masks = {"train": train_masks, "val": val_masks}

    def read(name: str, split: str) -> list[Listed]:
        # Which masks belong to a split is settled; some lists name those of the other one.
        return read_names(
            root,
            f"{_LISTS}/{name}.txt",
            images,
            masks[split],
            problems,
            folders=("JPEGImages", folder[split]),
            two_columns=False,
        )

    listed = {"val": read("val", "val")}
    if (root / _LISTS / "trainaug.txt").is_file():
        listed["train"] = read("trainaug", "train")
    else:
        held_out = {entry.name for entry in listed["val"]}
        listed["train"] = [Listed(name, name) for name in train_masks if name not in held_out]
    if any(problem.blocks for problem in problems):
        return Listing((), tuple(problems))
    pairs = []
    for split in ("train", "val"):

        def neither(name: str, split: str = split) -> Problem:
            text = (
                f"{name} of split '{split}' has neither JPEGImages/{name}.jpg nor "
                f"{folder[split]}/{name}.png. Add both or take the name off the list."
            )
            return Problem(f"{folder[split]}/{name}.png", text)

        pairs += listed_pairs(
            split,
            listed[split],
            images,
            masks[split],
            problems,
            where=f"{_LISTS} and {folder[split]}",
            neither=neither,
        )
    return Listing(tuple(pairs), tuple(problems))


def _prepare(root: Path, data: DataParams) -> Path:
    if data.download:
        download_voc(root)
    return root


VOC_LAYOUT = Layout(
    VOC,
    _list,
    f"{_FOLDERS} This is the folder VOCdevkit/VOC2012 of the VOC 2012 trainval archive, with the "
    "masks of the SBD data set converted to SegmentationClassAug; data.download=true gets both.",
    _prepare,
)
