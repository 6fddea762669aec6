from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from kedro.io import DatasetError, Version

from rdd_pipeline.datasets import TrainingStateDataset

FIRST, SECOND = "2026-01-01T00.00.00.000Z", "2026-01-02T00.00.00.000Z"


def _state() -> dict[str, Any]:
    return {
        "iteration": 7,
        "student": {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
        "optimizer": {"groups": [{"lr": 0.02, "params": [0, 1]}], "state": {0: None}},
        "history": [{"loss": 1.5}],
        "name": "tfe",
    }


def _versioned(folder: Path, save: str) -> TrainingStateDataset:
    return TrainingStateDataset(
        filepath=(folder / "state.ckpt").as_posix(), version=Version(None, save)
    )


def _file(folder: Path, version: str) -> Path:
    return folder / "state.ckpt" / version / "state.ckpt"


def test_gives_back_tensors_and_plain_values(tmp_path: Path) -> None:
    dataset = TrainingStateDataset(filepath=f"{tmp_path}/state.ckpt")
    dataset.save(_state())
    loaded = dataset.load()
    torch.testing.assert_close(loaded["student"], _state()["student"])
    for key in ("iteration", "optimizer", "history", "name"):
        assert loaded[key] == _state()[key]


def test_equal_content_becomes_a_hard_link(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    _versioned(tmp_path, FIRST).save({"a": shared, "b": shared})
    # torch.save writes other bytes for it: the storage is not shared any more.
    _versioned(tmp_path, SECOND).save({"b": shared.clone(), "a": shared})
    assert _file(tmp_path, FIRST).samefile(_file(tmp_path, SECOND))


def test_other_content_becomes_a_file_of_its_own(tmp_path: Path) -> None:
    _versioned(tmp_path, FIRST).save(_state())
    _versioned(tmp_path, SECOND).save({**_state(), "iteration": 8})
    assert not _file(tmp_path, FIRST).samefile(_file(tmp_path, SECOND))
    assert _versioned(tmp_path, "later").load()["iteration"] == 8


@pytest.mark.parametrize("place", [0, 20, 60, 500, -1])
def test_a_flipped_bit_is_noticed(tmp_path: Path, place: int) -> None:
    dataset = TrainingStateDataset(filepath=f"{tmp_path}/state.ckpt")
    dataset.save(_state())
    path = tmp_path / "state.ckpt"
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"damaged|not a training state"):
        dataset.load()


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    dataset = TrainingStateDataset(filepath=f"{tmp_path}/state.ckpt")
    dataset.save(_state())
    os.truncate(tmp_path / "state.ckpt", 700)
    with pytest.raises(DatasetError, match="damaged"):
        dataset.load()
