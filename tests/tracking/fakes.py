"""An MLflow that behaves as badly as it is told, and what a test asks a file or a store."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from rdd_pipeline.tracking import Sender, TrackingWriter
from rdd_pipeline.tracking.journal import _fields


class FakeClient:
    """Takes what it is given, or behaves as badly as it is told."""

    tracking_uri = "http://someone:secret@server:5000"

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.problem: Exception | None = None
        self.refuses: set[str] = set()
        self.open = threading.Event()
        self.open.set()

    def _request(self, name: str, run_id: str, content: Any) -> None:
        self.open.wait(30)
        if self.problem is not None:
            raise self.problem
        self.requests.append((name, run_id, content))

    def log_batch(
        self, run_id: str, metrics: list[Any], params: list[Any], tags: list[Any]
    ) -> None:
        bad = self.refuses & {item.key for item in (*metrics, *params, *tags)}
        if bad:
            raise MlflowException(f"cannot take {bad}", INVALID_PARAMETER_VALUE)
        self._request("batch", run_id, (metrics, params, tags))

    def get_run(self, run_id: str) -> SimpleNamespace:
        return SimpleNamespace(info=SimpleNamespace(status="FINISHED", lifecycle_stage="active"))

    def get_experiment_by_name(self, name: str) -> None:
        self._request("experiment", "", name)

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self._request("status", run_id, status)

    def log_artifact(self, run_id: str, path: str, folder: str) -> None:
        self._request("artifact", run_id, (path, folder))

    def log_artifacts(self, run_id: str, path: str, folder: str) -> None:
        self._request("artifacts", run_id, (path, folder))

    def points(self, run_id: str = "run") -> list[tuple[str, float, int]]:
        return [
            (metric.key, metric.value, metric.step)
            for name, run, content in self.requests
            if name == "batch" and run == run_id
            for metric in content[0]
        ]


def new_writer(client: FakeClient, folder: Path, **options: Any) -> TrackingWriter:
    sender = Sender(client.tracking_uri, client)  # type: ignore[arg-type]
    options = {"every": 0.01, **options}
    return TrackingWriter(sender, folder / "untracked" / "run.jsonl", **options)


def sent(writer: TrackingWriter, seconds: float = 10.0) -> bool:
    """Whether MLflow has been offered everything, in this time."""
    deadline = time.monotonic() + seconds
    journal = writer._journal
    while journal.sent.offset < journal.size and time.monotonic() < deadline:
        time.sleep(0.005)
    return journal.sent.offset == journal.size


def unsent(folder: Path) -> list[dict[str, Any]]:
    """First line of the file, then the records that MLflow was not offered or has refused."""
    path = folder / "untracked" / "run.jsonl"
    if not path.exists():
        return []
    content = path.read_bytes()
    header = content.splitlines(keepends=True)[0]
    sent = path.with_name("run.jsonl.sent")
    state = json.loads(sent.read_text()) if sent.exists() else {"offset": len(header)}
    lines = [content[start:].splitlines()[0] for start in state.get("refused", ())]
    lines += content[state["offset"] :].splitlines()
    return [_fields(line) for line in (header, *lines)]


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
