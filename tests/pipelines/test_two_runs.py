"""Two runs in one project at the same moment never see each other's data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from rdd_pipeline.config import DataParams, SceneParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.packed import PackedSource
from rdd_pipeline.datasets import ImagesDataset, TrainedMetricsDataset
from rdd_pipeline.networks import load_checkpoint
from rdd_pipeline.pipelines.data_ingestion.nodes import index_images, inspect_images, pack_images
from tests.kedro_project import ROOT, Project, bootstrap
from tests.mlflow_store import new_store

TIMES = 10


def scenes(seed: int, **more: Any) -> DataParams:
    small = SceneParams(seed=seed, train=2, val=1, test=1, height=48, width=64)
    return DataParams(layout="scenes", workers=1, scenes=small, **more)


def ingest(
    project: Path, data: DataParams, together: Callable[[], object] = lambda: None
) -> Images:
    """The nodes of ingestion and the entry `images`, as one session has them."""
    entry = ImagesDataset(filepath=str(project / "images"))
    entry.expect(data)
    cache = project / "cache"
    together()
    inspection, *_ = inspect_images(project / "raw", cache, data)
    images, *_ = index_images(inspection, data)
    together()
    entry.save(pack_images(images, cache, data)[0])
    together()
    return entry.load()


def at_once(project: Path, one: DataParams, other: DataParams) -> list[Images]:
    barrier = Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda data: ingest(project, data, barrier.wait), (one, other)))


def pixels(images: Images) -> list[torch.Tensor]:
    """What training and scoring read: of the packs where there are some."""
    batches = (images.split(name).evaluation_batches(4) for name in ("train", "val", "test"))
    return [tensor for split in batches for b in split for tensor in (b.images, b.labels)]


def equal(found: Images, alone: Images) -> bool:
    pairs = zip(pixels(found), pixels(alone), strict=True)
    return found.digest == alone.digest and all(torch.equal(a, b) for a, b in pairs)


def test_two_runs_with_other_scenes_both_have_their_own(tmp_path: Path):
    alone = [ingest(tmp_path / f"alone{seed}", scenes(seed)) for seed in (0, 7)]
    assert alone[0].digest != alone[1].digest
    for time in range(TIMES):
        found = at_once(tmp_path / str(time), scenes(0), scenes(7))
        assert [equal(*pair) for pair in zip(found, alone, strict=True)] == [True, True]
        assert all(isinstance(i.split("val")._source(None), PackedSource) for i in found)


def test_two_runs_that_divide_the_same_images_in_another_way_both_have_their_own(tmp_path: Path):
    images = ingest(tmp_path, scenes(0))
    ways = [
        DataParams(layout="camvid", path=images.root, workers=1, image_size=size, split_seed=seed)
        for seed, size in ((0, None), (1, (24, 32)))
    ]
    alone = [ingest(tmp_path / f"alone{data.split_seed}", data) for data in ways]
    for time in range(TIMES):
        found = at_once(tmp_path / str(time), *ways)
        assert [equal(*pair) for pair in zip(found, alone, strict=True)] == [True, True]
        assert [i.image_size for i in found] == [None, (24, 32)]


def test_two_runs_with_the_same_data_are_both_right(tmp_path: Path):
    alone = ingest(tmp_path / "alone", scenes(3))
    for time in range(TIMES):
        for found in at_once(tmp_path / str(time), scenes(3), scenes(3)):
            assert equal(found, alone)


RUN = """
import sys
from pathlib import Path
from tests.kedro_project import bootstrap
from tests.pipelines.test_two_runs import train_teacher
bootstrap()
train_teacher(Path(sys.argv[1]), int(sys.argv[2]))
"""


def train_teacher(project: Path, seed: int) -> None:
    """`kedro run --pipelines=train_teacher` on the scenes of this seed."""
    params = {"data": {"scenes": {"seed": seed}}, "trainer": {"threads": 1}}
    Project(project).run("train_teacher", params=params)


def start(project: Path, seed: int) -> subprocess.Popen[bytes]:
    """The same in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(project), str(seed)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def weights(project: Path) -> dict[str, str]:
    """Digest of the weights of each run's teacher by the digest of the images it was scored on."""
    folder = project / "data/06_models/test/teacher"
    metrics = TrainedMetricsDataset(filepath=str(project / "data/07_model_output/test/metrics"))
    found = {}
    for result in metrics.load():
        (path,) = folder.rglob(f"{result['version']}/**/*.safetensors")
        found[result["about"]["data_digest"]] = load_checkpoint(path).digest()
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_commands_at_once_end_as_each_does_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    bootstrap()
    for process in [start(tmp_path / "both", seed) for seed in (0, 7)]:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output.decode()[-2000:]
    expected = {}
    for seed in (0, 7):
        train_teacher(tmp_path / str(seed), seed)
        expected |= weights(tmp_path / str(seed))
    assert len(set(expected.values())) == 2
    assert weights(tmp_path / "both") == expected
