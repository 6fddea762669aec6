"""A frozen network computes what the network computes, with less."""

import copy

import pytest
import torch
from torch import nn

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.networks import network_from_params
from rdd_pipeline.networks.frozen import freeze
from rdd_pipeline.networks.network import PAPER_NETWORKS

NETWORKS = [
    *sorted(PAPER_NETWORKS),
    "deeplabv3_tf_efficientnet_lite0",
    "pspnet_convnext_atto",
    "fcn_pvt_v2_b0",
]


def made(name: str) -> nn.Module:
    """The network with batch statistics that are not 0 and 1."""
    torch.manual_seed(0)
    params = NetworkParams(name=name, pretrained=False, width=16)
    network = network_from_params(params, num_classes=5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.3, 3)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.3)
    return network


def tensors(network: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        logits, aux_logits, feature, stages = network(image)
    return [logits, feature, *stages, *([] if aux_logits is None else [aux_logits])]


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_equal_and_no_batch_norm_is_left(name):
    network, image = made(name), torch.randn(2, 3, 48, 40)
    exact = tensors(copy.deepcopy(network).double(), image.double())
    before = tensors(network, image)
    frozen = freeze(network, None)
    assert norms(frozen) == 0
    for output, plain, reference in zip(tensors(frozen, image), before, exact, strict=True):
        error, error_before = ((x - reference).norm() for x in (output, plain))
        assert error <= 3 * error_before
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("name", ["deeplabv3_resnet18", "fcn_pvt_v2_b0"])
def test_under_autocast_outputs_differ_by_the_rounding_of_bfloat16(name):
    network, image = made(name), torch.randn(2, 3, 48, 40)
    exact = tensors(network, image)
    with torch.autocast("cpu", torch.bfloat16):
        before = tensors(network, image)
        frozen = tensors(freeze(network, torch.bfloat16), image)
    for output, plain, reference in zip(frozen, before, exact, strict=True):
        assert output.dtype == plain.dtype
        error, error_before = ((x - reference).norm() for x in (output.float(), plain.float()))
        assert error <= 1.2 * error_before


def test_a_convolution_that_something_else_looks_at_is_left_alone():
    network = made("deeplabv3_mobilenetv2")
    block = network.neck if hasattr(network, "neck") else network
    norm = next(m for m in block.modules() if isinstance(m, nn.BatchNorm2d))
    convolution = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
    seen = []
    # The network's outputs get something of the convolution's own output.
    convolution.register_forward_hook(lambda m, args, output: seen.append(output))
    network.classifier.register_forward_hook(lambda m, args, output: output + seen[-1].mean())
    image = torch.randn(1, 3, 32, 32)
    expected = tensors(network, image)
    frozen = freeze(network, None)
    assert norm in list(frozen.modules())
    for output, before in zip(tensors(frozen, image), expected, strict=True):
        assert torch.equal(output, before)
