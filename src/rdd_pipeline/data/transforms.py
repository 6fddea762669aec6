"""Random scale, crop, flip and colors of a training sample, crop first.

Scaling a whole image to use a part of it wastes most of the work. A `CropPlan` says which part will
be used; `apply_crop` resizes only the source rows and columns that part depends on. The result is
that of scaling the whole image, padding it at the bottom and the right, cropping and flipping.

Scales are fractions k / m with a small m: k scaled pixels cover exactly m source pixels, so a
window that begins at a multiple of m has the same pixel grid as the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline.config import AugmentParams
from rdd_pipeline.errors import DataProblem

MAX_DENOMINATOR = 20
"""Scales are rounded to fractions with at most this denominator: exact for steps of .1 and .05,
within 1 % for any other."""


class CropPlan(NamedTuple):
    """What happens to one sample; lengths in pixels, `top` and `left` in the scaled image."""

    scale: Fraction
    top: int
    left: int
    height: int
    width: int
    flip: bool


class ColorPlan(NamedTuple):
    """Changes of a sample's colors; factors of 1 and a hue of 0 change nothing."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    """In turns of the color circle."""
    contrast_first: bool
    """Before saturation and hue; otherwise after them."""


def draw_plan(
    rng: np.random.Generator, height: int, width: int, augment: AugmentParams
) -> CropPlan:
    """Draw scale, crop position and flip for an image of `height` x `width`.

    The scale is uniform on the grid, the crop position uniform over the scaled image. Four numbers
    are drawn in a fixed order.

    Raises:
        DataProblem: A side of the scaled image is less than a pixel.
    """
    if augment.scale_step > 0:
        scales = scale_grid(augment.scale_min, augment.scale_max, augment.scale_step)
        scale = scales[int(rng.integers(len(scales)))]
    else:
        scale = as_scale(float(rng.uniform(augment.scale_min, augment.scale_max)))
    crop_height, crop_width = augment.crop
    rows, columns = scaled_length(height, scale), scaled_length(width, scale)
    if rows < 1 or columns < 1:
        raise DataProblem(
            f"An image of {width} x {height} pixels has no pixel left at scale {float(scale):g}. "
            "Remove it or raise scale_min."
        )
    top = int(rng.integers(max(rows - crop_height, 0) + 1))
    left = int(rng.integers(max(columns - crop_width, 0) + 1))
    flip = bool(rng.random() < augment.flip)
    return CropPlan(scale, top, left, crop_height, crop_width, flip)


def draw_colors(rng: np.random.Generator, strength: float) -> ColorPlan:
    """Draw changes of colors: those of SSD (arXiv 1512.02325) at strength 1.

    Each of the four happens with probability 1/2. Nine numbers are drawn in a fixed order.
    """
    ranges = np.array([0.125, 0.5, 0.5, 0.05]) * strength
    happens = rng.random(4) < 0.5
    changes = np.where(happens, rng.uniform(-1, 1, 4) * ranges, 0.0)
    brightness, contrast, saturation = (float(1 + change) for change in changes[:3])
    return ColorPlan(brightness, contrast, saturation, float(changes[3]), bool(rng.random() < 0.5))


def apply_colors(image_CHW: Tensor, plan: ColorPlan) -> Tensor:
    """A uint8 RGB image (3, H, W) in other colors, by torchvision's transforms.

    Contrast is about the mean gray of what is given.
    """
    # Importing torchvision takes a loader process seconds: only those who use it pay.
    from torchvision.transforms.v2 import functional

    steps: list[Callable[[Tensor], Tensor]] = []
    if plan.contrast != 1:
        steps.append(lambda image: functional.adjust_contrast(image, plan.contrast))
    others: list[Callable[[Tensor], Tensor]] = []
    if plan.saturation != 1:
        others.append(lambda image: functional.adjust_saturation(image, plan.saturation))
    if plan.hue != 0:
        others.append(lambda image: functional.adjust_hue(image, plan.hue))
    steps = steps + others if plan.contrast_first else others + steps
    if plan.brightness != 1:
        steps.insert(0, lambda image: functional.adjust_brightness(image, plan.brightness))
    for step in steps:
        image_CHW = step(image_CHW)
    return image_CHW


@lru_cache
def scale_grid(low: float, high: float, step: float) -> tuple[Fraction, ...]:
    """`low`, `low + step`, ... up to and including `high`, as fractions."""
    count = math.floor((high - low) / step + 1e-6) + 1
    return tuple(as_scale(low + number * step) for number in range(count))


def as_scale(value: float) -> Fraction:
    """The nearest fraction with a small denominator, see `MAX_DENOMINATOR`; never 0."""
    return Fraction(value).limit_denominator(MAX_DENOMINATOR) or Fraction(1, MAX_DENOMINATOR)


def scaled_length(length: int, scale: Fraction) -> int:
    """Pixels of a side of `length` pixels after scaling; a last fraction of a pixel is dropped."""
    return length * scale.numerator // scale.denominator


class _Window(NamedTuple):
    """Source pixels `start:stop` that the scaled pixels `first:last` of one axis depend on."""

    start: int
    stop: int
    skip: int  # scaled pixels of the resized window before `first`
    first: int
    last: int

    @property
    def length(self) -> int:
        return self.last - self.first


def _window(length: int, scale: Fraction, first: int, crop: int) -> _Window:
    k, m = scale.numerator, scale.denominator
    last = min(first + crop, scaled_length(length, scale))
    # Start one filter width early (the filter reaches max(1, 1 / scale) source pixels to each
    # side), then on a whole source pixel.
    margin = -(-k // m) + 1
    aligned = max(first - margin, 0) // k * k
    start = aligned // k * m
    reach = max(Fraction(1), 1 / scale)
    stop = min(length, math.ceil((last - Fraction(1, 2)) / scale + reach) + 1)
    return _Window(start, stop, first - aligned, first, last)


def source_window(plan: CropPlan, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the source image that `apply_crop` reads."""
    rows = _window(height, plan.scale, plan.top, plan.height)
    columns = _window(width, plan.scale, plan.left, plan.width)
    return slice(rows.start, rows.stop), slice(columns.start, columns.stop)


def apply_crop(
    image_CHW: Tensor,
    mask_HW: Tensor,
    plan: CropPlan,
    *,
    pad_color: tuple[float, float, float],
    ignore_index: int = 255,
    colors: ColorPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale, pad, crop and flip one sample, reading only the source pixels needed.

    Args:
        image_CHW: uint8, (3, H, W).
        mask_HW: uint8 train ids, (H, W).
        plan: From `draw_plan`, for this H and W.
        pad_color: RGB in 0..255 where the crop reaches beyond the scaled image; rounded.
        ignore_index: Label there.
        colors: Changes of the colors, not of the padding's. None: none.

    Returns:
        Image, uint8 (3, h, w), scaled bilinearly with antialiasing, and mask, uint8 (h, w), scaled
        to the nearest pixel (`nearest-exact`), with (h, w) the plan's size.
    """
    height, width = mask_HW.shape
    rows = _window(height, plan.scale, plan.top, plan.height)
    columns = _window(width, plan.scale, plan.left, plan.width)
    image = _crop_image(image_CHW, rows, columns, plan.scale)
    if colors is not None:
        image = apply_colors(image, colors)
    mask = _crop_mask(mask_HW, rows, columns, plan.scale)
    if (rows.length, columns.length) != (plan.height, plan.width):
        color = torch.tensor([round(value) for value in pad_color], dtype=torch.uint8)
        image = _padded(image, plan, color[:, None, None])
        mask = _padded(mask, plan, mask.new_tensor(ignore_index))
    if plan.flip:
        image, mask = image.flip(-1), mask.flip(-1)
    return image, mask


def _crop_image(image_CHW: Tensor, rows: _Window, columns: _Window, scale: Fraction) -> Tensor:
    image = image_CHW[:, rows.start : rows.stop, columns.start : columns.stop]
    if scale != 1:
        # interpolate rounds sizes down: a factor a hair above k / m keeps 252.0 from being 251.
        factor = float(scale) * (1 + 1e-9)
        image = F.interpolate(
            image[None],
            scale_factor=(factor, factor),
            mode="bilinear",
            antialias=True,
            align_corners=False,
            recompute_scale_factor=False,
        )[0]
    return image[:, rows.skip :, columns.skip :][:, : rows.length, : columns.length]


def _crop_mask(mask_HW: Tensor, rows: _Window, columns: _Window, scale: Fraction) -> Tensor:
    mask = mask_HW[rows.start : rows.stop, columns.start : columns.stop]
    if scale == 1:
        return mask[rows.skip :, columns.skip :][: rows.length, : columns.length]
    # numpy picks columns three times faster than torch.
    picked = mask.numpy().take(_nearest(rows, scale), axis=0)
    return torch.from_numpy(picked.take(_nearest(columns, scale), axis=1))


def _padded(pixels: Tensor, plan: CropPlan, fill: Tensor) -> Tensor:
    """`pixels` (..., H, W) at the top left of the crop, `fill` elsewhere."""
    rows, columns = pixels.shape[-2:]
    padded = pixels.new_empty((*pixels.shape[:-2], plan.height, plan.width))
    padded[..., :rows, :columns] = pixels
    padded[..., rows:, :] = fill
    padded[..., :rows, columns:] = fill
    return padded


def _nearest(window: _Window, scale: Fraction) -> NDArray[np.int64]:
    """Source pixel, counted from the window's start, under the center of each scaled pixel.

    In integers: torch's float32 form of the same rule depends on rounding where a center falls on
    the border of two source pixels.
    """
    k, m = scale.numerator, scale.denominator
    return (2 * np.arange(window.first, window.last) + 1) * m // (2 * k) - window.start
