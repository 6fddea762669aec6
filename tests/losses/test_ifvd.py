"""IFVD against a loop, and without labels."""

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.losses.ifvd import ifvd_loss
from tests.losses.reference import features

SHAPE = (2, 4, 5, 6)


LABELS = torch.randint(0, 3, (2, 10, 12), generator=torch.Generator().manual_seed(0))
LABELS[:, :4] = 255


def ifvd(student, teacher, labels=LABELS):
    return ifvd_loss(student, teacher, labels[: len(student)], num_classes=3)


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


def test_ifvd_with_everything_ignored_is_zero_with_zero_gradient():
    student = features(0, SHAPE).requires_grad_()
    loss = ifvd(student, features(1, SHAPE), torch.full_like(LABELS, 255))
    loss.backward()
    assert_close(loss.detach(), torch.tensor(0.0), atol=1e-12, rtol=0)
    assert student.grad.abs().max() < 1e-6
