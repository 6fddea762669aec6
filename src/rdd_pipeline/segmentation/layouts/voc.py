"""Pascal VOC 2012 with the additional training masks of SBD ("aug"), 21 classes."""

from __future__ import annotations

from pathlib import Path

from rdd_pipeline.segmentation.download import download_voc
from rdd_pipeline.segmentation.labels import LabelSet, make_lookup
from rdd_pipeline.segmentation.layouts.base import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Layout,
    Listing,
    Problem,
    distinct_colors,
    find_files,
    match_pairs,
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
    val_names = read_names(root, f"{_LISTS}/val.txt", images, problems)
    if (root / _LISTS / "trainaug.txt").is_file():
        train_names = read_names(root, f"{_LISTS}/trainaug.txt", images, problems)
    else:
        train_names = [name for name in train_masks if name not in set(val_names)]
    if any(problem.blocks for problem in problems):
        return Listing((), tuple(problems))
    pairs = []
    for split, names, masks in (("train", train_names, train_masks), ("val", val_names, val_masks)):
        listed = dict.fromkeys(names)
        folder = "SegmentationClassAug" if split == "train" else "SegmentationClass"
        for name in listed:
            if name not in images and name not in masks:
                text = (
                    f"{name} of split '{split}' has neither JPEGImages/{name}.jpg nor "
                    f"{folder}/{name}.png. Add both or take the name off the list."
                )
                problems.append(Problem(f"{folder}/{name}.png", text))
        pairs += match_pairs(
            split, images.only(listed), masks.only(listed), problems, where=f"{_LISTS} and {folder}"
        )
    return Listing(tuple(pairs), tuple(problems))


VOC_LAYOUT = Layout(
    VOC,
    _list,
    f"{_FOLDERS} This is the folder VOCdevkit/VOC2012 of the VOC 2012 trainval archive, with the "
    "masks of the SBD data set converted to SegmentationClassAug; data.download=true gets both.",
    download_voc,
)
