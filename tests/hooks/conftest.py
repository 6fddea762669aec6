"""A project of the test's own; whatever a session changes in the process is put back."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rdd_pipeline import tracking
from tests.hooks.project import Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    # Wherever the command is started, the database is the project's.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    hook = sys.excepthook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    path = tmp_path / "project"
    path.mkdir()
    project = Project(path)
    project.make()
    yield project
    sys.excepthook = hook
    assert handlers == {number: signal.getsignal(number) for number in handlers}
    assert tracking._SINK.get() is None
    assert not list(elsewhere.iterdir())
