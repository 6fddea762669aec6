"""Live curves: what is emitted reaches MLflow, or a file, and never costs the training anything."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_DOES_NOT_EXIST,
)
from mlflow.utils.validation import _validate_metric, _validate_param, _validate_tag

from rdd_pipeline import tracking
from rdd_pipeline.errors import UserError
from rdd_pipeline.tracking import Experiment, Sender, TrackingWriter, addresses
from rdd_pipeline.tracking.__main__ import main
from rdd_pipeline.tracking.addresses import (
    HideSecrets,
    hide_secrets_in_logs,
    remember_secrets,
    without_secrets,
)
from rdd_pipeline.tracking.records import Record, clean_name
from rdd_pipeline.tracking.sender import LOCAL_ID, send_file
from tests.mlflow_store import new_store


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


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def writer(client: FakeClient, tmp_path: Path) -> Iterator[TrackingWriter]:
    writer = _writer(client, tmp_path)
    yield writer
    client.open.set()
    writer.close(1.0)


def _writer(client: FakeClient, folder: Path, **options: Any) -> TrackingWriter:
    options = {"every": 0.01, **options}
    sender = Sender(client.tracking_uri, client)  # type: ignore[arg-type]
    return TrackingWriter(sender, folder / "untracked" / "run.jsonl", **options)


def _spooled(folder: Path) -> list[dict[str, Any]]:
    path = folder / "untracked" / "run.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_emit_without_a_listener_does_nothing() -> None:
    tracking.emit(1, {"loss": 1.0})


def test_emitted_points_reach_the_run(client: FakeClient, writer: TrackingWriter) -> None:
    tracking.listen(lambda step, values, seed: writer.metrics("run", values, step=step))
    for step in (1, 2):
        tracking.emit(step, {"loss": 1.0 / step, "lr": 0.02})
    tracking.listen(None)
    tracking.emit(3, {"loss": 9.0})
    assert writer.flush(5.0)
    assert client.points() == [("loss", 1.0, 1), ("lr", 0.02, 1), ("loss", 0.5, 2), ("lr", 0.02, 2)]


def test_listeners_belong_to_a_thread(client: FakeClient, writer: TrackingWriter) -> None:
    def train(run_id: str) -> None:
        tracking.listen(lambda step, values, seed: writer.metrics(run_id, values, step=step))
        time.sleep(0.01)
        tracking.emit(1, {"loss": float(len(run_id))})

    threads = [threading.Thread(target=train, args=(run_id,)) for run_id in ("a", "bb")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracking.emit(1, {"loss": 0.0})
    assert writer.flush(5.0)
    assert client.points("a") == [("loss", 1.0, 1)]
    assert client.points("bb") == [("loss", 2.0, 1)]


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
    assert writer.flush(10.0)
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
    assert writer.flush(5.0)
    assert [name for name, _, _ in client.requests] == ["batch", "artifact", "batch", "status"]


def test_folders_are_uploaded_whole(
    client: FakeClient, writer: TrackingWriter, tmp_path: Path
) -> None:
    writer.artifact("run", tmp_path, "figures")
    assert writer.flush(5.0)
    assert client.requests == [("artifacts", "run", (str(tmp_path), "figures"))]


def test_names_are_made_fit_for_mlflow(client: FakeClient, writer: TrackingWriter) -> None:
    writer.metrics("run", {"iou@50% (car)": 1.0})
    assert writer.flush(5.0)
    assert client.points() == [("iou_x40_50_x25_ _x28_car_x29_", 1.0, 0)]
    assert len(clean_name("x" * 300)) == 250


ORDINARY = [
    "val.iou.road",
    "aux/loss",
    "seed_1.val.miou",
    "Straße nass",
    "a_x",
    "_x2",
    "deep_xception41",
]
ODD = [
    *("road (wet)", "road [wet]", "road {wet}", "road _wet_", "road _x28_wet_x29_", "_x28_", "("),
    *("(x28_", "_x28(", "_x5f_x28_", "_(x28_", "__x28_", "/a", "a/", "a//b", "a/./b", "a/../b"),
    *(
        ".",
        "..",
        "../a",
        "a_x2f_b",
        "x=1,",
        "a:b",
        "😀",
        "_x1f600_",
        "é",
        "e\u0301",
        "a\tb",
        "a\nb",
    ),
    *("x" * 300, "x" * 299 + "y", "(" * 50, "(" * 49 + "["),
]


def test_every_name_gets_one_of_its_own_and_ordinary_ones_stay() -> None:
    assert [clean_name(name) for name in ORDINARY] == ORDINARY
    names = {*ORDINARY, *ODD}
    written = [clean_name(name) for name in names]
    assert len(set(written)) == len(names)
    for name in written:  # by MLflow's own rules
        _validate_metric(name, 0.0, 0, 0)
        _validate_param(name, "")
        _validate_tag(name, "")


def test_no_two_of_all_short_names_share_one() -> None:
    """All names of up to six characters over an alphabet in which escapes can be written."""
    names = ["".join(word) for n in range(1, 7) for word in product("_x28(", repeat=n)]
    assert len({clean_name(name) for name in names}) == len(names)


def test_a_server_that_is_away_keeps_nobody_waiting_and_gets_everything_later(
    client: FakeClient, writer: TrackingWriter, caplog: pytest.LogCaptureFixture
) -> None:
    client.problem = ConnectionError("refused")
    with caplog.at_level(logging.INFO, logger="rdd_pipeline"):
        writer.metrics("run", {"loss": 1.0}, step=1)
        assert not writer.flush(5.0)
        start = time.monotonic()
        writer.metrics("run", {"loss": 2.0}, step=2)
        assert not writer.flush(5.0)
        assert time.monotonic() - start < 1.0
        client.problem = None
        deadline = time.monotonic() + 10
        while not writer.flush(0.1) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert client.points() == [("loss", 1.0, 1), ("loss", 2.0, 2)]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "cannot be reached" in warnings[0].message
    assert "can be reached again" in caplog.text


def test_what_was_never_sent_is_in_a_file_and_one_line_says_so(
    client: FakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = _writer(client, tmp_path)
    client.problem = ConnectionError("refused")
    for step in range(3):
        writer.metrics("run", {"loss": 1.0}, step=step)
    writer.status("run", "FINISHED")
    with caplog.at_level(logging.WARNING):
        assert writer.close(5.0) == 4
    about, *records = _spooled(tmp_path)
    assert about == {"tracking_uri": "http://server:5000"}
    assert [record["step"] for record in records if record["kind"] == "metric"] == [0, 1, 2]
    assert records[-1]["value"] == "FINISHED"
    lines = [r for r in caplog.records if "did not take 4 records" in r.getMessage()]
    assert len(lines) == 1


def test_a_server_that_hangs_costs_no_more_than_the_timeouts(
    client: FakeClient, tmp_path: Path
) -> None:
    writer = _writer(client, tmp_path)
    client.open.clear()
    writer.metrics("run", {"loss": 1.0})
    start = time.monotonic()
    assert not writer.flush(0.1)
    assert writer.close(0.1) == 1
    assert time.monotonic() - start < 2.0
    client.open.set()
    assert len(_spooled(tmp_path)) == 2


def test_nothing_is_written_when_everything_was_sent(client: FakeClient, tmp_path: Path) -> None:
    writer = _writer(client, tmp_path, every=60.0)
    writer.metrics("run", {"loss": 1.0})
    assert writer.close(5.0) == 0
    assert client.points() == [("loss", 1.0, 0)]
    assert not (tmp_path / "untracked").exists()


def test_a_record_that_mlflow_refuses_does_not_hold_up_the_others(
    client: FakeClient, tmp_path: Path
) -> None:
    writer = _writer(client, tmp_path, every=60.0)
    client.refuses = {"bad"}
    for step in range(4):
        writer.metrics("run", {"good": 1.0, "bad": 2.0}, step=step)
    assert writer.close(5.0) == 4
    assert client.points() == [("good", 1.0, step) for step in range(4)]
    assert {record["key"] for record in _spooled(tmp_path)[1:]} == {"bad"}


def test_a_deleted_run_does_not_cost_a_request_for_each_point(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def gone(*arguments: Any, **named: Any) -> None:
        attempts.append(1)
        raise MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)

    monkeypatch.setattr(client, "log_batch", gone)
    writer = _writer(client, tmp_path, every=60.0)
    for step in range(500):
        writer.metrics("run", {"loss": 1.0}, step=step)
    assert writer.close(5.0) == 500
    assert len(attempts) < 10


def test_memory_is_bounded_and_the_excess_goes_to_the_file(
    client: FakeClient, tmp_path: Path
) -> None:
    writer = _writer(client, tmp_path, capacity=10)
    client.open.clear()
    for step in range(100):
        writer.metrics("run", {"loss": 1.0}, step=step)
    assert len(_spooled(tmp_path)) > 60
    client.open.set()
    sent = 100 - writer.close(5.0)
    steps = {record["step"] for record in _spooled(tmp_path)[1:]}
    assert len(client.points()) == sent
    assert steps | {step for _, _, step in client.points()} == set(range(100))


def test_a_forked_process_leaves_the_writer_alone(
    client: FakeClient, writer: TrackingWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    writer.metrics("run", {"loss": 1.0})
    assert writer.flush(5.0)
    assert writer.close(5.0) == 0
    assert client.requests == []


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:secret@host/x", "https://host/x"),
        ("http://alice:s3cr@t-pw@127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://alice:p/w@x@host:5000/a", "http://host:5000/a"),
        ("http://alice:p?w#x y'z@host", "http://host"),
        ("https://t0ken@host", "https://host"),
        ("https://host:5000/path", "https://host:5000/path"),
        ("https://host/page?q=me@x.org", "https://host/page?q=***"),
        ("http://u:p@[::1]:5000", "http://[::1]:5000"),
        ("http://[::1]:5000/x", "http://[::1]:5000/x"),
        ("postgresql+psycopg2://u:a@b:c@db:5432/ml", "postgresql+psycopg2://db:5432/ml"),
        ("postgresql://db/ml?user=u&password=p&sslmode=require",
         "postgresql://db/ml?user=***&password=***&sslmode=require"),
        ("mssql+pyodbc://u:p@dsn/?odbc_connect=UID%3Du", "mssql+pyodbc://dsn/?odbc_connect=***"),
        ("sqlite:////some/fol@der/ml.db", "sqlite:////some/fol@der/ml.db"),
        ("sqlite:///ml.db", "sqlite:///ml.db"),
        ("file:///home/me@x/mlruns", "file:///home/me@x/mlruns"),
        ("databricks://profile", "databricks://profile"),
        ("databricks://token:dapi12@adb.net", "databricks://adb.net"),
        ("databricks", "databricks"),
        ("/some/folder", "/some/folder"),
    ],
)  # fmt: skip
def test_addresses_are_shown_without_secrets(address: str, shown: str) -> None:
    assert without_secrets(address) == shown
    if " " not in address:
        assert without_secrets(f"'{address}' is away") == f"'{shown}' is away"
        assert without_secrets(shown) == shown


@pytest.fixture
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_secrets", set())


@pytest.mark.usefixtures("no_secrets")
def test_secrets_are_hidden_without_their_address_too(caplog: pytest.LogCaptureFixture) -> None:
    remember_secrets("http://alice:s3cr@t-pw%21@host?token=abc123")
    pieces = "Host 't-pw%21@host', auth ('alice', 's3cr@t-pw!'), token abc123"
    for secret in ("t-pw", "s3cr", "abc123"):
        assert secret not in without_secrets(pieces)
    logging.getLogger().addHandler(caplog.handler)
    caplog.handler.addFilter(HideSecrets())
    try:
        hide_secrets_in_logs()
        logging.getLogger("any.library").warning("cannot reach %s", "http://u:other@host/x")
    finally:
        caplog.handler.filters.clear()
    assert "cannot reach http://host/x" in caplog.text
    assert "other" not in caplog.text


@pytest.mark.usefixtures("no_secrets")
def test_unsent_records_hold_no_secret_and_are_sent_with_the_login_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://alice:s3cr@t-pw@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    file = tmp_path / "unsent.jsonl"
    away = FakeClient()
    away.problem = ConnectionError(f"{address}/api: t-pw@127.0.0.1 is away")
    writer = TrackingWriter(Sender(address, away), file, every=0.01)  # type: ignore[arg-type]
    run = writer.start("run", Experiment("x"), {"error": f"refused by {address}"})
    writer.params(run, {"uri": address})
    assert writer.close(1.0)
    text = file.read_text()
    assert "t-pw" not in text
    assert "alice" not in text
    used: list[str] = []
    monkeypatch.setattr(Sender, "send", lambda self, batch: used.append(self.tracking_uri) or [])
    assert send_file(file) == 0
    assert set(used) == {address}


# ---- against MLflow itself


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def run(database: str) -> tuple[MlflowClient, str]:
    client = MlflowClient(tracking_uri=database)
    return client, client.create_run("0").info.run_id


def _history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


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
    assert _history(client, run_id, "loss") == [(1, 0.5), (2, 0.25)]
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
    writer = _writer(fake, tmp_path)
    writer.metrics("run", {"loss": 1.0}, step=1)
    assert writer.flush(5.0)
    path.unlink()
    # sqlite's open connection would go on writing into the deleted file without an error.
    writer.metrics("run", {"loss": 2.0}, step=2)
    assert writer.close(5.0) == 1
    assert _spooled(tmp_path)[1]["step"] == 2


def test_a_file_of_unsent_records_can_be_sent_later(
    run: tuple[MlflowClient, str],
    database: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client, run_id = run
    away = FakeClient()
    away.tracking_uri = database
    away.problem = ConnectionError("away")
    writer = _writer(away, tmp_path)
    writer.metrics(run_id, {"loss": 0.5}, step=1)
    writer.params(run_id, {"lr": 1})
    writer.status(run_id, "FINISHED")
    assert writer.close(5.0) == 3
    path = tmp_path / "untracked" / "run.jsonl"
    assert main([str(path.parent)]) == 0
    assert "sent" in capsys.readouterr().out
    assert not path.exists()
    assert _history(client, run_id, "loss") == [(1, 0.5)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="is no file of unsent MLflow records"):
        send_file(path)


def test_a_file_that_a_killed_process_left_half_written_is_sent_up_to_there(
    run: tuple[MlflowClient, str],
    database: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, run_id = run
    away = FakeClient()
    away.tracking_uri = database
    away.problem = ConnectionError("away")
    writer = _writer(away, tmp_path)
    for step in (1, 2):
        writer.metrics(run_id, {"loss": 0.5}, step=step)
    assert writer.close(5.0) == 2
    path = tmp_path / "untracked" / "run.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert main([str(path)]) == 0
    assert "ends in the middle of a record" in caplog.text
    assert _history(client, run_id, "loss") == [(1, 0.5)]


def test_sending_while_mlflow_is_away_is_one_line_and_leaves_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.jsonl"
    lines = [
        {"tracking_uri": "http://127.0.0.1:1"},
        {"run_id": "run", "kind": "metric", "key": "loss", "value": 1.0, "step": 1},
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(content)
    with pytest.raises(SystemExit) as status:
        main([str(tmp_path)])
    assert status.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: MLflow at http://127.0.0.1:1 cannot be reached (")
    assert "stays as it is" in line
    assert path.read_text() == content


def test_refused_records_keep_the_address_they_were_meant_for(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.jsonl"
    lines = [
        {"tracking_uri": "http://server:5000"},
        {"run_id": "gone", "kind": "tag", "key": "a", "value": "b", "step": 0, "timestamp": 0},
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(content)
    assert main([str(path), "--tracking-uri", database]) == 1
    assert "1 records refused" in capsys.readouterr().out
    assert path.read_text() == content


def test_an_empty_folder_has_nothing_to_send(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"Nothing to send in {tmp_path}.\n"


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main([str(tmp_path / "missing")])
    assert status.value.code == 1
    assert "Error: There is no file or folder" in capsys.readouterr().err


# ---- runs that MLflow is asked for

PLACE = Experiment("late")


def _runs(client: MlflowClient, experiment: str = "late") -> dict[str, Run]:
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found is not None else []
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {str(run.info.run_name): run for run in runs}


def _family(writer: TrackingWriter) -> None:
    """A run with a child, a point and an end each."""
    parent = writer.start("whole", PLACE, {"dataset": "scenes"})
    child = writer.start("kd", PLACE, {"method": "kd"}, parent=parent)
    for run_id in (child, parent):
        writer.metrics(run_id, {"loss": 0.5}, step=1)
        writer.status(run_id, "FINISHED")


def _check_family(client: MlflowClient) -> None:
    runs = _runs(client)
    assert set(runs) == {"whole", "kd"}
    assert runs["whole"].data.tags["dataset"] == "scenes"
    assert runs["kd"].data.tags["method"] == "kd"
    assert runs["kd"].data.tags["mlflow.parentRunId"] == runs["whole"].info.run_id
    for run in runs.values():
        assert _history(client, run.info.run_id, "loss") == [(1, 0.5)]
        assert run.info.status == "FINISHED"


def test_runs_are_created_in_the_background(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    writer = TrackingWriter(Sender(str(client.tracking_uri)), tmp_path / "x.jsonl")
    with caplog.at_level(logging.INFO):
        _family(writer)
        assert writer.close() == 0
    _check_family(client)
    (run_id,) = (run.info.run_id for name, run in _runs(client).items() if name == "whole")
    assert f"MLflow run {run_id} in experiment late" in caplog.text
    assert caplog.text.count("MLflow run") == 1


def test_runs_that_could_not_be_created_are_created_when_they_are_sent(tmp_path: Path) -> None:
    away = FakeClient()
    away.problem = ConnectionError("away")
    writer = _writer(away, tmp_path)
    _family(writer)
    assert writer.close(5.0) == 6
    uri = new_store(tmp_path / "mlflow.db")
    assert main([str(tmp_path / "untracked"), "--tracking-uri", uri]) == 0
    assert not list((tmp_path / "untracked").iterdir())
    _check_family(MlflowClient(tracking_uri=uri))


def test_a_run_is_created_once_although_its_first_answer_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    create, calls = client.create_run, []

    def deaf(*arguments: Any) -> Any:
        calls.append(create(*arguments))
        if len(calls) == 1:
            raise ConnectionError("the answer was lost")
        return calls[-1]

    monkeypatch.setattr(client, "create_run", deaf)
    sender = Sender(str(client.tracking_uri), client)
    writer = TrackingWriter(sender, tmp_path / "x.jsonl", every=0.01)
    _family(writer)
    deadline = time.monotonic() + 20
    while not writer.flush(1.0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert writer.close() == 0
    assert len(calls) == 2
    _check_family(client)


def test_a_file_that_was_half_sent_is_sent_again_without_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = FakeClient()
    away.problem = ConnectionError("away")
    writer = _writer(away, tmp_path)
    _family(writer)
    writer.close(5.0)
    (path,) = (tmp_path / "untracked").iterdir()
    uri = new_store(tmp_path / "mlflow.db")

    def refuse(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("away again")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuse)
        with pytest.raises(UserError, match="away again"):
            send_file(path, uri)
    client = MlflowClient(tracking_uri=uri)
    assert set(_runs(client)) == {"whole", "kd"}
    assert send_file(path, uri) == 0
    _check_family(client)


def test_what_a_refused_run_should_have_taken_is_kept_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))

    def refuse(*arguments: Any) -> None:
        raise MlflowException("not you", PERMISSION_DENIED)

    with monkeypatch.context() as patch:
        patch.setattr(client, "create_run", refuse)
        writer = TrackingWriter(Sender(str(client.tracking_uri), client), tmp_path / "x.jsonl")
        _family(writer)
        assert writer.close() == 6
    assert send_file(tmp_path / "x.jsonl") == 0
    _check_family(client)


def test_the_creation_of_a_run_stays_in_memory_when_there_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    sender = Sender(str(client.tracking_uri), client)
    writer = TrackingWriter(sender, tmp_path / "x.jsonl", capacity=10, every=60.0)
    send, gate = sender.send, threading.Event()

    def send_when_open(batch: Sequence[Record]) -> list[Record]:
        gate.wait(30)
        return send(batch)

    monkeypatch.setattr(sender, "send", send_when_open)
    run_id = writer.start("whole", PLACE, {})
    for step in range(1, 101):
        writer.metrics(run_id, {"loss": 1.0}, step=step)
    gate.set()
    unsent = writer.close()
    assert unsent > 60
    assert send_file(tmp_path / "x.jsonl") == 0
    run = _runs(client)["whole"]
    steps = [step for step, _ in _history(client, run.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, 101))


def test_an_experiment_in_the_bin_is_restored(tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    client.delete_experiment(client.create_experiment("late"))
    writer = TrackingWriter(Sender(str(client.tracking_uri), client), tmp_path / "x.jsonl")
    _family(writer)
    assert writer.close() == 0
    assert client.get_experiment_by_name("late").lifecycle_stage == "active"
    _check_family(client)


def test_a_new_experiment_keeps_its_files_where_it_was_told(tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    place = (tmp_path / "files").as_uri()
    writer = TrackingWriter(Sender(str(client.tracking_uri), client), tmp_path / "x.jsonl")
    writer.start("whole", Experiment("new", place), {})
    assert writer.close() == 0
    assert client.get_experiment_by_name("new").artifact_location == place
    assert LOCAL_ID in _runs(client, "new")["whole"].data.tags
