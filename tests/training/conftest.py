"""A data set of eight tiny images, and jobs of a few iterations on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.config import (
    AugmentParams,
    NetworkParams,
    OptimizerParams,
    RddParams,
    RecipeParams,
    TrainerParams,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample, build_index
from rdd_pipeline.data.labels import LabelSet, make_lookup
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.networks import NetworkCheckpoint, NetworkOutput, build_network, probe
from rdd_pipeline.training import build
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training, TrainingResult

LABELS = LabelSet(
    name="blocks",
    names=("ground", "block", "sky"),
    colors=((90, 60, 30), (200, 0, 0), (120, 160, 255)),
    class_weights=(0.5, 2.0, 1.0),
    lookup=make_lookup({0: 0, 1: 1, 2: 2}, ignored=(255,)),
)
STUDENT = NetworkParams(name="fcn_test_efficientnet", width=8, output_stride=16)
TEACHER = NetworkParams(name="deeplabv3_test_efficientnet", width=8, output_stride=16)
CPU = TrainerParams(device="cpu", workers=0, log_every=2, checkpoint_every=1e-6)


class Blocks(NamedTuple):
    """Where the images are, and their index."""

    root: Path
    samples: tuple[Sample, ...]

    @property
    def images(self) -> Images:
        """All of them."""
        return Images(self.root, self.samples, LABELS)


def write_blocks(root: Path) -> None:
    """Sky above ground, a red block somewhere, an ignored frame: layout `camvid`."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2), ("test", 1)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for number in range(count):
            mask = np.full((40, 48), 2, np.uint8)
            mask[18 + number :] = 0
            row, column = rng.integers(8, 20, 2)
            mask[row : row + 12, column : column + 14] = 1
            mask[:2] = 255
            colors = np.array([*LABELS.colors, *([(0, 0, 0)] * 253)])
            noise = rng.normal(0, 20, (40, 48, 3))
            image = (colors[mask] + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / split / f"{number}.png")
            Image.fromarray(mask).save(root / f"{split}annot" / f"{number}.png")


def remembered_shapes() -> Callable[..., NetworkOutput]:
    """Both networks' shapes take as long as a short training, and are always the same few."""
    known: dict[tuple[str, tuple[int, int]], NetworkOutput] = {}

    def output_shapes(network, size):
        key = repr(network), tuple(size)
        if key not in known:
            known[key] = probe.output_shapes(network, size)
        return known[key]

    return output_shapes


@pytest.fixture(scope="session", autouse=True)
def _shapes_are_computed_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "output_shapes", remembered_shapes())
        yield


@pytest.fixture(scope="session")
def blocks(tmp_path_factory) -> Blocks:
    root = tmp_path_factory.mktemp("blocks")
    write_blocks(root)
    return Blocks(root, build_index(root, get_layout("camvid")._replace(labels=LABELS)).samples)


@pytest.fixture(scope="session")
def teacher() -> NetworkCheckpoint:
    """Untrained and so unsure of everything; both heads disagree."""
    torch.manual_seed(7)
    network = build_network(
        TEACHER.name, num_classes=3, width=TEACHER.width, output_stride=TEACHER.output_stride
    )
    return NetworkCheckpoint.from_network(network, params=TEACHER, label_names=LABELS.names)


MakeJob = Callable[..., TrainingJob]


@pytest.fixture(scope="session")
def make_job(blocks) -> MakeJob:
    """Function that makes a job of 8 iterations, 4 of them TFE; arguments change it."""

    def make(
        method: str = "tse",
        *,
        recipe: dict[str, Any] | None = None,
        rdd: dict[str, Any] | None = None,
        **fields: Any,
    ) -> TrainingJob:
        return TrainingJob(
            method=method,
            network=fields.pop("network", STUDENT),
            recipe=RecipeParams(
                **{
                    "iterations": 8,
                    "batch_size": 2,
                    "optimizer": OptimizerParams(lr=0.05),
                    "augment": AugmentParams(crop=(32, 32), scale_min=0.8, scale_max=1.2),
                    "validate_every": 4,
                    **(recipe or {}),
                }
            ),
            rdd=RddParams(**{"tfe_length": 5, "min_kept": 0.1, **(rdd or {})}),
            **fields,
        )

    return make


@pytest.fixture(scope="session")
def reference(blocks, teacher) -> Callable[[TrainingJob], TrainingResult]:
    """Function that says how a job ends by itself, undisturbed; trained once for all tests."""
    known: dict[str, TrainingResult] = {}

    def ends(job: TrainingJob) -> TrainingResult:
        key = job.model_dump_json()
        if key not in known:
            known[key] = train(Training(job, blocks.images, teacher), CPU)
        return known[key]

    return ends
