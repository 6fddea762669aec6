"""Objects as tools write them, drawn as pixels: polygons, run lengths, small pictures.

Each function looks at what is claimed before it takes memory for it.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rdd_pipeline.errors import DataProblem

Size = tuple[int, int]
"""(height, width)."""
Mask = NDArray[np.bool_]

MOST_CORNERS = 1_000_000
_FARTHEST = 1e6
"""Pixels; a corner that is further away is no slip of the hand."""


def corners(points: Any, source: str, *, scale: tuple[float, float] = (1.0, 1.0)) -> list[Any]:
    """(x, y) of a polygon, checked.

    Args:
        points: Pairs of x and y.
        source: The file, for messages.
        scale: What x and y are multiplied with.

    Raises:
        DataProblem: They are no finite numbers, or too many or too far away.
    """
    try:
        found = [(float(x) * scale[0], float(y) * scale[1]) for x, y in points]
    except (TypeError, ValueError) as error:
        raise DataProblem(f"{source} holds a polygon that is no list of x and y.") from error
    if len(found) > MOST_CORNERS:
        raise DataProblem(f"{source} holds a polygon of {len(found):,} corners.")
    wrong = next((p for p in found if not all(abs(v) <= _FARTHEST for v in p)), None)
    if wrong is not None:  # not a number, too
        raise DataProblem(f"{source} holds a polygon with the corner {wrong[0]:g}, {wrong[1]:g}.")
    return found


def inside(polygon: Sequence[tuple[float, float]], size: Size) -> Mask:
    """Pixels whose centers are in a polygon (even-odd rule); x = 0 is the left edge of the image.

    Each row's line through the centers of its pixels crosses the outline; between the first
    crossing and the second it is inside, and so on.
    """
    height, width = size
    crossings = np.zeros((height, width + 1), bool)
    for (x1, y1), (x2, y2) in pairwise([*polygon, *polygon[:1]]):
        if y1 == y2:
            continue
        low, high = sorted((y1, y2))
        # Rows whose center is in [low, high): a corner on a center belongs to one edge.
        first, last = max(0, math.ceil(low - 0.5)), min(height, math.ceil(high - 0.5))
        rows = np.arange(first, last)
        x = x1 + (rows + 0.5 - y1) * ((x2 - x1) / (y2 - y1))
        columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.intp)
        crossings[rows, columns] ^= True
    return np.logical_xor.accumulate(crossings, axis=1)[:, :width]


def filled(polygon: Sequence[tuple[float, float]], size: Size) -> Mask:
    """A polygon with its outline, as Pillow and OpenCV fill it: corners are pixels."""
    canvas = Image.new("L", (size[1], size[0]))
    if len(polygon) == 1:
        polygon = [*polygon, *polygon]
    if polygon:
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in polygon], fill=1, outline=1)
    return np.asarray(canvas, bool)


def thick_line(points: Sequence[tuple[float, float]], size: Size, width: int) -> Mask:
    """An open line of some pixels' width; a point alone is a disk."""
    canvas = Image.new("L", (size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    if len(points) > 1:
        draw.line([tuple(point) for point in points], fill=1, width=width)
    return np.asarray(canvas, bool)


def ellipse(center: tuple[float, float], radii: tuple[float, float], size: Size) -> Mask:
    """Pixels whose centers are in an ellipse."""
    rows, columns = np.ogrid[: size[0], : size[1]]
    x = (columns + 0.5 - center[0]) / max(radii[0], 1e-9)
    y = (rows + 0.5 - center[1]) / max(radii[1], 1e-9)
    return np.asarray(x * x + y * y <= 1.0)


def coco_runs(rle: Any, size: Size, source: str) -> Mask:
    """COCO's run lengths: pixels column by column, first those outside of the object.

    `counts` is a list, or text: each number in groups of five bits, the lowest first, character =
    48 + bits, 32 more where the number goes on, 16 in the last group for a negative one; from the
    third number on the difference to the last but one.

    Raises:
        DataProblem: It is not of this size, or does not fill it exactly.
    """
    try:
        height, width = (int(side) for side in rle["size"])
        counts = rle["counts"]
        if (height, width) != size:
            raise DataProblem(
                f"{source} holds run lengths of {width} x {height} pixels for an image of "
                f"{size[1]} x {size[0]}."
            )
        runs = _numbers(counts) if isinstance(counts, str) else [int(n) for n in counts]
    except DataProblem:
        raise
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataProblem(f"{source} holds run lengths that cannot be read.") from error
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise DataProblem(
            f"{source} holds run lengths of {sum(runs):,} pixels for an image of "
            f"{height * width:,}."
        )
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(text[:20])
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        if len(found) > 2:
            value += found[-2]
        found.append(value)
        value = shift = 0
    if shift:
        raise ValueError(text[:20])
    return found


def brush_runs(rle: Any, size: Size, source: str) -> Mask:
    """Label Studio's brush: bits of the package rle-pack, of RGBA pixels; the opaque ones count.

    32 bits: how many values; 5: bits of a value less one; four times 4: bits of a length less one.
    Then runs: one bit whether a value is repeated, two which of the four lengths, the length less
    one, and one value or that many.

    Raises:
        DataProblem: It ends too early, or is not of this size.
    """
    height, width = size
    try:
        data = np.asarray(rle, np.int64)
        if data.ndim != 1 or data.min() < 0 or data.max() > 255:
            raise ValueError("no bytes")
        return _unpacked(data.astype(np.uint8), height * width).reshape(height, width)
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        reason = str(error) if isinstance(error, ValueError) and "pixels" in str(error) else ""
        raise DataProblem(
            f"{source} holds brush strokes that cannot be read{reason and f' ({reason})'}."
        ) from error


def _unpacked(data: NDArray[np.uint8], pixels: int) -> Mask:
    bits = np.unpackbits(data)
    text = bits.tobytes().translate(bytes.maketrans(b"\0\1", b"01")).decode()
    place = 0

    def read(length: int) -> int:
        nonlocal place
        place += length
        if place > len(text):
            raise ValueError("too short")
        return int(text[place - length : place], 2)

    total, word = read(32), read(5) + 1
    if total not in (pixels, 4 * pixels) or word > 8:
        raise ValueError(f"{total:,} values for {pixels:,} pixels")
    lengths = [read(4) + 1 for _ in range(4)]
    values = np.zeros(total, np.uint8)
    powers = 1 << np.arange(word - 1, -1, -1)
    done = 0
    while done < total:
        repeated = read(1)
        end = done + 1 + read(lengths[read(2)])
        if end > total:
            raise ValueError(f"more than {total:,} values for {pixels:,} pixels")
        if repeated:
            values[done:end] = read(word)
        else:
            stop = place + (end - done) * word
            if stop > len(text):
                raise ValueError("too short")
            values[done:end] = bits[place:stop].reshape(-1, word) @ powers
            place = stop
        done = end
    return values.reshape(pixels, -1)[:, -1] > 0


def bitmap(data: Any, origin: Any, size: Size, source: str, *, packed: bool = True) -> Mask:
    """A small picture as base64 text, at a place (x, y) of the image; what is not empty counts.

    Args:
        data: PNG, compressed by zlib if `packed` (Supervisely), as base64.
        origin: (x, y) of its upper left pixel; what lies outside of the image is cut.
        size: Of the image.
        source: The file, for messages.
        packed: Whether zlib comes before.

    Raises:
        DataProblem: It is no PNG or larger than the image can be.
    """
    height, width = size
    try:
        raw = base64.b64decode(data, validate=True)
        if packed:
            # A PNG can hardly be larger than its pixels; a few bytes may unpack to gigabytes.
            most = 4 * height * width + 1_000_000
            unpacker = zlib.decompressobj()
            raw = unpacker.decompress(raw, most)
            if unpacker.unconsumed_tail:
                raise DataProblem(f"{source} holds a bitmap that unpacks to over {most:,} bytes.")
        x, y = (int(value) for value in origin)
        with Image.open(io.BytesIO(raw), formats=("PNG",)) as picture:
            if picture.width > 2 * width or picture.height > 2 * height:
                raise DataProblem(
                    f"{source} holds a bitmap of {picture.width} x {picture.height} pixels for an "
                    f"image of {width} x {height}."
                )
            opaque = picture.mode in ("RGBA", "LA", "PA")
            pixels = np.asarray(picture.getchannel("A") if opaque else picture.convert("L")) > 0
            if picture.mode == "P" and "transparency" in picture.info:
                pixels = np.asarray(picture.convert("RGBA").getchannel("A")) > 0
    except DataProblem:
        raise
    except (
        binascii.Error, zlib.error, TypeError, ValueError, OSError, SyntaxError, OverflowError
    ) as error:  # fmt: skip
        raise DataProblem(f"{source} holds a bitmap that cannot be read.") from error
    mask = np.zeros(size, bool)
    top, left = max(y, 0), max(x, 0)
    part = pixels[top - y : height - y, left - x : width - x] if y < height and x < width else None
    if part is not None and part.size:
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return mask
