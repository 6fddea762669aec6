from __future__ import annotations

import pytest
import torch
from torch import nn

from rdd_pipeline.evaluation.cost import (
    count_macs,
    count_parameters,
    measure_cost,
    without_auxiliary,
)
from rdd_pipeline.networks import build_network

# Parameters (M) as in the papers' tables, MACs (G) at 1024 x 2048.
TABLE = {
    "deeplabv3_resnet101": (61.12, 2063.3),
    "deeplabv3_resnet18": (13.61, 517.5),
    "pspnet_resnet18": (12.92, 488.5),
    "deeplabv3_mobilenetv2": (3.23, 106.5),
    "pspnet_mobilenetv2": (2.65, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_cost_equals_the_published_table(name):
    with torch.device("meta"):
        network = build_network(name, num_classes=19)
    cost = measure_cost(network, (1024, 2048))
    parameters, macs = TABLE[name]
    assert cost["trained_parameters"] / 1e6 == pytest.approx(parameters, abs=0.005)
    if macs is not None:
        assert cost["trained_macs"] / 1e9 == pytest.approx(macs, rel=1e-3)


def test_the_network_that_is_used_has_no_auxiliary_head():
    network = build_network("pspnet_test_resnet", num_classes=11, width=32)
    cost = measure_cost(network, (360, 480))
    head = sum(parameter.numel() for parameter in network.auxiliary.parameters())
    assert cost["parameters"] == cost["trained_parameters"] - head
    assert cost["parameters"] / 1e6 == pytest.approx(0.438, abs=5e-4)
    assert cost["macs"] / 1e9 == pytest.approx(1.601, abs=5e-4)
    assert cost["trained_parameters"] / 1e6 == pytest.approx(0.521, abs=5e-4)
    assert cost["trained_macs"] / 1e9 == pytest.approx(1.827, abs=5e-4)
    bare = build_network("pspnet_test_resnet", num_classes=11, width=32, auxiliary=False)
    used = {"parameters": cost["parameters"], "macs": cost["macs"]}
    trained = {f"trained_{name}": value for name, value in used.items()}
    assert measure_cost(bare, (360, 480)) == used | trained
    # The head is still there, and the same logits come out without it.
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        whole, used = network.eval()(images), without_auxiliary(network)(images)
    assert whole.aux_logits is not None
    assert used.aux_logits is None
    assert torch.equal(used.logits, whole.logits)


def test_macs_of_a_convolution_are_the_hand_count():
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    assert count_macs(conv, (16, 24)) == 8 * 12 * 8 * 3 * 9
    assert count_parameters(conv) == 8 * 3 * 9 + 8


def test_dilation_leaves_the_count_as_it_is():
    conv = nn.Conv2d(3, 8, 3, padding=5, dilation=5, groups=1, bias=False)
    assert count_macs(conv, (10, 10)) == 100 * 8 * 27


def test_padding_by_name_and_groups_are_counted():
    conv = nn.Conv2d(3, 6, 3, padding="same", dilation=2, groups=3)
    assert count_macs(conv, (5, 7)) == 35 * 6 * 9


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(layer, layer)) == 12


def test_counting_leaves_the_network_alone():
    network = build_network("deeplabv3_lcnet_035", num_classes=3, width=8)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    measure_cost(network, (32, 48))
    assert network.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
