"""Errors of the user are one line."""

from __future__ import annotations

import errno
import logging
import re
import sys

import pytest
from kedro.io import DataCatalog, DatasetError, Version
from kedro.pipeline import Node, Pipeline
from kedro.runner import SequentialRunner
from kedro.validation import ParameterValidationError

from rdd_pipeline import interruptions
from rdd_pipeline.datasets import MetricsDataset
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


def wrapped(error: Exception, *words: str) -> Exception:
    """As Kedro wraps it: a data set in a data set, each with words of its own."""
    for text in words:
        outer = DatasetError(text)
        outer.__cause__ = error
        error = outer
    return error


SAVING = (
    "Failed while saving data to dataset JSONDataset(filepath=data/a.json).",
    "Failed while saving data to dataset BySeed(filepath=data/x).",
)
LOADING = (
    "Failed while loading data from dataset kedro.JSONDataset(filepath=/p/data/a.json, x=1)",
)


@pytest.mark.parametrize("kind", [UserError, RunInterrupted])
def test_kedros_wrapping_is_followed_to_its_end(kind) -> None:
    assert user_message(wrapped(kind("Do this."), *SAVING)) == "Do this."


def test_an_interruption_is_found_in_whatever_a_library_made_of_it() -> None:
    with pytest.raises(ImportError) as info:  # noqa: PT012
        try:
            raise RunInterrupted("Stopped.")
        except RunInterrupted:
            raise ImportError("half a module") from None
    assert user_message(info.value) == "Stopped."


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/d/a"), "no space left .*: /d/a"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota is used up: data/a.json"),
        (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
        (OSError(errno.EROFS, "Read-only file system", "/d/a"), "read-only: /d/a"),
        (PermissionError(errno.EACCES, "Permission denied", "/d/a"), "Permission denied: /d/a"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, message) -> None:
    assert re.search(message, str(user_message(wrapped(error, *SAVING))))
    assert user_message(error) is not None


def test_a_file_of_the_catalog_that_cannot_be_read_is_one_line_and_a_bug_in_it_is_not() -> None:
    message = user_message(wrapped(ValueError("Expecting value:\nline 1"), *LOADING))
    assert message is not None
    assert message.startswith("/p/data/a.json cannot be used (Expecting value: line 1). Delete it")
    assert user_message(wrapped(ValueError("a bug"), *SAVING)) is None
    assert user_message(wrapped(TypeError("a bug"), *LOADING)) is None
    assert user_message(OSError(errno.EBADF, "a bug")) is None


def test_an_entry_without_a_version_is_one_line() -> None:
    entry = MetricsDataset(filepath="/nowhere/metrics/kd", version=Version(None, None))
    with pytest.raises(DatasetError) as info:
        DataCatalog({"metrics_kd": entry}).load("metrics_kd")
    assert user_message(info.value) == (
        "/nowhere/metrics/kd holds no version yet. Run the pipeline that makes it first."
    )


def test_kedro_does_not_say_again_what_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    show_user_errors_as_one_line()
    for kind in (UserError, RuntimeError):

        def node(kind: type[Exception] = kind) -> None:
            raise kind("Do this.")

        pipeline = Pipeline([Node(node, None, "x", name="only")])
        with pytest.raises(kind):
            SequentialRunner().run(pipeline, DataCatalog())
        lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        if kind is UserError:
            assert lines == []
    assert [line.split(" ")[0] for line in lines] == ["Node", "No"]


def test_only_errors_of_the_user_lose_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[BaseException] = []
    monkeypatch.setattr(interruptions, "_process", interruptions._Process())  # told nobody yet
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


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("could not create a primitive"), DatasetError("x")],
)
def test_memory_that_ran_out_is_one_line(error):
    if isinstance(error, DatasetError):
        error.__cause__ = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")
    assert user_message(error).startswith("Memory ran out. Lower batch_size")
    assert user_message(RuntimeError("could not create a plan")) is None
