"""Sessions without MLflow, or killed: what they have recorded is sent later."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from typing import Any

import pytest
from kedro_mlflow.config.kedro_mlflow_config import KedroMlflowConfig
from mlflow import MlflowClient

from rdd_pipeline.hooks import experiment
from rdd_pipeline.tracking.__main__ import main as tracking_command
from tests import warm
from tests.hooks.project import Project


def _wait_for_the_run(project: Project) -> None:
    deadline = time.monotonic() + 20
    while not project.runs() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_database_that_goes_away_does_not_stop_the_training(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    def go_away() -> None:
        _wait_for_the_run(project)
        (project.path / "mlflow.db").unlink()

    with caplog.at_level(logging.WARNING):
        project.run("kd", after_start=go_away)
    assert len(list((project.path / "data" / "metrics").rglob("kd.json"))) == 2
    (file,) = (project.path / "data/07_model_output/untracked").glob("*.jsonl")
    assert '"loss"' in file.read_text()
    assert "was deleted or replaced" in caplog.text
    assert f"python -m rdd_pipeline.tracking {os.path.relpath(file)}" in caplog.text


def test_a_child_that_cannot_be_made_is_made_when_its_records_are_sent(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("away")

    def go_away() -> None:
        _wait_for_the_run(project)
        patch.setattr(MlflowClient, "create_run", refuse)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        project.run("kd", "cwd", after_start=go_away)
    assert set(project.runs()) == {"small"}
    assert tracking_command([str(project.path / "data/07_model_output/untracked")]) == 0
    runs = project.runs()
    assert set(runs) == {"small", "kd", "cwd"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["cwd"].data.tags["mlflow.parentRunId"] == runs["small"].info.run_id
    assert project.curve(runs["kd"]) == [1.0, 0.5]
    assert runs["cwd"].data.params["train.epochs"] == "3"


def test_without_a_server_the_run_goes_on_and_can_be_sent_elsewhere(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="rdd_pipeline"):
        project.run("kd")
    assert time.monotonic() - start < 20
    assert (project.path / "data" / "metrics" / "kd.json").exists()
    first, last = [
        record.getMessage() for record in caplog.records if record.name.startswith("rdd_pipeline")
    ]
    assert f"MLflow at http://127.0.0.1:{port} cannot be used" in first
    (file,) = (project.path / "data/07_model_output/untracked").glob("*.jsonl")
    assert file.name.endswith("-small.jsonl")
    assert f"Send them later: python -m rdd_pipeline.tracking {os.path.relpath(file)}" in last
    assert "secret" not in caplog.text + file.read_text()
    assert project.runs() == {}
    assert tracking_command([str(file), "--tracking-uri", project.uri]) == 0
    (run,) = project.runs().values()
    assert run.data.tags["method"] == "kd"
    assert run.data.tags["data_digest"] == "abc"
    assert project.curve(run) == [1.0, 0.5]
    assert run.info.status == "FINISHED"


def test_a_server_that_starts_late_gets_the_run_all_the_same(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any) -> None:
        raise ConnectionError("not yet")

    monkeypatch.setattr(KedroMlflowConfig, "setup", away)
    project.run("kd", "cwd")
    runs = project.runs()
    assert set(runs) == {"small", "kd", "cwd"}
    client = MlflowClient(tracking_uri=project.uri)
    assert client.get_experiment_by_name("rdd_scenes") is not None
    location = str(runs["kd"].info.artifact_uri)
    assert location.startswith((project.path / "mlartifacts").as_uri())


def test_a_server_that_never_finishes_its_answer_delays_the_start_only_so_long(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    monkeypatch.setattr(experiment, "START_SECONDS", 0.2)
    monkeypatch.setattr(KedroMlflowConfig, "setup", lambda *_: released.wait(60))
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="rdd_pipeline"):
        project.run("kd")
    released.set()
    assert time.monotonic() - start < 30
    assert "cannot be used (TimeoutError: no answer in 0 s)" in caplog.text
    assert project.curve(project.runs()["small"]) == [1.0, 0.5]


KILLED = """
import sys
from pathlib import Path
from kedro_mlflow.config.kedro_mlflow_config import KedroMlflowConfig
from rdd_pipeline.tracking import Sender
from tests.hooks.project import Project

def refuse(*arguments):
    raise ConnectionError("away")

if sys.argv[2] == "away":
    KedroMlflowConfig.setup = Sender._request = refuse
fault = {"kd": {"train": {"fault": "SIGKILL"}}}
Project(Path(sys.argv[1])).run("kd", "cwd", params=fault)
"""


@pytest.mark.parametrize(("mlflow", "sender"), [("there", "next run"), ("away", "command")])
def test_a_killed_run_loses_nothing_and_is_ended(
    project: Project, mlflow: str, sender: str
) -> None:
    words = ["-c", KILLED, str(project.path), mlflow]
    done = warm.run(words, cwd=warm.ROOT, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    unsent = project.path / "data/07_model_output/untracked"
    assert len(list(unsent.glob("*.jsonl"))) == 1
    if sender == "command":
        assert project.runs() == {}
        assert tracking_command([str(unsent)]) == 0
    else:
        project.run("dist")
        deadline = time.monotonic() + 60
        while list(unsent.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not list(unsent.iterdir())
    runs = project.runs()
    assert project.curve(runs["cwd"]) == [1.0, 0.5, 1.0 / 3]  # all of it, before the kill
    assert runs["cwd"].data.metrics["test.miou"] == 0.5
    assert project.curve(runs["kd"]) == [1.0, 0.5]
    assert runs["cwd"].info.status == runs["kd"].info.status == "KILLED"
    assert runs["kd"].data.tags["data_digest"] == "abc"
    client = MlflowClient(tracking_uri=project.uri)
    parent = client.get_run(runs["kd"].data.tags["mlflow.parentRunId"])
    assert parent.info.status == "KILLED"
    assert parent.data.tags["error"] == "the process died"
    if sender == "next run":
        assert runs["small"].info.status == "FINISHED"
        assert project.curve(runs["small"]) == [1.0, 0.5]
