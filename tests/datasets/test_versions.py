from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from kedro.io import DatasetError, Version
from kedro_datasets.json import JSONDataset

from rdd_pipeline.datasets import VersionsDataset

FIRST, SECOND = "2026-01-01T00.00.00.000Z", "2026-01-02T00.00.00.000Z"


def _save(folder: Path, method: str, version: str, content: object) -> None:
    """Through Kedro's own dataset, so that the layout is the real one."""
    path = (folder / f"{method}.json").as_posix()
    JSONDataset(filepath=path, version=Version(None, version)).save(content)


def test_lists_every_version_of_every_method(tmp_path: Path) -> None:
    _save(tmp_path, "tse", FIRST, {"miou": 0.5})
    _save(tmp_path, "tse", SECOND, {"miou": 0.6})
    _save(tmp_path, "kd", FIRST, {"miou": 0.4})
    assert VersionsDataset(filepath=str(tmp_path)).load() == [
        {"miou": 0.4, "method": "kd", "version": FIRST},
        {"miou": 0.5, "method": "tse", "version": FIRST},
        {"miou": 0.6, "method": "tse", "version": SECOND},
    ]


def test_nothing_saved_yet_is_an_empty_list(tmp_path: Path) -> None:
    dataset = VersionsDataset(filepath=f"{tmp_path}/not_there")
    assert dataset.load() == []
    assert not dataset.exists()


def test_sees_what_was_saved_since_the_last_load(tmp_path: Path) -> None:
    dataset = VersionsDataset(filepath=str(tmp_path))
    assert dataset.load() == []
    _save(tmp_path, "kd", FIRST, {})
    assert len(dataset.load()) == 1
    assert dataset.exists()


@pytest.mark.parametrize("broken", ["{not json", "[1, 2]", ""])
def test_a_broken_file_is_named_and_left_out(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, "kd", FIRST, {"miou": 0.4})
    path = tmp_path / "kd.json" / SECOND / "kd.json"
    path.parent.mkdir()
    path.write_text(broken)
    with caplog.at_level(logging.WARNING):
        loaded = VersionsDataset(filepath=str(tmp_path)).load()
    assert [entry["version"] for entry in loaded] == [FIRST]
    assert str(path) in caplog.text


def test_other_files_are_not_taken_for_versions(tmp_path: Path) -> None:
    _save(tmp_path, "kd", FIRST, {})
    (tmp_path / "flat.json").write_text(json.dumps({"miou": 1.0}))
    other = tmp_path / "kd.json" / FIRST / "other.json"
    other.write_text("{}")
    assert len(VersionsDataset(filepath=str(tmp_path)).load()) == 1


def test_nothing_is_saved_through_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is only read"):
        VersionsDataset(filepath=str(tmp_path)).save({})  # type: ignore[arg-type]
