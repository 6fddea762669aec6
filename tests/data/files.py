"""Tiny labeled data sets as files, for the tests of this folder."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "val", "test")


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def noise(seed: int, *shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def make_camvid(
    root: Path, count: int = 2, size: tuple[int, int] = (6, 8), splits: tuple[str, ...] = SPLITS
) -> Path:
    """`count` random pairs in each split, values 0..11."""
    for place, split in enumerate(splits):
        for number in range(count):
            seed = 100 * place + number
            save(root / split / f"{split}{number}.png", noise(seed, *size, 3))
            save(root / f"{split}annot" / f"{split}{number}.png", noise(seed, *size, high=12))
    return root


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """A picture as a file of that kind."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
