"""KD of standardized logits: z-scores by numpy."""

import numpy as np
import torch
from torch.testing import assert_close

from rdd_pipeline.losses.kd import kd_loss
from rdd_pipeline.losses.standardized import standardized_kd_loss
from tests.losses.reference import logits


def test_it_is_kd_of_the_z_scores():
    def z_score(values):
        found = values.numpy().astype(np.float64)
        deviation = found.std(axis=1, ddof=1, keepdims=True)
        return torch.from_numpy((found - found.mean(axis=1, keepdims=True)) / (1e-7 + deviation))

    expected = kd_loss(z_score(logits(0)), z_score(logits(1)), temperature=2)
    assert_close(standardized_kd_loss(logits(0), logits(1)), expected.float())


def test_neither_shift_nor_scale_of_a_network_counts():
    student, teacher = logits(0), logits(1)
    loss = standardized_kd_loss(student, teacher)
    assert_close(standardized_kd_loss(3 * student + 5, 0.1 * teacher - 2), loss)
    same = standardized_kd_loss(7 * teacher + 1, teacher)
    assert_close(same, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_equal_logits_of_all_classes_have_a_gradient_that_can_be_used():
    """A new classifier is zero, and so may be a feature behind a ReLU."""
    student = torch.zeros(1, 5, 2, 2, requires_grad=True)
    standardized_kd_loss(student, logits(1)[:1, :, :2, :2]).backward()
    assert student.grad.isfinite().all()
    assert 0 < student.grad.abs().max() < 1e3


def test_a_single_class_has_no_loss():
    assert standardized_kd_loss(logits(0)[:, :1], logits(1)[:, :1]) == 0
