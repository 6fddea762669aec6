from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from kedro.io import DatasetError, Version

from rdd_pipeline.datasets import MetricsDataset, TrainedMetricsDataset

FIRST, SECOND = "2026-01-01T00.00.00.000Z", "2026-01-02T00.00.00.000Z"


def _metrics(miou: float) -> dict[str, Any]:
    return {"about": {}, "cost": {}, "splits": {"val": {"miou": miou}}}


def _save(folder: Path, method: str, version: str, **mious: float) -> None:
    """Scores of the seeds `s0`, `s1`, ... through the method's entry, in the real layout."""
    entry = MetricsDataset(filepath=f"{folder}/{method}", version=Version(None, version))
    entry.save({seed.removeprefix("s"): _metrics(miou) for seed, miou in mious.items()})


def test_metrics_come_back_by_seed(tmp_path: Path) -> None:
    _save(tmp_path, "kd", FIRST, s0=0.5, s1=0.1 + 0.2)
    entry = MetricsDataset(filepath=f"{tmp_path}/kd", version=Version(None, SECOND))
    assert entry.load() == {"0": _metrics(0.5), "1": _metrics(0.1 + 0.2)}


@pytest.mark.parametrize("change", [("0.5", "0.6"), ('"digest"', '"other"')])
def test_metrics_that_were_changed_since_are_refused(
    tmp_path: Path, change: tuple[str, str]
) -> None:
    entry = MetricsDataset(filepath=f"{tmp_path}/kd")
    entry.save({"0": _metrics(0.5)})
    path = tmp_path / "kd" / "0.json"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(DatasetError, match=r"0\.json (was changed|has no digest).*Delete it"):
        entry.load()


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_metrics_is_not_waited_for(tmp_path: Path, caplog: Any) -> None:
    _save(tmp_path, "kd", FIRST, s0=0.5)
    [path] = tmp_path.rglob("0.json")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DatasetError, match=r"is a named pipe: .*0\.json"):
        MetricsDataset(filepath=f"{tmp_path}/kd", version=Version(None, SECOND)).load()
    assert TrainedMetricsDataset(filepath=str(tmp_path)).load() == []
    assert "0.json" in caplog.text


def test_lists_every_version_of_every_method_and_seed(tmp_path: Path) -> None:
    _save(tmp_path, "tse", FIRST, s0=0.5)
    _save(tmp_path, "tse", SECOND, s10=0.7, s9=0.6)
    _save(tmp_path, "kd", FIRST, s0=0.4)
    assert TrainedMetricsDataset(filepath=str(tmp_path)).load() == [
        {**_metrics(0.4), "method": "kd", "version": FIRST},
        {**_metrics(0.5), "method": "tse", "version": FIRST},
        {**_metrics(0.6), "method": "tse", "version": SECOND},
        {**_metrics(0.7), "method": "tse", "version": SECOND},
    ]


def test_nothing_saved_yet_is_an_empty_list(tmp_path: Path) -> None:
    dataset = TrainedMetricsDataset(filepath=f"{tmp_path}/not_there")
    assert dataset.load() == []
    assert not dataset.exists()


def test_sees_what_was_saved_since_the_last_load(tmp_path: Path) -> None:
    dataset = TrainedMetricsDataset(filepath=str(tmp_path))
    assert dataset.load() == []
    _save(tmp_path, "kd", FIRST, s0=0.1)
    assert len(dataset.load()) == 1
    assert dataset.exists()


@pytest.mark.parametrize("broken", ["{not json", "[1, 2]", "", '{"splits": {}}'])
def test_a_broken_file_is_named_and_left_out(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, "kd", FIRST, s0=0.4)
    path = tmp_path / "kd" / SECOND / "kd" / "0.json"
    path.parent.mkdir(parents=True)
    path.write_text(broken)
    with caplog.at_level(logging.WARNING):
        loaded = TrainedMetricsDataset(filepath=str(tmp_path)).load()
    assert [entry["version"] for entry in loaded] == [FIRST]
    assert str(path) in caplog.text


def test_files_of_older_versions_of_the_project_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They had one file for all seeds, and the splits beside `about`."""
    for method, version in (("tse", FIRST), ("tse", SECOND), ("kd", FIRST)):
        path = tmp_path / f"{method}.json" / version / f"{method}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"about": {"method": method}, "val": {"miou": 0.5}}))
    _save(tmp_path, "kd", SECOND, s0=0.4)
    with caplog.at_level(logging.WARNING):
        assert len(TrainedMetricsDataset(filepath=str(tmp_path)).load()) == 1
    (record,) = caplog.records
    assert "3 metrics files of an older rdd_pipeline, of kd, tse, are left out" in record.message


def test_other_files_are_not_taken_for_versions(tmp_path: Path) -> None:
    _save(tmp_path, "kd", FIRST, s0=0.1)
    (tmp_path / "flat.json").write_text(json.dumps({"miou": 1.0}))
    other = tmp_path / "kd" / FIRST / "other" / "0.json"
    other.parent.mkdir()
    other.write_text("{}")
    assert len(TrainedMetricsDataset(filepath=str(tmp_path)).load()) == 1


def test_nothing_is_saved_through_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is only read"):
        TrainedMetricsDataset(filepath=str(tmp_path)).save({})  # type: ignore[arg-type]


def test_the_preview_is_a_table_of_scores_and_not_of_digests(tmp_path: Path) -> None:
    entry = MetricsDataset(filepath=f"{tmp_path}/kd")
    scores = {"miou": 0.25, "pixel_accuracy": 0.5, "classes_in_mean": 2, "confusion": [[1]]}
    found = {"splits": {"test": scores | {"iou": {"road": 0.5, "sky": None}}}, "about": {}}
    entry.save({"0": found, "1": found})
    table = entry.preview()
    assert table["columns"] == ["in %", "test, seed 0", "test, seed 1"]
    assert table["data"] == [
        ["mIoU", "25.0", "25.0"],
        ["pixel accuracy", "50.0", "50.0"],
        ["road", "50.0", "50.0"],
    ]
