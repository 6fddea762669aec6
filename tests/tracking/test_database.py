"""The local database is whole or not there; one that cannot be used costs no record."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rdd_pipeline.tracking import Experiment, Sender, TrackingWriter, database
from rdd_pipeline.tracking.__main__ import main
from rdd_pipeline.tracking.database import make_database
from tests.mlflow_store import new_store
from tests.tracking.fakes import history, sent

MAKE = """
import sys
from rdd_pipeline.tracking.database import make_database
make_database(sys.argv[1])
"""

# Stops as soon as the file has some tables.
MAKE_AND_STOP = """
import os, signal, sys
from mlflow.store.db import utils
upgrade = utils._upgrade_db
def stop(engine):
    if sys.argv[2] == "after":
        upgrade(engine)
    print("now", flush=True)
    signal.pause()
utils._upgrade_db = stop
from rdd_pipeline.tracking.database import make_database
make_database(sys.argv[1])
"""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _start(script: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _send_from_another_process(file: Path) -> None:
    words = [sys.executable, "-m", "rdd_pipeline.tracking", str(file)]
    assert subprocess.run(words, check=False, timeout=120).returncode == 0


def _half_made(path: Path) -> None:
    """What MLflow itself leaves when it is killed early."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE experiments (experiment_id INTEGER)")
    connection.close()


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's part of the making takes seconds."""
    monkeypatch.setattr(database, "_migrate", new_store)


@pytest.mark.slow
def test_it_is_made_by_one_of_two_and_is_whole(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    processes = [_start(MAKE, uri) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert _names(tmp_path) == ["mlflow.db"]
    (found,) = MlflowClient(tracking_uri=uri).search_experiments()
    assert found.name == "Default"


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("before", signal.SIGKILL),
        pytest.param("after", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("before", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_stop_while_it_is_made_leaves_nothing_in_the_way(
    tmp_path: Path, moment: str, number: int
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    process = _start(MAKE_AND_STOP, uri, moment)
    assert process.stdout.readline() == "now\n"
    assert not (tmp_path / "mlflow.db").exists()
    process.send_signal(number)
    assert process.wait(60) == -number
    make_database(uri)
    assert _names(tmp_path) == ["mlflow.db"]


def test_two_runs_wait_for_each_other_only_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "OTHERS_SECONDS", 0.2)
    with (
        database._alone(tmp_path),
        pytest.raises(TimeoutError, match="another command has been making it"),
    ):
        make_database(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.usefixtures("copied")
def test_the_journal_of_a_database_that_was_moved_away_is_not_played_back(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    (tmp_path / "mlflow.db-journal").write_bytes(b"pages of another database")
    path.touch()  # a process that was killed at once
    make_database(f"sqlite:///{path}")
    assert _names(tmp_path) == ["mlflow.db", "mlflow.db.old-journal"]
    assert MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()


@pytest.mark.slow
def test_a_half_made_database_has_a_remedy_and_what_was_kept_arrives_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = tmp_path / "mlflow.db", tmp_path / "untracked" / "run.jsonl"
    _half_made(path)
    with caplog.at_level(logging.WARNING, logger="rdd_pipeline"):
        writer = TrackingWriter(Sender(f"sqlite:///{path}"), file, every=0.01)
        run = writer.start("run", Experiment("late"), {})
        writer.metrics(run, {"loss": 0.5}, step=1)
        writer.status(run, "FINISHED")
        assert writer.close(60.0) == 3
    assert f"is damaged or half-made: mv {path} {path}.old, a new one is made" in caplog.text
    with pytest.raises(SystemExit):
        main([str(file)])
    assert f"mv {path} {path}.old" in capsys.readouterr().err
    path.rename(tmp_path / "mlflow.db.old")
    new_store(path)
    _send_from_another_process(file)
    client = MlflowClient(tracking_uri=f"sqlite:///{path.parent}/./{path.name}")
    (found,) = client.search_runs([client.get_experiment_by_name("late").experiment_id])
    assert history(client, found.info.run_id, "loss") == [(1, 0.5)]
    assert found.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        ("table experiments already exists", "mv"),
        ("duplicate column name: workspace", "mv"),
        ("no such table: runs", "mv"),
        ("database disk image is malformed", "mv"),
        ("file is not a database", "mv"),
        ("database is locked", "end it"),
        ("Detected out-of-date database schema (found", "mlflow db upgrade sqlite:////a/b.db"),
        ("Can't locate revision identified by 'abc'", "move it away"),
    ],
)
def test_what_is_wrong_with_a_database_has_a_remedy(problem: str, remedy: str) -> None:
    assert remedy in database.explain(RuntimeError(problem), "sqlite:////a/b.db")
    assert database.explain(RuntimeError(problem), "http://host") == f"RuntimeError: {problem}"


@pytest.mark.slow
def test_a_database_that_is_damaged_during_a_run_gets_all_of_it_when_it_is_made_anew(
    tmp_path: Path,
) -> None:
    uri, file = new_store(tmp_path / "mlflow.db"), tmp_path / "run.jsonl"
    writer = TrackingWriter(Sender(uri), file, every=0.01)
    run = writer.start("run", Experiment("late"), {})
    writer.metrics(run, {"loss": 1.0}, step=1)
    assert sent(writer)
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("DROP TABLE metrics")
    connection.close()
    writer.metrics(run, {"loss": 2.0}, step=2)
    assert writer.close(30.0) == 1
    (tmp_path / "mlflow.db").rename(tmp_path / "mlflow.db.old")
    new_store(tmp_path / "mlflow.db")
    new_uri = f"sqlite:///{tmp_path}/./mlflow.db"  # this process keeps what it has opened
    _send_from_another_process(file)
    client = MlflowClient(tracking_uri=new_uri)
    (found,) = client.search_runs([client.get_experiment_by_name("late").experiment_id])
    assert history(client, found.info.run_id, "loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("fault", ["locked", "text", "folder"])
def test_a_database_that_cannot_be_read_costs_no_minutes(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCKED_SECONDS", 0.1)
    path = tmp_path / "mlflow.db"
    connection = sqlite3.connect(":memory:" if fault != "locked" else path)
    if fault == "locked":
        connection.execute("CREATE TABLE a (b)")
        connection.commit()
        connection.execute("BEGIN EXCLUSIVE")
    elif fault == "text":
        path.write_text("words" * 1000)
    else:
        path.mkdir()
    start = time.monotonic()
    with pytest.raises((sqlite3.Error, OSError)):
        make_database(f"sqlite:///{path}")
    connection.close()
    assert time.monotonic() - start < 2.0
    assert not os.path.isfile(f"{path}.old")
