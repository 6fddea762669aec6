from __future__ import annotations

import pytest
import torch

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.networks import NetworkCheckpoint
from rdd_pipeline.networks.checkpoint import NetworkHeader
from rdd_pipeline.networks.preprocessing import Preprocessing


def make_checkpoint(seed: int = 0, source: str = "a test") -> NetworkCheckpoint:
    """A checkpoint file's content without a network behind it: building one takes long."""
    generator = torch.Generator().manual_seed(seed)
    header = NetworkHeader(
        network=NetworkParams(name="fcn_resnet18"),
        label_names=("road", "sky"),
        preprocessing=Preprocessing.imagenet(),
        provenance={"source": source},
    )
    tensors = {
        "classifier.weight": torch.randn(2, 3, 1, 1, generator=generator),
        "classifier.bias": torch.randn(2, generator=generator),
        "norm.num_batches_tracked": torch.tensor(5),
    }
    return NetworkCheckpoint(tensors, header)


@pytest.fixture
def checkpoint() -> NetworkCheckpoint:
    return make_checkpoint()
