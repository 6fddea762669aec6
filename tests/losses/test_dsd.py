"""DSD: equal to the published numbers, and maps of several sizes."""

import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.losses.dsd import csd_loss, psd_loss
from tests.losses.reference import assert_equal, features

SHAPE = (2, 4, 5, 6)


def test_dsd_equals_the_reference(reference):
    def maps(who):
        names = (f"{who}_feature_2", f"{who}_feature", f"dsd/{who}_logits_resized")
        return [reference[name] for name in names]

    assert_equal(psd_loss(maps("student"), maps("teacher")), reference["dsd/psd_loss"])
    loss = csd_loss(maps("student")[2], maps("teacher")[2])
    assert_equal(loss, reference["dsd/csd_loss"])


def test_psd_resizes_all_maps_to_the_teachers_first():
    def grown(x):
        return F.interpolate(x, (5, 6), mode="bilinear", align_corners=True)

    maps = [features(0, SHAPE), features(1, (2, 3, 3, 3)), features(2, (2, 5, 4, 4))]
    teacher = [features(3, SHAPE), features(4, (2, 6, 2, 2)), features(5, (2, 5, 9, 9))]
    expected = psd_loss([grown(x) for x in maps], [grown(x) for x in teacher])
    assert_close(psd_loss(maps, teacher), expected)
