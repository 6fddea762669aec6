"""What every tool's export is read into: classes, pictures, remarks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.data.labels import Color
from rdd_pipeline.errors import DataProblem

IGNORED = 255
"""Mask value of pixels that count as unlabeled."""
MOST_CLASSES = 255
BACKGROUND = "background"

_SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_UNLABELED = {
    "void", "unlabeled", "unlabelled", "notlabeled", "notlabelled", "nolabel", "ignore", "ignored",
    "unknown", "unannotated", "notannotated", "unclassified", "undefined", "dontcare",
}  # fmt: skip
"""Letters only: `not labelled`, `__ignore__` and `don't care` are among them."""
_BACKGROUNDS = {"background", "_background_", "__background__", "bg", "backgr", "none"}


class Sizes(NamedTuple):
    """(height, width) of an image as it is seen, and as the file stores it."""

    upright: tuple[int, int]
    stored: tuple[int, int]


Draw = Callable[[Sizes], NDArray[np.uint8]]
"""Class numbers and `IGNORED`, (height, width) of either of the sizes."""


MALFORMED = (TypeError, KeyError, AttributeError, IndexError, OverflowError)
"""What reading JSON raises that has other types or keys in it than its format says."""


class Category(NamedTuple):
    """A class as the tool knows it."""

    name: str
    color: Color | None = None


@dataclass(frozen=True)
class Picture:
    """One image with its labels, which are drawn when they are asked for.

    Attributes:
        name: Path of the image in the export without suffix, with `/`.
        image: File below the export's folder, or what reads its content.
        draw: Makes the mask.
        split: The tool's own; None: it has none.
        source: The file that holds the labels, for messages.
    """

    name: str
    image: str | Callable[[], bytes]
    draw: Draw
    split: str | None
    source: str


@dataclass(frozen=True)
class Export:
    """A folder that was understood.

    Attributes:
        tool: Its name for people.
        categories: Their positions are the class numbers.
        pictures: In a fixed order.
        background: Class of the pixels that nobody labeled; None: there are none.
        unlabeled: What the tool's unlabeled pixels have become, one clause.
        remarks: What was left out or decided, a sentence each.
        named: Whether people have named the classes.
    """

    tool: str
    categories: Sequence[Category]
    pictures: Sequence[Picture]
    background: int | None = None
    unlabeled: str = ""
    remarks: list[str] = field(default_factory=list)
    named: bool = True


def is_unlabeled(name: str) -> bool:
    """Whether a class of this name stands for pixels that are not labeled (`void`)."""
    return re.sub(r"[\W_]+", "", name.lower()) in _UNLABELED


def is_background(name: str) -> bool:
    """Whether a class of this name is all the rest."""
    return name.strip().lower() in _BACKGROUNDS


def split_of(path: str) -> str | None:
    """The split that a path's folders say, the innermost first; None: none.

    It may be part of a folder's name, as in `images_train`, `train2017` or `validannot`.
    """
    for part in reversed(path.split("/")):
        found = {split for word in words(part) if (split := _split_of_word(word)) is not None}
        if len(found) == 1:
            return found.pop()
    return None


def words(text: str) -> list[str]:
    """Runs of letters and runs of digits, in lower case: `leftImg8bit_01` -> left, img, 8, ..."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", text)
    return re.findall(r"\d+|[^\W\d_]+", text.lower())


def _split_of_word(word: str) -> str | None:
    bare = re.sub("(annotations?|annots?|labels?|masks?|images?)$", "", word)
    return _SPLITS.get(word) or _SPLITS.get(bare)


def with_background(names: Iterable[str]) -> tuple[list[str], int]:
    """The classes with one for the pixels that no object covers, and its number.

    A class that is called so already is taken; else it comes first.

    Raises:
        DataProblem: There are too many classes.
    """
    found = list(dict.fromkeys(names))
    place = next((number for number, name in enumerate(found) if is_background(name)), None)
    if place is None:
        found, place = [BACKGROUND, *found], 0
    check_count(len(found))
    return found, place


def check_count(count: int) -> None:
    """Make sure that the classes fit a mask.

    Raises:
        DataProblem: There are more than `MOST_CLASSES`.
    """
    if count > MOST_CLASSES:
        raise DataProblem(f"{count} classes, at most {MOST_CLASSES} fit a mask. Merge some.")


def canvas_size(declared: tuple[int, int] | None, sizes: Sizes, source: str) -> tuple[int, int]:
    """(height, width) to draw on: what the labels say if the image has it, before memory is taken.

    Raises:
        DataProblem: The labels were made for another size.
    """
    if declared is None or declared == sizes.upright:
        return sizes.upright
    if declared == sizes.stored:
        return declared
    raise DataProblem(
        f"{source} is about an image of {declared[1]} x {declared[0]} pixels, but the image has "
        f"{sizes.upright[1]} x {sizes.upright[0]}."
    )


def draw_objects(
    objects: Sequence[Mapping[str, Any]],
    pixels: Callable[[Mapping[str, Any], tuple[int, int], str], NDArray[np.bool_]],
    ids: Mapping[str, int],
    label: str,
    background: int,
    declared: tuple[int, int] | None,
    source: str,
) -> Draw:
    """Objects one over the other, in the order of the file.

    Args:
        objects: As the tool writes them.
        pixels: Those of an object on a canvas of a size; the last argument is `source`.
        ids: Class by name.
        label: Field of an object that names its class.
        background: Class of all other pixels.
        declared: (height, width) that the labels were made for, see `canvas_size`.
        source: The file, for messages.
    """

    def draw(sizes: Sizes) -> NDArray[np.uint8]:
        size = canvas_size(declared, sizes, source)
        mask = np.full(size, background, np.uint8)
        for item in objects:
            mask[pixels(item, size, source)] = ids[str(item.get(label))]
        return mask

    return draw
