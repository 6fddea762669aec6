"""Bicubic and antialiased resizing as a product of matrices, against torch's own kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.networks.backbones import make_backbone
from rdd_pipeline.networks.resizing import RepeatableResizing, repeatable_resizing
from tests.training.refusing import RefusesLikeCuda

HOW = [
    {"mode": "bicubic"},
    {"mode": "bicubic", "antialias": True},
    {"mode": "bicubic", "align_corners": True},
    {"mode": "bilinear", "antialias": True},
    {"mode": "bilinear", "antialias": True, "align_corners": True},
]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize(
    ("old", "size"), [((7, 6), (5, 9)), ((7, 6), (14, 3)), ((7, 6), (7, 6)), ((7, 6), (1, 1))]
)
def test_values_and_gradients_are_those_of_torch(how, old, size):
    x = torch.randn(2, 3, *old, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = F.interpolate(x, size=size, **how)
    (gradient,) = torch.autograd.grad((expected * direction).sum(), x)
    with RepeatableResizing(), RefusesLikeCuda():
        found = F.interpolate(x, size=size, **how)
        (found_gradient,) = torch.autograd.grad((found * direction).sum(), x)
    assert_close(found, expected)
    assert_close(found_gradient, gradient)


def test_an_integer_is_a_square_and_positions_count():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    expected = F.interpolate(x, 6, mode="bicubic")
    with RepeatableResizing():
        assert_close(F.interpolate(x, 6, None, "bicubic"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    x = torch.randn(1, 2, 8, 8).to(dtype).requires_grad_()
    with RepeatableResizing(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = F.interpolate(x, size=(5, 5), mode="bicubic", antialias=True)
    assert found.dtype == dtype
    expected = F.interpolate(x.detach().float(), size=(5, 5), mode="bicubic", antialias=True)
    assert_close(found, expected.to(dtype))


@pytest.mark.parametrize(
    "how",
    [
        {"size": (5, 5), "mode": "nearest"},
        {"size": (5, 5), "mode": "bilinear", "align_corners": True},
        {"scale_factor": 2, "mode": "bicubic"},
    ],
    ids=str,
)
def test_everything_else_passes_through(how):
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    with RepeatableResizing():
        assert torch.equal(F.interpolate(x, **how), F.interpolate(x, **how))


def test_it_is_used_off_the_cpu_and_when_repeatability_is_asked_for():
    try:
        torch.use_deterministic_algorithms(True)
        assert isinstance(repeatable_resizing(torch.device("cuda")), RepeatableResizing)
        assert not isinstance(repeatable_resizing(torch.device("cpu")), RepeatableResizing)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not isinstance(repeatable_resizing(torch.device("cuda")), RepeatableResizing)


def test_a_transformer_backbone_resizes_its_position_embedding_with_it(monkeypatch):
    backbone = make_backbone("test_vit", output_stride=16)
    images = torch.randn(1, 3, 64, 96)
    expected = backbone(images)[1]
    with pytest.raises(RuntimeError, match="deterministic"), RefusesLikeCuda():
        backbone(images)[1].sum().backward()
    monkeypatch.setattr(
        "rdd_pipeline.networks.backbones.repeatable_resizing", lambda device: RepeatableResizing()
    )
    with RefusesLikeCuda():
        found = backbone(images)[1]
        found.sum().backward()
    assert_close(found, expected)
