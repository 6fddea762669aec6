"""Camera and canvas of the generated road scenes.

Surfaces are painted far to near into one buffer of paint numbers; color, texture, haze, shadow and
label are looked up per pixel afterwards. So one drawing call serves image and label alike, and the
two cannot disagree. The image is drawn at twice the size and averaged; the label is crisp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float32]
Point = tuple[float, float]
RGB = tuple[float, float, float]

SUPERSAMPLING = 2
NEAR = 1.6
"""Nothing closer to the camera than this is drawn, in meters."""


class Camera(NamedTuple):
    """A pinhole camera on the road: X to the right, Y up, Z ahead, in meters; image in pixels."""

    focal: float
    vanishing_x: float
    horizon: float
    height: float
    curve: float
    """Sideways shift of everything at distance Z is `curve * Z**2`: a bend of the road."""
    roll: float
    """Slope of the horizon."""

    def project(self, x: float, y: float, z: float) -> Point:
        """Image position of a point of the world; points too near are pushed to `NEAR`."""
        z = max(z, NEAR)
        column = self.vanishing_x + self.focal * (x + self.curve * z * z) / z
        row = self.horizon - self.focal * (y - self.height) / z
        return column, row + self.roll * (column - self.vanishing_x)

    def pixels(self, length: float, z: float) -> float:
        """Length in the image of `length` meters at distance `z`."""
        return self.focal * length / max(z, NEAR)


class Paint(NamedTuple):
    """Looks and label of a surface."""

    color: RGB
    """Reflectance, 0..1."""
    label: int
    depth: float
    """Distance in meters; 0: taken from the row, for the ground."""
    grain: float = 0.04
    """Strength of pixel-sized texture."""
    blotches: float = 0.05
    """Strength of texture many pixels wide."""
    stripes: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Strength, and cycles a pixel along x and along y."""


class Light(NamedTuple):
    """Weather, daylight and the camera's sensor."""

    tint: RGB
    haze_color: RGB
    haze_distance: float
    shadow: float
    """What is left of the light in a shadow, 0..1."""
    shadow_blur: float
    contrast: float
    noise: float
    blur: float
    vignette: float


class Canvas:
    """Painted surfaces of one scene of `height` x `width` pixels, nearest painted last."""

    def __init__(self, height: int, width: int, camera: Camera) -> None:
        self.height, self.width = height * SUPERSAMPLING, width * SUPERSAMPLING
        self.camera = camera
        self._image = Image.new("I", (self.width, self.height), 0)
        self._draw = ImageDraw.Draw(self._image)
        self._shadow_image = Image.new("L", (self.width, self.height), 0)
        self._shadow_draw = ImageDraw.Draw(self._shadow_image)
        self._paints: list[Paint] = []
        self._objects: list[int] = []
        self._object = 0

    def new_object(self) -> None:
        """What is painted from here on belongs to one object; label borders run between objects."""
        self._object += 1

    def paint(self, paint: Paint) -> int:
        """The number under which `paint` is drawn."""
        self._paints.append(paint)
        self._objects.append(self._object)
        return len(self._paints) - 1

    def polygon(self, points: Sequence[Point], number: int) -> None:
        """Fill a polygon of image points."""
        self._draw.polygon(points, fill=number)

    def ellipse(self, center: Point, radius_x: float, radius_y: float, number: int) -> None:
        """Fill an ellipse."""
        x, y = center
        box = (x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        self._draw.ellipse(box, fill=number)

    def ring(self, center: Point, radius_x: float, radius_y: float, line: float, n: int) -> None:
        """Outline of an ellipse, `line` pixels wide."""
        x, y = center
        box = (x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        self._draw.ellipse(box, outline=n, width=max(1, round(line)))

    def line(self, points: Sequence[Point], width: float, number: int) -> None:
        """A line `width` pixels wide."""
        self._draw.line(points, fill=number, width=max(1, round(width)))

    def ground(self, points: Sequence[Point], number: int) -> None:
        """Fill a polygon of (X, Z) points of the ground."""
        self.polygon([self.camera.project(x, 0.0, z) for x, z in points], number)

    def shadow(self, points: Sequence[Point], strength: float = 1.0) -> None:
        """A shadow on the ground over (X, Z) points; `strength` 0..1."""
        corners = [self.camera.project(x, 0.0, z) for x, z in points]
        self._shadow_draw.polygon(corners, fill=round(255 * strength))

    def round_shadow(
        self, x: float, z: float, radius_x: float, radius_z: float, strength: float = 1.0
    ) -> None:
        """An elliptic shadow on the ground."""
        angles = [2 * math.pi * step / 14 for step in range(14)]
        points = [(x + radius_x * math.cos(a), z + radius_z * math.sin(a)) for a in angles]
        self.shadow(points, strength)

    def finish(
        self,
        rng: np.random.Generator,
        light: Light,
        *,
        ground_labels: Sequence[int],
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
        """Shade everything.

        Returns:
            Image (H, W, 3), and at the same size the label and the object number of each pixel.
        """
        numbers = np.asarray(self._image)
        table = self._paints
        labels = np.array([paint.label for paint in table])
        color = np.array([paint.color for paint in table], np.float32)[numbers]
        color *= self._texture(rng, numbers, np.isin(labels, ground_labels)[numbers])[..., None]
        color *= np.asarray(light.tint, np.float32)

        on_ground = np.isin(labels, ground_labels)[numbers]
        shadow = self._shadow_image.filter(ImageFilter.BoxBlur(light.shadow_blur))
        dark = np.asarray(shadow, np.float32) / 255 * (1 - light.shadow)
        color *= 1 - (dark * on_ground)[..., None] * np.array([1.0, 0.97, 0.9], np.float32)

        depth = np.array([paint.depth for paint in table], np.float32)[numbers]
        depth = np.where(depth == 0, self._ground_depth(), depth)
        clear = np.exp(-depth / light.haze_distance)[..., None]
        color = color * clear + np.asarray(light.haze_color, np.float32) * (1 - clear)

        step = SUPERSAMPLING
        parts = [color[row::step, column::step] for row in range(step) for column in range(step)]
        small = sum(parts[1:], parts[0]) / np.float32(len(parts))
        image = self._develop(rng, small, light)
        crisp = numbers[::step, ::step]
        return image, labels[crisp], np.array(self._objects)[crisp]

    def _ground_depth(self) -> Floats:
        rows = np.arange(self.height, dtype=np.float32) - np.float32(self.camera.horizon)
        depth = self.camera.focal * self.camera.height / np.maximum(rows, 0.5)
        return np.broadcast_to(depth[:, None], (self.height, self.width)).astype(np.float32)

    def _texture(
        self, rng: np.random.Generator, numbers: NDArray[np.int32], ground: NDArray[np.bool_]
    ) -> Floats:
        """Factor on the color of each pixel, around 1."""
        table = self._paints
        grain = np.array([paint.grain for paint in table], np.float32)[numbers]
        blotches = np.array([paint.blotches for paint in table], np.float32)[numbers]
        fine = rng.standard_normal((self.height, self.width), dtype=np.float32)
        wide = smooth_noise(rng, self.height, self.width, self.height // 16)
        middle = smooth_noise(rng, self.height, self.width, self.height // 5)
        # Ground texture lies in the plane of the ground: coarser towards the camera.
        rows = self._ground_depth()
        columns = np.arange(self.width, dtype=np.float32) - np.float32(self.camera.vanishing_x)
        across = columns * rows / np.float32(self.camera.focal)
        tile = rng.standard_normal((64, 64), dtype=np.float32)
        plane = tile[(rows * 5).astype(np.int64) % 64, np.floor(across * 9).astype(np.int64) % 64]
        fine = np.where(ground, 0.4 * fine + 0.7 * plane, fine)
        factor: Floats = 1 + grain * fine + blotches * (wide + 0.6 * middle)
        stripes = np.array([paint.stripes for paint in table], np.float32)
        if np.any(stripes[:, 0]):
            strength, per_x, per_y = (stripes[:, column][numbers] for column in range(3))
            x = np.arange(self.width, dtype=np.float32)[None, :]
            y = np.arange(self.height, dtype=np.float32)[:, None]
            factor += strength * np.sin(2 * np.pi * (per_x * x + per_y * y), dtype=np.float32)
        return np.maximum(factor, np.float32(0.05))

    def _develop(self, rng: np.random.Generator, color: Floats, light: Light) -> NDArray[np.uint8]:
        """The sensor: vignette, contrast, blur and noise; from light to 8 bits."""
        height, width = color.shape[:2]
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        color = color * (1 - np.float32(light.vignette / 2) * (x * x + y * y))[..., None]
        pixels = np.clip(np.maximum(color, 0) ** np.float32(light.contrast) * 255, 0, 255)
        if light.blur > 0.3:
            soft = Image.fromarray(pixels.astype(np.uint8)).filter(
                ImageFilter.GaussianBlur(light.blur - 0.2)
            )
            pixels = np.asarray(soft, np.float32)
        noise = rng.standard_normal(pixels.shape, dtype=np.float32)
        noisy = pixels + noise * light.noise * (0.5 + np.sqrt(pixels / 255))
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> Floats:
    """Noise of about unit strength whose blotches are `cell` pixels wide, (height, width)."""
    cell = max(cell, 2)
    rows, columns = height // cell + 2, width // cell + 2
    grid = rng.standard_normal((rows, columns), dtype=np.float32)
    wide = Image.fromarray(grid).resize((columns * cell, rows * cell), Image.Resampling.BILINEAR)
    return np.asarray(wide)[:height, :width]
