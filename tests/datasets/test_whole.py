"""Tables, figures and texts: whole, with a digest that is checked."""

from __future__ import annotations

import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from kedro.io import DatasetError, Version

from rdd_pipeline.datasets import (
    WholeCSVDataset,
    WholeFigureDataset,
    WholeJSONDataset,
    WholeTextDataset,
)
from rdd_pipeline.errors import UserError

FIRST, SECOND = "2026-01-01T00.00.00.000Z", "2026-01-02T00.00.00.000Z"


def _figure():
    return plt.figure()


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        (WholeJSONDataset, "plan.json", lambda: {"width": 128}),
        (WholeCSVDataset, "kd.csv", lambda: pd.DataFrame({"loss": [1.0]})),
        (WholeTextDataset, "summary.md", lambda: "| mIoU |"),
        (WholeFigureDataset, "kd.png", _figure),
    ],
)
def test_a_version_is_its_file_and_a_digest_that_others_can_check(tmp_path, kind, name, content):
    path = tmp_path / "made" / name
    kind(filepath=str(path), version=Version(None, FIRST)).save(content())
    folder = path / FIRST
    assert sorted(p.name for p in folder.iterdir()) == [name, f"{name}.b2"]
    assert sorted(p.name for p in path.parent.rglob("*")) == sorted(
        [name, FIRST, name, f"{name}.b2"]
    )
    check = ["b2sum", "-l", "128", "--quiet", "-c", f"{name}.b2"]
    assert subprocess.run(check, cwd=folder, check=False).returncode == 0


def _plans(tmp_path: Path, load: str | None = None) -> WholeJSONDataset:
    return WholeJSONDataset(filepath=f"{tmp_path}/plan.json", version=Version(load, SECOND))


def test_a_version_that_was_changed_is_refused_and_the_next_one_is_not(tmp_path):
    _plans(tmp_path).save({"width": 128})
    path = tmp_path / "plan.json" / SECOND / "plan.json"
    path.write_text(path.read_text().replace("8", "9"))
    with pytest.raises(DatasetError) as caught:
        _plans(tmp_path).load()
    assert isinstance(caught.value.__cause__, UserError)
    assert "its digest does not fit. Delete the folder" in str(caught.value.__cause__)
    later = "2026-01-03T00.00.00.000Z"
    WholeJSONDataset(filepath=f"{tmp_path}/plan.json", version=Version(None, later)).save({})
    assert _plans(tmp_path, later).load() == {}


def test_a_version_of_before_there_were_digests_loads(tmp_path):
    _plans(tmp_path).save({"width": 128})
    (tmp_path / "plan.json" / SECOND / "plan.json.b2").unlink()
    assert _plans(tmp_path).load() == {"width": 128}


def test_when_saving_fails_nothing_is_left_and_the_next_time_it_works(tmp_path):
    entry = _plans(tmp_path)
    with pytest.raises(DatasetError):
        entry.save({"width": object()})
    assert list(tmp_path.rglob("*")) == []
    entry.save({"width": 1})
    assert entry.load() == {"width": 1}


def test_an_entry_without_versions_is_replaced(tmp_path):
    entry = WholeTextDataset(filepath=f"{tmp_path}/report.html")
    entry.save("one")
    entry.save("two")
    assert entry.load() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
