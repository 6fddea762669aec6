from __future__ import annotations

import socket

import pytest
import safetensors.torch
import timm
import torch

from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import build_network


def trained(name="lcnet_035", **options):
    """State dict of a whole timm classifier with weights that differ from a fresh start."""
    torch.manual_seed(7)
    return {k: v.contiguous() for k, v in timm.create_model(name, **options).state_dict().items()}


def saved(tmp_path, tensors, suffix=".safetensors"):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file_reach_the_backbone_and_the_classifier_is_dropped(tmp_path, suffix):
    tensors = trained()
    network = build_network(
        "fcn_lcnet_035", num_classes=3, pretrained=saved(tmp_path, tensors, suffix)
    )
    loaded = network.backbone.features.state_dict()
    assert all(torch.equal(value, tensors[key]) for key, value in loaded.items())
    assert "classifier.weight" in tensors


def test_flattened_names_of_timms_feature_lists_are_matched(tmp_path):
    tensors = trained("test_convnext")
    network = build_network("fcn_test_convnext", num_classes=3, pretrained=saved(tmp_path, tensors))
    assert torch.equal(
        network.backbone.features.state_dict()["stem_0.weight"], tensors["stem.0.weight"]
    )


def test_prefixed_names_of_timms_transformers_are_matched(tmp_path):
    tensors = trained("test_vit")
    network = build_network("fcn_test_vit", num_classes=3, pretrained=saved(tmp_path, tensors))
    loaded = network.backbone.features.state_dict()
    assert torch.equal(loaded["model.patch_embed.proj.weight"], tensors["patch_embed.proj.weight"])


def test_half_precision_is_read_as_float32(tmp_path):
    tensors = {k: v.half() if v.ndim in (2, 4) else v for k, v in trained().items()}
    network = build_network("fcn_lcnet_035", num_classes=3, pretrained=saved(tmp_path, tensors))
    weight = network.backbone.features.state_dict()["conv_stem.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors["conv_stem.weight"].float())


def test_everything_that_does_not_fit_is_listed_and_counted(tmp_path):
    tensors = trained()
    del tensors["bn1.weight"], tensors["bn1.bias"]
    tensors["surprise"] = torch.zeros(2)
    tensors["conv_stem.weight"] = torch.zeros(1, 3, 3, 3)
    path = saved(tmp_path, tensors)
    with pytest.raises(UserError) as error:
        build_network("fcn_lcnet_035", num_classes=3, pretrained=path)
    message = str(error.value)
    assert str(path) in message
    assert "2 missing: bn1.weight, bn1.bias" in message
    assert "1 unexpected: surprise" in message
    assert "1 of another shape: conv_stem.weight (1, 3, 3, 3) instead of (8, 3, 3, 3)" in message


def test_plain_stem_weights_in_a_deep_stem_are_explained(tmp_path):
    path = saved(tmp_path, trained("resnet18"))
    with pytest.raises(UserError, match=r"plain 7x7 stem.*deeplabv3_resnet18\.tv_in1k"):
        build_network("deeplabv3_resnet18", num_classes=3, pretrained=path)


def test_deep_stem_weights_fit_a_published_network(tmp_path):
    tensors = trained("resnet18", stem_type="deep", stem_width=64)
    network = build_network("pspnet_resnet18", num_classes=3, pretrained=saved(tmp_path, tensors))
    (name,) = (key for key in network.state_dict() if key.endswith("layer1.0.conv1.weight"))
    assert torch.equal(network.state_dict()[name], tensors["layer1.0.conv1.weight"])


def test_without_a_network_the_download_is_refused_at_once(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"timm/resnet18.tv_in1k.*could not be downloaded.*its path"
    ):
        build_network("fcn_resnet18.tv_in1k", num_classes=3, pretrained=True)


def test_a_published_network_without_public_weights_says_what_to_use():
    with pytest.raises(
        UserError, match=r"no public .* deeplabv3_resnet18.*deeplabv3_resnet18\.tv_in1k"
    ):
        build_network("deeplabv3_resnet18", num_classes=3, pretrained=True)
