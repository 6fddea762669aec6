from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params, save_checkpoint

PARAMS = NetworkParams(name="fcn_lcnet_035", width=8, output_stride=16)
LABELS = ("road", "car", "sky")
COLORS = ((128, 64, 128), (0, 0, 142), (70, 130, 180))


def checkpoint(seed: int = 0, colors: tuple | None = COLORS, **header) -> NetworkCheckpoint:
    """A tiny network with random weights whose classes differ from place to place."""
    torch.manual_seed(seed)
    network = network_from_params(PARAMS, num_classes=len(LABELS))
    with torch.no_grad():  # statistics of such images, and no class that wins everywhere
        noise = torch.nn.functional.interpolate(torch.randn(8, 3, 6, 8), size=(64, 80))
        for _ in range(30):
            network.train()(noise)
        logits = network.eval()(noise).logits
        network.classifier.weight *= 3 / logits.std()
        network.classifier.bias -= network(noise).logits.mean(dim=(0, 2, 3))
    made = NetworkCheckpoint.from_network(
        network, params=PARAMS, label_names=LABELS, provenance={"seed": str(seed)}
    )
    described = made.header.model_copy(update={"colors": colors, **header})
    return NetworkCheckpoint(made.tensors, described)


@pytest.fixture(scope="session")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("network") / "student.safetensors"
    save_checkpoint(checkpoint(), path)
    return path


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
