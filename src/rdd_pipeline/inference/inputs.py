"""Whatever people hold an image in -> RGB tensors as networks here take them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rdd_pipeline.data.formats import open_picture, stored_bits
from rdd_pipeline.data.reading import FULL_BITS, picture_pixels, read_bytes
from rdd_pipeline.errors import DataProblem, UserError

ImageLike = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any] | Tensor
"""A path, a file's content, a Pillow image, an array (H, W), (H, W, 1 | 3 | 4) or a tensor (H, W),
(1 | 3 | 4, H, W). See `as_rgb`."""
Images = ImageLike | Sequence[ImageLike]
"""One of them, several of them in a list, or an array (N, H, W, C) or tensor (N, C, H, W)."""

_IN_MEMORY = Path("the image")
"""In messages, where there is no file."""


def as_rgb(image: ImageLike, *, bits: int = FULL_BITS) -> Tensor:
    """One image as uint8 RGB, (3, H, W).

    As when a data set is read: EXIF rotation is followed, gray becomes RGB, of 16 bits the upper 8
    are kept, transparency is dropped.

    Args:
        image: See `ImageLike`.
        bits: Bits of the values of 16-bit gray files, as `data.bits`.

    Raises:
        DataProblem: It cannot be read or decoded.
        UserError: It is no image, or has other numbers than 0..255 (16-bit integers: 0..65535).
    """
    if isinstance(image, str | os.PathLike):
        path = Path(os.path.expanduser(image))
        return decode(read_bytes(path), path, bits=bits)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image), _IN_MEMORY, bits=bits)
    if isinstance(image, Image.Image):
        return torch.from_numpy(_decoded(image, bits)).permute(2, 0, 1)
    if isinstance(image, Tensor):
        if image.ndim == 2 or (image.ndim == 3 and image.shape[0] in (1, 3, 4)):
            return _three(_bytes(_array(image)), channels=0)
        raise _shape(image, "(3, H, W), (1, H, W) or (H, W)")
    if isinstance(image, np.ndarray):
        if image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4)):
            return _three(_bytes(image), channels=-1)
        raise _shape(image, "(H, W, 3) or (H, W)")
    raise UserError(
        f"An image is a {type(image).__name__}, expected a path, the bytes of a file, a Pillow "
        "image, an array (H, W, 3) or a tensor (3, H, W)."
    )


def decode(data: bytes, path: Path, *, bits: int = FULL_BITS) -> Tensor:
    """An image from a file's content, (3, H, W) uint8; `path` is for messages.

    Raises:
        DataProblem: Not an image, damaged, too large, several, or without an 8-bit RGB meaning.
    """
    with open_picture(data, path, "") as picture:
        pixels, *_ = picture_pixels(picture, path, depth=stored_bits(picture, data), bits=bits)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def is_batch(images: Images) -> bool:
    """Whether it is several images: a list, or an array or tensor of four dimensions."""
    if isinstance(images, list | tuple):
        return True
    return isinstance(images, np.ndarray | Tensor) and images.ndim == 4


def _decoded(image: Image.Image, bits: int) -> NDArray[np.uint8]:
    if 0 in image.size:
        raise _empty()
    depth = 16 if image.mode.startswith("I") else 8
    try:
        return picture_pixels(image, _IN_MEMORY, depth=depth, bits=bits)[0]
    except DataProblem:
        raise
    except Exception as error:  # Decoders raise many types; all mean a bad file.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataProblem(
            f"The image cannot be decoded ({reason[:200]}). Copy or download its file again."
        ) from error


def _array(image: Tensor) -> NDArray[Any]:
    image = image.detach().cpu()
    return (image.float() if image.dtype == torch.bfloat16 else image).numpy()  # NumPy has none


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    if 0 in values.shape:
        raise _empty()
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer) and 0 <= values.min() <= values.max() <= 255:
        return values.astype(np.uint8)
    raise UserError(
        f"An image has values {values.min()}..{values.max()} of type {values.dtype}, expected "
        "0..255 of type uint8 (or 16-bit integers). Of an image from 0 to 1 give "
        "(255 * image).round() as uint8."
    )


def _three(values: NDArray[np.uint8], *, channels: int) -> Tensor:
    """(3, H, W) of gray, of gray with a channel, of RGB or of RGB with transparency."""
    image = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if image.ndim == 2:
        return image.expand(3, -1, -1)
    image = image.movedim(channels, 0)
    return image.expand(3, -1, -1) if len(image) == 1 else image[:3]


def _shape(image: Tensor | NDArray[Any], expected: str) -> UserError:
    kind = "tensor" if isinstance(image, Tensor) else "array"
    return UserError(
        f"An image is an {kind} of shape {tuple(image.shape)}, expected {expected}; several "
        "images are a list of them."
    )


def _empty() -> UserError:
    return UserError("An image has no pixels.")
