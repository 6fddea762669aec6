"""Runs that MLflow is asked for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from rdd_pipeline.errors import UserError
from rdd_pipeline.tracking import Experiment, Sender, TrackingWriter, UsedData
from rdd_pipeline.tracking.__main__ import main
from rdd_pipeline.tracking.delivery import send_file
from rdd_pipeline.tracking.records import Record
from rdd_pipeline.tracking.sender import LOCAL_ID
from tests.mlflow_store import new_store
from tests.tracking.fakes import FakeClient, history, new_writer, sent

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
        assert history(client, run.info.run_id, "loss") == [(1, 0.5)]
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
    writer = new_writer(away, tmp_path)
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
    assert sent(writer, 20.0)
    assert writer.close() == 0
    assert len(calls) == 2
    _check_family(client)


def test_a_file_that_was_half_sent_is_sent_again_without_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = FakeClient()
    away.problem = ConnectionError("away")
    writer = new_writer(away, tmp_path)
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


def test_points_that_wait_for_their_run_all_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    sender = Sender(str(client.tracking_uri), client)
    writer = TrackingWriter(sender, tmp_path / "x.jsonl", every=60.0)
    send, gate = sender.send, threading.Event()

    def send_when_open(batch: Sequence[Record]) -> list[bool]:
        gate.wait(30)
        return send(batch)

    monkeypatch.setattr(sender, "send", send_when_open)
    run_id = writer.start("whole", PLACE, {})
    for step in range(1, 101):
        writer.metrics(run_id, {"loss": 1.0}, step=step)
    assert writer.close(0.1) == 101
    gate.set()
    writer._thread.join()  # its answer comes too late
    assert send_file(tmp_path / "x.jsonl") == 0
    run = _runs(client)["whole"]
    steps = [step for step, _ in history(client, run.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, 101))


def test_an_experiment_in_the_bin_is_restored(tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    client.delete_experiment(client.create_experiment("late"))
    writer = TrackingWriter(Sender(str(client.tracking_uri), client), tmp_path / "x.jsonl")
    _family(writer)
    assert writer.close() == 0
    assert client.get_experiment_by_name("late").lifecycle_stage == "active"
    _check_family(client)


@pytest.mark.parametrize("there", [True, False])
def test_an_experiment_opens_on_its_runs(tmp_path: Path, there: bool) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    if there:  # kedro-mlflow makes it without the tag
        client.create_experiment("late")
    writer = TrackingWriter(Sender(str(client.tracking_uri), client), tmp_path / "x.jsonl")
    writer.start("whole", PLACE, {})
    assert writer.close() == 0
    tags = client.get_experiment_by_name("late").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_kind_that_a_user_chose_or_may_not_set_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    client.create_experiment("late", tags={"mlflow.experimentKind": "genai_development"})
    client.create_experiment("theirs")

    def refuse(*arguments: Any) -> None:
        raise MlflowException("not you", PERMISSION_DENIED)

    monkeypatch.setattr(client, "set_experiment_tag", refuse)
    writer = TrackingWriter(Sender(str(client.tracking_uri), client), tmp_path / "x.jsonl")
    for name in ("late", "theirs"):
        writer.start("whole", Experiment(name), {})
    assert writer.close() == 0
    assert set(_runs(client, "theirs")) == {"whole"}
    tags = client.get_experiment_by_name("late").tags
    assert tags["mlflow.experimentKind"] == "genai_development"


def test_data_that_a_run_reads_is_noted_once_however_often_it_is_sent(tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    writer = TrackingWriter(Sender(str(client.tracking_uri), client), tmp_path / "x.jsonl")
    run_id = writer.start("whole", PLACE, {})
    data = UsedData("scenes train", "a" * 36, "http://me:secret@host/x", "train", {"images": 3})
    writer.used(run_id, data)
    writer.used(run_id, data)
    assert writer.close() == 0
    (found,) = _runs(client)["whole"].inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("scenes train", "a" * 36)
    assert found.dataset.profile == '{"images": 3}'
    assert "secret" not in found.dataset.source
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "train")]


def test_a_new_experiment_keeps_its_files_where_it_was_told(tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    place = (tmp_path / "files").as_uri()
    writer = TrackingWriter(Sender(str(client.tracking_uri), client), tmp_path / "x.jsonl")
    writer.start("whole", Experiment("new", place), {})
    assert writer.close() == 0
    assert client.get_experiment_by_name("new").artifact_location == place
    assert LOCAL_ID in _runs(client, "new")["whole"].data.tags
