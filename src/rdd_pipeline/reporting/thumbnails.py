"""Small pictures inside HTML pages, as data URIs of a few kilobytes; equal pixels give equal bytes.

Suffixes: H rows, W columns of an image.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rdd_pipeline.data.labels import LabelSet

BOX = 200, 150
"""Most columns and rows of a thumbnail; smaller pictures are not enlarged."""
WRONG = 0xD5, 0x5E, 0x00
"""Color of wrong pixels (Okabe and Ito 2008)."""
_QUALITY = 72


def photograph(image_CHW: Tensor) -> str:
    """A (3, H, W) uint8 RGB image as JPEG."""
    picture = Image.fromarray(np.ascontiguousarray(image_CHW.cpu().numpy().transpose(1, 2, 0)))
    picture.thumbnail(BOX, Image.Resampling.LANCZOS)
    return _uri(picture, "JPEG", quality=_QUALITY, optimize=True)


def class_map(map_HW: Tensor, labels: LabelSet) -> str:
    """An (H, W) map of train ids in the label set's colors as PNG; ignored pixels are white."""
    palette = np.full((256, 3), 255, np.uint8)
    palette[: labels.num_classes] = labels.colors
    return _indexed(map_HW.cpu().numpy(), palette)


def mistakes(prediction_HW: Tensor, label_HW: Tensor, ignore_index: int) -> str:
    """Wrong pixels as PNG to lie over the image: right ones are clear, ignored ones white."""
    label = label_HW.cpu().numpy()
    kinds = np.where(label == ignore_index, 2, prediction_HW.cpu().numpy() != label)
    palette = np.array([(255, 255, 255), WRONG, (255, 255, 255)], np.uint8)
    return _indexed(kinds, palette, transparency=0)


def _indexed(values_HW: NDArray[np.generic], palette: NDArray[np.uint8], **how: int) -> str:
    """Values that stand for colors, so none between two of them may come into being."""
    picture = Image.fromarray(values_HW.astype(np.uint8))
    picture.thumbnail(BOX, Image.Resampling.NEAREST)
    picture.putpalette(palette.tobytes())
    return _uri(picture, "PNG", optimize=True, **how)


def _uri(picture: Image.Image, kind: str, **how: int) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
