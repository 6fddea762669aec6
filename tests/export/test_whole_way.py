"""From labeled images to a file that runs elsewhere, as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from kedro.framework.session import KedroSession
from mlflow import MlflowClient
from numpy.testing import assert_array_equal

import rdd_pipeline
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import from_checked_json
from rdd_pipeline.tracking.delivery import send_file
from tests.kedro_project import CONF, Project, bootstrap
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


def test_a_student_is_registered_under_the_data_set_s_name(project, tmp_path):
    """As everywhere but in conf/test, where it would take seconds of every test."""
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "test" / "catalog.yml").unlink()
    with KedroSession.create(
        project_path=project.folder, conf_source=str(conf), env="test", save_on_close=False
    ) as session:
        session.run(pipeline_names=["distill_baselines"], to_outputs=["metrics_baseline"])
    left = list((project.folder / "data/07_model_output/untracked").glob("*.jsonl"))
    assert [send_file(path) for path in left] == [0] * len(left)  # what a busy machine has left
    client = MlflowClient()
    version = client.get_model_version_by_alias("test", "best")
    run = client.get_run(version.run_id)
    assert version.tags["method"] == run.data.tags["method"] == "baseline"
    miou = project.json("07_model_output/test/metrics/baseline/0.json")["splits"]["val"]["miou"]
    assert float(version.tags["val_miou"]) == miou == run.data.metrics["val.miou"]
    model = mlflow.pyfunc.load_model("models:/test@best")
    image = np.zeros((1, 48, 64, 3), np.uint8)
    weights = project.newest("06_models/test/student_baseline/0.safetensors")
    assert_array_equal(model.predict(image), rdd_pipeline.load(weights)(image))


def test_the_verdicts_are_json_that_anybody_reads(project):
    folder = Path(project.folder / "data/06_models/test/export")
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["format"] in ("onnx", "pt2", "int8")
