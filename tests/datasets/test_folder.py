from __future__ import annotations

from pathlib import Path

import pytest
from kedro.io import DataCatalog, DatasetError

from rdd_pipeline.datasets import FolderDataset


def test_hands_out_a_path_that_need_not_exist(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=f"{tmp_path}/images")
    assert dataset.load() == tmp_path / "images"
    assert not dataset.exists()
    (tmp_path / "images").mkdir()
    assert dataset.exists()


def test_a_folder_that_must_exist_is_asked_for(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=f"{tmp_path}/images", must_exist=True)
    with pytest.raises(DatasetError, match=r"images does not exist\. Put the data there"):
        dataset.load()
    (tmp_path / "images").touch()
    with pytest.raises(DatasetError, match="images is a file"):
        dataset.load()


@pytest.mark.parametrize("filepath", ["~/images/x", "/some/project/~/images/x"])
def test_home_is_expanded_also_behind_the_project(
    filepath: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FolderDataset(filepath=filepath).load() == tmp_path / "images" / "x"


def test_a_name_that_only_contains_a_tilde_stays(tmp_path: Path) -> None:
    assert FolderDataset(filepath=f"{tmp_path}/a~b").load() == tmp_path / "a~b"


def test_nothing_is_saved_through_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is only read"):
        FolderDataset(filepath=f"{tmp_path}").save(1)  # type: ignore[arg-type]


def test_is_made_from_a_catalog_entry(tmp_path: Path) -> None:
    entry = {"type": "rdd_pipeline.datasets.FolderDataset", "filepath": f"{tmp_path}/images"}
    assert DataCatalog.from_config({"raw": entry}).load("raw") == tmp_path / "images"
