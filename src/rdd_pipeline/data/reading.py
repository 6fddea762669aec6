"""Reading one image or one mask from a file, with checks.

Everything that can be wrong with a file becomes a `DataProblem` that names the file. `formats` has
what is common to images and masks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from rdd_pipeline.data.formats import (
    UPRIGHT,
    is_inverted,
    open_picture,
    orientation,
    refuse_lossy,
    stored_bits,
)
from rdd_pipeline.data.labels import FORBIDDEN, ColorRow, Lookup
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.files import not_a_file

LARGEST_FILE = 2**30
"""Bytes of an image's or mask's file: more than the largest one takes without compression."""
FULL_BITS = 16
"""Bits of the values of 16-bit images unless `data.bits` says otherwise."""
# Pillow stretches gray levels of fewer than 8 bits to 0..255: undone for masks.
_GRAY_STRETCH = {2: 85, 4: 17}
_COLOR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "L", "LA", "1")
"""Pillow's names of pixels that hold the colors that were saved."""


class ImageFacts(NamedTuple):
    """What an image's file says beside its pixels."""

    orientation: int = UPRIGHT
    """EXIF orientation it was turned by, 1 to 8."""
    gray_top: int = -1
    """Largest value of 16-bit gray; -1: it is none."""
    color_top: int = -1
    """Largest high byte of 16-bit color; -1: it is none."""


def read_bytes(path: Path) -> bytes:
    """Content of a file.

    Raises:
        DataProblem: The file is missing, no regular file, too large, not readable or empty.
    """
    try:
        instead = _not_readable(path)
        if instead is not None:
            raise DataProblem(f"{path} {instead}")
        data = path.read_bytes()
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or repr(error)
        raise DataProblem(
            f"{path} cannot be read ({reason}). Check the path and the file's permissions."
        ) from error
    if not data:
        raise DataProblem(f"{path} is empty (0 bytes). Copy or download it again.")
    return data


def _not_readable(path: Path) -> str | None:
    """Why a path is not to be opened, as the end of a sentence; None: it can be tried.

    Opening a pipe waits for a writer, and some devices never end.
    """
    instead = not_a_file(path)
    if instead is None:
        size = path.stat().st_size
        if size <= LARGEST_FILE:
            return None
        return (
            f"has {size / 1e6:,.0f} MB, expected at most {LARGEST_FILE / 1e6:,.0f} MB. Save it "
            "with compression, or cut the image and its mask into tiles."
        )
    if path.is_symlink():
        target = os.readlink(path)
        if instead == "does not exist":
            return f"is a link to {target}, which does not exist. Correct or remove the link."
        instead = instead.replace("is ", f"is a link to {target}, ", 1)
    elif instead == "does not exist":
        return None  # the system's own words say it
    return f"cannot be read: it {instead}, expected a file. Replace or remove it."


def decode_image_bytes(data: bytes, path: Path, *, bits: int = FULL_BITS) -> Tensor:
    """RGB image from a file's content, turned upright as its EXIF data says.

    Gray, palette, CMYK and 16-bit images become 8-bit RGB; transparency and further bands are
    dropped.

    Args:
        data: Content of the file.
        path: Where it came from, for messages.
        bits: How many bits the values of 16-bit gray images have, 8 to 16: the upper 8 of them are
            kept.

    Returns:
        uint8, (3, H, W); memory may be laid out channels last.

    Raises:
        DataProblem: Not an image, damaged, or of a kind that has no 8-bit RGB meaning.
    """
    return inspect_image(data, path, bits=bits)[0]


def inspect_image(data: bytes, path: Path, *, bits: int = FULL_BITS) -> tuple[Tensor, ImageFacts]:
    """As `decode_image_bytes`, with what else the file says."""
    with open_picture(data, path, "its mask") as picture:
        turned = orientation(picture)
        pixels, gray_top, color_top = picture_pixels(
            picture, path, depth=stored_bits(picture, data), bits=bits
        )
    return torch.from_numpy(pixels).permute(2, 0, 1), ImageFacts(turned, gray_top, color_top)


def picture_pixels(
    picture: Image.Image, path: Path, *, depth: int, bits: int = FULL_BITS
) -> tuple[NDArray[np.uint8], int, int]:
    """Decode a picture, which stays as it is. See `decode_image_bytes`.

    Args:
        picture: What Pillow has opened.
        path: Where it came from, for messages.
        depth: Bits of a channel as they are stored.
        bits: See `decode_image_bytes`.

    Returns:
        (H, W, 3), and `gray_top` and `color_top` of `ImageFacts`.

    Raises:
        DataProblem: It is of a kind that has no 8-bit RGB meaning.
    """
    gray_top = color_top = -1
    if is_inverted(picture) and picture.mode.startswith("I"):
        raise DataProblem(
            f"{path} holds gray values of more than 8 bits whose 0 means white. Convert it to "
            "an 8-bit RGB PNG or JPEG."
        )
    upright: Image.Image = picture
    if orientation(picture) != UPRIGHT:
        upright = ImageOps.exif_transpose(picture)
    if upright.mode == "F":
        raise DataProblem(
            f"{path} holds floating-point gray values, which have no fixed white. "
            "Convert it to an 8-bit RGB PNG or JPEG."
        )
    if upright.mode in ("LAB", "HSV"):
        raise DataProblem(
            f"{path} holds {upright.mode} colors, expected RGB or gray. Convert it to an 8-bit "
            "RGB PNG or JPEG."
        )
    if upright.mode.startswith("I"):
        gray = np.asarray(upright).astype(np.int64)
        if depth == 12:  # The file itself says how many bits are used.
            bits = depth
        else:
            gray_top = int(gray.max())
        upright = Image.fromarray(_upper_byte(gray, bits, path))
    elif depth == 16:
        # Pillow has taken the high bytes of 16-bit color already.
        color_top = max(_extremes(upright))
    pixels = np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))
    return pixels, gray_top, color_top


def _upper_byte(gray: NDArray[np.int64], bits: int, path: Path) -> NDArray[np.uint8]:
    low, high = int(gray.min()), int(gray.max())
    if not 0 <= low <= high < 1 << bits:
        limits = f"{bits}-bit values 0..{(1 << bits) - 1}"
        advice = "Convert it to an 8-bit RGB PNG or JPEG."
        if bits < FULL_BITS and low >= 0:
            advice = f"Raise `data.bits`, or {advice[0].lower()}{advice[1:]}"
        raise DataProblem(f"{path} holds gray values {low}..{high}, expected {limits}. {advice}")
    # High byte, as Pillow and libpng do for 16-bit RGB.
    return (gray >> (bits - 8)).astype(np.uint8)


def _extremes(picture: Image.Image) -> list[int]:
    """The largest value of each channel but the transparency."""
    channels = picture.convert("RGB").getextrema()
    return [int(high) for _, high in cast(tuple[tuple[int, int], ...], channels)]


def decode_mask_bytes(
    data: bytes, path: Path, palette: dict[int, int] | None = None
) -> NDArray[np.uint8]:
    """Raw mask values from a file's content: palette indices or gray levels, as stored.

    Args:
        data: Content of the file.
        path: Where it came from, for messages.
        palette: Takes the color (0xRRGGBB) of each palette index that is used.

    Returns:
        uint8, (H, W).

    Raises:
        DataProblem: Not an image, damaged, colored, turned, or with values beyond 255.
    """
    with open_picture(data, path, "its image") as picture:
        _check_mask(picture, data, path)
        if is_inverted(picture):
            raise DataProblem(
                f"{path} is a TIFF file whose 0 means white, so its numbers may be meant either "
                "way. Save the mask as PNG."
            )
        mode, depth, kind = picture.mode, stored_bits(picture, data), picture.format
        values = np.array(picture)
        if mode == "P" and palette is not None:
            palette |= _used_colors(picture)
    if kind == "WEBP" and mode in ("RGB", "RGBA"):  # WebP has no gray of its own.
        gray = values[..., 0]
        if (values[..., :3] == gray[..., None]).all():
            values, mode = gray, "L"
    if mode == "F":
        raise DataProblem(
            f"{path} holds floating-point values, expected class numbers. Save them as 8-bit gray."
        )
    if mode not in ("L", "P", "1") and not mode.startswith("I"):
        raise DataProblem(
            f"{path} is a color image (mode {mode}), expected a mask with one class number a "
            "pixel (gray or palette PNG). Convert the colors to class numbers (the layout "
            "`folders` reads colors, too), or check whether images and masks were mixed up."
        )
    if mode == "L" and depth in _GRAY_STRETCH:
        values = values // np.uint8(_GRAY_STRETCH[depth])
    elif mode.startswith("I") and values.size and not 0 <= values.min() <= values.max() <= 255:
        raise DataProblem(
            f"{path} holds values {values.min()}..{values.max()}, expected class numbers 0..255. "
            "Check that it is a class mask (instance masks and depth maps have 16 bits)."
        )
    return values.astype(np.uint8, copy=False)


def _used_colors(picture: Image.Image) -> dict[int, int]:
    colors = picture.getpalette("RGB") or []
    return {
        value: colors[3 * value] << 16 | colors[3 * value + 1] << 8 | colors[3 * value + 2]
        for value, count in enumerate(picture.histogram())
        if count and 3 * value + 2 < len(colors)
    }


def decode_mask(data: bytes, lookup: Lookup, path: Path) -> NDArray[np.uint8]:
    """Train ids from a file's content; see `decode_mask_bytes` and `to_train_ids`.

    Args:
        data: Content of the file.
        lookup: What values or, for colored masks, colors mean; see `LabelSet.lookup`.
        path: Where it came from, for messages.

    Returns:
        uint8, (H, W).

    Raises:
        DataProblem: The file cannot be read as a mask or holds what may not occur.
    """
    if _holds_colors(lookup):
        rows = [row for row in lookup if isinstance(row, tuple)]
        return _colors_to_train_ids(_decode_colors(data, path), rows, path)
    return to_train_ids(decode_mask_bytes(data, path), cast(tuple[int, ...], lookup), path)


def inspect_mask(
    data: bytes, lookup: Lookup, path: Path
) -> tuple[NDArray[np.uint8], dict[int, int]]:
    """As `decode_mask`, with the colors (0xRRGGBB) of the palette indices that are used.

    There are none where colors, not indices, say what the classes are.
    """
    palette: dict[int, int] = {}
    if _holds_colors(lookup):
        return decode_mask(data, lookup, path), palette
    values = decode_mask_bytes(data, path, palette)
    return to_train_ids(values, cast(tuple[int, ...], lookup), path), palette


def _holds_colors(lookup: Lookup) -> bool:
    return bool(lookup) and isinstance(lookup[0], tuple)


def _decode_colors(data: bytes, path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) colors of a mask; palette entries are looked up, transparency is dropped."""
    with open_picture(data, path, "its image") as picture:
        _check_mask(picture, data, path)
        if picture.mode.startswith(("I", "F")):
            raise DataProblem(
                f"{path} is a gray image of more than 8 bits (mode {picture.mode}), expected a "
                "mask with the colors of the table of labels. Check that it is one."
            )
        if picture.mode not in _COLOR_MODES:
            raise DataProblem(
                f"{path} holds {picture.mode} colors, expected the RGB colors of the table of "
                "labels. Save the mask as RGB or palette PNG."
            )
        return np.array(picture.convert("RGB"))


def _check_mask(picture: Image.Image, data: bytes, path: Path) -> None:
    refuse_lossy(picture, data, path)
    if orientation(picture) != UPRIGHT:
        raise DataProblem(
            f"{path} carries an EXIF rotation, and programs differ in whether they follow it. Save "
            "the mask without, in the direction of its upright image."
        )
    # Without a look at the transparency such pixels would be classes of any number.
    alpha = picture.getchannel("A") if (picture.format, picture.mode) == ("WEBP", "RGBA") else None
    if alpha is not None and cast(tuple[int, int], alpha.getextrema())[0] == 0:
        raise DataProblem(
            f"{path} has transparent pixels, below which WebP does not keep what was saved. Save "
            "the mask as PNG, from its original."
        )


def _colors_to_train_ids(
    colors_HWC: NDArray[np.uint8], rows: Sequence[ColorRow], path: Path
) -> NDArray[np.uint8]:
    weights = np.array([1 << 16, 1 << 8, 1], np.int32)
    codes = colors_HWC.astype(np.int32) @ weights
    table = sorted((int(np.dot(row[:3], weights)), row[3]) for row in rows)
    known = np.array([code for code, _ in table])
    places = np.searchsorted(known, codes).clip(max=len(known) - 1)
    wrong = codes[known[places] != codes]
    if len(wrong):
        found, counts = np.unique(wrong, return_counts=True)
        most = found[np.argsort(-counts)][:5].tolist()
        shown = ", ".join(str((code >> 16, code >> 8 & 255, code & 255)) for code in most)
        raise DataProblem(
            f"{path} holds {len(found)} colors that are not in the table of labels ({shown}"
            f"{', ...' if len(found) > 5 else ''}). Add them to a class or to `ignore`; many "
            "similar ones come from resizing or JPEG, then use the original masks."
        )
    ids: NDArray[np.uint8] = np.array([train_id for _, train_id in table], np.uint8)[places]
    return ids


def to_train_ids(raw: NDArray[np.uint8], lookup: Sequence[int], path: Path) -> NDArray[np.uint8]:
    """Raw mask values replaced by train ids.

    Args:
        raw: uint8, any shape.
        lookup: 256 entries, see `LabelSet.lookup`.
        path: Where the mask came from, for messages.

    Returns:
        uint8, shape of `raw`.

    Raises:
        DataProblem: A value may not occur.
    """
    table, allowed = _translation(tuple(lookup))
    # bytes.translate is several times faster than numpy's indexing and counting.
    data = bytearray(raw.tobytes())
    wrong = np.unique(np.frombuffer(data.translate(None, allowed), np.uint8)).astype(np.int64)
    if len(wrong):
        raise DataProblem(
            f"{path} holds mask values {_ranges(wrong)}, allowed are "
            f"{_ranges(np.array(list(allowed)))}. Correct the mask, or check that `data.layout` is "
            "the layout of these files."
        )
    return np.frombuffer(data.translate(table), np.uint8).reshape(raw.shape)


@lru_cache(maxsize=8)
def _translation(lookup: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Train id of each raw value (0 where it may not occur), and the values that may occur."""
    allowed = bytes(raw for raw, train_id in enumerate(lookup) if train_id != FORBIDDEN)
    return bytes(max(train_id, 0) for train_id in lookup), allowed


def read_image(
    path: Path, *, image_size: tuple[int, int] | None = None, bits: int = FULL_BITS
) -> Tensor:
    """RGB image, upright; see `decode_image_bytes`.

    Args:
        path: PNG, JPEG, WebP, BMP or TIFF file.
        image_size: (height, width) it is resized to, bilinear with antialiasing. None: its own.
        bits: See `decode_image_bytes`.

    Returns:
        uint8, (3, H, W).

    Raises:
        DataProblem: The file cannot be read as an image.
    """
    return resize_image(decode_image_bytes(read_bytes(path), path, bits=bits), image_size)


def read_mask(path: Path, lookup: Lookup, *, image_size: tuple[int, int] | None = None) -> Tensor:
    """Mask as train ids; see `decode_mask`.

    Args:
        path: PNG, BMP, TIFF or WebP file without loss, with one class number or one of the table's
            colors a pixel.
        lookup: See `LabelSet.lookup`.
        image_size: (height, width) it is resized to, nearest pixel. None: its own.

    Returns:
        uint8, (H, W).

    Raises:
        DataProblem: The file cannot be read as a mask or holds a value that may not occur.
    """
    ids = decode_mask(read_bytes(path), lookup, path)
    return resize_mask(torch.from_numpy(ids), image_size)


def resize_image(image_CHW: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Bilinear with antialiasing, to (height, width); None or the own size: unchanged."""
    if size is None or tuple(image_CHW.shape[-2:]) == tuple(size):
        return image_CHW
    return F.interpolate(image_CHW[None], size=size, mode="bilinear", antialias=True)[0]


def resize_mask(mask_HW: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Nearest pixel, to (height, width); None or the own size: unchanged."""
    if size is None or tuple(mask_HW.shape) == tuple(size):
        return mask_HW
    return F.interpolate(mask_HW[None, None], size=size, mode="nearest-exact")[0, 0]


def _ranges(values: NDArray[np.int64], *, shown: int = 10) -> str:
    """`0-10, 255` for 0, 1, ..., 10, 255."""
    groups = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    texts = [str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups]
    return ", ".join(texts[:shown]) + (", ..." if len(texts) > shown else "")
