"""Packed images make training and scoring faster, and change nothing else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rdd_pipeline.config import EvaluationParams
from rdd_pipeline.data.index import of_split
from rdd_pipeline.data.packed import write_pack
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.evaluation.scoring import score_splits
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training

from .conftest import CPU, LABELS


@pytest.fixture
def packs(blocks, tmp_path) -> Path:
    """Packs of all splits, as ingestion makes them for `image_size` (30, 36)."""
    for split, size in (("train", (30, 36)), ("val", None), ("test", None)):
        chosen = of_split(blocks.samples, split)
        folder = tmp_path / "packs"
        write_pack(chosen, blocks.root, folder, lookup=LABELS.lookup, image_size=size, workers=1)
    return tmp_path / "packs"


@pytest.fixture
def nowhere(blocks, tmp_path) -> Path:
    """A folder without the images: whoever reads a file fails."""
    return tmp_path / "nowhere"


def test_a_training_from_packs_ends_with_the_same_weights_and_reads_no_file(
    blocks, make_job, packs, nowhere
):
    fields = {"image_size": (30, 36)}
    plain = train(Training(make_job("baseline", **fields), blocks.samples), CPU)
    job = make_job("baseline", root=nowhere, packs=packs, **fields)
    packed = train(Training(job, blocks.samples), CPU)
    assert packed.fingerprint == plain.fingerprint
    assert packed.network.digest() == plain.network.digest()
    assert [r for r in packed.history if "val.miou" in r] == [
        r for r in plain.history if "val.miou" in r
    ]


def test_packs_are_not_part_of_the_fingerprint(blocks, make_job, packs):
    prints = {
        Training(make_job("baseline", packs=place), blocks.samples).fingerprint
        for place in (None, packs, Path("elsewhere"))
    }
    assert len(prints) == 1


def test_a_size_that_was_not_packed_is_read_from_the_files(blocks, make_job, packs, nowhere):
    train(Training(make_job("baseline", packs=packs), blocks.samples), CPU)
    with pytest.raises(DataProblem, match="cannot be read"):
        train(Training(make_job("baseline", root=nowhere, packs=packs), blocks.samples), CPU)


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_packs_that_cannot_be_used_cost_speed_only(blocks, make_job, packs, damage, caplog):
    for path in packs.iterdir():
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:5000])
    if damage == "gone":
        shutil.rmtree(packs)
    fields = {"image_size": (30, 36)}
    plain = train(Training(make_job("baseline", **fields), blocks.samples), CPU)
    packed = train(Training(make_job("baseline", packs=packs, **fields), blocks.samples), CPU)
    assert packed.network.digest() == plain.network.digest()
    assert ("cannot be used" in caplog.text) == (damage == "truncated")


def test_scores_from_packs_are_the_same(blocks, teacher, packs, nowhere):
    params = EvaluationParams(splits=("val", "test"), batch_size=2)
    images = replace(blocks.images, image_size=(30, 36))
    plain = score_splits(teacher, images, params, device=torch.device("cpu"))
    packed = replace(images, root=nowhere, packs=packs)
    assert score_splits(teacher, packed, params, device=torch.device("cpu")) == plain
