"""Pascal VOC 2012 with the additional training masks of SBD ("aug"), 21 classes."""

from __future__ import annotations

from pathlib import Path

from rdd_pipeline.segmentation.labels import LabelSet, make_lookup
from rdd_pipeline.segmentation.layouts.base import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Layout,
    Listing,
    distinct_colors,
    find_files,
    match_pairs,
    missing_folders,
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
        problems.append(f"{_LISTS}/val.txt missing. Expected: {_FOLDERS}")
    if problems:
        return Listing((), tuple(problems))
    images = find_files(root, "JPEGImages", IMAGE_SUFFIXES, problems)
    train_masks = find_files(root, "SegmentationClassAug", MASK_SUFFIXES, problems)
    val_masks = find_files(root, "SegmentationClass", MASK_SUFFIXES, problems)
    val_names = _read_names(root / _LISTS / "val.txt")
    trainaug = root / _LISTS / "trainaug.txt"
    if trainaug.is_file():
        train_names = _read_names(trainaug)
    else:
        train_names = [name for name in train_masks if name not in set(val_names)]
    pairs = []
    for split, names, masks in (("train", train_names, train_masks), ("val", val_names, val_masks)):
        listed = dict.fromkeys(names)
        folder = "SegmentationClassAug" if split == "train" else "SegmentationClass"
        nowhere = [name for name in listed if name not in images and name not in masks]
        problems += [
            f"{name} of split '{split}' has neither JPEGImages/{name}.jpg nor {folder}/{name}.png."
            for name in nowhere
        ]
        pairs += match_pairs(
            split,
            {name: images[name] for name in listed if name in images},
            {name: masks[name] for name in listed if name in masks},
            problems,
            where=f"{_LISTS} and {folder}",
        )
    return Listing(tuple(pairs), tuple(problems))


def _read_names(path: Path) -> list[str]:
    """One name a line; the lines of some lists are `/JPEGImages/NAME.jpg /MASKS/NAME.png`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Path(line.split()[0]).stem for line in lines if line.strip()]


VOC_LAYOUT = Layout(
    VOC,
    _list,
    f"{_FOLDERS} This is the folder VOCdevkit/VOC2012 of the VOC 2012 trainval archive, with the "
    "masks of the SBD data set converted to SegmentationClassAug.",
)
