"""A process that is killed, a full disk, a file that is in use: no record is lost or doubled."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rdd_pipeline.errors import UserError
from rdd_pipeline.tracking import Experiment, Sender, TrackingWriter, send_left
from rdd_pipeline.tracking.__main__ import main
from rdd_pipeline.tracking.delivery import send_file
from rdd_pipeline.tracking.journal import Journal, JournalInUseError
from rdd_pipeline.tracking.records import Record
from tests import warm
from tests.mlflow_store import new_store
from tests.tracking.fakes import FakeClient, history, new_writer, sent, unsent

STEPS = 2500
KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from rdd_pipeline.tracking import Experiment, Sender, TrackingWriter

uri, file, request, status = sys.argv[1:]
send, requests, written = Sender.send, [], threading.Event()

def send_and_die(sender, batch):
    written.wait()
    taken = send(sender, batch)
    requests.append(batch)
    if len(requests) == int(request):
        os.kill(os.getpid(), signal.SIGKILL)
    return taken

Sender.send = send_and_die
writer = TrackingWriter(Sender(uri), Path(file), every=0.01)
run = writer.start("killed", Experiment("late"), {})
for step in range(2500):
    writer.metrics(run, {"loss": 1.0 / (step + 1)}, step=step)
if status:
    writer.status(run, status)
written.set()
while not Path(file + ".sent").exists():
    time.sleep(0.01)
note = f'"offset": {writer._journal.size},'
while note not in Path(file + ".sent").read_text():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _killed(uri: str, file: Path, request: int, status: str = "") -> None:
    """A process that dies after MLflow has taken its nth request, before this is noted."""
    words = ["-c", KILLED, uri, str(file), str(request), status]
    done = warm.run(words, cwd=warm.ROOT, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr


def _only_run(client: MlflowClient):
    (run,) = client.search_runs([client.get_experiment_by_name("late").experiment_id])
    return run


@pytest.mark.parametrize("request_number", [1, 3])
def test_what_a_killed_process_has_not_sent_is_sent_once_and_its_run_is_ended(
    tmp_path: Path, request_number: int
) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    file = tmp_path / "untracked" / "run.jsonl"
    _killed(uri, file, request_number)
    client = MlflowClient(tracking_uri=uri)
    assert _only_run(client).info.status == "RUNNING"
    assert send_file(file) == 0
    run = _only_run(client)
    points = history(client, run.info.run_id, "loss")
    assert sorted(points) == [(step, 1.0 / (step + 1)) for step in range(STEPS)]
    assert run.info.status == "KILLED"
    assert run.data.tags["error"] == "the process died"
    assert not list(file.parent.iterdir())


def test_the_next_run_ends_what_a_killed_process_has_left_running(tmp_path: Path) -> None:
    """All of it was sent, only the end was never written."""
    uri = new_store(tmp_path / "mlflow.db")
    file = tmp_path / "untracked" / "run.jsonl"
    _killed(uri, file, 99)
    client = MlflowClient(tracking_uri=uri)
    assert len(history(client, _only_run(client).info.run_id, "loss")) == STEPS
    alive = TrackingWriter(Sender(uri, client), file.with_name("alive.jsonl"))
    own = alive.start("alive", Experiment("0"), {})
    assert sent(alive)
    send_left(file.parent, "sqlite:///elsewhere.db", client)
    assert _only_run(client).info.status == "RUNNING"
    send_left(file.parent, uri, client)
    assert _only_run(client).info.status == "KILLED"
    assert not file.exists()
    (run_id,) = alive._sender.runs.values()
    assert client.get_run(run_id).info.status == "RUNNING"
    alive.status(own, "FINISHED")
    assert alive.close() == 0


def test_a_killed_run_that_was_deleted_is_left_alone(tmp_path: Path) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    file = tmp_path / "untracked" / "run.jsonl"
    _killed(uri, file, 99)
    client = MlflowClient(tracking_uri=uri)
    run_id = _only_run(client).info.run_id
    client.delete_run(run_id)
    assert send_file(file) == 0
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"
    assert not list(file.parent.iterdir())


def test_a_run_that_had_ended_keeps_its_status(tmp_path: Path) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    file = tmp_path / "untracked" / "run.jsonl"
    _killed(uri, file, 4, "FINISHED")
    assert send_file(file) == 0
    assert _only_run(MlflowClient(tracking_uri=uri)).info.status == "FINISHED"


def _half_sent(client: FakeClient, tmp_path: Path) -> None:
    """A run of two points, of which MLflow got the first."""
    writer = new_writer(client, tmp_path, every=60.0)
    writer.metrics("run", {"loss": 1.0}, step=1)
    assert sent(writer)
    client.problem = ConnectionError("away")
    writer.metrics("run", {"loss": 2.0}, step=2)
    assert writer.close(5.0) == 1
    client.problem = None


def test_what_was_sent_is_not_sent_again(client: FakeClient, tmp_path: Path) -> None:
    _half_sent(client, tmp_path)
    send_left(tmp_path / "untracked", client.tracking_uri, client)  # type: ignore[arg-type]
    assert client.points() == [("loss", 1.0, 1), ("loss", 2.0, 2)]
    assert not list((tmp_path / "untracked").iterdir())


def test_without_its_note_all_of_a_file_is_sent_again_and_nothing_is_doubled(
    tmp_path: Path,
) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    client = MlflowClient(tracking_uri=uri)
    writer = TrackingWriter(Sender(uri, client), tmp_path / "x.jsonl", every=0.01)
    run = writer.start("whole", Experiment("late"), {})
    for step in range(20):
        writer.metrics(run, {"loss": 1.0}, step=step)
    assert sent(writer)
    shutil.copy(tmp_path / "x.jsonl", tmp_path / "again.jsonl")
    writer.status(run, "FINISHED")
    assert writer.close() == 0
    (tmp_path / "again.jsonl.sent").write_text("{half")
    assert send_file(tmp_path / "again.jsonl") == 0
    steps = [step for step, _ in history(client, _only_run(client).info.run_id, "loss")]
    assert sorted(steps) == list(range(20))


def test_what_went_to_one_mlflow_goes_to_another_from_the_beginning(tmp_path: Path) -> None:
    first, second = (new_store(tmp_path / f"{name}.db") for name in "ab")
    writer = TrackingWriter(Sender(first), tmp_path / "x.jsonl", every=0.01)
    run = writer.start("whole", Experiment("late"), {})
    writer.metrics(run, {"loss": 1.0}, step=1)
    assert sent(writer)
    (tmp_path / "a.db").unlink()
    writer.metrics(run, {"loss": 1.0}, step=2)
    assert writer.close() == 1
    assert send_file(tmp_path / "x.jsonl", second) == 0
    client = MlflowClient(tracking_uri=second)
    assert history(client, _only_run(client).info.run_id, "loss") == [(1, 1.0), (2, 1.0)]


def test_a_file_that_is_in_use_is_left_alone(
    client: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = new_writer(client, tmp_path, every=60.0)
    client.problem = ConnectionError("away")
    writer.metrics("run", {"loss": 1.0})
    file = tmp_path / "untracked" / "run.jsonl"
    with pytest.raises(JournalInUseError, match=r"run\.jsonl: its run goes on"):
        Journal(file)
    assert main([str(file.parent)]) == 0
    assert "its run goes on" in capsys.readouterr().out
    send_left(file.parent, client.tracking_uri, client)  # type: ignore[arg-type]
    assert client.requests == []
    client.problem = None
    assert writer.close(5.0) == 0
    assert client.points() == [("loss", 1.0, 0)]


def test_only_the_command_offers_refused_records_again(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = new_writer(client, tmp_path, every=60.0)
    client.refuses = {"bad"}
    writer.metrics("run", {"good": 1.0, "bad": 2.0})
    assert writer.close(5.0) == 1
    client.refuses = set()
    folder = tmp_path / "untracked"
    send_left(folder, client.tracking_uri, client)  # type: ignore[arg-type]
    assert client.points() == [("good", 1.0, 0)]
    assert [record["key"] for record in unsent(tmp_path)[1:]] == ["bad"]
    monkeypatch.setattr(Sender, "_connected", lambda sender: client)
    assert send_file(folder / "run.jsonl") == 0
    assert client.points() == [("good", 1.0, 0), ("bad", 2.0, 0)]
    assert not list(folder.iterdir())


def test_one_bad_record_of_a_thousand_costs_a_few_requests(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []
    take = client.log_batch

    def count(*arguments: object, **named: object) -> None:
        attempts.append(1)
        take(*arguments, **named)

    monkeypatch.setattr(client, "log_batch", count)
    writer = new_writer(client, tmp_path, every=60.0)
    client.refuses = {"bad"}
    for step in range(999):
        writer.metrics("run", {"bad" if step == 500 else "good": 1.0}, step=step)
    assert writer.close(10.0) == 1
    assert len(client.points()) == 998
    assert len(attempts) < 25


def test_a_full_disk_costs_the_records_of_that_moment_and_leaves_no_half_line(
    client: FakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = new_writer(client, tmp_path, every=60.0)
    writer.metrics("run", {"loss": 1.0}, step=1)
    file = tmp_path / "untracked" / "run.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 40, limits[1]))
        try:
            writer.metrics("run", {"loss": 2.0}, step=2)
            writer.metrics("run", {"loss": 2.0}, step=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("Records for MLflow are lost") == 1
    writer.metrics("run", {"loss": 3.0}, step=3)
    assert writer.close(5.0) == 0
    assert client.points() == [("loss", 1.0, 1), ("loss", 3.0, 3)]


def test_a_file_of_the_version_before_is_sent_too(tmp_path: Path) -> None:
    """It held only what was unsent, each record after the request for its run."""
    uri = new_store(tmp_path / "mlflow.db")
    request = {"experiment": {"name": "late", "artifact_location": None}, "tags": {"a": "b"}}
    rest = {"step": 1, "timestamp": 5}
    run_value = json.dumps({**request, "parent": None})
    lines = [
        {"tracking_uri": uri},
        {"run_id": "1", "kind": "run", "key": "old", "value": run_value, **rest},
        {"run_id": "1", "kind": "metric", "key": "loss", "value": 0.5, **rest},
        {"run_id": "1", "kind": "status", "key": "status", "value": "FAILED", **rest},
    ]
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert send_file(path) == 0
    client = MlflowClient(tracking_uri=uri)
    run = _only_run(client)
    assert (run.info.run_name, run.info.status, run.data.tags["a"]) == ("old", "FAILED", "b")
    assert history(client, run.info.run_id, "loss") == [(1, 0.5)]


@pytest.mark.parametrize("at", range(8, 150, 9))
def test_a_flipped_bit_costs_its_line_which_is_named_and_kept(
    client: FakeClient,
    tmp_path: Path,
    at: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "x.jsonl"
    journal = Journal(file, client.tracking_uri, new=True)
    journal.append([Record("run", "metric", "loss", 1.0, step) for step in range(3)])
    journal.close()
    lines = file.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[2])
    damaged[at % (len(damaged) - 1)] ^= 1 << at % 7
    file.write_bytes(b"".join([*lines[:2], bytes(damaged), lines[3]]))
    monkeypatch.setattr(Sender, "_connected", lambda sender: client)
    with caplog.at_level(logging.WARNING):
        assert send_file(file) == damaged.count(b"\n")
    assert client.points() == [("loss", 1.0, 0), ("loss", 1.0, 2)]
    assert f"Line 3 of {file} is left out, and kept" in caplog.text.replace(" and 1 after it", "")
    assert bytes(damaged) in file.read_bytes()


def test_a_line_that_lost_its_checksum_is_none_of_a_former_version(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.jsonl"
    journal = Journal(file, client.tracking_uri, new=True)
    journal.append([Record("run", "metric", "loss", 1.0, 1)])
    journal.close()
    header, line = file.read_bytes().splitlines(keepends=True)
    cut = line[: line.index(b"1, ")] + b"7}\n"
    file.write_bytes(header + cut)
    monkeypatch.setattr(Sender, "_connected", lambda sender: client)
    assert send_file(file) == 1
    assert client.points() == []


def test_a_damaged_first_line_needs_the_address(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.jsonl"
    journal = Journal(file, "http://server", new=True)
    journal.append([Record("run", "metric", "loss", 1.0, 1)])
    journal.close()
    file.write_bytes(file.read_bytes().replace(b"server", b"sarver"))
    monkeypatch.setattr(Sender, "_connected", lambda sender: client)
    with pytest.raises(UserError, match=r"first line of .* is damaged .* --tracking-uri"):
        send_file(file)
    assert send_file(file, "http://server") == 0
    assert client.points() == [("loss", 1.0, 1)]


REQUEST = {"experiment": {"name": "x", "artifact_location": None}, "tags": {}, "parent": None}
POISON: list[dict[str, object]] = [
    {"kind": "status", "key": "status", "value": "BOGUS"},
    {"kind": "metric", "key": "loss", "value": "much"},
    {"kind": "metric", "key": "loss", "value": None},
    {"kind": "metric", "key": "loss", "value": 1.0, "step": 2**63},
    {"kind": "metric", "key": "loss", "value": 1.0, "step": "2"},
    {"kind": "metric", "key": "loss"},
    {"kind": "tag", "key": 3, "value": "x"},
    {"kind": "tag", "key": "a", "value": "\ud800"},
    {"kind": "trace", "key": "a", "value": "b"},
    {"kind": "artifact", "key": "../../up", "value": "x"},
    {"kind": "artifact", "key": "/up", "value": "x"},
    {"kind": "run", "key": "name", "value": "[1, 2]"},
    {"kind": "run", "key": "name", "value": "{}"},
    {"kind": "run", "key": "name", "value": json.dumps({**REQUEST, "tags": {"a": 1}})},
    {"kind": "run", "key": "name", "value": json.dumps({**REQUEST, "experiment": {"name": 1}})},
]


def _foreign(file: Path, uri: str, *records: dict[str, object]) -> Path:
    """A file that something else has written, or somebody."""
    lines = [{"tracking_uri": uri}, *({"run_id": "run"} | record for record in records)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("poison", POISON, ids=str)
def test_a_record_that_makes_no_sense_is_kept_and_does_not_block_the_rest(
    client: FakeClient, tmp_path: Path, poison: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"kind": "metric", "key": "loss", "value": 1.0}
    file = _foreign(tmp_path / "x.jsonl", "http://server", poison, good)
    monkeypatch.setattr(Sender, "_connected", lambda sender: client)
    content = file.read_bytes()
    assert send_file(file) == 1
    assert client.points() == [("loss", 1.0, 0)]
    assert file.read_bytes() == content


def test_a_damaged_note_is_as_good_as_none(client: FakeClient, tmp_path: Path) -> None:
    _half_sent(client, tmp_path)
    note = tmp_path / "untracked" / "run.jsonl.sent"
    note.write_text(note.read_text().replace('"offset": ', '"offset": 9'))
    send_left(tmp_path / "untracked", client.tracking_uri, client)  # type: ignore[arg-type]
    assert client.points() == [("loss", 1.0, 1), ("loss", 1.0, 1), ("loss", 2.0, 2)]


def test_a_file_of_records_uploads_and_copies_nothing_outside_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    project, secret = tmp_path / "project", tmp_path / "secret.txt"
    secret.write_text("secret")
    uri = new_store(tmp_path / "mlflow.db")
    (project / "data").mkdir(parents=True)
    (project / "data" / "figure.txt").write_text("figure")
    (project / "data" / "link").symlink_to(secret)
    experiment = {"name": "late", "artifact_location": (tmp_path / "anywhere").as_uri()}
    paths = [secret, project / "data" / "link", project / "data" / ".." / ".." / "secret.txt"]
    file = _foreign(
        project / "data/07_model_output/untracked/x.jsonl",
        uri,
        {"kind": "run", "key": "name", "value": json.dumps({**REQUEST, "experiment": experiment})},
        *({"kind": "artifact", "key": "files", "value": str(path)} for path in paths),
        {"kind": "artifact", "key": "../../up", "value": str(project / "data/figure.txt")},
        {"kind": "artifact", "key": "files", "value": str(project / "data/figure.txt")},
    )
    monkeypatch.chdir(tmp_path)  # the project is where the file lies
    with caplog.at_level(logging.WARNING):
        assert send_file(file) == 4
    assert caplog.text.count("outside of the project (--artifacts FOLDER allows it)") == 3
    assert not (tmp_path / "anywhere").exists()
    artifacts = [path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]
    assert [path.name for path in artifacts] == ["figure.txt"]
    assert send_file(file, artifacts=[tmp_path]) == 1


def test_a_file_of_records_makes_no_database_anywhere(tmp_path: Path) -> None:
    file = _foreign(tmp_path / "project" / "x.jsonl", f"sqlite:///{tmp_path}/anywhere/mlflow.db")
    with pytest.raises(UserError, match=r"which is not there. Say with --tracking-uri"):
        send_file(file)
    assert not (tmp_path / "anywhere").exists()


def test_a_file_that_is_nested_without_end_is_refused_in_one_line(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep.jsonl is no file of unsent MLflow records"):
        Journal(path)
