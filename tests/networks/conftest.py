from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

DATA = Path(__file__).parents[1] / "vectors"


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.strip("()").split(",") if size.strip())


def _filled(name: str, shape: tuple[int, ...]) -> Tensor:
    """The rule by which the reference networks were filled (README of the reference numbers)."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        values = 0.75 + 0.5 * generator.random(shape)
    elif name.endswith("running_mean"):
        values = 0.1 * generator.standard_normal(shape)
    elif len(shape) == 4:
        values = generator.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    elif name.endswith("weight"):
        values = 0.4 + 0.3 * generator.random(shape)
    else:
        values = 0.1 * generator.standard_normal(shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


@pytest.fixture(scope="session")
def published_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the published checkpoints, by network."""
    networks: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in (DATA / "networks_state_dict.tsv").read_text().splitlines():
        if line.startswith("# "):
            shapes = networks.setdefault(line[2:].strip(), {})
        elif line.strip():
            name, shape = line.split("\t")
            shapes[name] = _shape(shape)
    return networks


@pytest.fixture(scope="session")
def published_state_dict(published_shapes):
    """Function from a network's name to its reference weights in the published names."""

    def make(network: str) -> dict[str, Tensor]:
        return {name: _filled(name, shape) for name, shape in published_shapes[network].items()}

    return make


@pytest.fixture(scope="session")
def reference_outputs():
    with np.load(DATA / "networks.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive}
