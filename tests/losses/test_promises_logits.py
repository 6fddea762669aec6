"""What all losses on logits promise."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.bpkd import bpkd_losses
from rdd_pipeline.losses.cwd import cwd_loss
from rdd_pipeline.losses.dist import dist_loss
from rdd_pipeline.losses.dkd import dkd_losses
from rdd_pipeline.losses.kd import kd_loss
from rdd_pipeline.losses.standardized import standardized_kd_loss
from tests.losses.reference import blocks, logits


def bpkd_sum(student, teacher, labels=None):
    terms = bpkd_losses(student, teacher, blocks() if labels is None else labels)
    return 50 * terms.edge + 20 * terms.body


def dkd_sum(student, teacher, labels=None):
    terms = dkd_losses(student, teacher, blocks() if labels is None else labels, temperature=3)
    return terms.target + 0.5 * terms.rest


ALL = [kd_loss, cwd_loss, dist_loss, bpkd_sum, dkd_sum, standardized_kd_loss]


@pytest.mark.parametrize("loss", ALL)
def test_equal_networks_have_no_loss(loss):
    assert_close(loss(logits(0), logits(0)), torch.tensor(0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", ALL)
def test_gradcheck_in_float64(loss):
    student = logits(0, dtype=torch.float64).requires_grad_()
    teacher = logits(1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher), student)


@pytest.mark.parametrize("loss", ALL)
def test_half_precision_does_not_overflow_and_autocast_changes_nothing(loss):
    student, teacher = ((1000 * logits(s)).half().requires_grad_() for s in (0, 1))
    outside = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(student, teacher)
    inside.backward()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert inside.isfinite()
    assert student.grad.isfinite().all()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", ALL)
def test_a_student_of_another_stride_is_resized(loss):
    small = logits(0, (2, 5, 2, 2))
    grown = F.interpolate(small, (3, 4), mode="bilinear", align_corners=True)
    assert_close(loss(small, logits(1)), loss(grown, logits(1)))


@pytest.mark.parametrize("loss", ALL)
def test_an_empty_batch_gives_zero(loss):
    arguments = (blocks()[:0],) if loss in (bpkd_sum, dkd_sum) else ()
    assert loss(logits(0)[:0], logits(1)[:0], *arguments) == 0


@pytest.mark.parametrize("loss", ALL)
def test_what_does_not_fit_is_named(loss):
    with pytest.raises(UserError, match="student has 4 classes, the teacher 5"):
        loss(logits(0)[:, :4], logits(1))
    with pytest.raises(UserError, match="hold 1 images, teacher logits 2"):
        loss(logits(0)[:1], logits(1))
    with pytest.raises(UserError, match="four axes"):
        loss(logits(0)[0], logits(1)[0])
