"""Gradients in half precision on CPUs: torch's own are wrong for one kind of layer and layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rdd_pipeline.config import TrainerParams
from rdd_pipeline.training.build import _to_device

CPU = torch.device("cpu")


def gradient(half: bool) -> torch.Tensor:
    """Of the weights of a dilated depthwise convolution between two others, as it is trained."""
    torch.manual_seed(0)
    depthwise = nn.Conv2d(96, 96, 3, padding=2, dilation=2, groups=96, bias=False)
    module = nn.Sequential(nn.Conv2d(3, 96, 1), depthwise, nn.Conv2d(96, 5, 1))
    autocast = torch.bfloat16 if half else None
    _to_device(module, CPU, TrainerParams(), autocast)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = module(images)
    F.cross_entropy(logits.float(), labels).backward()
    return depthwise.weight.grad


def test_half_precision_learns_dilated_depthwise_weights_as_float32_does():
    half, whole = gradient(half=True), gradient(half=False)
    assert (half - whole).norm() < 0.02 * whole.norm()  # rounding; garbage has 1 and more


@pytest.mark.parametrize(
    ("dilation", "groups", "autocast", "last"),
    [
        (2, 8, torch.bfloat16, False),
        (2, 8, None, True),
        (1, 8, torch.bfloat16, True),
        (2, 1, torch.bfloat16, True),
    ],
)
def test_only_that_kind_of_layer_goes_without_channels_last(dilation, groups, autocast, last):
    module = nn.Sequential(nn.Conv2d(8, 8, 3, dilation=dilation, groups=groups), nn.Conv2d(8, 4, 3))
    _to_device(module, CPU, TrainerParams(), autocast)
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last) == last
    # A GPU has kernels of its own.
    _to_device(module.to("meta"), torch.device("meta"), TrainerParams(), torch.bfloat16)
