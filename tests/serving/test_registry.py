"""Networks in MLflow's registry: logged once, without a pickle, the best one by its alias."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from numpy.testing import assert_array_equal

import rdd_pipeline
from rdd_pipeline.tracking.records import Network, Record, read_record
from rdd_pipeline.tracking.registry import register
from tests.mlflow_store import new_store
from tests.serving.conftest import make_network
from tests.serving.test_loader import IMAGES, TEXTS


class Store:
    """An MLflow database with a run."""

    def __init__(self, folder: Path) -> None:
        self.uri = new_store(folder / "mlflow.db")
        self.client = MlflowClient(self.uri, registry_uri=self.uri)
        place = (folder / "artifacts").as_uri()
        self.run_id = self.client.create_run(self.client.create_experiment("e", place)).info.run_id

    def register(self, path: Path, score: float | None, scored_on: str = "x") -> None:
        network = Network(
            str(path), score, scored_on, {"val.miou": score or 0.0}, {"method": "tse", "seed": "0"}
        )
        record = Record(self.run_id, "model", "scenes", network.written(), timestamp=1)
        register(self.client, self.run_id, read_record(record._asdict()))

    @property
    def versions(self) -> list[str]:
        return sorted(str(v.version) for v in self.client.search_model_versions("name = 'scenes'"))

    @property
    def best(self) -> str:
        return str(self.client.get_model_version_by_alias("scenes", "best").version)


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    store = Store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", store.uri)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    return store


def test_a_network_is_logged_registered_and_loaded_without_a_pickle(store, weights, tmp_path):
    store.register(weights, 0.5)
    version = store.client.get_model_version_by_alias("scenes", "best")
    assert version.run_id == store.run_id
    assert (version.tags["method"], float(version.tags["val_miou"])) == ("tse", 0.5)
    folder = Path(mlflow.artifacts.download_artifacts("models:/scenes@best"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"MLmodel", "requirements.txt", "input_example.json"} <= {p.name for p in files}
    for path in files:
        assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".pyc"), path
        assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05")), path
    model = mlflow.pyfunc.load_model("models:/scenes@best")
    assert_array_equal(model.predict(IMAGES), rdd_pipeline.load(weights)(IMAGES))
    assert_array_equal(np.stack(model.predict(TEXTS)), model.predict(IMAGES))
    assert model.metadata.signature.outputs.input_names() == ["mask"]
    example = model.input_example
    assert model.predict(example).shape == example.shape[:3]
    assert any(line.startswith("torch==") for line in (folder / "requirements.txt").open())
    experiment = store.client.get_run(store.run_id).info.experiment_id
    (logged,) = store.client.search_logged_models([experiment])
    assert logged.source_run_id == store.run_id
    assert {(m.key, m.value) for m in logged.metrics} == {("val.miou", 0.5)}


def test_the_alias_goes_to_the_best_on_val_and_nothing_is_registered_twice(
    store, tmp_path, monkeypatch
):
    # What lies in the folder is the other test's.
    def empty(folder, weights, facts):
        folder.mkdir()
        (folder / "MLmodel").write_text("")

    monkeypatch.setattr("rdd_pipeline.serving.folder.write_model", empty)
    paths = [make_network(tmp_path / f"{seed}.safetensors", seed) for seed in range(4)]
    store.register(paths[0], 0.5)
    store.register(paths[1], 0.4)
    assert (store.versions, store.best) == (["1", "2"], "1")
    store.register(paths[2], 0.6)
    store.register(paths[0], 0.5)
    assert (store.versions, store.best) == (["1", "2", "3"], "3")
    store.register(paths[3], None)
    assert (store.versions, store.best) == (["1", "2", "3", "4"], "3")
    # Scores on other images say nothing about these.
    store.register(paths[1], 0.1, "y")
    assert store.best == "2"


def test_a_network_that_was_removed_is_refused_for_good(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="was removed"):
        store.register(tmp_path / "gone.safetensors", 0.5)


@pytest.mark.parametrize(
    "value",
    ["{}", "[]", '{"path": 3}', Network("a", 0.5, "x", {"m": "no"}, {}).written()],  # type: ignore[dict-item]
)
def test_a_record_that_makes_no_sense_is_told_apart(value):
    with pytest.raises((ValueError, TypeError, KeyError)):
        read_record(Record("r", "model", "scenes", value)._asdict())


@pytest.mark.slow
def test_it_is_served_on_loopback_and_answers_bad_requests_with_400(store, weights):
    store.register(weights, 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": ""}  # the code is that in the model's folder
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/scenes@best"),
            *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
        ],
        env=environment,
        start_new_session=True,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/ping", server)
        url = f"http://127.0.0.1:{port}/invocations"
        expected = rdd_pipeline.load(weights)(IMAGES)
        for request in ({"inputs": IMAGES.tolist()}, {"instances": TEXTS}, {"inputs": TEXTS},
                        {"dataframe_records": [{"image": text} for text in TEXTS]}):  # fmt: skip
            status, answer = _post(url, request)
            assert status == 200, answer
            assert_array_equal(np.array(answer["predictions"]), expected)
        for request, reason in (
            ({"instances": ["no base64!"]}, "is no base64"),
            ({"inputs": [[1, 2], [3, 4]]}, "expected images as an array"),
            ({"dataframe_records": [{"photo": TEXTS[0]}]}, "has the columns"),
            ({"nothing": 1}, "exactly one of the input fields"),
        ):
            status, answer = _post(url, request)
            assert status == 400, answer
            assert reason in answer["message"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(240):
        assert server.poll() is None
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("it did not come up")


def _post(url: str, content: object) -> tuple[int, dict]:
    request = urllib.request.Request(
        url, json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {"message": error.read().decode()}


AT_THE_END = """
import errno, os, sys, threading, time, types
from pathlib import Path
from types import SimpleNamespace
from rdd_pipeline.tracking import registry

writes = threading.Event()

def write_model(place, path, facts):
    (place / "code").mkdir(parents=True)
    writes.set()
    time.sleep(60)

def rmdir(*args, **options):
    raise OSError(errno.ENOTEMPTY, "Directory not empty")  # the thread has written meanwhile

sys.modules["rdd_pipeline.serving.folder"] = types.ModuleType("folder")
sys.modules["rdd_pipeline.serving.folder"].write_model = write_model
client = SimpleNamespace(get_run=lambda run_id: None)
work = [client, "run", SimpleNamespace(facts={}), Path("student.pt"), 0]
threading.Thread(target=registry._logged, args=work, daemon=True).start()
writes.wait()
os.rmdir = rmdir
"""


def test_a_command_ends_quietly_while_a_model_is_written(tmp_path):
    command = [sys.executable, "-c", AT_THE_END]
    place = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=place)
    assert done.returncode == 0
    assert done.stderr == ""
