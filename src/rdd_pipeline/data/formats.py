"""Opening a picture file: which kinds are read and, in one line, why another one is not.

Pillow decodes: torchvision's decoder is 15 to 40 % faster, but version 0.29 ends the whole process
at a damaged PNG, and importing it takes a loader process several seconds. The packed cache decodes
once anyway.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from rdd_pipeline.config import MOST_PIXELS
from rdd_pipeline.errors import DataProblem

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = MOST_PIXELS
"""What Pillow takes at most (a quarter GiB of 3 bytes, doubled)."""
UPRIGHT = 1
"""EXIF orientation of an image that is stored as it is seen."""

# Pillow warns from half of that on and speaks of attacks beyond it: `_check_size` is in its place.
Image.MAX_IMAGE_PIXELS = None

_ORIENTATION = 0x0112
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _KIND_OF_PAGE, _OLD_KIND_OF_PAGE = 258, 262, 254, 255
_LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp")


@contextlib.contextmanager
def open_picture(
    data: bytes, path: Path, partner: str, *, several: bool = False
) -> Iterator[Image.Image]:
    """A file's content as a picture that is not decoded yet.

    What goes wrong inside the `with` block, where it is decoded, becomes a `DataProblem`, too.

    Args:
        data: Content of the file.
        path: Where it came from, for messages.
        partner: What has to go with the file if it is removed, for messages; empty: nothing.
        several: Also open what holds several pages or frames, and GIF.

    Raises:
        DataProblem: It is none, is damaged or too large, or holds several pictures.
    """
    try:
        formats = (*FORMATS, "GIF") if several else FORMATS
        with Image.open(io.BytesIO(data), formats=formats) as picture:
            _check_size(picture, path)
            if not several:
                _check_pages(picture, path)
            yield picture
    except DataProblem:
        raise
    except MemoryError as error:
        raise DataProblem(
            f"{path} cannot be decoded (MemoryError). There is too little memory: lower "
            "`data.workers` and `trainer.workers`, or cut the image and its mask into tiles."
        ) from error
    except Exception as error:  # Decoders raise many types; all mean a bad file.
        raise _undecodable(data, path, error, partner) from error


def orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; to be asked before the picture is turned."""
    found = picture.getexif().get(_ORIENTATION, UPRIGHT)
    return found if found in range(1, 9) else UPRIGHT


def stored_bits(picture: Image.Image, data: bytes) -> int:
    """Bits of a channel as the file stores them; Pillow gives 8 for many other numbers."""
    if picture.format == "PNG":
        return data[24]
    if isinstance(picture, TiffImageFile):
        return int(max(picture.tag_v2.get(_BITS_PER_SAMPLE, (1,))))
    return 8


def is_inverted(picture: Image.Image) -> bool:
    """Whether 0 means white, which programs and even bit depths of Pillow treat differently."""
    return isinstance(picture, TiffImageFile) and picture.tag_v2.get(_PHOTOMETRIC) == 0


def refuse_lossy(picture: Image.Image, data: bytes, path: Path) -> None:
    """Make sure that a mask's numbers are those that were saved.

    Raises:
        DataProblem: The file's compression changes them.
    """
    kind = picture.format or ""
    if kind == "TIFF" and picture.info.get("compression") in _LOSSY_IN_TIFF:
        kind = f"TIFF file with {picture.info['compression'].removeprefix('tiff_').upper()} inside"
    elif kind in ("JPEG", "MPO") or (kind == "WEBP" and not _is_lossless_webp(data)):
        kind = f"{kind} file"
    else:
        return
    raise DataProblem(
        f"{path} is a {kind}, whatever its name says: such compression changes class numbers. Save "
        "the mask as PNG, from its original."
    )


def _is_lossless_webp(data: bytes) -> bool:
    kinds = set()
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        kinds.add(kind)
        at += 8 + length + length % 2
    return b"VP8L" in kinds and b"VP8 " not in kinds


def _check_size(picture: Image.Image, path: Path) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise DataProblem(
            f"{path} cannot be decoded as one image: {width} x {height} pixels are "
            f"{width * height / 1e6:.0f} million, expected at most {MAX_PIXELS // 1_000_000} "
            "million. Cut image and mask into tiles of the same names."
        )


def _check_pages(picture: Image.Image, path: Path) -> None:
    count = len(pages(picture))
    if count > 1:
        raise DataProblem(
            f"{path} holds {count} pages or frames, expected one image. Save each as a file of its "
            "own."
        )


def pages(picture: Image.Image) -> list[int]:
    """Numbers of the pages or frames that are images of their own, for `picture.seek`.

    Smaller versions and masks of the first page, as in GeoTIFF files, do not count, nor does what
    phones keep behind a photo.
    """
    if not getattr(picture, "is_animated", False) or picture.format in ("JPEG", "MPO"):
        return [0]
    if isinstance(picture, TiffImageFile):
        return [0, *_further_images(picture)]
    return list(range(getattr(picture, "n_frames", 1)))


def _further_images(picture: TiffImageFile) -> list[int]:
    """Pages behind the first one that are images of their own."""
    found = []
    for page in itertools.count(1):
        try:
            picture.seek(page)
        except EOFError:
            break
        except SyntaxError:  # None that Pillow decodes, but its tags are read.
            pass
        kind = int(picture.tag_v2.get(_KIND_OF_PAGE, 0))
        if not (kind & 0b101 or picture.tag_v2.get(_OLD_KIND_OF_PAGE) == 2):
            found.append(page)
    picture.seek(0)
    return found


def _undecodable(data: bytes, path: Path, error: Exception, partner: str) -> DataProblem:
    reason = " ".join(str(error).split()) or type(error).__name__
    advice = "Copy or download it again, or remove it"
    if data[:4] in _TIFF_SIGNATURES:
        advice = f"If other programs open it, save it as PNG; else {advice.lower()}"
    if "cannot identify image file" in reason:
        reason = f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
        if data[:4] in _TIFF_SIGNATURES:
            reason = "a TIFF file, but its bands or bits are none that make an RGB or gray image"
    return DataProblem(
        f"{path} cannot be decoded ({reason[:200]}). {advice}"
        f"{f' together with {partner}' if partner else ''}."
    )
