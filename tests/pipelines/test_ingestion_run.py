"""`kedro run --pipeline=data_ingestion` on one's own folder: bad images, report, packed cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from rdd_pipeline.errors import DataProblem, UserError
from tests.kedro_project import Project, bootstrap
from tests.mlflow_store import new_store


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        uri = new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        bootstrap()
        yield MlflowClient(tracking_uri=uri)


@pytest.fixture
def images(tmp_path) -> Path:
    root = tmp_path / "my images"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(3):
            for folder, shape in ((split, (20, 30, 3)), (f"{split}annot", (20, 30))):
                (root / folder).mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 12, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return root


def _newest(client: MlflowClient):
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, order_by=["attributes.start_time DESC"])[0]


def test_bad_images_stop_the_run_after_the_report_or_are_left_out(tmp_path, images, client):
    path = images / "train" / "1.png"
    path.write_bytes(path.read_bytes()[:80])
    project = Project(tmp_path / "project")
    data: dict[str, Any] = {"layout": "camvid", "path": str(images)}
    with pytest.raises(DataProblem, match=r"1 problem with .*my images[^$]*train/1\.png cannot"):
        project.run("data_ingestion", params={"data": data})
    report = tmp_path / "project/data/08_reporting/test/ingestion_report.html"
    assert "train/1.png cannot be decoded" in report.read_text(encoding="utf-8")
    stopped = _newest(client)
    assert stopped.info.status == "FAILED"
    assert "ingestion_report.html" in [
        Path(artifact.path).name for artifact in client.list_artifacts(stopped.info.run_id, "data")
    ]

    project.run("data_ingestion", params={"data": {**data, "on_problem": "quarantine"}})
    assert "were left out" in report.read_text(encoding="utf-8")
    assert _newest(client).data.tags["image_problems"] == "1"
    place = tmp_path / "project/data/02_intermediate/test"
    packed = json.loads((place / "packed_images.json").read_text())
    assert list(packed["splits"]) == ["train", "val"]
    assert (Path(packed["folder"]) / packed["splits"]["train"]["file"]).is_file()
    assert (place / "index.csv").read_text().count("train/") == 2


def test_a_run_that_begins_after_ingestion_needs_the_images_of_its_parameters(tmp_path, client):
    project = Project(tmp_path)
    later = {"from_nodes": ["teacher.import_weights"], "to_nodes": ["teacher.check_networks"]}
    with pytest.raises(UserError, match=r"No images have been ingested yet .* data_ingestion"):
        project.run("train_teacher", **later)
    project.run("data_ingestion")
    project.run("train_teacher", params={"data": {"workers": 2}}, **later)
    with pytest.raises(UserError, match=r"not been ingested with these .*\(data\.bits is 12, was"):
        project.run("train_teacher", params={"data": {"bits": 12}}, **later)
