"""One's own images: a folder of images and one of masks for each split, and a table of labels."""

from __future__ import annotations

import glob
import json
import os
import re
import reprlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml  # type: ignore[import-untyped,unused-ignore]
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from rdd_pipeline.data.labels import (
    Color,
    ColorRow,
    LabelSet,
    make_color_lookup,
    make_lookup,
)
from rdd_pipeline.data.layouts.base import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Files,
    Layout,
    Listing,
    Pair,
    Problem,
    absent_split,
    check_root,
    distinct_colors,
    find_files,
    is_misnamed,
    listed_pairs,
    match_pairs,
    missing_folders,
    name_splits,
    read_names,
)
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.files import not_a_file, require_regular_file

SPLIT = "SPLIT"
TABLES = ("labels.yaml", "labels.yml", "labels.json")
_MOST_VALUES = 100_000
_LARGEST_TABLE = 2**20
"""Bytes; a class takes about a hundred, and reading YAML takes seconds for each megabyte."""

FOLDERS = (
    "images/SPLIT/NAME.png (or .jpg, subfolders allowed) with its mask masks/SPLIT/NAME.png for "
    "the splits train, val and perhaps more, and the table labels.yaml (or .json): `classes:`, a "
    "list of names or of {name, value, color, weight}, and `ignore:`, a list of mask values, [255] "
    "if left out. Other folders, lists of names, colored masks and all else: docs/data.md."
)
_FORM = "The form of the table is in docs/data.md, Your own images."
_NEEDED = ("train", "val", "test")
"""Splits that are wanted when they are there; others may be empty."""

_COLOR = "[red, green, blue] with 0..255 each, '#rrggbb', or a list of these"


def _as_colors(value: Any) -> Any:
    """One color or several, as numbers or hexadecimal -> a list of colors."""
    if value is None:
        return None
    several = isinstance(value, list | tuple) and not any(isinstance(v, int) for v in value)
    colors = [_as_color(item) for item in (value if several else [value])]
    if not colors or any(color is None for color in colors):
        raise ValueError(f"{reprlib.repr(value)} is no color, expected {_COLOR}")
    return colors


def _as_color(value: Any) -> Color | None:
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        red, green, blue = bytes.fromhex(value[1:])
        return red, green, blue
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    if not all(type(part) is int and 0 <= part <= 255 for part in value):
        return None
    return value[0], value[1], value[2]


Colors = Annotated[tuple[Color, ...], BeforeValidator(_as_colors)]


class _Row(BaseModel):
    """One class."""

    model_config = ConfigDict(extra="forbid")

    name: str
    value: int | list[int] | None = Field(None, description="Mask values; None: the position.")
    color: Colors | None = Field(None, description="In figures the first one is used.")
    weight: PositiveFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, dict):
            raise ValueError(
                f"{reprlib.repr(value)} is no class, expected a name or "
                "{name: ..., value: ..., color: ...} (quote names such as 'off' and '2')"
            )
        return value


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = "folders"
    classes: list[_Row] = Field(min_length=1, max_length=255)
    ignore: list[int] | Colors | None = None
    encoding: Literal["index", "color"] = "index"
    images: str = "images/SPLIT"
    masks: str = "masks/SPLIT"
    lists: str | None = None
    image_ending: str = ""
    mask_ending: str = ""

    @field_validator("ignore", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @model_validator(mode="after")
    def _splits_are_told_apart(self) -> Self:
        for key in ("images", "masks", "lists"):
            value = getattr(self, key)
            parts = Path(value or "").parts
            if ".." in parts or Path(value or "").is_absolute():
                raise ValueError(f"{key} is {value!r}, expected a path below the table's folder")
            if key != "lists" and sum(part.count(SPLIT) for part in parts) > 1:
                raise ValueError(f"{key} is {value!r}, expected SPLIT once")
        split = [SPLIT in value for value in (self.images, self.masks)]
        if self.lists is None and any(split) and not all(split):
            raise ValueError(
                "with SPLIT in one of images and masks only, `lists` has to tell splits apart: "
                "write SPLIT in both, or in neither (then all images are `train`, and "
                "data.val_fraction makes the split `val` of them)"
            )
        if self.lists is not None and (any(split) or self.lists.count(SPLIT) != 1):
            raise ValueError("`lists` needs SPLIT once, and then images and masks have none")
        return self

    @property
    def expected(self) -> str:
        """What the folders should look like."""
        image = f"{self.images}/NAME{self.image_ending}.png (or .jpg)"
        mask = f"{self.masks}/NAME{self.mask_ending}.png"
        return f"{image} with its mask {mask}, as the table of labels says."


def folders_layout(root: Path) -> Layout:
    """The layout of one's own images in `root`, with the labels of its table.

    Raises:
        UserError: There is no table, it is no file, or something in it is wrong.
    """
    check_root(root, FOLDERS)
    table, labels = _read(root)
    default_ignored = (255,) if table.ignore is None and 255 in _ignored_values(table) else ()
    return Layout(
        labels,
        partial(_list, table),
        FOLDERS,
        default_ignored=default_ignored,
        palette=_palette(table),
    )


def _read(root: Path) -> tuple[_Table, LabelSet]:
    found = [root / name for name in TABLES if os.path.lexists(root / name)]
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or "no table of labels"
        raise DataProblem(f"{root} holds {names}, expected one of {', '.join(TABLES)}. {FOLDERS}")
    path = require_regular_file(found[0], "The table of labels", largest=_LARGEST_TABLE)
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        _require_small(content)
        table = _Table.model_validate(content)
        return table, _label_set(table)
    except ValidationError as error:
        faults = [
            f"{_place(fault['loc'])}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise DataProblem(f"{path}: {'; '.join(faults).rstrip('.')}. {_FORM}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataProblem(f"{path} cannot be used ({reason}). {_FORM}") from error


def _require_small(content: Any) -> None:
    """Refuse aliases of YAML by which few lines hold without end, as messages would show them.

    Raises:
        ValueError: There are too many values.
    """
    left = [content]
    for _ in range(_MOST_VALUES):
        if not left:
            return
        value = left.pop()
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
    raise ValueError(f"it holds more than {_MOST_VALUES} values, aliases counted in full")


def _place(location: tuple[int | str, ...]) -> str:
    """Where in the table a fault is."""
    return ".".join(str(part) for part in location) or "table"


def _label_set(table: _Table) -> LabelSet:
    weights = [row.weight for row in table.classes]
    if any(weights) and not all(weights):
        raise ValueError("some classes have a weight and some have none: give all or none")
    defaults = distinct_colors(len(table.classes) + 1)[1:]
    return LabelSet(
        name=table.name,
        names=tuple(row.name for row in table.classes),
        colors=tuple(
            row.color[0] if row.color else color
            for row, color in zip(table.classes, defaults, strict=True)
        ),
        class_weights=tuple(weight for weight in weights if weight) or None,
        lookup=_color_lookup(table) if table.encoding == "color" else _index_lookup(table),
    )


def _palette(table: _Table) -> dict[int, Color]:
    """The color of each mask value whose class was given one."""
    return {
        value: row.color[0]
        for number, row in enumerate(table.classes)
        if row.color
        for value in _values(row, number)
    }


def _ignored_values(table: _Table) -> tuple[int, ...]:
    """Mask values that count as unlabeled: 255 if the table neither says so nor gives it a class.

    Raises:
        ValueError: They are colors, or not 0..255.
    """
    if table.encoding == "color":
        return ()
    if table.ignore is None:
        used = {value for row in table.classes for value in _values(row, -1)}
        return () if 255 in used else (255,)
    ignored = tuple(value for value in table.ignore if isinstance(value, int))
    if len(ignored) < len(table.ignore):
        raise ValueError("ignore holds colors, expected mask values (or set `encoding: color`)")
    wrong = [value for value in ignored if not 0 <= value <= 255]
    if wrong:
        raise ValueError(f"ignore holds {wrong}, expected mask values 0..255")
    return ignored


def _values(row: _Row, position: int) -> list[int]:
    values = position if row.value is None else row.value
    return [values] if isinstance(values, int) else values


def _index_lookup(table: _Table) -> tuple[int, ...]:
    ignored = _ignored_values(table)
    train_ids: dict[int, int] = {}
    for number, row in enumerate(table.classes):
        if row.color is not None and len(row.color) > 1:
            raise ValueError(
                f"class '{row.name}' has several colors, but the masks hold numbers (or set "
                "`encoding: color`)"
            )
        for value in _values(row, number):
            if not 0 <= value <= 255:
                raise ValueError(f"class '{row.name}' has mask value {value}, expected 0..255")
            if value in ignored:
                raise ValueError(
                    f"mask value {value} of class '{row.name}' is used twice: it is in `ignore`, "
                    f"too. Take it out there (`ignore: {[v for v in ignored if v != value]}`)"
                )
            if value in train_ids:
                other = table.classes[train_ids[value]].name
                raise ValueError(
                    f"mask value {value} of class '{row.name}' is used twice: it is class "
                    f"'{other}', too (a class without `value` has its position, from 0)"
                )
            train_ids[value] = number
    return make_lookup(train_ids, ignored=ignored)


def _color_lookup(table: _Table) -> tuple[ColorRow, ...]:
    train_ids: dict[Color, int] = {}
    for number, row in enumerate(table.classes):
        if row.value is not None:
            raise ValueError(f"class '{row.name}' has a value, but the masks hold colors")
        if row.color is None:
            raise ValueError(f"class '{row.name}' has no color, by which masks are read")
        for color in row.color:
            if color in train_ids:
                raise ValueError(f"color {color} of class '{row.name}' is used twice")
            train_ids[color] = number
    ignore = table.ignore or ()
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
    if SPLIT not in table.images:
        return _list_whole(table, root)
    tops = tuple(_around_split(folder)[0] for folder in (table.images, table.masks))
    problems = missing_folders(root, dict.fromkeys(tops), table.expected)
    if problems:
        return Listing((), tuple(problems))
    found = _splits_there(root, table.images, table.masks, problems)
    pairs: list[Pair] = []
    absent: dict[str, Problem] = {}
    warnings: list[str] = []
    for split, name in name_splits(found).items():
        folders = (table.images.replace(SPLIT, name), table.masks.replace(SPLIT, name))
        missing = missing_folders(root, folders, table.expected)
        if missing and split == "val" and name not in found:
            absent[split] = absent_split(split, missing[0].text)
        elif missing:
            problems += missing
        else:
            images, masks = _trees(table, root, *folders, problems)
            unread = images.other.keys() & masks.other.keys()
            if not images and not masks and not unread and split not in _NEEDED:
                warnings.append(f"Split '{split}' is passed over: {folders[0]} holds no image.")
                continue
            pairs += match_pairs(split, images, masks, problems, where=folders[0])
    return Listing(tuple(pairs), tuple(problems), tuple(warnings), absent=absent)


def _list_whole(table: _Table, root: Path) -> Listing:
    """Without split folders and lists all images are `train`."""
    problems = missing_folders(root, dict.fromkeys((table.images, table.masks)), table.expected)
    if problems:
        return Listing((), tuple(problems))
    images, masks = _trees(table, root, table.images, table.masks, problems)
    pairs = match_pairs("train", images, masks, problems, where=table.images)
    text = f"{root} has no split 'val': its table names folders without SPLIT, and no `lists`."
    return Listing(tuple(pairs), tuple(problems), absent={"val": absent_split("val", text)})


def _list_by_names(table: _Table, lists: str, root: Path) -> Listing:
    """Splits are lists of names; what no list names is not used."""
    problems = missing_folders(root, dict.fromkeys((table.images, table.masks)), table.expected)
    found = {
        name
        for name in _lists_there(root, lists)
        if not is_misnamed(root / lists.replace(SPLIT, name), root, problems)
    }
    splits = name_splits(found)
    paths = {split: lists.replace(SPLIT, name) for split, name in splits.items()}
    absent: dict[str, Problem] = {}
    for split, path in list(paths.items()):
        instead = not_a_file(root / path)
        if instead is None:
            continue
        del paths[split]
        there = "missing" if instead == "does not exist" else instead
        text = f"{path} {there}, the list of the images of split '{split}'."
        if split == "val":
            absent[split] = absent_split(split, text)
        else:
            text += (
                f" Lists there: {', '.join(sorted(found)) or 'none'}. Add it or correct `lists`."
            )
            problems.append(Problem(path, text, blocks=True))
    if problems:
        return Listing((), tuple(problems), absent=absent)
    images, masks = _trees(table, root, table.images, table.masks, problems)
    folders = (table.images, table.masks)
    listed = {
        split: read_names(root, path, images, masks, problems, folders=folders)
        for split, path in paths.items()
    }
    if any(problem.blocks for problem in problems):
        return Listing((), tuple(problems), absent=absent)
    pairs: list[Pair] = []
    warnings: list[str] = []
    for split, path in paths.items():

        def neither(name: str, path: str = path) -> Problem:
            text = (
                f"{name} of {path} has neither image nor mask in {table.images} and "
                f"{table.masks}. Add both or take the name off the list."
            )
            return Problem(name, text)

        if split not in _NEEDED and not (root / path).read_bytes().strip():
            warnings.append(f"Split '{split}' is passed over: {path} is empty.")
            continue
        pairs += listed_pairs(
            split, listed[split], images, masks, problems, where=path, neither=neither
        )
    return Listing(tuple(pairs), tuple(problems), tuple(warnings), absent=absent)


def _lists_there(root: Path, lists: str) -> set[str]:
    """Names that stand for SPLIT in the paths of the lists that are there."""
    before, _, after = lists.partition(SPLIT)
    pattern = f"{glob.escape(before)}*{glob.escape(after)}"
    return {
        path.removeprefix(before).removesuffix(after)
        for path in glob.glob(pattern, root_dir=root)
        if (root / path).is_file() and path not in (before, after)
    } - {""}


def _trees(
    table: _Table, root: Path, images: str, masks: str, problems: list[Problem]
) -> tuple[Files, Files]:
    """Images and masks; where one folder holds both, no file is both."""
    of_images, of_masks = _sides(table, root / images, root / masks)
    return (
        find_files(
            root,
            images,
            IMAGE_SUFFIXES,
            problems,
            ending=table.image_ending,
            recursive=True,
            leave_out=of_masks,
        ),
        find_files(
            root,
            masks,
            MASK_SUFFIXES,
            problems,
            ending=table.mask_ending,
            recursive=True,
            leave_out=of_images,
        ),
    )


def _sides(
    table: _Table, images: Path, masks: Path
) -> tuple[Callable[[Path], bool], Callable[[Path], bool]]:
    """Whether a file that may be on either side is an image, and whether it is a mask."""
    if images != masks:
        return (
            lambda path: images.is_relative_to(masks) and path.is_relative_to(images),
            lambda path: masks.is_relative_to(images) and path.is_relative_to(masks),
        )

    def is_mask(path: Path) -> bool:
        # The longer ending is meant: NAME_mask.png has the ending "" of images, too. With equal
        # ones the suffix decides: NAME.jpg and NAME.png.
        sides = [(table.image_ending, False), (table.mask_ending, True)]
        fitting = [(len(end), mask) for end, mask in sides if path.stem.endswith(end)]
        if len(fitting) == 2 and fitting[0][0] == fitting[1][0]:
            return path.suffix.lower() == ".png"
        return bool(fitting) and max(fitting)[1]

    return lambda path: not is_mask(path), is_mask


def _splits_there(root: Path, images: str, masks: str, problems: list[Problem]) -> set[str]:
    """What stands for SPLIT in the folders that are there, on either side."""
    found: dict[str, dict[str, str]] = {}
    for pattern in dict.fromkeys((images, masks)):
        top, before, after = _around_split(pattern)
        names = [
            path.name[len(before) : len(path.name) - len(after)]
            for path in (root / top).iterdir()
            if path.name.startswith(before)
            and path.name.endswith(after)
            and not is_misnamed(path, root, problems)
        ]
        folders = {pattern.replace(SPLIT, name): name for name in names if name}
        found[pattern] = {f: name for f, name in folders.items() if (root / f).is_dir()}
    if images != masks:
        # `trainannot` holds the masks of `train`; it is no split of its own of images in `SPLIT`.
        both = found[images].keys() & found[masks].keys()
        for folder in both:
            whole = len(found[images][folder]) > len(found[masks][folder])
            del found[images if whole else masks][folder]
    return {name for folders in found.values() for name in folders.values()}


def _around_split(folder: str) -> tuple[str, str, str]:
    """The folder whose subfolders are the splits; what their names have before and after SPLIT."""
    parts = Path(folder).parts
    place = next(number for number, part in enumerate(parts) if SPLIT in part)
    before, _, after = parts[place].partition(SPLIT)
    return Path(*parts[:place]).as_posix(), before, after
