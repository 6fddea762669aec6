"""From labeled images to a file that runs elsewhere, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import from_checked_json
from tests.kedro_project import Project, bootstrap
from tests.mlflow_store import new_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A project with the student alone, trained."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    project = Project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(
            "MLFLOW_TRACKING_URI", new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")
        )
        bootstrap()
        project.run("distill_baselines", to_outputs=["metrics_baseline"])
        yield project


def test_export_writes_files_with_verdicts_and_fails_where_one_deviates(project, monkeypatch):
    params = {"method": "best", "check_images": 2, "calibration_images": 2, "tolerance": 0.99}
    project.run("export", params={"export": {**params, "int8_tolerance": 100.0}})
    folder = project.folder / "data/06_models/test/export"
    files = {path.name for path in folder.iterdir()}
    formats = {f"baseline_0{suffix}" for suffix in (".onnx", ".pt2", ".int8.onnx")}
    assert files == formats | {f"{name}.json" for name in formats}
    kept = project.json("08_reporting/test/export_verdicts.json")
    for kind, verdict in kept.items():
        path = folder / f"{verdict['file']}.json"
        assert from_checked_json(path.read_bytes(), str(path)) == verdict, kind
        assert verdict["passed"]
    strict = {**params, "formats": ["int8"], "int8_tolerance": 0.0, "tolerance": 1.0}
    verdicts = project.versions("08_reporting/test/export_verdicts.json")
    monkeypatch.setattr("rdd_pipeline.export.files.points_lost", lambda found: 0.5)
    with pytest.raises(UserError, match=r"baseline_0\.int8\.onnx loses 0\.50 points"):
        project.run("export", params={"export": strict})
    assert len(project.versions("08_reporting/test/export_verdicts.json")) == len(verdicts) + 1


def test_the_verdicts_are_json_that_anybody_reads(project):
    folder = Path(project.folder / "data/06_models/test/export")
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["format"] in ("onnx", "pt2", "int8")
