"""Reading one image or one mask from a file, with checks.

Everything that can be wrong with a file becomes a `DataProblem` that names the file.

Pillow decodes: torchvision's decoder is 15 to 40 % faster, but version 0.29 ends the whole process
at a damaged PNG, and importing it takes a loader process several seconds. The packed cache decodes
once anyway.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.segmentation.labels import FORBIDDEN, ColorRow, Lookup

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_LOSSY = ("JPEG", "WEBP", "MPO")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_GRAY = 0
# Pillow stretches gray levels of fewer than 8 bits to 0..255: undone for masks.
_GRAY_STRETCH = {1: 1, 2: 85, 4: 17}


def read_bytes(path: Path) -> bytes:
    """Content of a file.

    Raises:
        DataProblem: The file is missing, not readable or empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise DataProblem(
                f"{path} is a link to {os.readlink(path)}, which does not exist. Correct or remove "
                "the link."
            ) from error
        raise DataProblem(
            f"{path} cannot be read ({error.strerror or error}). Check the path and the file's "
            "permissions."
        ) from error
    if not data:
        raise DataProblem(f"{path} is empty (0 bytes). Copy or download it again.")
    return data


def decode_image_bytes(data: bytes, path: Path) -> Tensor:
    """RGB image from a file's content, turned upright as its EXIF data says.

    Gray, palette and 16-bit images become 8-bit RGB; transparency is dropped.

    Args:
        data: Content of the file.
        path: Where it came from, for messages.

    Returns:
        uint8, (3, H, W); memory may be laid out channels last.

    Raises:
        DataProblem: Not an image, damaged, or of a kind that has no 8-bit RGB meaning.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            upright: Image.Image = image
            if upright.mode == "F":
                raise DataProblem(
                    f"{path} holds floating-point gray values, which have no fixed white. "
                    "Convert it to an 8-bit RGB PNG or JPEG."
                )
            if upright.mode in ("I", "I;16", "I;16B", "I;16L"):
                gray = np.asarray(upright).astype(np.int64)
                if gray.size and not 0 <= int(gray.min()) <= int(gray.max()) <= 65535:
                    raise DataProblem(
                        f"{path} holds gray values {gray.min()}..{gray.max()}, expected 16-bit "
                        "values 0..65535. Convert it to an 8-bit RGB PNG or JPEG."
                    )
                # High byte, as Pillow and libpng do for 16-bit RGB.
                upright = Image.fromarray((gray >> 8).astype(np.uint8))
            pixels = np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except DataProblem:
        raise
    except Exception as error:  # Decoders raise many types; all mean a bad file.
        raise _undecodable(path, error, "its mask") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def decode_mask_bytes(data: bytes, path: Path) -> NDArray[np.uint8]:
    """Raw mask values from a file's content: palette indices or gray levels, as stored.

    Returns:
        uint8, (H, W).

    Raises:
        DataProblem: Not an image, damaged, colored, or with values beyond 255.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_lossy(image, path)
            mode = image.mode
            values = np.array(image)
    except DataProblem:
        raise
    except Exception as error:
        raise _undecodable(path, error, "its image") from error
    if mode == "F":
        raise DataProblem(
            f"{path} holds floating-point values, expected class numbers. Save them as 8-bit gray."
        )
    if mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
        raise DataProblem(
            f"{path} is a color image (mode {mode}), expected a mask with one class number a "
            "pixel (gray or palette PNG). Convert the colors to class numbers (the layout "
            "`folders` reads colors, too), or check whether images and masks were mixed up."
        )
    if mode == "L":
        values //= np.uint8(_GRAY_STRETCH.get(_gray_png_depth(data), 1))
    elif mode.startswith("I") and values.size and not 0 <= values.min() <= values.max() <= 255:
        raise DataProblem(
            f"{path} holds values {values.min()}..{values.max()}, expected class numbers 0..255. "
            "Check that it is a class mask (instance masks and depth maps have 16 bits)."
        )
    return values.astype(np.uint8, copy=False)


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
    if lookup and isinstance(lookup[0], tuple):
        rows = [row for row in lookup if isinstance(row, tuple)]
        return _colors_to_train_ids(_decode_colors(data, path), rows, path)
    return to_train_ids(decode_mask_bytes(data, path), cast(tuple[int, ...], lookup), path)


def _decode_colors(data: bytes, path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) colors of a mask; palette entries are looked up, transparency is dropped."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_lossy(image, path)
            if image.mode.startswith(("I", "F")):
                raise DataProblem(
                    f"{path} is a gray image of more than 8 bits (mode {image.mode}), expected a "
                    "mask with the colors of the table of labels. Check that it is one."
                )
            return np.array(image.convert("RGB"))
    except DataProblem:
        raise
    except Exception as error:
        raise _undecodable(path, error, "its image") from error


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


def _refuse_lossy(image: Image.Image, path: Path) -> None:
    if image.format in _LOSSY:
        raise DataProblem(
            f"{path} is a {image.format} file, whatever its name says: such compression changes "
            "class numbers. Save the mask as PNG, from its original."
        )


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


def read_image(path: Path, *, image_size: tuple[int, int] | None = None) -> Tensor:
    """RGB image, upright; see `decode_image_bytes`.

    Args:
        path: PNG, JPEG, WebP, BMP or TIFF file.
        image_size: (height, width) it is resized to, bilinear with antialiasing. None: its own.

    Returns:
        uint8, (3, H, W).

    Raises:
        DataProblem: The file cannot be read as an image.
    """
    return resize_image(decode_image_bytes(read_bytes(path), path), image_size)


def read_mask(path: Path, lookup: Lookup, *, image_size: tuple[int, int] | None = None) -> Tensor:
    """Mask as train ids; see `decode_mask`.

    Args:
        path: PNG with one class number or one of the table's colors a pixel.
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


def _gray_png_depth(data: bytes) -> int:
    """Bits a pixel of a gray PNG; 0 for anything else."""
    is_gray = data[:8] == _PNG_SIGNATURE and len(data) > 25 and data[25] == _PNG_GRAY
    return data[24] if is_gray else 0


def _undecodable(path: Path, error: Exception, partner: str) -> DataProblem:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify image file" in reason:
        reason = f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    return DataProblem(
        f"{path} cannot be decoded ({reason[:200]}). Copy or download it again, or remove it "
        f"together with {partner}."
    )


def _ranges(values: NDArray[np.int64], *, shown: int = 10) -> str:
    """`0-10, 255` for 0, 1, ..., 10, 255."""
    groups = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    texts = [str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups]
    return ", ".join(texts[:shown]) + (", ..." if len(texts) > shown else "")
