"""MGD: the squared error, and what is hidden of the student's feature."""

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.mgd import MaskedGeneration, mgd_loss
from tests.losses.reference import features

SHAPE = (2, 4, 5, 6)


def test_mgd_is_the_squared_error_of_an_image():
    student, teacher = features(0, SHAPE), features(1, SHAPE)
    assert_close(mgd_loss(student, teacher), ((student - teacher) ** 2).sum() / 2)


def test_masked_generation_hides_whole_positions():
    torch.manual_seed(0)
    module = MaskedGeneration(3, 4, mask_ratio=0.75)
    seen = []
    module.generation.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    completed = module(features(0, (2, 3, 20, 20)), (40, 40))
    assert completed.shape == (2, 4, 40, 40)
    hidden = (seen[0] == 0).all(1)
    assert torch.equal(hidden, (seen[0] == 0).any(1))  # all channels alike
    assert 0.7 < hidden.float().mean() < 0.8
    assert not torch.equal(hidden[0], hidden[1])  # each image its own


def test_masked_generation_at_the_extremes():
    feature = features(0, SHAPE)
    everything = MaskedGeneration(4, 4, mask_ratio=0.0)
    expected = everything.generation(everything.align(feature))
    assert_close(everything(feature, (5, 6)), expected)
    with pytest.raises(UserError, match=r"mask_ratio is 1\.5"):
        MaskedGeneration(4, 4, mask_ratio=1.5)
