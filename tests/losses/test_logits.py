"""Losses on logits: equal to the published numbers and to independent oracles."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.bpkd import bpkd_losses, edge_masks
from rdd_pipeline.losses.cwd import cwd_loss
from rdd_pipeline.losses.dist import dist_loss
from rdd_pipeline.losses.kd import kd_loss
from tests.losses.reference import NAMES, Reference, assert_equal, features


@pytest.fixture(params=NAMES)
def reference(request):
    return Reference(request.param)


SHAPE = (2, 5, 3, 4)


def logits(seed, shape=SHAPE, dtype=torch.float32):
    return features(seed, shape, dtype)


def blocks():
    """Labels of a few rectangles and an ignored corner."""
    labels = torch.zeros(2, 24, 32, dtype=torch.uint8)
    labels[:, 4:14, 6:20] = 1
    labels[0, 10:, 18:] = 3
    labels[1, :6, :9] = 255
    return labels


def bpkd_sum(student, teacher, labels=None):
    terms = bpkd_losses(student, teacher, blocks() if labels is None else labels)
    return 50 * terms.edge + 20 * terms.body


ALL = [kd_loss, cwd_loss, dist_loss, bpkd_sum]


# --- the published numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1, 4])
def test_kd_equals_the_reference(reference, temperature):
    student = reference.leaf("student_logits")
    loss = kd_loss(student, reference["teacher_logits"], temperature=temperature)
    loss.backward()
    assert_equal(loss, reference[f"kd/T{temperature}/loss"])
    assert_equal(student.grad, reference[f"kd/T{temperature}/grad"])


def test_cwd_equals_the_reference(reference):
    student = reference.leaf("student_logits")
    loss = cwd_loss(student, reference["teacher_logits"])
    loss.backward()
    assert_equal(loss, reference["cwd_logit/T4/loss"])
    assert_equal(student.grad, reference["cwd_logit/T4/grad"])


def test_dist_is_not_the_published_copy_without_reshape(reference):
    loss = dist_loss(reference["student_logits"], reference["teacher_logits"])
    assert abs(float(loss - reference["dist/as_in_rdd_repo/loss"])) > 1e-3


# --- independent oracles --------------------------------------------------------------------------


def test_kd_is_the_mean_divergence_of_the_positions():
    student, teacher = (Categorical(logits=logits(s).movedim(1, -1) / 3) for s in (0, 1))
    expected = 9 * kl_divergence(teacher, student).mean()
    assert_close(kd_loss(logits(0), logits(1), temperature=3), expected)


def test_cwd_is_the_mean_divergence_of_the_channels():
    student, teacher = (Categorical(logits=logits(s).flatten(2) / 4) for s in (0, 1))
    assert_close(cwd_loss(logits(0), logits(1)), 16 * kl_divergence(teacher, student).mean())


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


# --- what all of them promise ---------------------------------------------------------------------


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
    arguments = (blocks()[:0],) if loss is bpkd_sum else ()
    assert loss(logits(0)[:0], logits(1)[:0], *arguments) == 0


@pytest.mark.parametrize("loss", ALL)
def test_what_does_not_fit_is_named(loss):
    with pytest.raises(UserError, match="student has 4 classes, the teacher 5"):
        loss(logits(0)[:, :4], logits(1))
    with pytest.raises(UserError, match="hold 1 images, teacher logits 2"):
        loss(logits(0)[:1], logits(1))
    with pytest.raises(UserError, match="four axes"):
        loss(logits(0)[0], logits(1)[0])


def test_bpkd_names_a_kernel_without_center_and_labels_out_of_range():
    with pytest.raises(UserError, match="side is 4; it must be odd"):
        bpkd_losses(logits(0), logits(1), blocks(), kernel=4)
    with pytest.raises(UserError, match="label 9, expected 0 to 4"):
        bpkd_losses(logits(0), logits(1), torch.full((2, 24, 32), 9))


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
