"""KD: equal to the published numbers and to torch's distributions."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from rdd_pipeline.losses.kd import kd_loss
from tests.losses.reference import assert_equal, features

SHAPE = (2, 5, 3, 4)


def logits(seed, shape=SHAPE, dtype=torch.float32):
    return features(seed, shape, dtype)


@pytest.mark.parametrize("temperature", [1, 4])
def test_kd_equals_the_reference(reference, temperature):
    student = reference.leaf("student_logits")
    loss = kd_loss(student, reference["teacher_logits"], temperature=temperature)
    loss.backward()
    assert_equal(loss, reference[f"kd/T{temperature}/loss"])
    assert_equal(student.grad, reference[f"kd/T{temperature}/grad"])


def test_kd_is_the_mean_divergence_of_the_positions():
    student, teacher = (Categorical(logits=logits(s).movedim(1, -1) / 3) for s in (0, 1))
    expected = 9 * kl_divergence(teacher, student).mean()
    assert_close(kd_loss(logits(0), logits(1), temperature=3), expected)
