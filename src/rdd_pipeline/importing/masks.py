"""Masks that are picture files: what they hold, and reading them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdd_pipeline.data.formats import open_picture, refuse_lossy
from rdd_pipeline.data.labels import Color, Lookup, make_color_lookup, make_lookup
from rdd_pipeline.data.reading import decode_mask, decode_mask_bytes
from rdd_pipeline.importing.export import IGNORED, Category, Draw, Sizes, is_unlabeled
from rdd_pipeline.importing.folder import Folder

MOST_COLORS = 4096
"""Different colors of a picture that are still counted one by one."""


class Values(NamedTuple):
    """What one mask holds."""

    indices: dict[int, int] | None
    """Pixels of each number, of a gray or palette mask."""
    colors: dict[Color, int] | None
    """Pixels of each color; None: more than `MOST_COLORS`, or a gray mask."""
    palette: dict[int, Color]
    """Color of each number, of a palette mask."""


def survey(data: bytes, path: Path) -> Values:
    """Count what a mask holds.

    Raises:
        DataProblem: It cannot be read, or its compression changes numbers.
    """
    with open_picture(data, path, "its image") as picture:
        refuse_lossy(picture, data, path)
        if picture.mode in ("RGB", "RGBA", "LA", "RGBX"):
            counted = picture.convert("RGB").getcolors(MOST_COLORS)
            return Values(None, None if counted is None else _by_color(counted), {})
    palette: dict[int, int] = {}
    values = decode_mask_bytes(data, path, palette)
    counts = np.bincount(values.ravel(), minlength=256)
    colors = {index: _color(code) for index, code in palette.items()}
    return Values({int(v): int(counts[v]) for v in np.flatnonzero(counts)}, None, colors)


def _by_color(counted: Sequence[tuple[int, object]]) -> dict[Color, int]:
    found: dict[Color, int] = {}
    for count, color in counted:
        assert isinstance(color, tuple)
        found[color[0], color[1], color[2]] = count
    return found


def _color(code: int) -> Color:
    return code >> 16, code >> 8 & 255, code & 255


def looks_like_a_mask(data: bytes) -> bool | None:
    """Whether a picture is a mask by what it holds: few values in large areas; None: no picture.

    Photographs have thousands of colors. A gray image with few values is a mask as well.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.format in ("JPEG", "MPO"):
                return False
            if picture.mode.startswith(("I", "F")):
                return len(np.unique(np.asarray(picture))) <= 256
            if picture.mode == "P":
                return _is_flat(np.asarray(picture)) or len(picture.getcolors(256) or []) <= 16
            small = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
            if picture.mode in ("1",) or small.getcolors(64) is not None:
                return True
            # Drawn with soft edges: many colors, but most pixels equal their neighbor.
            return _is_flat(np.asarray(small))
    except Exception:  # decoders raise many types; it is looked at again with a message
        return None


def _is_flat(pixels: NDArray[np.uint8]) -> bool:
    if pixels.shape[0] < 2 or pixels.shape[1] < 2:
        return True
    same = pixels[:, 1:] == pixels[:, :-1]
    return bool((same if same.ndim == 2 else same.all(-1)).mean() > 0.9)


def draw_file(folder: Folder, file: str, lookup: Lookup) -> Draw:
    """Draws what a mask file holds."""
    return draw_bytes(lambda: folder.bytes(file), file, lookup)


def draw_bytes(
    read: Callable[[], bytes], source: str, lookup: Lookup, gray: Lookup | None = None
) -> Draw:
    """Draws what an encoded mask holds.

    Args:
        read: Gives the encoded mask.
        source: Where it comes from, for messages.
        lookup: What its numbers or colors mean.
        gray: What the numbers of a mask of one channel mean, where others hold colors.
    """

    def draw(_: Sizes) -> NDArray[np.uint8]:
        data = read()
        chosen = lookup
        if gray is not None and _has_one_channel(data):
            chosen = gray
        return decode_mask(data, chosen, Path(source))

    return draw


def _has_one_channel(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.mode in ("1", "L", "I;16", "I")


def table_of_values(values: Mapping[int, str]) -> tuple[list[Category], Lookup, list[str]]:
    """Classes of mask values by name; a value that is called void is ignored, as 255 is.

    Returns:
        The classes, the lookup, and the names of ignored values.
    """
    classes = {v: name for v, name in sorted(values.items()) if not is_unlabeled(name)}
    ids: dict[int, int] = {}
    names: list[str] = []
    for value, name in classes.items():
        if name not in names:
            names.append(name)
        ids[value] = names.index(name)
    ignored = tuple({*range(256)} & ({*values} | {255}) - {*ids})
    left = [name for name in values.values() if is_unlabeled(name)]
    lookup = make_lookup(ids, ignored=ignored, ignore_index=IGNORED)
    return [Category(name) for name in names], lookup, left


def table_of_colors(
    rows: Sequence[tuple[str, Color]],
) -> tuple[list[Category], Lookup, list[str]]:
    """Classes of colors by name, likewise; several colors of one name are one class."""
    categories: dict[str, Category] = {}
    ids: dict[Color, int] = {}
    left: list[str] = []
    ignored: list[Color] = []
    for name, color in rows:
        if is_unlabeled(name):
            left.append(name)
            ignored.append(color)
            continue
        categories.setdefault(name, Category(name, color))
        ids[color] = list(categories).index(name)
    lookup = make_color_lookup(ids, ignored=tuple(ignored), ignore_index=IGNORED)
    return list(categories.values()), lookup, left


def said_ignored(left: Sequence[str]) -> str:
    """What the unlabeled pixels of masks have become."""
    return f"{', '.join(left)} is ignored" if left else ""
