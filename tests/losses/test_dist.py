"""DIST: Pearson's correlation by other means."""

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.losses.dist import dist_loss
from tests.losses.reference import features

SHAPE = (2, 5, 3, 4)


def logits(seed, shape=SHAPE, dtype=torch.float32):
    return features(seed, shape, dtype)


def test_dist_is_not_the_published_copy_without_reshape(reference):
    loss = dist_loss(reference["student_logits"], reference["teacher_logits"])
    assert abs(float(loss - reference["dist/as_in_rdd_repo/loss"])) > 1e-3


def test_dist_is_one_minus_pearson_over_the_pixels_of_all_images():
    student, teacher = (logits(s).softmax(1).movedim(1, -1).reshape(-1, 5) for s in (0, 1))

    def mean_distance(a, b):  # rows of a against rows of b
        pairs = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
        return 1 - torch.stack(pairs).mean()

    inter, intra = mean_distance(student, teacher), mean_distance(student.T, teacher.T)
    assert_close(dist_loss(logits(0), logits(1)), inter + intra)
    weighted = dist_loss(logits(0), logits(1), inter_weight=2, intra_weight=0.5)
    assert_close(weighted, 2 * inter + 0.5 * intra)


def test_dist_ignores_the_scale_of_probabilities_but_not_their_order():
    # Pearson: a student whose probabilities are an affine function of the teacher's is perfect.
    teacher = torch.tensor([0.1, 0.2, 0.7]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    student = 0.5 * teacher + 0.5 / 3
    loss = dist_loss(student.log(), teacher.log(), intra_weight=0)
    assert_close(loss, torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-2, 1.0])
def test_dist_between_two_classes_has_no_gradient(scale):
    g = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(2, 2, 16, 16, generator=g) for _ in range(2))
    student.requires_grad_()
    loss = dist_loss(student, teacher, inter_weight=1.0, intra_weight=0.0)
    # Of two values the correlation is whether both networks prefer the same class.
    same = (student.argmax(1) == teacher.argmax(1)).float()
    assert_close(loss.detach(), 1 - (2 * same - 1).mean(), atol=1e-3, rtol=0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.count_nonzero() == 0
    whole = dist_loss(student, teacher)
    assert torch.autograd.grad(whole, student)[0].isfinite().all()
