"""`kedro run` with one teacher for all students, against runs that train them one by one."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from mlflow import MlflowClient

from rdd_pipeline import tracking
from rdd_pipeline.errors import RunInterrupted
from rdd_pipeline.networks import load_checkpoint
from rdd_pipeline.training.step import Teacher
from tests.equal import equal
from tests.kedro_project import Project, bootstrap
from tests.mlflow_store import new_store

SHARED = {"trainer": {"share_teacher": True}}
PIPELINES = ("distill_baselines", "distill_tse")
METHODS = ("kd", "skd", "cirkd", "mgd", "tse")
OUTPUTS = [f"metrics_{name}" for name in METHODS]


@pytest.fixture
def client(tmp_path, monkeypatch) -> MlflowClient:
    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    bootstrap()
    return MlflowClient(tracking_uri=uri)


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Sizes of the batches that the teacher has computed."""
    sizes, ask = [], Teacher._ask

    def counting(self, images):
        sizes.append(len(images))
        return ask(self, images)

    monkeypatch.setattr(Teacher, "_ask", counting)
    return sizes


def _weights(project: Project, method: str):
    return load_checkpoint(project.newest(f"06_models/test/student_{method}/0.safetensors")).tensors


def _stop_at_three(step, values, *, seed=None, method=None):
    if step == 3 and method == "skd":
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_students_have_the_weights_of_separate_runs(tmp_path, client, asked, monkeypatch):
    """Four baselines and RDD with its two stages, stopped once on their way."""
    alone, together = Project(tmp_path / "alone"), Project(tmp_path / "together")
    alone.folder.mkdir()
    alone.run(*PIPELINES, to_outputs=OUTPUTS)
    assert asked == [2] * 6 * 5
    asked.clear()
    shutil.copytree(alone.folder / "data/01_raw", together.folder / "data/01_raw")
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "log_metrics", _stop_at_three)
        with pytest.raises(RunInterrupted, match="group of 5 students"):
            together.run(*PIPELINES, to_outputs=OUTPUTS, params=SHARED)
    together.run(*PIPELINES, to_outputs=OUTPUTS, params=SHARED)
    assert asked == [2] * 6
    for method in (*METHODS, "tfe"):
        assert equal(_weights(together, method), _weights(alone, method)), method
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    for method in ("kd", "cirkd", "tse"):
        done = [
            r for r in runs if (r.data.tags.get("method"), r.info.status) == (method, "FINISHED")
        ]
        assert len(done) == 2
        assert len({run.data.metrics["loss"] for run in done}) == 1

    asked.clear()
    options = {"namespaces": ["kd", "at"], "params": {"seed": 1, **SHARED}}
    together.run("distill_baselines", **options)
    assert asked == [2] * 6
    assert together.newest("06_models/test/student_at/1.safetensors")
