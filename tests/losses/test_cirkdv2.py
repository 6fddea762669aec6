"""CIRKDv2: channel relations, attention, and what its queue holds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.cirkdv2 import ChannelRelations, SelfAttentionBlock, pooled_positions
from tests.losses.reference import features
from tests.losses.test_similarity import plain_similarity_kl

STUDENT, TEACHER = (2, 3, 4, 5), (2, 4, 4, 5)


def channels(**options):
    torch.manual_seed(0)
    positions = pooled_positions(4, 5)
    return ChannelRelations(3, 4, positions, **({"slots": 12, "enqueued": 5} | options))


def test_pooled_positions_round_up():
    assert pooled_positions(64, 128) == 16 * 32
    assert pooled_positions(45, 65) == 12 * 17
    for height, width in ((4, 5), (9, 8), (1, 3)):
        pooled = F.avg_pool2d(torch.zeros(1, height, width), 4, ceil_mode=True)
        assert pooled.numel() == pooled_positions(height, width)


def test_channel_terms_equal_plain_torch(in_order):
    module = channels(contrast=7)
    terms = module(features(0, STUDENT), features(1, TEACHER))
    student, teacher = (
        F.avg_pool2d(features(seed, shape), 4, ceil_mode=True)
        for seed, shape in ((0, STUDENT), (1, TEACHER))
    )
    s, t = (
        F.normalize(f.flatten(2), dim=2) for f in (module.projection(student).detach(), teacher)
    )
    pairs = [
        plain_similarity_kl(s[i], s[j : j + 1], t[i], t[j : j + 1], 0.1) / 4
        for i in range(2)
        for j in range(2)
    ]
    assert_close(terms.minibatch.detach(), torch.stack(pairs).mean(), rtol=1e-5, atol=1e-5)
    assert_close(module.queue[:5], t.flatten(0, 1)[:5])
    assert module.pointer.item() == 5
    keys = module.queue[None, :7]
    memory_term = plain_similarity_kl(s.flatten(0, 1), keys, t.flatten(0, 1), keys, 0.1) / 8
    assert_close(terms.memory.detach(), memory_term, rtol=1e-5, atol=1e-5)
    assert_close(terms.mse.detach(), F.mse_loss(s, t))


def test_channel_queue_goes_round():
    module = channels()
    for _ in range(3):
        module(features(0, STUDENT), features(1, TEACHER))
    assert module.pointer.item() == 3
    assert_close(module.queue.norm(dim=1), torch.ones(12))


def test_channel_gradcheck_in_float64(in_order):
    module = channels().double().eval()
    student = features(0, STUDENT, torch.float64).requires_grad_()
    teacher = features(1, TEACHER, torch.float64)
    assert torch.autograd.gradcheck(
        lambda feature: sum(copy.deepcopy(module)(feature, teacher)), student
    )


def test_channels_under_autocast_stay_float32():
    module, student = channels(), features(0, STUDENT).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = module(student.bfloat16(), features(1, TEACHER).bfloat16())
    assert {term.dtype for term in terms} == {torch.float32}
    sum(terms).backward()
    assert student.grad.isfinite().all()


def test_channels_name_another_crop():
    with pytest.raises(UserError, match=r"made for 2 positions, but this feature has 2 x 2"):
        channels()(features(0, (2, 3, 8, 8)), features(1, (2, 4, 8, 8)))


def test_attention_block_equals_plain_attention():
    torch.manual_seed(0)
    block, feature = SelfAttentionBlock(6).eval(), features(0, (2, 6, 3, 4))
    q, k, v = (layer(feature).flatten(2) for layer in (block.query, block.key, block.value))
    weights = (q.transpose(1, 2) @ k / 3**0.5).softmax(2)
    attended = (weights @ v.transpose(1, 2)).transpose(1, 2).reshape(2, 3, 3, 4)
    expected = block.join(torch.cat([feature, block.expand(attended)], 1))
    assert_close(block(feature), expected)
    assert block(feature).shape == feature.shape
