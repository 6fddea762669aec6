"""Cityscapes, fine annotations, 19 classes.

The test split is left out: its labels are not public, its mask files hold no classes.
"""

from __future__ import annotations

from pathlib import Path

from rdd_pipeline.data.labels import Color, LabelSet, make_lookup
from rdd_pipeline.data.layouts.base import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Layout,
    Listing,
    Pair,
    Problem,
    find_files,
    match_pairs,
    missing_folders,
)

# Name, labelId, color, the class weight used in the field.
_CLASSES: tuple[tuple[str, int, Color, float], ...] = (
    ("road", 7, (128, 64, 128), 0.8373),
    ("sidewalk", 8, (244, 35, 232), 0.918),
    ("building", 11, (70, 70, 70), 0.866),
    ("wall", 12, (102, 102, 156), 1.0345),
    ("fence", 13, (190, 153, 153), 1.0166),
    ("pole", 17, (153, 153, 153), 0.9969),
    ("traffic light", 19, (250, 170, 30), 0.9754),
    ("traffic sign", 20, (220, 220, 0), 1.0489),
    ("vegetation", 21, (107, 142, 35), 0.8786),
    ("terrain", 22, (152, 251, 152), 1.0023),
    ("sky", 23, (70, 130, 180), 0.9539),
    ("person", 24, (220, 20, 60), 0.9843),
    ("rider", 25, (255, 0, 0), 1.1116),
    ("car", 26, (0, 0, 142), 0.9037),
    ("truck", 27, (0, 0, 70), 1.0865),
    ("bus", 28, (0, 60, 100), 1.0955),
    ("train", 31, (0, 80, 100), 1.0865),
    ("motorcycle", 32, (0, 0, 230), 1.1529),
    ("bicycle", 33, (119, 11, 32), 1.0507),
)

CITYSCAPES = LabelSet(
    name="cityscapes",
    names=tuple(name for name, *_ in _CLASSES),
    colors=tuple(color for _, _, color, _ in _CLASSES),
    class_weights=tuple(weight for *_, weight in _CLASSES),
    lookup=make_lookup(
        {raw: number for number, (_, raw, *_) in enumerate(_CLASSES)},
        # 255: the license plate's -1 in eight bits.
        ignored=(*range(34), 255),
    ),
)

_FOLDERS = (
    "leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png with its mask "
    "gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png, for the splits train and val."
)


def _list(root: Path) -> Listing:
    pairs: list[Pair] = []
    problems: list[Problem] = []
    for split in ("train", "val"):
        folders = (f"leftImg8bit/{split}", f"gtFine/{split}")
        missing = missing_folders(root, folders, _FOLDERS)
        if missing:
            problems += missing
            continue
        images = find_files(
            root, folders[0], IMAGE_SUFFIXES, problems, ending="_leftImg8bit", recursive=True
        )
        masks = find_files(
            root, folders[1], MASK_SUFFIXES, problems, ending="_gtFine_labelIds", recursive=True
        )
        matched = match_pairs(
            split, images, masks, problems, where=f"{folders[0]}/CITY/*_leftImg8bit.png"
        )
        # File names hold the city's name: the folder need not be repeated.
        pairs += [pair._replace(name=pair.name.rpartition("/")[2]) for pair in matched]
    return Listing(tuple(pairs), tuple(problems))


CITYSCAPES_LAYOUT = Layout(
    CITYSCAPES,
    _list,
    f"{_FOLDERS} These are the packages leftImg8bit_trainvaltest and gtFine_trainvaltest of "
    "Cityscapes, which need an account there.",
)
