"""What all losses on features promise."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.af_dcd import af_dcd_contrast_loss
from rdd_pipeline.losses.at import at_loss
from rdd_pipeline.losses.cwd import cwd_feature_loss
from rdd_pipeline.losses.dsd import csd_loss, psd_loss
from rdd_pipeline.losses.fitnet import fitnet_loss
from rdd_pipeline.losses.ifvd import ifvd_loss
from rdd_pipeline.losses.mgd import mgd_loss
from tests.losses.reference import assert_equal, features

SHAPE = (2, 4, 5, 6)


LABELS = torch.randint(0, 3, (2, 10, 12), generator=torch.Generator().manual_seed(0))
LABELS[:, :4] = 255


def ifvd(student, teacher, labels=LABELS):
    return ifvd_loss(student, teacher, labels[: len(student)], num_classes=3)


def psd(student, teacher):
    return psd_loss([student, student[:, :2]], [teacher, teacher[:, :2]])


def af_dcd(student, teacher):
    return af_dcd_contrast_loss(student, teacher, groups=2, temperature=1.0)


def width_matters(loss):
    return loss in (fitnet_loss, cwd_feature_loss, mgd_loss, af_dcd)


ALL = [fitnet_loss, at_loss, ifvd, cwd_feature_loss, psd, csd_loss, mgd_loss, af_dcd]


@pytest.mark.parametrize("name", ["fitnet", "at", "ifvd", "cwd_feature/T4"])
def test_equals_the_reference(reference, name):
    student, teacher = reference.leaf("student_feature"), reference["teacher_feature"]
    adapted = F.conv2d(student, reference["adapter_weight"])
    if name == "fitnet":
        loss = fitnet_loss(adapted, teacher)
    elif name == "at":
        loss = at_loss(student, teacher)
    elif name == "ifvd":
        classes = reference["student_logits"].shape[1]
        loss = ifvd_loss(student, teacher, reference.labels, num_classes=classes, ignore_index=-1)
    else:  # the published one adapts only where the widths differ
        same = student.shape == teacher.shape
        loss = cwd_feature_loss(
            student if same else adapted, teacher, student_channels=student.shape[1]
        )
    loss.backward()
    assert_equal(loss, reference[f"{name}/loss"])
    assert_equal(student.grad, reference[f"{name}/grad"])


@pytest.mark.parametrize("loss", [loss for loss in ALL if loss is not af_dcd])
def test_equal_features_have_no_loss(loss):
    feature = features(0, SHAPE)
    assert_close(loss(feature, feature), torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", ALL)
def test_gradcheck_in_float64(loss):
    shape = (2, 4, 4, 4) if loss is af_dcd else (2, 4, 3, 3)
    student = features(0, shape, torch.float64).requires_grad_()
    teacher = features(1, shape, torch.float64)
    labels = LABELS[:, 1:7, :6]
    assert torch.autograd.gradcheck(
        lambda f: ifvd(f, teacher, labels) if loss is ifvd else loss(f, teacher), student
    )


@pytest.mark.parametrize("loss", ALL)
def test_half_precision_does_not_overflow_and_autocast_changes_nothing(loss):
    student, teacher = ((100 * features(s, SHAPE)).half().requires_grad_() for s in (0, 1))
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
    small, teacher = features(0, (2, 4, 3, 3)), features(1, SHAPE)
    grown = F.interpolate(small, (5, 6), mode="bilinear", align_corners=True)
    assert_close(loss(small, teacher), loss(grown, teacher))


@pytest.mark.parametrize("loss", ALL)
def test_an_empty_batch_gives_zero(loss):
    assert loss(features(0, SHAPE)[:0], features(1, SHAPE)[:0]) == 0


@pytest.mark.parametrize("loss", ALL)
def test_a_feature_of_zeros_has_a_finite_gradient(loss):
    # A freshly initialized or dead layer; lengths of zero are where normalizations break.
    student = torch.zeros(SHAPE).requires_grad_()
    loss(student, features(1, SHAPE)).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL)
def test_what_does_not_fit_is_named(loss):
    with pytest.raises(UserError, match="hold 1 images"):
        loss(features(0, SHAPE)[:1], features(1, SHAPE))
    if width_matters(loss):
        with pytest.raises(UserError, match=r"3 channels, the teacher's 4.*ChannelAdapter\(3, 4\)"):
            loss(features(0, SHAPE)[:, :3], features(1, SHAPE))


def test_settings_that_do_not_fit_are_named():
    feature = features(0, SHAPE)
    with pytest.raises(UserError, match="cuts channels in 3 groups"):
        af_dcd_contrast_loss(feature, feature, groups=3)
    with pytest.raises(UserError, match=r"at least 4 x 4 positions, got 3 x 6"):
        af_dcd_contrast_loss(feature[:, :, :3], feature[:, :, :3], groups=2)
    with pytest.raises(UserError, match="1 maps of the student and 2 of the teacher"):
        psd_loss([feature], [feature, feature])
    with pytest.raises(UserError, match="at least two"):
        psd_loss([feature], [feature])
    with pytest.raises(UserError, match="label 7"):
        ifvd(feature, feature, torch.full_like(LABELS, 7))
