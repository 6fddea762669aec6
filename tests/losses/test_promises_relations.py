"""What the losses on relations promise: SKD's pairs and CIRKD's mini-batch."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.cirkd import cirkd_minibatch_loss
from rdd_pipeline.losses.skd import skd_pairwise_loss
from tests.losses.reference import assert_equal, features

STUDENT, TEACHER = (2, 3, 4, 5), (2, 4, 4, 5)


@pytest.mark.parametrize(
    ("loss", "name"),
    [(skd_pairwise_loss, "skd_pairwise"), (cirkd_minibatch_loss, "cirkd_minibatch/T0.1")],
)
def test_equals_the_reference(reference, loss, name):
    student = reference.leaf("student_feature")
    value = loss(student, reference["teacher_feature"])
    value.backward()
    assert_equal(value, reference[f"{name}/loss"])
    assert_equal(student.grad, reference[f"{name}/grad"])


FUNCTIONS = [skd_pairwise_loss, cirkd_minibatch_loss]


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_gradcheck_in_float64(loss):
    student = features(0, (2, 3, 3, 3), torch.float64).requires_grad_()
    teacher = features(1, (2, 4, 3, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda f: loss(f, teacher), student)


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_equal_features_have_no_loss_and_widths_may_differ(loss):
    feature = features(0, STUDENT)
    padded = F.pad(feature, (0, 0, 0, 0, 0, 1))  # one more channel, of zeros
    assert_close(loss(feature, padded), torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_half_precision_is_computed_in_float32_also_under_autocast(loss):
    student, teacher = features(0, STUDENT).half().requires_grad_(), features(1, TEACHER).half()
    outside = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(student, teacher)
    inside.backward()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_a_student_of_another_stride_is_resized(loss):
    small = features(0, (2, 3, 2, 2))
    grown = F.interpolate(small, (4, 5), mode="bilinear", align_corners=True)
    assert_close(loss(small, features(1, TEACHER)), loss(grown, features(1, TEACHER)))


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_an_empty_batch_gives_zero_and_other_batches_are_named(loss):
    assert loss(features(0, STUDENT)[:0], features(1, TEACHER)[:0]) == 0
    with pytest.raises(UserError, match="hold 1 images"):
        loss(features(0, STUDENT)[:1], features(1, TEACHER))


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_a_feature_of_zeros_has_a_finite_gradient(loss):
    student = torch.zeros(STUDENT).requires_grad_()
    loss(student, features(1, TEACHER)).backward()
    assert student.grad.isfinite().all()
