"""Losses on logits: equal to the published numbers and to independent oracles."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.logits import kd_loss
from tests.losses.reference import NAMES, Reference, assert_equal


@pytest.fixture(params=NAMES)
def reference(request):
    return Reference(request.param)


def logits(seed, shape=(2, 5, 3, 4), dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)


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


def test_kd_of_equal_networks_is_zero():
    assert_close(kd_loss(logits(0), logits(0)), torch.tensor(0.0))


def test_kd_gradcheck_in_float64():
    student = logits(0, dtype=torch.float64).requires_grad_()
    teacher = logits(1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, teacher, temperature=2), student)


def test_kd_in_half_precision_does_not_overflow():
    student, teacher = ((1000 * logits(s)).half().requires_grad_() for s in (0, 1))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = kd_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert teacher.grad is None


def test_kd_resizes_a_student_of_another_stride():
    small = logits(0, (2, 5, 2, 2))
    grown = torch.nn.functional.interpolate(small, (3, 4), mode="bilinear", align_corners=True)
    assert_close(kd_loss(small, logits(1)), kd_loss(grown, logits(1)))


def test_kd_names_what_does_not_fit():
    with pytest.raises(UserError, match="student has 4 classes, the teacher 5"):
        kd_loss(logits(0)[:, :4], logits(1))
    with pytest.raises(UserError, match="hold 1 images, teacher logits 2"):
        kd_loss(logits(0)[:1], logits(1))
    with pytest.raises(UserError, match="four axes"):
        kd_loss(logits(0)[0], logits(1)[0])
