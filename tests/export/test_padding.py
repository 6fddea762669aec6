"""SAME padding without the size in its formula, beside timm's own."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn
from torch.testing import assert_close

from rdd_pipeline.export.padding import exportable_padding

LAYERS = [
    *(
        Conv2dSame(2, 3, kernel, stride=stride, dilation=dilation)
        for kernel, stride, dilation in itertools.product((1, 2, 3, 5), (1, 2, 4), (1, 2))
    ),
    *(MaxPool2dSame(kernel, stride) for kernel, stride in ((2, 2), (3, 2), (3, 1))),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@torch.no_grad()
def test_layers_compute_what_they_do_with_timm_s_padding(layer: nn.Module):
    for height, width in ((8, 11), (9, 10), (13, 7)):
        image = torch.randn(2, 2, height, width, generator=torch.Generator().manual_seed(0))
        expected = layer(image)
        with exportable_padding():
            assert_close(layer(image), expected)


def test_timm_has_its_own_padding_afterwards():
    # timm.layers.conv2d_same is a function of that name, too.
    conv2d_same = importlib.import_module("timm.layers.conv2d_same")
    own = conv2d_same.pad_same
    with exportable_padding():
        assert conv2d_same.pad_same is not own
    assert conv2d_same.pad_same is own
