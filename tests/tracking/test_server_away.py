"""An MLflow server that is killed, or hangs, in the middle of a run: nothing of the run is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rdd_pipeline.tracking import TrackingWriter
from rdd_pipeline.tracking.__main__ import main
from tests.kedro_project import Project, bootstrap
from tests.mlflow_store import new_store

pytestmark = pytest.mark.slow

ITERATIONS = 60
KILLED_AT = 20


class Server:
    """`mlflow server` on loopback, with a database that outlives it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._store = new_store(folder / "mlflow.db")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
                *("--port", str(self.port), "--workers", "1", "--backend-store-uri", self._store),
            ],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # it has children, which share its process group
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.2)

    def signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_run_ends_without_its_server_and_all_of_it_can_be_sent_later(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = TrackingWriter.metrics

    def take_until(writer: TrackingWriter, run_id: str, values, *, step: int = 0) -> None:
        take(writer, run_id, values, step=step)
        if step == KILLED_AT and "loss" in values:
            server.signal(signal.Signals[name])

    monkeypatch.setattr(TrackingWriter, "metrics", take_until)
    bootstrap()
    project = Project(tmp_path / "project")
    project.folder.mkdir()
    recipe = {"iterations": ITERATIONS, "validate_every": 30}
    project.run("train_teacher", params={"teacher_recipe": recipe})  # raises nothing

    assert project.newest("06_models/test/teacher/0.safetensors").exists()
    unsent = project.folder / "data/07_model_output/untracked"
    assert list(unsent.glob("*.jsonl"))
    if name == "SIGKILL":
        with pytest.raises(SystemExit) as status:
            main([str(unsent)])
        assert status.value.code == 1
        server.kill()
        server.start()
    else:
        server.signal(signal.SIGCONT)
    assert main([str(unsent)]) == 0
    assert not list(unsent.iterdir())

    client = MlflowClient(tracking_uri=server.uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (run,) = (run for run in runs if "loss" in run.data.metrics)
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, ITERATIONS + 1))
    assert {run.info.status for run in runs} == {"FINISHED"}
