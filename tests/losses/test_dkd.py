"""DKD: probabilities by torch's distributions, and its relation to KD."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.dkd import dkd_losses
from rdd_pipeline.losses.kd import kd_loss
from tests.losses.reference import blocks, logits

LABELS = torch.tensor([[[0, 1, 2, 255], [3, 3, 4, 0], [1, 255, 0, 2]]] * 2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_is_two_divergences_of_each_labeled_position(temperature):
    student, teacher = logits(0), logits(1)
    targets, rests = [], []
    for n, row, column in torch.nonzero(LABELS != 255).tolist():
        label = int(LABELS[n, row, column])
        s, t = (z[n, :, row, column] / temperature for z in (student, teacher))
        p_s, p_t = s.softmax(0)[label], t.softmax(0)[label]
        pairs = (Categorical(torch.stack([p, 1 - p])) for p in (p_t, p_s))
        targets.append(kl_divergence(*pairs))
        others = [c for c in range(5) if c != label]
        rests.append(kl_divergence(Categorical(logits=t[others]), Categorical(logits=s[others])))
    found = dkd_losses(student, teacher, LABELS, temperature=temperature)
    assert_close(found.target, temperature**2 * torch.stack(targets).mean())
    assert_close(found.rest, temperature**2 * torch.stack(rests).mean())


def test_kd_is_the_target_and_the_rest_by_the_teachers_doubt():
    student, teacher = logits(0)[:1, :, :1, :1], logits(1)[:1, :, :1, :1]
    label = torch.tensor([[[2]]])
    doubt = 1 - teacher.softmax(1)[0, 2, 0, 0]
    found = dkd_losses(student, teacher, label)
    assert_close(found.target + doubt * found.rest, kd_loss(student, teacher))


def test_ignored_positions_may_hold_nan_and_none_labeled_give_nothing():
    student, teacher = logits(0).requires_grad_(), logits(1)
    poisoned = torch.where((LABELS == 255).unsqueeze(1), torch.nan, student)
    found = dkd_losses(poisoned, teacher, LABELS)
    assert_close(sum(found), sum(dkd_losses(student, teacher, LABELS)))
    sum(found).backward()
    assert student.grad.isfinite().all()
    for nothing in dkd_losses(student, teacher, torch.full_like(LABELS, 255)):
        assert nothing == 0
        assert not torch.autograd.grad(nothing, student, retain_graph=True)[0].any()


def test_between_two_classes_only_the_target_counts():
    student, teacher = (logits(s, (2, 2, 3, 4)) for s in (0, 1))
    found = dkd_losses(student, teacher, torch.zeros(2, 3, 4, dtype=torch.uint8))
    assert found.rest == 0
    assert_close(found.target, kd_loss(student, teacher))


def test_wrong_labels_are_refused():
    with pytest.raises(UserError, match="label"):
        dkd_losses(logits(0), logits(1), blocks() + 100)
