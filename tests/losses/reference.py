"""The frozen reference numbers (tests/vectors), and what the loss tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "vectors"
NAMES = ("losses_c19", "losses_c5")
_WEIGHTS = "0.8373 0.918 0.866 1.0345 1.0166 0.9969 0.9754 1.0489 0.8786 1.0023 0.9539 0.9843"
_WEIGHTS += " 1.1116 0.9037 1.0865 1.0955 1.0865 1.1529 1.0507"
CITYSCAPES_WEIGHTS = torch.tensor([float(weight) for weight in _WEIGHTS.split()])


class Reference:
    """One file of reference numbers; tensors by key."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as arrays:
            self._arrays = dict(arrays)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.array(self._arrays[key]))

    def leaf(self, key: str) -> Tensor:
        return self[key].requires_grad_()

    @property
    def labels(self) -> Tensor:
        """Labels with -1 = ignored, int64."""
        return self["target"].long()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Equal within 2e-5 of the largest expected value."""
    scale = max(float(expected.double().abs().max()), 1e-12)
    error = float((found.detach().double() - expected.double()).abs().max()) / scale
    assert found.shape == expected.shape
    assert error < 2e-5, f"relative error {error:.2e}"


def features(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)


def upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=True)


SHAPE = (2, 5, 3, 4)
"""Of small logits: two images, five classes."""


def logits(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random logits; those of one seed are the same whatever the type."""
    return features(seed, shape, dtype)


def blocks() -> Tensor:
    """Labels of a few rectangles and an ignored corner, (2, 24, 32) uint8."""
    labels = torch.zeros(2, 24, 32, dtype=torch.uint8)
    labels[:, 4:14, 6:20] = 1
    labels[0, 10:, 18:] = 3
    labels[1, :6, :9] = 255
    return labels
