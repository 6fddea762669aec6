"""Small networks that are served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params, save_checkpoint

PARAMS = NetworkParams(name="fcn_test_efficientnet", width=8, output_stride=16)


def make_network(path: Path, seed: int = 0) -> Path:
    """A network with random weights, as a file."""
    torch.manual_seed(seed)
    network = network_from_params(PARAMS, num_classes=3)
    torch.nn.init.normal_(network.classifier.weight)
    names = ("road", "sky", "tree")
    checkpoint = NetworkCheckpoint.from_network(network, params=PARAMS, label_names=names)
    save_checkpoint(checkpoint, path)
    return path


@pytest.fixture
def weights(tmp_path) -> Path:
    return make_network(tmp_path / "0.safetensors")
