"""Packed images make training and scoring faster, and change nothing else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rdd_pipeline.config import EvaluationParams
from rdd_pipeline.data.packed import write_pack
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.evaluation.scoring import score_splits
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training

from .conftest import CPU


@pytest.fixture
def packs(blocks, tmp_path) -> Path:
    """Packs of all splits, as ingestion makes them for `image_size` (30, 36)."""
    for split, size in (("train", (30, 36)), ("val", None), ("test", None)):
        write_pack(blocks.images.split(split).files(size), tmp_path / "packs", workers=1)
    return tmp_path / "packs"


@pytest.fixture
def nowhere(blocks, tmp_path) -> Path:
    """A folder without the images: whoever reads a file fails."""
    return tmp_path / "nowhere"


def test_a_training_from_packs_ends_with_the_same_weights_and_reads_no_file(
    blocks, make_job, packs, nowhere
):
    images, job = replace(blocks.images, image_size=(30, 36)), make_job("baseline")
    plain = train(Training(job, images), CPU)
    packed = train(Training(job, replace(images, root=nowhere, packs=packs)), CPU)
    assert packed.fingerprint == plain.fingerprint
    assert packed.network.digest() == plain.network.digest()
    assert [r for r in packed.history if "val.miou" in r] == [
        r for r in plain.history if "val.miou" in r
    ]


def test_packs_are_not_part_of_the_fingerprint(blocks, make_job, packs):
    prints = {
        Training(make_job("baseline"), replace(blocks.images, packs=place)).fingerprint
        for place in (None, packs, Path("elsewhere"))
    }
    assert len(prints) == 1


def test_a_size_that_was_not_packed_is_read_from_the_files(blocks, make_job, packs, nowhere):
    images, job = replace(blocks.images, packs=packs), make_job("baseline")
    train(Training(job, images), CPU)
    with pytest.raises(DataProblem, match="cannot be read"):
        train(Training(job, replace(images, root=nowhere)), CPU)


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_packs_that_cannot_be_used_cost_speed_only(blocks, make_job, packs, damage, caplog):
    for path in packs.iterdir():
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:5000])
    if damage == "gone":
        shutil.rmtree(packs)
    images, job = replace(blocks.images, image_size=(30, 36)), make_job("baseline")
    plain = train(Training(job, images), CPU)
    packed = train(Training(job, replace(images, packs=packs)), CPU)
    assert packed.network.digest() == plain.network.digest()
    assert ("cannot be used" in caplog.text) == (damage == "truncated")


def test_scores_from_packs_are_the_same(blocks, teacher, packs, nowhere):
    params = EvaluationParams(splits=("val", "test"), batch_size=2)
    images = replace(blocks.images, image_size=(30, 36))
    plain = score_splits(teacher, images, params, device=torch.device("cpu"))
    packed = replace(images, root=nowhere, packs=packs)
    assert score_splits(teacher, packed, params, device=torch.device("cpu")) == plain
