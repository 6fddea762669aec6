from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from kedro.io import DatasetError, Version

from rdd_pipeline.datasets import TrainingStatesDataset
from rdd_pipeline.training.state import TrainState

FIRST, SECOND = "2026-01-01T00.00.00.000Z", "2026-01-02T00.00.00.000Z"


def _state(iteration: int = 7) -> TrainState:
    return TrainState(
        iteration=iteration,
        student={"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
        optimizer={"groups": [{"lr": 0.02, "params": [0, 1]}], "state": {0: None}},
        history=[{"loss": 1.5}],
        fingerprint="tfe",
    )


def _versioned(folder: Path, save: str) -> TrainingStatesDataset:
    return TrainingStatesDataset(
        filepath=(folder / "state").as_posix(), version=Version(None, save)
    )


def _file(folder: Path, version: str) -> Path:
    return folder / "state" / version / "state" / "0.ckpt"


def test_gives_back_tensors_and_plain_values(tmp_path: Path) -> None:
    dataset = TrainingStatesDataset(filepath=f"{tmp_path}/state")
    dataset.save({"0": _state()})
    loaded = dataset.load()["0"]
    torch.testing.assert_close(loaded.student, _state().student)
    for name in ("iteration", "optimizer", "history", "fingerprint"):
        assert getattr(loaded, name) == getattr(_state(), name)


def test_equal_content_is_no_new_version(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    _versioned(tmp_path, FIRST).save({"0": TrainState(student={"a": shared, "b": shared})})
    # torch.save writes other bytes for it: the storage is not shared any more.
    _versioned(tmp_path, SECOND).save({"0": TrainState(student={"b": shared.clone(), "a": shared})})
    assert not _file(tmp_path, SECOND).exists()


def test_other_content_becomes_a_file_of_its_own(tmp_path: Path) -> None:
    _versioned(tmp_path, FIRST).save({"0": _state()})
    _versioned(tmp_path, SECOND).save({"0": _state(8)})
    assert not _file(tmp_path, FIRST).samefile(_file(tmp_path, SECOND))
    assert _versioned(tmp_path, "later").load()["0"].iteration == 8


@pytest.mark.parametrize("place", [0, 20, 60, 500, -1])
def test_a_flipped_bit_is_noticed(tmp_path: Path, place: int) -> None:
    dataset = TrainingStatesDataset(filepath=f"{tmp_path}/state")
    dataset.save({"0": _state()})
    path = tmp_path / "state" / "0.ckpt"
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"damaged|not a training state"):
        dataset.load()


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    dataset = TrainingStatesDataset(filepath=f"{tmp_path}/state")
    dataset.save({"0": _state()})
    os.truncate(tmp_path / "state" / "0.ckpt", 700)
    with pytest.raises(DatasetError, match="damaged"):
        dataset.load()
