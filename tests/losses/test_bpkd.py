"""BPKD against a loop over classes, and its edges."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.bpkd import bpkd_losses, edge_masks
from rdd_pipeline.losses.cwd import cwd_loss
from tests.losses.reference import blocks, logits


def test_edge_masks_equal_a_loop_over_neighborhoods():
    labels = blocks()[:, :12, :16]
    masks = edge_masks(labels, num_classes=4, size=(12, 16), kernel=3, ignore_index=255)
    for n, c, y, x in itertools.product(range(2), range(4), range(12), range(16)):
        square = labels[n, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] == c
        known = labels[n, y, x] != 255  # ignored pixels are no edge
        assert masks[n, c, y, x] == float(known and square.any() and not square.all())


def test_edge_masks_are_averaged_down():
    full = edge_masks(blocks(), num_classes=4, size=(24, 32), kernel=7, ignore_index=255)
    small = edge_masks(blocks(), num_classes=4, size=(3, 4), kernel=7, ignore_index=255)
    assert_close(small, F.avg_pool2d(full, 8))
    assert 0 < small.mean() < 1


def test_bpkd_equals_a_loop_over_classes():
    student, teacher, t = logits(0), logits(1), 4.0
    mask = edge_masks(blocks(), num_classes=5, size=(3, 4), kernel=7, ignore_index=255)
    edge = body = 0.0
    for n in range(2):
        p_s, p_t = (
            Categorical(logits=(z[n] * mask[n] / t).movedim(0, -1)) for z in (student, teacher)
        )
        kl = kl_divergence(p_t, p_s)  # (3, 4)
        for c in range(5):
            if mask[n, c].sum() > 0:
                edge += 2 * t**2 * (mask[n, c] * kl).sum() / mask[n, c].sum() / 2
            q_s, q_t = (
                Categorical(logits=(z[n, c] * (1 - mask[n, c]) / t).flatten())
                for z in (student, teacher)
            )
            body += t**2 / 5 * kl_divergence(q_t, q_s) / 2
    terms = bpkd_losses(student, teacher, blocks())
    assert_close(terms.edge, torch.as_tensor(edge), rtol=1e-5, atol=1e-6)
    assert_close(terms.body, torch.as_tensor(body), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_bpkd_is_never_negative_and_zero_for_the_teacher_itself(scale):
    """A student that calls each edge by its class scores below zero in the form by class alone."""
    teacher = logits(1)
    mask = edge_masks(blocks(), num_classes=5, size=(3, 4), kernel=7, ignore_index=255)
    for student in (logits(0) * scale, teacher + scale * mask):
        terms = bpkd_losses(student, teacher, blocks())
        assert terms.edge > 0
        assert terms.body > 0
    same = bpkd_losses(teacher, teacher, blocks())
    assert_close(torch.stack([*same]), torch.zeros(2), atol=1e-4, rtol=0)


def test_bpkd_without_any_edge_has_only_a_body():
    student, teacher = logits(0).requires_grad_(), logits(1)
    for value in (0, 255):  # one class everywhere; everything ignored
        terms = bpkd_losses(student, teacher, torch.full((2, 24, 32), value))
        assert terms.edge == 0
        assert (torch.autograd.grad(terms.edge, student)[0] == 0).all()
        assert_close(terms.body, cwd_loss(student, teacher))


def test_bpkd_names_a_kernel_without_center_and_labels_out_of_range():
    with pytest.raises(UserError, match="side is 4; it must be odd"):
        bpkd_losses(logits(0), logits(1), blocks(), kernel=4)
    with pytest.raises(UserError, match="label 9, expected 0 to 4"):
        bpkd_losses(logits(0), logits(1), torch.full((2, 24, 32), 9))
