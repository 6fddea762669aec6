"""CWD on logits and on features: equal to the published numbers and to torch's distributions."""

import torch
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from rdd_pipeline.losses.cwd import cwd_feature_loss, cwd_loss
from tests.losses.reference import assert_equal, features

SHAPE = (2, 5, 3, 4)


def logits(seed, shape=SHAPE, dtype=torch.float32):
    return features(seed, shape, dtype)


def test_cwd_equals_the_reference(reference):
    student = reference.leaf("student_logits")
    loss = cwd_loss(student, reference["teacher_logits"])
    loss.backward()
    assert_equal(loss, reference["cwd_logit/T4/loss"])
    assert_equal(student.grad, reference["cwd_logit/T4/grad"])


def test_cwd_is_the_mean_divergence_of_the_channels():
    student, teacher = (Categorical(logits=logits(s).flatten(2) / 4) for s in (0, 1))
    assert_close(cwd_loss(logits(0), logits(1)), 16 * kl_divergence(teacher, student).mean())


def test_cwd_divides_by_the_teachers_width_unless_told_otherwise():
    shape = (2, 4, 5, 6)
    student, teacher = (Categorical(logits=features(s, shape).flatten(2) / 4) for s in (0, 1))
    paper = cwd_feature_loss(features(0, shape), features(1, shape))
    assert_close(paper, 16 * kl_divergence(teacher, student).mean())
    cirkd = cwd_feature_loss(features(0, shape), features(1, shape), student_channels=2)
    assert_close(cirkd, 2 * paper)
