from __future__ import annotations

import pytest
import torch

from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import PAPER_NETWORKS, build_network, convert_cirkd_names


def relative_difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", PAPER_NETWORKS)
def test_published_weights_give_the_published_outputs(
    name, published_state_dict, reference_outputs
):
    with torch.device("meta"):  # no time for random weights
        network = build_network(name, num_classes=19).eval()
    network.load_state_dict(convert_cirkd_names(published_state_dict(name), name), assign=True)
    with torch.no_grad():
        output = network(reference_outputs["input"])
    for key in ("logits", "aux_logits", "feature"):
        found, expected = getattr(output, key), reference_outputs.get(f"{name}/{key}")
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.shape == expected.shape
            assert relative_difference(found, expected) < 1e-4


@pytest.mark.parametrize("name", PAPER_NETWORKS)
def test_entries_fit_in_the_published_order_too(name, published_shapes):
    theirs = [
        shape
        for key, shape in published_shapes[name].items()
        if "num_batches" not in key and not key.startswith("pretrained.fc")
    ]
    with torch.device("meta"):
        network = build_network(name, num_classes=19)
    ours = [tuple(v.shape) for k, v in network.state_dict().items() if "num_batches" not in k]
    assert ours == theirs


@pytest.fixture
def small(published_state_dict):
    return published_state_dict("pspnet_mobilenetv2")


def test_order_prefix_and_nesting_do_not_matter(small):
    plain = convert_cirkd_names(small, "pspnet_mobilenetv2")
    wrapped = {"state_dict": {f"module.{key}": small[key] for key in sorted(small)}, "epoch": 3}
    for key, value in convert_cirkd_names(wrapped, "pspnet_mobilenetv2").items():
        assert torch.equal(value, plain[key])


def test_number_of_classes_is_the_checkpoints(small):
    small["head.classifier.weight"] = torch.zeros(21, 128, 1, 1)
    small["head.classifier.bias"] = torch.zeros(21)
    converted = convert_cirkd_names(small, "pspnet_mobilenetv2")
    network = build_network("pspnet_mobilenetv2", num_classes=21)
    network.load_state_dict(converted)
    assert network.classifier.weight.shape[0] == 21
    assert not network.classifier.weight.any()


def test_backbone_classifier_and_missing_counters_are_no_fault(small):
    lean = {key: value for key, value in small.items() if "num_batches" not in key}
    lean["pretrained.fc.weight"] = torch.zeros(1000, 512)
    assert len(convert_cirkd_names(lean, "pspnet_mobilenetv2")) == len(small)


def test_everything_that_does_not_fit_is_listed(small):
    del small["head.block.1.bias"]
    small["head.extra.weight"] = torch.zeros(1)
    small["head.block.0.weight"] = torch.zeros(128, 1, 3, 3)
    with pytest.raises(UserError) as error:
        convert_cirkd_names(small, "pspnet_mobilenetv2")
    message = str(error.value)
    assert "1 missing: neck.norm.bias" in message
    assert "1 unexpected: head.extra.weight" in message
    assert "head.block.0.weight (128, 1, 3, 3) instead of (128, 640, 3, 3)" in message


def test_another_network_is_an_error_that_names_the_choices(small):
    with pytest.raises(UserError, match="not one of the published deeplabv3_resnet18"):
        convert_cirkd_names(small, "deeplabv3_resnet18")
    with pytest.raises(UserError, match="No published network is called 'unet'"):
        convert_cirkd_names(small, "unet")


def test_no_state_dict_is_an_error():
    with pytest.raises(UserError, match="holds no tensors by name"):
        convert_cirkd_names({"epoch": 3}, "pspnet_mobilenetv2")
