"""Errors of the user are one line."""

from __future__ import annotations

import sys

import pytest
from kedro.io import DatasetError
from kedro.validation import ParameterValidationError

from rdd_pipeline.errors import RunInterrupted, UserError, WorkerFailedError
from rdd_pipeline.hooks.messages import show_user_errors_as_one_line, user_message


def test_errors_of_the_user_are_their_message() -> None:
    assert user_message(UserError("Do this.")) == "Do this."
    wrapped = DatasetError("Failed while loading data from dataset X")
    wrapped.__cause__ = UserError("File X is damaged.")
    assert user_message(wrapped) == "File X is damaged."
    text = "Parameter 'x': bad\n    For further information visit https://errors.pydantic.dev/2"
    assert user_message(ParameterValidationError(text)) == "Parameter 'x': bad"
    assert user_message(WorkerFailedError("ValueError: bad")) == "ValueError: bad"
    assert user_message(RuntimeError("a bug")) is None
    assert user_message(DatasetError("no cause")) is None


def test_only_errors_of_the_user_lose_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: seen.append(error))
    show_user_errors_as_one_line()
    once = sys.excepthook
    show_user_errors_as_one_line()
    assert sys.excepthook is once
    bug = RuntimeError("a bug")
    sys.excepthook(UserError, UserError("Do this."), None)
    sys.excepthook(RuntimeError, bug, None)
    assert capsys.readouterr().err == "Error: Do this.\n"
    assert seen == [bug]
    with pytest.raises(SystemExit) as info:
        sys.excepthook(RunInterrupted, RunInterrupted("Stopped."), None)
    assert info.value.code == 143
    assert capsys.readouterr().err == "Error: Stopped.\n"


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDD_TRACEBACK", "1")
    before = sys.excepthook
    show_user_errors_as_one_line()
    assert sys.excepthook is before
