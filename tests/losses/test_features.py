"""Losses on features: equal to the published numbers and to independent oracles."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.af_dcd import af_dcd_contrast_loss
from rdd_pipeline.losses.at import at_loss
from rdd_pipeline.losses.cwd import cwd_feature_loss
from rdd_pipeline.losses.dsd import csd_loss, psd_loss
from rdd_pipeline.losses.fitnet import fitnet_loss
from rdd_pipeline.losses.ifvd import ifvd_loss
from rdd_pipeline.losses.layers import ChannelAdapter
from rdd_pipeline.losses.mgd import MaskedGeneration, mgd_loss
from tests.losses.reference import NAMES, Reference, assert_equal, features


@pytest.fixture(params=NAMES)
def reference(request):
    return Reference(request.param)


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


# --- the published numbers ------------------------------------------------------------------------


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


def test_dsd_equals_the_reference(reference):
    def maps(who):
        names = (f"{who}_feature_2", f"{who}_feature", f"dsd/{who}_logits_resized")
        return [reference[name] for name in names]

    assert_equal(psd_loss(maps("student"), maps("teacher")), reference["dsd/psd_loss"])
    loss = csd_loss(maps("student")[2], maps("teacher")[2])
    assert_equal(loss, reference["dsd/csd_loss"])


# --- independent oracles --------------------------------------------------------------------------


def test_ifvd_equals_a_loop_over_images_and_classes():
    def cosines(feature, labels):
        result = torch.ones(labels.shape, dtype=feature.dtype)
        for n in range(len(feature)):
            for c in labels[n][labels[n] != 255].unique():
                inside = labels[n] == c
                mean = feature[n][:, inside].mean(1, keepdim=True)
                result[n][inside] = F.cosine_similarity(feature[n][:, inside], mean, dim=0)
        return result

    student, teacher = features(0, SHAPE), features(1, (2, 7, 5, 6))
    small = F.interpolate(LABELS[:, None].float(), (5, 6))[:, 0].long()
    expected = F.mse_loss(cosines(student, small), cosines(teacher, small))
    assert_close(ifvd(student, teacher), expected)


def test_cwd_divides_by_the_teachers_width_unless_told_otherwise():
    student, teacher = (Categorical(logits=features(s, SHAPE).flatten(2) / 4) for s in (0, 1))
    paper = cwd_feature_loss(features(0, SHAPE), features(1, SHAPE))
    assert_close(paper, 16 * kl_divergence(teacher, student).mean())
    cirkd = cwd_feature_loss(features(0, SHAPE), features(1, SHAPE), student_channels=2)
    assert_close(cirkd, 2 * paper)


def test_psd_resizes_all_maps_to_the_teachers_first():
    def grown(x):
        return F.interpolate(x, (5, 6), mode="bilinear", align_corners=True)

    maps = [features(0, SHAPE), features(1, (2, 3, 3, 3)), features(2, (2, 5, 4, 4))]
    teacher = [features(3, SHAPE), features(4, (2, 6, 2, 2)), features(5, (2, 5, 9, 9))]
    expected = psd_loss([grown(x) for x in maps], [grown(x) for x in teacher])
    assert_close(psd_loss(maps, teacher), expected)


def test_mgd_is_the_squared_error_of_an_image():
    student, teacher = features(0, SHAPE), features(1, SHAPE)
    assert_close(mgd_loss(student, teacher), ((student - teacher) ** 2).sum() / 2)


def test_af_dcd_equals_a_loop_over_vectors():
    student, teacher = features(0, (2, 4, 8, 9)), features(1, (2, 4, 8, 9))
    total, groups = 0.0, 2
    pooled = [F.max_pool2d(x, 2) for x in (student, teacher)]  # 4 x 4: one patch an image
    for s, t in zip(*pooled, strict=True):
        for y in range(4):
            for x in range(4):
                for g in range(groups):
                    own = s[2 * g : 2 * g + 2, y, x]

                    def similarity(yy, xx, gg, own=own, t=t):
                        return -(own - t[2 * gg : 2 * gg + 2, yy, xx]).abs().sum() / 0.5

                    positive = similarity(y, x, g)
                    negatives = [
                        similarity(yy, xx, gg)
                        for yy in range(4)
                        for xx in range(4)
                        for gg in range(groups)
                        if gg != g
                    ]
                    total += torch.stack([positive, *negatives]).logsumexp(0) - positive
    loss = af_dcd_contrast_loss(student, teacher, groups=groups, temperature=0.5)
    assert_close(loss, total / (2 * 16), rtol=1e-5, atol=1e-5)


def test_af_dcd_pools_less_on_small_maps_and_leaves_out_what_fills_no_patch():
    student, teacher = features(0, (1, 4, 7, 9)), features(1, (1, 4, 7, 9))
    cut = af_dcd_contrast_loss(student[..., :4, :8], teacher[..., :4, :8], groups=2)
    assert_close(af_dcd_contrast_loss(student, teacher, groups=2), cut)


def test_masked_generation_hides_whole_positions():
    torch.manual_seed(0)
    module = MaskedGeneration(3, 4, mask_ratio=0.75)
    seen = []
    module.generation.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    completed = module(features(0, (2, 3, 20, 20)), (40, 40))
    assert completed.shape == (2, 4, 40, 40)
    hidden = (seen[0] == 0).all(1)
    assert torch.equal(hidden, (seen[0] == 0).any(1))  # all channels alike
    assert 0.7 < hidden.float().mean() < 0.8
    assert not torch.equal(hidden[0], hidden[1])  # each image its own


def test_masked_generation_at_the_extremes():
    feature = features(0, SHAPE)
    everything = MaskedGeneration(4, 4, mask_ratio=0.0)
    expected = everything.generation(everything.align(feature))
    assert_close(everything(feature, (5, 6)), expected)
    with pytest.raises(UserError, match=r"mask_ratio is 1\.5"):
        MaskedGeneration(4, 4, mask_ratio=1.5)


def test_channel_adapter_is_a_projection_without_bias():
    adapter = ChannelAdapter(3, 5)
    assert [tuple(p.shape) for p in adapter.parameters()] == [(5, 3, 1, 1)]


# --- what all of them promise ---------------------------------------------------------------------


@pytest.mark.parametrize("loss", [loss for loss in ALL if loss is not af_dcd])
def test_equal_features_have_no_loss(loss):
    feature = features(0, SHAPE)
    assert_close(loss(feature, feature), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_af_dcd_of_equal_features_is_at_most_a_guess():
    feature = features(0, SHAPE)
    assert 0 < af_dcd(feature, feature) < 2 * math.log(17)


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


def test_ifvd_with_everything_ignored_is_zero_with_zero_gradient():
    student = features(0, SHAPE).requires_grad_()
    loss = ifvd(student, features(1, SHAPE), torch.full_like(LABELS, 255))
    loss.backward()
    assert_close(loss.detach(), torch.tensor(0.0), atol=1e-12, rtol=0)
    assert student.grad.abs().max() < 1e-6


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
