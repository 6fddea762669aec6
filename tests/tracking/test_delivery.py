"""The command and the next run send what is left of a file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rdd_pipeline.errors import UserError
from rdd_pipeline.tracking.__main__ import main
from rdd_pipeline.tracking.delivery import send_file
from tests.tracking.fakes import FakeClient, history, new_writer


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
    writer = new_writer(away, tmp_path)
    writer.metrics(run_id, {"loss": 0.5}, step=1)
    writer.params(run_id, {"lr": 1})
    writer.status(run_id, "FINISHED")
    assert writer.close(5.0) == 3
    path = tmp_path / "untracked" / "run.jsonl"
    assert main([str(path.parent)]) == 0
    assert "sent" in capsys.readouterr().out
    assert not path.exists()
    assert history(client, run_id, "loss") == [(1, 0.5)]
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
    writer = new_writer(away, tmp_path)
    for step in (1, 2):
        writer.metrics(run_id, {"loss": 0.5}, step=step)
    assert writer.close(5.0) == 2
    path = tmp_path / "untracked" / "run.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert main([str(path)]) == 0
    assert "ends in the middle of a record" in caplog.text
    assert history(client, run_id, "loss") == [(1, 0.5)]


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
