"""Af-DCD's contrast against a loop over its vectors."""

import math

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.losses.af_dcd import af_dcd_contrast_loss
from tests.losses.reference import features

SHAPE = (2, 4, 5, 6)


def af_dcd(student, teacher):
    return af_dcd_contrast_loss(student, teacher, groups=2, temperature=1.0)


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


def test_af_dcd_of_equal_features_is_at_most_a_guess():
    feature = features(0, SHAPE)
    assert 0 < af_dcd(feature, feature) < 2 * math.log(17)
