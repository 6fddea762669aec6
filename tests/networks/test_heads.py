from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rdd_pipeline.networks.heads import (
    PyramidPooling,
    adaptive_average,
    initialize,
    make_auxiliary,
    make_decode_head,
)


@pytest.mark.parametrize("size", [(9, 13), (6, 6), (4, 17), (1, 1)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_averages_equal_adaptive_pooling(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert_close(adaptive_average(x, bins), nn.functional.adaptive_avg_pool2d(x, bins))


def test_average_has_the_gradient_of_adaptive_pooling():
    x = torch.randn(1, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: adaptive_average(x, 3), (x,))


def test_pyramid_keeps_its_input_and_adds_a_quarter_for_each_level():
    pyramid = PyramidPooling(10).eval()
    x = torch.randn(2, 10, 5, 7)
    out = pyramid(x)
    assert out.shape == (2, pyramid.out_channels, 5, 7) == (2, 18, 5, 7)
    assert torch.equal(out[:, :10], x)


@pytest.mark.parametrize(
    ("stride", "rates"), [(8, [12, 24, 36]), (16, [6, 12, 18]), (14, [6, 13, 20])]
)
def test_dilation_reaches_equally_far_in_the_image(stride, rates):
    neck = make_decode_head("deeplabv3", 4, 8, stride=stride, dropout=0.1)
    assert [neck.context.convs[i][0].dilation[0] for i in (1, 2, 3)] == rates


def test_dropout_zero_makes_training_repeatable():
    neck = make_decode_head("deeplabv3", 4, 8, stride=8, dropout=0.0)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(neck(x), neck(x))


def test_auxiliary_head_works_on_few_channels():
    assert make_auxiliary(3, 5, dropout=0.1)(torch.randn(2, 3, 4, 4)).shape == (2, 5, 4, 4)


def test_first_loss_is_near_the_logarithm_of_the_classes():
    torch.manual_seed(0)
    head = make_auxiliary(64, 11, dropout=0.0)
    initialize(head)
    logits = head(torch.randn(2, 64, 8, 8))
    loss = nn.functional.cross_entropy(logits, torch.randint(0, 11, (2, 8, 8)))
    assert loss.item() == pytest.approx(torch.tensor(11.0).log().item(), abs=0.05)


def test_exported_pyramid_works_at_another_size():
    pyramid = PyramidPooling(8).eval()
    free = torch.export.Dim.AUTO
    program = torch.export.export(
        pyramid, (torch.randn(1, 8, 12, 16),), dynamic_shapes=({2: free, 3: free},)
    )
    x = torch.randn(1, 8, 9, 25)
    assert_close(program.module()(x), pyramid(x))
