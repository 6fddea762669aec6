"""Dice, Lovasz and focal against loops and segmentation_models_pytorch."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses import region
from rdd_pipeline.losses.cross_entropy import cross_entropy_loss, focal
from rdd_pipeline.losses.rdd import selected_pixels, teacher_confidence, tfe_loss, tse_loss
from rdd_pipeline.losses.region import dice_loss, lovasz_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.double)
    labels = torch.randint(0, 4, (2, 9, 11), generator=generator)
    labels[:, :2] = 255
    return logits.requires_grad_(), labels


def probabilities(logits, labels):
    up = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=True)
    return up.softmax(1)


def weights_of(labels, kind):
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(labels.shape, generator=generator, dtype=torch.double)
    return None if kind is None else weights if kind == "any" else (weights > 0.5).double()


@pytest.mark.parametrize("kind", [None, "any", "chosen"])
def test_dice_equals_a_loop(batch, kind):
    logits, labels = batch
    weights = weights_of(labels, kind)
    w = torch.ones(labels.shape).double() if weights is None else weights
    w = w * (labels != 255)
    p = probabilities(logits, labels)
    expected = [
        1 - (2 * (w * p[:, c] * y).sum() + 1) / ((w * p[:, c]).sum() + (w * y).sum() + 1)
        for c in range(4)
        for y in [(labels == c).double()]
    ]
    value = dice_loss(logits, labels, weights)
    assert_close(value, torch.stack(expected).mean())
    ours, theirs = (
        torch.autograd.grad(v, logits, retain_graph=True)[0]
        for v in (value, torch.stack(expected).mean())
    )
    assert_close(ours, theirs)


def lovasz_by_hand(p, y):
    """Of one class: errors in falling order times the growth of the Jaccard loss."""
    errors = (y - p).abs()
    order = sorted(range(len(p)), key=lambda i: -errors[i].item())
    total, missed, added, before, loss = y.sum(), 0.0, 0.0, 0.0, 0.0
    for i in order:
        missed, added = missed + y[i], added + 1 - y[i]
        jaccard = 1 - (total - missed) / (total + added)
        loss, before = loss + errors[i] * (jaccard - before), jaccard
    return loss


@pytest.mark.parametrize("kind", [None, "chosen"])
def test_lovasz_equals_a_loop(batch, kind):
    logits, labels = batch
    selected = weights_of(labels, kind)
    counted = labels != 255 if selected is None else (labels != 255) & (selected > 0)
    p = probabilities(logits, labels).transpose(0, 1)[:, counted]
    y = labels[counted]
    expected = torch.stack([lovasz_by_hand(p[c], (y == c).double()) for c in y.unique()]).mean()
    value = lovasz_loss(logits, labels, selected)
    assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (value, expected))
    assert_close(ours, theirs)


def test_they_are_those_of_segmentation_models_pytorch(batch, monkeypatch):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="extra teachers")
    logits, labels = batch
    up = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=True)
    theirs = smp.losses.DiceLoss("multiclass", smooth=0.0, ignore_index=255)(up, labels)
    monkeypatch.setattr(region, "_SMOOTH", 0.0)
    assert_close(dice_loss(logits, labels), theirs)
    lovasz = smp.losses.LovaszLoss("multiclass", ignore_index=255, from_logits=True)
    assert_close(
        lovasz_loss(logits, labels),
        lovasz(up.float(), labels).to(logits.dtype),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("loss", [dice_loss, lovasz_loss])
def test_where_nothing_counts_the_loss_and_its_gradient_are_zero(batch, loss):
    logits, labels = batch
    for given in ((torch.full_like(labels, 255), None), (labels, torch.zeros(labels.shape))):
        value = loss(logits, *given)
        assert value == 0
        assert not torch.autograd.grad(value, logits)[0].any()
    with pytest.raises(UserError):
        loss(logits, torch.full_like(labels, 4))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_equals_its_formula_and_certain_pixels_have_no_slope(gamma):
    p = torch.tensor([0.01, 0.3, 0.9, 1.0], dtype=torch.double, requires_grad=True)
    value = focal(p.log(), gamma)
    assert_close(value, (1 - p) ** gamma * p.log(), atol=1e-12, rtol=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), p)
    assert slope.isfinite().all()
    inner = p.detach()[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: focal(p.log(), gamma), (inner,))


def test_rdd_weighs_the_focal_loss_and_says_which_pixels_it_looked_at(batch):
    logits, labels = batch
    teacher = logits.detach() + 0.5 * torch.randn_like(logits)
    second = teacher + 0.3 * torch.randn_like(teacher)
    valid = labels != 255
    p = probabilities(logits, labels).gather(1, labels.where(valid, 0)[:, None])[:, 0]
    each = -(((1 - p) ** 2) * p.log())

    plain = cross_entropy_loss(logits, labels, focal_gamma=2.0)
    assert_close(plain.loss, each[valid].mean())
    assert torch.equal(plain.pixel_weights, valid.double())

    tfe = tfe_loss(
        logits, labels, teacher_logits=teacher, teacher_aux_logits=second, focal_gamma=2.0
    )
    confidence = teacher_confidence(teacher, second, size=labels.shape[-2:]) * valid
    assert_close(tfe.loss, (confidence * each)[valid].sum() / labels.numel())
    assert_close(tfe.pixel_weights, confidence)

    options = {"threshold": 0.6, "min_kept": 5}
    tse = tse_loss(logits, labels, teacher_logits=teacher, focal_gamma=2.0, **options)
    chosen = selected_pixels(logits, teacher, labels, **options).selected
    assert_close(tse.loss, each[chosen].mean())
    assert torch.equal(tse.pixel_weights > 0, chosen)
