from __future__ import annotations

import pytest
import torch

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import PAPER_NETWORKS, build_network, network_from_params


def small(name="deeplabv3_lcnet_035", **options):
    return build_network(name, num_classes=5, width=8, **options)


@pytest.mark.parametrize("head", ["deeplabv3", "pspnet", "fcn"])
@pytest.mark.parametrize("stride", [8, 16])
def test_every_head_gives_maps_at_the_stride(head, stride):
    network = small(f"{head}_lcnet_035", output_stride=stride).eval()
    out = network(torch.randn(2, 3, 48, 64))
    size = (48 // stride, 64 // stride)
    assert network.stride == stride
    assert out.logits.shape == out.aux_logits.shape == (2, 5, *size)
    assert out.feature.shape == (2, network.feature_channels, *size) == (2, 8, *size)
    assert tuple(stage.shape[1] for stage in out.stages) == network.stage_channels


def test_logits_are_the_classifier_on_the_feature():
    network = small().eval()
    out = network(torch.randn(1, 3, 40, 56))
    assert torch.equal(out.logits, network.classifier(out.feature))


def test_without_auxiliary_head_there_are_no_auxiliary_logits():
    network = small(auxiliary=False).eval()
    assert network.auxiliary is None
    assert network(torch.randn(1, 3, 32, 32)).aux_logits is None


@pytest.mark.parametrize("name", PAPER_NETWORKS)
def test_published_networks_have_the_published_heads(name):
    with torch.device("meta"):
        network = build_network(name, num_classes=19)
    assert (network.auxiliary is not None) == ("resnet" in name)
    assert network.feature_channels == (256 if "101" in name else 128)
    assert network.stride == 8


def test_same_seed_gives_the_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(small().state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_every_parameter_gets_a_gradient():
    network = small("pspnet_lcnet_035")
    out = network(torch.randn(2, 3, 32, 48))
    (out.logits.sum() + out.aux_logits.sum()).backward()
    assert [k for k, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("head", ["deeplabv3", "pspnet"])
def test_a_single_image_cannot_train_image_pooling(head):
    network = small(f"{head}_lcnet_035")
    with pytest.raises(UserError, match="batch_size of at least 2"):
        network(torch.randn(1, 3, 32, 32))
    with pytest.raises(UserError, match="A batch of 1 image"):
        network.check_trainable(1)
    network.check_trainable(2)
    network.neck.eval()  # frozen statistics need no batch
    network(torch.randn(1, 3, 32, 32))


def test_a_single_image_can_train_the_plain_head():
    network = small("fcn_lcnet_035").train()
    logits = network(torch.randn(1, 3, 48, 48)).logits
    logits.square().mean().backward()
    assert len(logits) == 1
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["fcn_test_vit", "fcn_efficientvit_m0", "fcn_test_convnext"])
@pytest.mark.parametrize("size", [(48, 80), (65, 97)])
def test_any_backbone_takes_any_size(name, size):
    network = small(name).eval()
    out = network(torch.randn(1, 3, *size))
    assert out.logits.shape == out.aux_logits.shape
    assert out.logits.shape[-1] in (size[1] // network.stride, -(-size[1] // network.stride))


def test_channels_last_backbones_give_channels_first_stages():
    network = small("fcn_swin_tiny_patch4_window7_224").eval()
    stages = network(torch.randn(1, 3, 64, 96)).stages
    assert network.stride == 32
    assert [tuple(stage.shape) for stage in stages] == [(1, 384, 4, 6), (1, 768, 2, 3)]


def test_its_own_stride_is_used_and_logged_when_a_backbone_cannot_be_dilated(caplog):
    with caplog.at_level("INFO"):
        network = small("fcn_test_vit", output_stride=8)
    assert network.stride == 16
    assert "cannot be given output stride 8: its own stride 16" in caplog.text


def test_typed_parameters_build_the_same_network():
    params = NetworkParams(name="fcn_lcnet_035", width=8, output_stride=16, auxiliary=False)
    torch.manual_seed(0)
    one = network_from_params(params, num_classes=5)
    torch.manual_seed(0)
    other = small("fcn_lcnet_035", output_stride=16, auxiliary=False)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("psp_resnet18", "Unknown network 'psp_resnet18'. Choose one of deeplabv3_resnet101"),
        ("fcn_", "Unknown network"),
        ("fcn_resnet81", "no model 'resnet81'. Close names: .*resnet18"),
        ("fcn_resnet18.bogus", "no weights tag 'bogus'. It has: .*tv_in1k"),
        ("fcn_hiera_tiny_224", "does not take images of any size"),
    ],
)
def test_unusable_names_are_explained(name, message):
    with pytest.raises(UserError, match=message):
        build_network(name, num_classes=3)


def test_no_classes_is_an_error():
    with pytest.raises(UserError, match="0 classes"):
        build_network("fcn_lcnet_035", num_classes=0)
