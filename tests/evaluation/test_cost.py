from __future__ import annotations

import pytest
import torch
from torch import nn

from rdd_pipeline.evaluation.cost import (
    count_macs,
    count_parameters,
    measure_cost,
    measure_latency,
    published_macs,
    without_auxiliary,
)
from rdd_pipeline.networks import build_network

# methods.md sec. 3: parameters (M), true MACs (G), published "FLOPs" (G) at 1024 x 2048.
TABLE = {
    "deeplabv3_resnet101": (61.12, 2063.3, 2371.7),
    "deeplabv3_resnet18": (13.61, 517.5, 572.0),
    "pspnet_resnet18": (12.92, 488.5, 507.4),
    "deeplabv3_mobilenetv2": (3.23, 106.5, 128.9),
    "pspnet_mobilenetv2": (2.65, None, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_cost_equals_the_published_table(name):
    with torch.device("meta"):
        network = build_network(name, num_classes=19)
    cost = measure_cost(network, (1024, 2048))
    parameters, macs, published = TABLE[name]
    assert cost.trained_parameters / 1e6 == pytest.approx(parameters, abs=0.005)
    if macs is not None:
        assert cost.trained_macs / 1e9 == pytest.approx(macs, rel=1e-3)
        assert cost.published_macs / 1e9 == pytest.approx(published, rel=1e-3)


def test_the_network_that_is_used_has_no_auxiliary_head():
    network = build_network("pspnet_test_resnet", num_classes=11, width=32)
    cost = measure_cost(network, (360, 480))
    head = sum(parameter.numel() for parameter in network.auxiliary.parameters())
    assert cost.parameters == cost.trained_parameters - head
    assert cost.parameters / 1e6 == pytest.approx(0.438, abs=5e-4)
    assert cost.macs / 1e9 == pytest.approx(1.601, abs=5e-4)
    assert cost.trained_parameters / 1e6 == pytest.approx(0.521, abs=5e-4)
    assert cost.trained_macs / 1e9 == pytest.approx(1.827, abs=5e-4)
    bare = build_network("pspnet_test_resnet", num_classes=11, width=32, auxiliary=False)
    assert measure_cost(bare, (360, 480))[:2] == cost[:2]
    assert measure_cost(bare, (360, 480))[2:4] == cost[:2]
    # The head is still there, and the same logits come out without it.
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        whole, used = network.eval()(images), without_auxiliary(network)(images)
    assert whole.aux_logits is not None
    assert used.aux_logits is None
    assert torch.equal(used.logits, whole.logits)


class _Tokens(nn.Module):
    def __init__(self, positions: int) -> None:
        super().__init__()
        self.patch, self.linear = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 5)
        self.positions = positions

    def forward(self, images):
        return self.linear(self.patch(images).flatten(2).movedim(1, 2)[:, : self.positions])


def test_the_published_count_means_nothing_where_linear_layers_see_many_positions():
    assert published_macs(_Tokens(1), (8, 8)) == 4 * 4 * 3 * 16 + 4 * 5
    assert published_macs(_Tokens(4), (8, 8)) is None
    with torch.device("meta"):
        network = build_network("fcn_test_vit", num_classes=3, width=8)
    assert measure_cost(network, (160, 160)).published_macs is None


def test_macs_of_a_convolution_are_the_hand_count():
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    assert count_macs(conv, (16, 24)) == 8 * 12 * 8 * 3 * 9
    assert published_macs(conv, (16, 24)) == 8 * 12 * 8 * 3 * 9
    assert count_parameters(conv) == 8 * 3 * 9 + 8


def test_only_the_published_count_ignores_dilation():
    conv = nn.Conv2d(3, 8, 3, padding=5, dilation=5, groups=1, bias=False)
    assert count_macs(conv, (10, 10)) == 100 * 8 * 27
    assert published_macs(conv, (10, 10)) == 18 * 18 * 8 * 27


def test_padding_by_name_and_groups_are_counted():
    conv = nn.Conv2d(3, 6, 3, padding="same", dilation=2, groups=3)
    assert published_macs(conv, (5, 7)) == count_macs(conv, (5, 7)) == 35 * 6 * 9


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


def test_latency_is_the_median_of_its_repeats_and_restores_the_mode():
    network = build_network("fcn_lcnet_035", num_classes=3, width=8)
    latency = measure_latency(network, (32, 32), repeats=3, warmup=1)
    assert latency.median_ms > 0
    assert latency.spread_ms >= 0
    assert (latency.repeats, latency.device) == (3, "cpu")
    assert network.training
    assert measure_latency(network, (32, 32), repeats=1, warmup=0).spread_ms == 0


@pytest.mark.parametrize("auxiliary", [False, True])
def test_latency_is_that_of_the_network_that_is_used_unless_asked(monkeypatch, auxiliary):
    network = build_network("fcn_lcnet_035", num_classes=3, width=8)
    calls = []
    network.auxiliary.register_forward_hook(lambda *_: calls.append(1))
    measure_latency(network, (32, 32), repeats=2, warmup=0, auxiliary=auxiliary)
    assert len(calls) == (2 if auxiliary else 0)


def test_latency_needs_a_repeat():
    with pytest.raises(ValueError, match="0 repeats"):
        measure_latency(nn.Identity(), (8, 8), repeats=0)
