"""What is written reaches MLflow, or stays in a file, and never costs the training anything."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from rdd_pipeline.tracking import Sender, TrackingWriter
from tests.tracking.fakes import FakeClient, history, new_writer, sent, unsent


def test_points_are_sent_without_being_asked(client: FakeClient, writer: TrackingWriter) -> None:
    writer.metrics("run", {"loss": 1.0})
    deadline = time.monotonic() + 5
    while not client.requests and time.monotonic() < deadline:
        time.sleep(0.005)
    assert client.points() == [("loss", 1.0, 0)]


def test_many_points_go_in_batches_that_mlflow_takes(
    client: FakeClient, writer: TrackingWriter
) -> None:
    client.open.clear()
    for step in range(2500):
        writer.metrics("run", {"loss": 1.0}, step=step)
    writer.params("run", {f"p{number}": number for number in range(250)})
    client.open.set()
    assert sent(writer)
    assert [step for _, _, step in client.points()] == list(range(2500))
    for _, _, (metrics, params, tags) in client.requests:
        assert len(metrics) + len(params) + len(tags) <= 1000
        assert len(params) <= 100
    assert len(client.requests) < 12


def test_order_is_kept_between_kinds(client: FakeClient, writer: TrackingWriter) -> None:
    client.open.clear()
    writer.tags("run", {"a": 1})
    writer.artifact("run", Path("figure.png"), "figures")
    writer.metrics("run", {"loss": 1.0})
    writer.status("run", "FINISHED")
    client.open.set()
    assert sent(writer)
    assert [name for name, _, _ in client.requests] == ["batch", "artifact", "batch", "status"]


def test_folders_are_uploaded_whole(
    client: FakeClient, writer: TrackingWriter, tmp_path: Path
) -> None:
    writer.artifact("run", tmp_path, "figures")
    assert sent(writer)
    assert client.requests == [("artifacts", "run", (str(tmp_path), "figures"))]


def test_a_server_that_is_away_keeps_nobody_waiting_and_gets_everything_later(
    client: FakeClient, writer: TrackingWriter, caplog: pytest.LogCaptureFixture
) -> None:
    client.problem = ConnectionError("refused")
    with caplog.at_level(logging.INFO, logger="rdd_pipeline"):
        writer.metrics("run", {"loss": 1.0}, step=1)
        assert not sent(writer, 0.5)
        start = time.monotonic()
        writer.metrics("run", {"loss": 2.0}, step=2)
        assert time.monotonic() - start < 1.0
        client.problem = None
        assert sent(writer)
        assert writer.close(5.0) == 0
    assert client.points() == [("loss", 1.0, 1), ("loss", 2.0, 2)]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "cannot be reached" in warnings[0].message
    assert "can be reached again" in caplog.text


def test_what_was_never_sent_is_in_a_file_and_one_line_says_so(
    client: FakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = new_writer(client, tmp_path)
    client.problem = ConnectionError("refused")
    for step in range(3):
        writer.metrics("run", {"loss": 1.0}, step=step)
    writer.status("run", "FINISHED")
    with caplog.at_level(logging.WARNING):
        assert writer.close(5.0) == 4
    about, *records = unsent(tmp_path)
    assert about == {"tracking_uri": "http://server:5000"}
    assert [record["step"] for record in records if record["kind"] == "metric"] == [0, 1, 2]
    assert records[-1]["value"] == "FINISHED"
    lines = [r for r in caplog.records if "did not take 4 records" in r.getMessage()]
    assert len(lines) == 1


def test_a_server_that_hangs_costs_no_more_than_the_timeouts(
    client: FakeClient, tmp_path: Path
) -> None:
    writer = new_writer(client, tmp_path)
    client.open.clear()
    writer.metrics("run", {"loss": 1.0})
    start = time.monotonic()
    assert not sent(writer, 0.1)
    assert writer.close(0.1) == 1
    assert time.monotonic() - start < 2.0
    client.open.set()
    assert len(unsent(tmp_path)) == 2


def test_a_file_is_uploaded_as_it_was_although_another_run_writes_it_anew(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[tuple[str, str]] = []

    def upload(run_id: str, path: str, folder: str) -> None:
        client.open.wait(30)
        uploaded.append((Path(path).name, Path(path).read_text()))

    monkeypatch.setattr(client, "log_artifact", upload)
    client.open.clear()
    writer = new_writer(client, tmp_path)
    report = tmp_path / "report.html"
    report.write_text("own")
    writer.artifact("run", report, "data", as_it_is=True)
    report.write_text("another's")
    client.open.set()
    assert writer.close(5.0) == 0
    assert uploaded == [("report.html", "own")]
    assert not list((tmp_path / "untracked").iterdir())


def test_no_file_is_left_when_everything_was_sent(client: FakeClient, tmp_path: Path) -> None:
    writer = new_writer(client, tmp_path, every=60.0)
    writer.metrics("run", {"loss": 1.0})
    assert writer.close(5.0) == 0
    assert client.points() == [("loss", 1.0, 0)]
    assert not list((tmp_path / "untracked").iterdir())


def test_a_record_that_mlflow_refuses_does_not_hold_up_the_others(
    client: FakeClient, tmp_path: Path
) -> None:
    writer = new_writer(client, tmp_path, every=60.0)
    client.refuses = {"bad"}
    for step in range(4):
        writer.metrics("run", {"good": 1.0, "bad": 2.0}, step=step)
    assert writer.close(5.0) == 4
    assert client.points() == [("good", 1.0, step) for step in range(4)]
    assert {record["key"] for record in unsent(tmp_path)[1:]} == {"bad"}


def test_a_deleted_run_does_not_cost_a_request_for_each_point(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def gone(*arguments: Any, **named: Any) -> None:
        attempts.append(1)
        raise MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)

    monkeypatch.setattr(client, "log_batch", gone)
    writer = new_writer(client, tmp_path, every=60.0)
    for step in range(500):
        writer.metrics("run", {"loss": 1.0}, step=step)
    assert writer.close(5.0) == 500
    assert len(attempts) < 10


def test_what_a_hanging_server_does_not_take_is_in_the_file_not_in_memory(
    client: FakeClient, tmp_path: Path
) -> None:
    writer = new_writer(client, tmp_path)
    client.open.clear()
    for step in range(100):
        writer.metrics("run", {"loss": 1.0}, step=step)
    assert {record["step"] for record in unsent(tmp_path)[1:]} == set(range(100))
    client.open.set()
    assert writer.close(5.0) == 0
    assert [step for _, _, step in client.points()] == list(range(100))


def test_a_forked_process_leaves_the_writer_alone(
    client: FakeClient, writer: TrackingWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    writer.metrics("run", {"loss": 1.0})
    assert sent(writer)  # nothing was written
    assert writer.close(5.0) == 0
    assert client.requests == []


def test_mlflow_takes_every_kind(
    run: tuple[MlflowClient, str], database: str, tmp_path: Path
) -> None:
    client, run_id = run
    writer = TrackingWriter(Sender(database, client), tmp_path / "x.jsonl")
    writer.metrics(run_id, {"loss": 0.5, "nan": float("nan"), "inf": float("inf")}, step=1)
    writer.metrics(run_id, {"loss": 0.25}, step=2)
    writer.params(run_id, {"lr": 0.02, "long": "x" * 10_000})
    writer.tags(run_id, {"method": "kd", "long": "x" * 10_000})
    writer.status(run_id, "KILLED")
    assert writer.close() == 0
    found = client.get_run(run_id)
    assert history(client, run_id, "loss") == [(1, 0.5), (2, 0.25)]
    assert found.data.params["lr"] == "0.02"
    assert found.data.tags["method"] == "kd"
    assert found.info.status == "KILLED"


def test_a_second_value_of_a_param_is_refused_and_kept(
    run: tuple[MlflowClient, str], database: str, tmp_path: Path
) -> None:
    client, run_id = run
    writer = TrackingWriter(Sender(database, client), tmp_path / "x.jsonl")
    writer.params(run_id, {"lr": 1})
    writer.params(run_id, {"lr": 2, "batch": 3})
    assert writer.close() == 1
    assert client.get_run(run_id).data.params == {"lr": "1", "batch": "3"}


def test_a_deleted_database_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.touch()
    fake = FakeClient()
    fake.tracking_uri = f"sqlite:///{path}"
    writer = new_writer(fake, tmp_path)
    writer.metrics("run", {"loss": 1.0}, step=1)
    assert sent(writer)
    path.unlink()
    # sqlite's open connection would go on writing into the deleted file without an error.
    writer.metrics("run", {"loss": 2.0}, step=2)
    assert writer.close(5.0) == 1
    assert unsent(tmp_path)[1]["step"] == 2
