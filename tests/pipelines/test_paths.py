"""Paths that users name."""

from __future__ import annotations

from pathlib import Path

from rdd_pipeline.config import (
    DataParams,
)
from rdd_pipeline.pipelines.paths import from_project, images_root


def test_paths_of_users_start_at_the_project_and_know_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[tool.kedro]\npackage_name = "x"\n')
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert from_project(Path("weights/x.pth")) == tmp_path / "weights/x.pth"
    assert from_project(Path("~/x.pth")) == tmp_path / "home/x.pth"
    assert not from_project(Path("~nobody of that name/x")).exists()
    assert from_project(tmp_path / "x") == tmp_path / "x"
    assert (
        images_root(tmp_path / "raw", DataParams(layout="camvid", path=Path("mine")))
        == tmp_path / "mine"
    )
    assert images_root(tmp_path / "raw", DataParams(layout="camvid")) == tmp_path / "raw"
