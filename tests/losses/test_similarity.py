"""The chunked KL of similarities against plain torch."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from rdd_pipeline.losses import similarity
from rdd_pipeline.losses.similarity import soft_similarity_kl
from tests.losses.reference import features


def plain_similarity_kl(student_rows, student_keys, teacher_rows, teacher_keys, temperature):
    total = 0.0
    for s_keys, t_keys in zip(student_keys, teacher_keys, strict=True):
        student = Categorical(logits=student_rows @ s_keys.T / temperature)
        teacher = Categorical(logits=teacher_rows @ t_keys.T / temperature)
        total = total + kl_divergence(teacher, student).sum()
    return total


@pytest.mark.parametrize("similarities", [1, 24, 2**22])
def test_soft_similarity_kl_equals_plain_torch_however_it_is_cut(monkeypatch, similarities):
    monkeypatch.setattr(similarity, "_SIMILARITIES_CPU", similarities)
    rows, keys = features(0, (7, 3)).requires_grad_(), features(1, (2, 6, 3)).requires_grad_()
    others = features(2, (7, 4)), features(3, (2, 6, 4))
    ours = soft_similarity_kl(rows, keys, *others, temperature=0.5)
    plain = plain_similarity_kl(rows, keys, *others, 0.5)
    assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for found, expected in zip(
        torch.autograd.grad(3 * ours, (rows, keys)),
        torch.autograd.grad(3 * plain, (rows, keys)),
        strict=True,
    ):
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_soft_similarity_kl_computes_only_gradients_that_are_asked_for():
    rows, keys = features(0, (7, 3)), features(1, (2, 6, 3))
    others = features(2, (7, 4)), features(3, (2, 6, 4))
    assert not soft_similarity_kl(rows, keys, *others, temperature=1.0).requires_grad
    loss = soft_similarity_kl(rows.requires_grad_(), keys, *others, temperature=1.0)
    loss.backward()
    assert rows.grad is not None
    with torch.no_grad():
        assert not soft_similarity_kl(rows, keys, *others, temperature=1.0).requires_grad


@pytest.mark.parametrize("similarities", [1, 2**22])
def test_rows_that_do_not_count_are_as_if_they_were_not_there(monkeypatch, similarities):
    monkeypatch.setattr(similarity, "_SIMILARITIES_CPU", similarities)
    counted = torch.tensor([True, False, True, True, False, False, True])
    keys, others = features(1, (2, 6, 3)), (features(2, (7, 4)), features(3, (2, 6, 4)))
    found = []
    for some in (slice(None), counted):
        rows, leaf_keys = features(0, (7, 3)), keys.clone().requires_grad_()
        if some is not counted:
            rows[1] = torch.nan  # nor does what they hold
        rows.requires_grad_()
        loss = soft_similarity_kl(
            rows[some],
            leaf_keys,
            others[0][some],
            others[1],
            temperature=0.5,
            counted=counted if some is not counted else None,
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, (rows, leaf_keys))))
    assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0][1][~counted].count_nonzero() == 0


def test_gradcheck_in_float64():
    shapes = ((4, 3), (2, 5, 3), (4, 2), (2, 5, 2))
    inputs = [features(seed, shape, torch.float64) for seed, shape in enumerate(shapes)]
    leaves = [tensor.requires_grad_() for tensor in inputs[:2]]
    assert torch.autograd.gradcheck(
        lambda rows, keys: soft_similarity_kl(rows, keys, *inputs[2:], temperature=0.7), leaves
    )


def test_no_rows_give_zero_with_zero_gradient():
    rows, keys = torch.zeros(0, 3).requires_grad_(), features(1, (2, 6, 3)).requires_grad_()
    loss = soft_similarity_kl(rows, keys, torch.zeros(0, 4), features(3, (2, 6, 4)), temperature=1)
    loss.backward()
    assert loss == 0
    assert rows.grad.shape == (0, 3)
    assert (keys.grad == 0).all()


def test_autocast_does_not_lower_the_precision():
    inputs = [features(s, shape) for s, shape in enumerate(((7, 3), (2, 6, 3), (7, 4), (2, 6, 4)))]
    outside = soft_similarity_kl(*inputs, temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_similarity_kl(*inputs, temperature=0.1), outside)


def test_second_derivative_is_refused():
    rows = features(0, (7, 3)).requires_grad_()
    others = features(1, (2, 6, 3)), features(2, (7, 4)), features(3, (2, 6, 4))
    loss = soft_similarity_kl(rows, *others, temperature=1.0)
    (grad,) = torch.autograd.grad(loss.square(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
