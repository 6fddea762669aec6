from __future__ import annotations

import math

import pytest
import torch

from rdd_pipeline.evaluation.calibration import (
    BINS,
    calibration_counts,
    expected_calibration_error,
)


def test_agrees_with_torchmetrics_over_batches_and_without_ignored_pixels() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(6, 5, 8, 9, generator=generator).mul(3).softmax(1)
    labels = torch.randint(0, 5, (6, 8, 9), generator=generator)
    labels[:, :2] = 255
    confidence, classes = probabilities.max(dim=1)
    counts = sum(
        calibration_counts(confidence[i], classes[i] == labels[i], labels[i] != 255)
        for i in range(6)
    )
    expected = functional.multiclass_calibration_error(
        probabilities.movedim(1, -1)[:, 2:].reshape(-1, 5),
        labels[:, 2:].flatten(),
        num_classes=5,
        n_bins=BINS,
    )
    assert expected_calibration_error(counts) == pytest.approx(float(expected), abs=1e-6)


def test_a_network_that_is_sure_and_always_right_has_no_error() -> None:
    sure, all_of_them = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool)
    counts = calibration_counts(sure, all_of_them, all_of_them)
    assert counts[:, -1].tolist() == [16, 16, 16]
    assert expected_calibration_error(counts) == 0
    assert expected_calibration_error(calibration_counts(sure, ~all_of_them, all_of_them)) == 1


def test_without_a_valid_pixel_there_is_none() -> None:
    nothing = torch.zeros(4, dtype=torch.bool)
    assert math.isnan(
        expected_calibration_error(calibration_counts(torch.ones(4), nothing, nothing))
    )
