"""Heads of segmentation_models_pytorch: its own networks, on any backbone with a pyramid."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import NetworkCheckpoint, build_network, network_from_params
from rdd_pipeline.networks.heads import HEADS

smp = pytest.importorskip("segmentation_models_pytorch")

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
HALVED = {"decoder_channels": (32, 16, 8, 4, 2)}
OPTIONS = {
    "unet": HALVED,
    "unetplusplus": HALVED,
    "manet": HALVED,
    "linknet": {},
    "fpn": {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32},
    "upernet": {"decoder_channels": 32},
    "segformer": {"decoder_segmentation_channels": 32},
}


def test_every_head_with_a_decoder_is_compared_here():
    assert set(OPTIONS) == {name for name, spec in HEADS.items() if spec.decoder is not None}


# PVT has no stage of stride 2.
PAIRS = [*((head, "test_resnet") for head in OPTIONS), ("unet", "pvt_v2_b0"), ("fpn", "pvt_v2_b0")]


@pytest.mark.parametrize(("head", "backbone"), PAIRS)
def test_the_feature_is_that_of_smp(head, backbone):
    theirs = smp.create_model(
        head, encoder_name=f"tu-{backbone}", encoder_weights=None, **OPTIONS[head]
    ).eval()
    ours = build_network(f"{head}_{backbone}", num_classes=3, width=32).eval()
    theirs.encoder.model.load_state_dict(ours.backbone.features.state_dict())
    theirs.decoder.load_state_dict(ours.neck.decoder.decoder.state_dict())
    with torch.no_grad():
        found = ours(IMAGES)
        stages = theirs.encoder(IMAGES)
        assert_close(found.feature, theirs.decoder(stages))
        assert_close(found.stages[1], stages[-1])
        assert_close(found.logits, ours.classifier(found.feature))
    assert found.logits.shape == (2, 3, 64 // ours.stride, 96 // ours.stride)
    assert found.aux_logits.shape == found.logits.shape


def test_images_of_any_size_are_resized_up_to_what_the_decoder_halves():
    network = build_network("fpn_test_resnet", num_classes=3, width=32).eval()
    odd = torch.randn(1, 3, 50, 70)
    larger = torch.nn.functional.interpolate(
        odd, size=(64, 96), mode="bilinear", align_corners=True
    )
    with torch.no_grad():
        assert_close(network(odd).logits, network(larger).logits)


def test_a_header_brings_the_network_back():
    params = NetworkParams(name="segformer_test_efficientnet", width=32, auxiliary=False)
    torch.manual_seed(1)
    network = network_from_params(params, num_classes=3).eval()
    saved = NetworkCheckpoint.from_network(network, params=params, label_names=("a", "b", "c"))
    found = NetworkCheckpoint.from_bytes(saved.to_bytes()).build()
    with torch.no_grad():
        assert_close(found(IMAGES).logits, network(IMAGES).logits)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("unet_test_vit", None, "has stages of the strides 16, 16, 16; this head takes 4, 8, 16"),
        ("fpn_test_resnet", 40, "The head fpn cannot have the width 40: .*divisible by num_groups"),
    ],
)
def test_what_does_not_fit_is_named(name, width, message):
    with pytest.raises(UserError, match=message):
        build_network(name, num_classes=3, width=width)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=r"head unet is that of .* pip install 'rdd-pipeline\[tea"):
        build_network("unet_test_resnet", num_classes=3)


def test_one_image_does_not_train_a_head_that_pools_to_one():
    network = build_network("upernet_test_resnet", num_classes=3, width=32)
    with pytest.raises(UserError, match="batch_size of at least 2"):
        network(IMAGES[:1])
    build_network("fpn_test_resnet", num_classes=3, width=32)(IMAGES[:1])
