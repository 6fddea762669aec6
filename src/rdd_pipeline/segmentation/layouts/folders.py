"""One's own images: a folder of images and one of masks for each split, and a table of labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.segmentation.labels import Color, LabelSet, make_lookup
from rdd_pipeline.segmentation.layouts.base import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Layout,
    Listing,
    Pair,
    check_root,
    distinct_colors,
    find_files,
    match_pairs,
    missing_folders,
)

TABLES = ("labels.yaml", "labels.yml", "labels.json")

FOLDERS = (
    "images/SPLIT/NAME.png (or .jpg, subfolders allowed) with its mask masks/SPLIT/NAME.png for "
    "the splits train, val and perhaps more, and the table labels.yaml (or .json): `classes:`, a "
    "list of {name, value, color, weight}, all but the name optional, and `ignore:`, a list of "
    "mask values, [255] if left out."
)


class _Row(BaseModel):
    """One class."""

    model_config = ConfigDict(extra="forbid")

    name: str
    value: int | list[int] | None = Field(None, description="Mask values; None: the position.")
    color: Color | None = None
    weight: PositiveFloat | None = None


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = "folders"
    classes: list[_Row] = Field(min_length=1, max_length=255)
    ignore: list[int] = [255]


def folders_layout(root: Path) -> Layout:
    """The layout of one's own images in `root`, with the labels of its table.

    Raises:
        DataProblem: There is no table, or something in it is wrong.
    """
    check_root(root, FOLDERS)
    return Layout(read_label_table(root), _list, FOLDERS)


def read_label_table(root: Path) -> LabelSet:
    """The label set of `labels.yaml` (or .json) in `root`; see `FOLDERS` for its form.

    Raises:
        DataProblem: It is missing, cannot be read, or something in it is wrong.
    """
    found = [root / name for name in TABLES if (root / name).is_file()]
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or "no table of labels"
        raise DataProblem(f"{root} holds {names}, expected one of {', '.join(TABLES)}. {FOLDERS}")
    path = found[0]
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        table = _Table.model_validate(content)
        return _label_set(table)
    except ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in fault['loc']) or 'table'}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise DataProblem(f"{path}: {'; '.join(faults)}. Expected: {FOLDERS}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataProblem(f"{path} cannot be used ({reason}). Expected: {FOLDERS}") from error


def _label_set(table: _Table) -> LabelSet:
    train_ids: dict[int, int] = {}
    for number, row in enumerate(table.classes):
        values = [number] if row.value is None else row.value
        for value in [values] if isinstance(values, int) else values:
            if not 0 <= value <= 255:
                raise ValueError(f"class '{row.name}' has mask value {value}, expected 0..255")
            if value in train_ids or value in table.ignore:
                raise ValueError(f"mask value {value} of class '{row.name}' is used twice")
            train_ids[value] = number
    wrong = [value for value in table.ignore if not 0 <= value <= 255]
    if wrong:
        raise ValueError(f"ignore holds {wrong}, expected mask values 0..255")
    weights = [row.weight for row in table.classes]
    if any(weights) and not all(weights):
        raise ValueError("some classes have a weight and some have none: give all or none")
    defaults = distinct_colors(len(table.classes) + 1)[1:]
    return LabelSet(
        name=table.name,
        names=tuple(row.name for row in table.classes),
        colors=tuple(
            row.color or color for row, color in zip(table.classes, defaults, strict=True)
        ),
        class_weights=tuple(weight for weight in weights if weight) or None,
        lookup=make_lookup(train_ids, ignored=tuple(table.ignore)),
    )


def _list(root: Path) -> Listing:
    pairs: list[Pair] = []
    problems = missing_folders(root, ("images", "masks"), FOLDERS)
    if problems:
        return Listing((), tuple(problems))
    others = {
        path.name
        for folder in ("images", "masks")
        for path in (root / folder).iterdir()
        if path.is_dir() and not path.name.startswith(".")
    }
    for split in ["train", "val", *sorted(others - {"train", "val"})]:
        missing = missing_folders(root, (f"images/{split}", f"masks/{split}"), FOLDERS)
        if missing:
            problems += missing
            continue
        images = find_files(root, f"images/{split}", IMAGE_SUFFIXES, problems, recursive=True)
        masks = find_files(root, f"masks/{split}", MASK_SUFFIXES, problems, recursive=True)
        pairs += match_pairs(split, images, masks, problems, where=f"images/{split}")
    return Listing(tuple(pairs), tuple(problems))
