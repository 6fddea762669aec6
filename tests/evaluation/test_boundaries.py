from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from torch import Tensor

from rdd_pipeline.evaluation.boundaries import (
    boundary,
    boundary_counts,
    boundary_distance,
    boundary_iou,
)


def _blobs(seed: int, size: tuple[int, int] = (31, 44)) -> Tensor:
    """Regions of four values, some of one pixel."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 4, (-(-size[0] // 6), -(-size[1] // 6)), generator=generator)
    fine = coarse.repeat_interleave(6, 0).repeat_interleave(6, 1)[: size[0], : size[1]].clone()
    fine[torch.rand(size, generator=generator) < 0.01] = 2
    return fine


def _eroded(mask: np.ndarray, distance: int) -> np.ndarray:
    return binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=0)


@pytest.mark.parametrize("distance", [1, 2, 3, 15, 40])
def test_is_each_mask_without_its_erosion(distance: int) -> None:
    regions = _blobs(0)
    expected = np.zeros(regions.shape, bool)
    for value in range(4):
        mask = regions.numpy() == value
        expected |= mask & ~_eroded(mask, distance)
    assert np.array_equal(boundary(regions, distance).numpy(), expected)


def test_iou_of_the_summed_boundaries_as_scipy_finds_them() -> None:
    sums = torch.zeros(3, 5, dtype=torch.int64)
    both, either = np.zeros(5), np.zeros(5)
    for seed in range(3):
        label, prediction = _blobs(seed, (60, 80)), _blobs(seed + 10, (60, 80))
        prediction[:, :40] = label[:, :40]
        label[20:35, 10:60] = 255
        sums += boundary_counts(prediction, label.to(torch.uint8), 5, 255)
        for value in range(5):
            ours, theirs = (
                (m.numpy() == value) & (label.numpy() != 255) for m in (prediction, label)
            )
            ours, theirs = (m & ~_eroded(m, 2) for m in (ours, theirs))  # 0.02 * 100 pixels
            both[value] += (ours & theirs).sum()
            either[value] += (ours | theirs).sum()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(boundary_iou(sums).numpy(), both / either)
    assert math.isnan(boundary_iou(sums)[4])


def test_what_is_predicted_where_labels_are_ignored_changes_nothing() -> None:
    label, prediction = _blobs(1), _blobs(2)
    label[5:20] = 255
    other = prediction.clone()
    other[5:20] = 3
    assert torch.equal(
        boundary_counts(prediction, label, 4, 255), boundary_counts(other, label, 4, 255)
    )
    assert not boundary_counts(prediction, torch.full_like(label, 255), 4, 255).any()


def test_distance_is_two_percent_of_the_diagonal_and_a_pixel_at_least() -> None:
    assert boundary_distance((1024, 2048)) == 46
    assert boundary_distance((10, 10)) == 1
