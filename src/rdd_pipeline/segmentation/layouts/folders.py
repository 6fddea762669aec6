"""One's own images: a folder of images and one of masks for each split, and a table of labels."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import yaml  # type: ignore[import-untyped,unused-ignore]
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.segmentation.labels import (
    Color,
    ColorRow,
    LabelSet,
    make_color_lookup,
    make_lookup,
)
from rdd_pipeline.segmentation.layouts.base import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Files,
    Layout,
    Listing,
    Pair,
    Problem,
    check_root,
    distinct_colors,
    find_files,
    match_pairs,
    missing_folders,
    read_names,
)

SPLIT = "SPLIT"
TABLES = ("labels.yaml", "labels.yml", "labels.json")

FOLDERS = (
    "images/SPLIT/NAME.png (or .jpg, subfolders allowed) with its mask masks/SPLIT/NAME.png for "
    "the splits train, val and perhaps more, and the table labels.yaml (or .json): `classes:`, a "
    "list of {name, value, color, weight}, all but the name optional, and `ignore:`, a list of "
    "mask values, [255] if left out. `encoding: color` if the masks hold colors: then `ignore:` is "
    "a list of colors. Other folders: `images: FOLDER` and `masks: FOLDER` with SPLIT in them, or "
    "without, and `lists: FILE` with SPLIT in it, one name a line. Other names: `image_ending:` "
    "and `mask_ending:`, what their file names have before the suffix beside the common name."
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
    ignore: list[int] | list[Color] | None = None
    encoding: Literal["index", "color"] = "index"
    images: str = "images/SPLIT"
    masks: str = "masks/SPLIT"
    lists: str | None = None
    image_ending: str = ""
    mask_ending: str = ""

    @model_validator(mode="after")
    def _splits_are_told_apart(self) -> Self:
        for key in ("images", "masks", "lists"):
            value = getattr(self, key)
            parts = Path(value or "").parts
            if ".." in parts or Path(value or "").is_absolute():
                raise ValueError(f"{key} is {value!r}, expected a path below the table's folder")
            inside = [part for part in parts if SPLIT in part]
            if inside and key != "lists" and inside != [SPLIT]:
                raise ValueError(f"{key} is {value!r}: SPLIT has to be one whole folder name")
        split = [SPLIT in value for value in (self.images, self.masks)]
        if self.lists is None and not all(split):
            raise ValueError("without SPLIT in images and masks, `lists` has to tell splits apart")
        if self.lists is not None and (any(split) or self.lists.count(SPLIT) != 1):
            raise ValueError("`lists` needs SPLIT once, and then images and masks have none")
        return self


def folders_layout(root: Path) -> Layout:
    """The layout of one's own images in `root`, with the labels of its table.

    Raises:
        DataProblem: There is no table, or something in it is wrong.
    """
    check_root(root, FOLDERS)
    table, labels = _read(root)
    return Layout(labels, partial(_list, table), FOLDERS)


def read_label_table(root: Path) -> LabelSet:
    """The label set of `labels.yaml` (or .json) in `root`; see `FOLDERS` for its form.

    Raises:
        DataProblem: It is missing, cannot be read, or something in it is wrong.
    """
    return _read(root)[1]


def _read(root: Path) -> tuple[_Table, LabelSet]:
    found = [root / name for name in TABLES if (root / name).is_file()]
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or "no table of labels"
        raise DataProblem(f"{root} holds {names}, expected one of {', '.join(TABLES)}. {FOLDERS}")
    path = found[0]
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        table = _Table.model_validate(content)
        return table, _label_set(table)
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
        lookup=_color_lookup(table) if table.encoding == "color" else _index_lookup(table),
    )


def _index_lookup(table: _Table) -> tuple[int, ...]:
    ignore = [255] if table.ignore is None else table.ignore
    ignored = tuple(value for value in ignore if isinstance(value, int))
    if len(ignored) < len(ignore):
        raise ValueError("ignore holds colors, expected mask values (or set `encoding: color`)")
    train_ids: dict[int, int] = {}
    for number, row in enumerate(table.classes):
        values = [number] if row.value is None else row.value
        for value in [values] if isinstance(values, int) else values:
            if not 0 <= value <= 255:
                raise ValueError(f"class '{row.name}' has mask value {value}, expected 0..255")
            if value in train_ids or value in ignored:
                raise ValueError(f"mask value {value} of class '{row.name}' is used twice")
            train_ids[value] = number
    wrong = [value for value in ignored if not 0 <= value <= 255]
    if wrong:
        raise ValueError(f"ignore holds {wrong}, expected mask values 0..255")
    return make_lookup(train_ids, ignored=ignored)


def _color_lookup(table: _Table) -> tuple[ColorRow, ...]:
    train_ids: dict[Color, int] = {}
    for number, row in enumerate(table.classes):
        if row.value is not None:
            raise ValueError(f"class '{row.name}' has a value, but the masks hold colors")
        if row.color is None:
            raise ValueError(f"class '{row.name}' has no color, by which masks are read")
        if row.color in train_ids:
            raise ValueError(f"color {row.color} of class '{row.name}' is used twice")
        train_ids[row.color] = number
    ignore = table.ignore or []
    ignored = tuple(color for color in ignore if not isinstance(color, int))
    if len(ignored) < len(ignore):
        raise ValueError("ignore holds mask values, expected colors as [red, green, blue]")
    both = sorted(set(ignored) & set(train_ids))
    if both:
        raise ValueError(f"color {both[0]} is that of a class and in ignore")
    return make_color_lookup(train_ids, ignored=ignored)


def _list(table: _Table, root: Path) -> Listing:
    if table.lists is not None:
        return _list_by_names(table, table.lists, root)
    pairs: list[Pair] = []
    tops = tuple(_above_split(folder) for folder in (table.images, table.masks))
    problems = missing_folders(root, dict.fromkeys(tops), FOLDERS)
    if problems:
        return Listing((), tuple(problems))
    others = {
        path.name
        for top, folder in zip(tops, (table.images, table.masks), strict=True)
        for path in (root / top).iterdir()
        if not path.name.startswith(".") and (root / folder.replace(SPLIT, path.name)).is_dir()
    }
    for split in ["train", "val", *sorted(others - {"train", "val"})]:
        folders = (table.images.replace(SPLIT, split), table.masks.replace(SPLIT, split))
        missing = missing_folders(root, folders, FOLDERS)
        if missing:
            problems += missing
            continue
        images, masks = _trees(table, root, *folders, problems)
        pairs += match_pairs(split, images, masks, problems, where=folders[0])
    return Listing(tuple(pairs), tuple(problems))


def _list_by_names(table: _Table, lists: str, root: Path) -> Listing:
    """Splits are lists of names; what no list names is not used."""
    problems = missing_folders(root, dict.fromkeys((table.images, table.masks)), FOLDERS)
    before, after = Path(lists).name.split(SPLIT) if SPLIT in Path(lists).name else ("", "")
    folder = Path(lists).parent
    found = {
        path.name.removeprefix(before).removesuffix(after)
        for path in (root / folder).glob("*")
        if path.name.startswith(before) and path.name.endswith(after) and path.is_file()
    }
    splits = ["train", "val", *sorted(found - {"train", "val", ""})]
    paths = {split: lists.replace(SPLIT, split) for split in splits}
    for path in paths.values():
        if not (root / path).is_file():
            problems.append(Problem(path, f"{path} missing. Expected: {FOLDERS}", blocks=True))
    if problems:
        return Listing((), tuple(problems))
    images, masks = _trees(table, root, table.images, table.masks, problems)
    listed = {
        split: dict.fromkeys(read_names(root, path, images, problems))
        for split, path in paths.items()
    }
    if any(problem.blocks for problem in problems):
        return Listing((), tuple(problems))
    pairs: list[Pair] = []
    for split, path in paths.items():
        names = listed[split]
        for name in names:
            if name not in images and name not in masks:
                text = (
                    f"{name} of {path} has neither image nor mask in {table.images} and "
                    f"{table.masks}. Add both or take the name off the list."
                )
                problems.append(Problem(name, text))
        pairs += match_pairs(split, images.only(names), masks.only(names), problems, where=path)
    return Listing(tuple(pairs), tuple(problems))


def _trees(
    table: _Table, root: Path, images: str, masks: str, problems: list[Problem]
) -> tuple[Files, Files]:
    return (
        find_files(
            root, images, IMAGE_SUFFIXES, problems, ending=table.image_ending, recursive=True
        ),
        find_files(root, masks, MASK_SUFFIXES, problems, ending=table.mask_ending, recursive=True),
    )


def _above_split(folder: str) -> str:
    """The folder whose subfolders are the splits."""
    parts = Path(folder).parts
    return Path(*parts[: parts.index(SPLIT)]).as_posix()
