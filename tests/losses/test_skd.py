"""SKD's holistic term: hinge losses and a discriminator that fits the map."""

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.skd import (
    GatedSelfAttention,
    HolisticDiscriminator,
    discriminator_depth,
    discriminator_loss,
    generator_loss,
)
from tests.losses.reference import NAMES, Reference, assert_equal, features


@pytest.mark.parametrize("name", NAMES)
def test_hinge_losses_equal_the_reference(name):
    reference, prefix = Reference(name), "holistic_adversarial"
    student, teacher = reference[f"{prefix}/score_student"], reference[f"{prefix}/score_teacher"]
    assert_equal(discriminator_loss(teacher, student), reference[f"{prefix}/discriminator_loss"])
    assert_equal(generator_loss(student), reference[f"{prefix}/generator_loss"])


def test_hinge_losses_gradcheck_and_empty_batch():
    scores = [features(seed, (2, 1, 3, 3), torch.float64).requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(discriminator_loss, scores)
    assert torch.autograd.gradcheck(generator_loss, scores[0])
    assert discriminator_loss(torch.zeros(0), torch.zeros(0)) == 0
    assert generator_loss(torch.zeros(0)) == 0


def test_hinge_losses_in_half_precision_are_float32():
    score = torch.full((2, 1, 3, 3), 6e4, dtype=torch.float16)
    assert_close(generator_loss(score), torch.tensor(-float(score[0, 0, 0, 0])))
    assert discriminator_loss(-score, score).isfinite()


def test_a_perfect_discriminator_has_no_loss():
    assert discriminator_loss(torch.tensor([2.0]), torch.tensor([-2.0])) == 0


@pytest.mark.parametrize(
    ("size", "depth"),
    [((65, 129), 4), ((64, 64), 4), ((45, 45), 3), ((12, 16), 1), ((8, 8), 1), ((7, 99), 0)],
)
def test_depth_leaves_four_positions_for_the_score(size, depth):
    assert discriminator_depth(size) == depth
    if depth:
        torch.manual_seed(0)
        scores = HolisticDiscriminator(3, size)(features(0, (2, 3, *size)))
        assert scores.shape[:2] == (2, 1)
        assert min(scores.shape[2:]) >= 1
        assert scores.isfinite().all()


def test_published_depth_has_attention_after_256_and_512():
    layers = HolisticDiscriminator(19, (64, 128)).layers
    kinds = [type(layer).__name__ for layer in layers if not isinstance(layer, torch.nn.LeakyReLU)]
    assert [kind.removeprefix("Parametrized") for kind in kinds] == [
        "BatchNorm2d",
        "Conv2d",
        "Conv2d",
        "Conv2d",
        "GatedSelfAttention",
        "Conv2d",
        "GatedSelfAttention",
        "Conv2d",
    ]


def test_too_small_maps_are_named():
    with pytest.raises(UserError, match=r"at least 8 x 8 positions, got 6 x 20"):
        HolisticDiscriminator(19, (6, 20))


def test_attention_starts_as_the_identity_and_equals_the_plain_formula():
    torch.manual_seed(0)
    block, maps = GatedSelfAttention(16), features(0, (2, 16, 3, 4))
    assert torch.equal(block(maps), maps)
    torch.nn.init.constant_(block.gate, 0.5)
    q, k, v = (layer(maps).flatten(2) for layer in (block.query, block.key, block.value))
    weights = (q.transpose(1, 2) @ k).softmax(2)
    expected = maps + 0.5 * (v @ weights.transpose(1, 2)).reshape(maps.shape)
    assert_close(block(maps), expected, rtol=1e-4, atol=1e-4)


def test_learns_to_tell_two_kinds_of_logits_apart():
    torch.manual_seed(0)
    discriminator = HolisticDiscriminator(3, (8, 8))
    teacher = features(0, (4, 3, 8, 8)).sort(dim=3).values  # smooth
    student = features(1, (4, 3, 8, 8))
    losses = []
    for _ in range(8):
        loss = discriminator_loss(discriminator(teacher), discriminator(student))
        losses.append(float(loss.detach()))
        parameters = list(discriminator.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 0.02 * grad
    assert losses[-1] < 0.8 * losses[0]


def test_gradient_of_the_students_term_reaches_the_logits():
    torch.manual_seed(0)
    logits = features(0, (2, 3, 8, 8)).bfloat16().requires_grad_()
    generator_loss(HolisticDiscriminator(3, (8, 8))(logits)).backward()
    assert logits.grad.abs().sum() > 0
