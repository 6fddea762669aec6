"""What the tests of nodes have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rdd_pipeline import commands as rdd_commands
from rdd_pipeline.commands import Session
from rdd_pipeline.data.images import Images
from rdd_pipeline.networks import NetworkCheckpoint
from tests.pipelines.examples import (
    FOLDER,
    checkpoint,
    ingest,
    write,
)


@pytest.fixture(autouse=True)
def no_session(monkeypatch):
    """Commands to paste carry the parameters of this process's last run, another test's too."""
    monkeypatch.setattr(rdd_commands, "_session", Session())


@pytest.fixture
def images(tmp_path) -> Path:
    """Three pairs for training, one each for validation and test, in CamVid's layout."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for number in range(count):
            image = rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)
            mask = np.repeat(rng.integers(0, 12, (4, 5), dtype=np.uint8), 8, 0).repeat(8, 1)
            write(tmp_path / "images" / split / f"{number}.png", image)
            write(tmp_path / "images" / f"{split}annot" / f"{number}.png", mask)
    return tmp_path / "images"


@pytest.fixture
def ingested(images) -> Images:
    """The images, checked."""
    return ingest(images, FOLDER).images


@pytest.fixture
def teacher() -> NetworkCheckpoint:
    return checkpoint()
