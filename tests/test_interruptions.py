"""SIGTERM and Ctrl-C end a command in one line and with status 143, whenever they come."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rdd_pipeline import interruptions
from rdd_pipeline.errors import RunInterrupted
from rdd_pipeline.interruptions import Signals, is_command
from tests.kedro_project import CONF, ROOT
from tests.mlflow_store import new_store


@pytest.fixture
def signals():
    signals = Signals()
    signals.install()
    yield signals
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_a_swallowed_stop_signal_stops_the_next_node(signals) -> None:
    signals.check()
    with contextlib.suppress(Exception):  # what some library does
        stop()
    with pytest.raises(RunInterrupted, match="SIGTERM"):
        signals.check()


def test_several_signals_of_one_wish_are_one(signals, monkeypatch) -> None:
    with pytest.raises(RunInterrupted):
        stop()
    stop(signal.SIGINT)
    monkeypatch.setattr(interruptions, "SAME_WISH_SECONDS", 0.0)
    with pytest.raises(RunInterrupted, match="SIGINT"):
        stop(signal.SIGINT)


def test_what_has_to_be_whole_is_finished_first(signals) -> None:
    with signals.hold():
        stop()
        done = True
    assert done
    with pytest.raises(RunInterrupted):
        signals.check()


def test_a_stop_signal_in_a_destructor_is_not_lost(signals, capsys) -> None:
    class Closing:
        def __del__(self) -> None:
            stop()

    with pytest.raises(RunInterrupted):  # noqa: PT012
        Closing()
        time.sleep(5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "program", "is_ours"),
    [
        ("kedro run --env=x", "python kedro run --env=x", True),
        ("/x/.venv/bin/kedro run", "python /x/.venv/bin/kedro run", True),
        ("-m --delete", "python -m rdd_pipeline.datasets.prune --delete", True),
        ("-m", "python -u -m rdd_pipeline", True),
        ("kedro mlflow ui", "python kedro mlflow ui", False),
        ("kedro ipython", "python kedro ipython", False),
        ("kedro viz run", "python kedro viz run", False),
        ("-m", "python -m pytest", False),
        ("/x/pytest/__main__.py run", "python -m pytest run", False),
        ("-c", "python -c pass", False),
        ("", "python", False),
    ],
)
def test_ctrl_c_is_left_to_notebooks_and_servers(words: str, program: str, is_ours: bool) -> None:
    assert is_command(words.split(" "), program.split(" ")) is is_ours


def test_kedro_started_as_a_module_is_a_command() -> None:
    words = ["python -m kedro", "run"]  # what it calls itself
    assert is_command(words, ["python", "-m", "kedro", "run"])


# ---- whole commands

RUN = ["run", "--pipeline=data_ingestion", "--env=test"]
KEDRO = ["-m", "kedro", *RUN]
TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.fixture
def project(tmp_path) -> Path:
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "src").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    new_store(tmp_path / "mlflow.db")
    (tmp_path / "first").mkdir()
    (tmp_path / "first/sitecustomize.py").write_text("from tests.moments import arm\narm()\n")
    return tmp_path


def interrupted(
    project: Path, command: list[str], moment: str, numbers: list[int]
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "MOMENT": moment, "SIGNALS": ",".join(str(int(n)) for n in numbers)}
    env |= {"PYTHONPATH": f"{project / 'first'}:{ROOT}:{ROOT / 'src'}", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )


def check_one_line(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 143, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "failed with error" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert "topped by SIG" in line


def statuses(project: Path) -> list[str]:
    with sqlite3.connect(project / "mlflow.db") as store:
        return [status for (status,) in store.execute("select status from runs")]


@pytest.mark.parametrize(
    ("command", "moment", "numbers"),
    [
        (KEDRO, "import:rdd_pipeline.config", [INT]),
        (KEDRO, "import:mlflow.entities", [TERM]),
        (["-m", "rdd_pipeline.tracking", "x"], "import:rdd_pipeline.tracking.sender", [INT, TERM]),
        (["-m", "rdd_pipeline.launching", "x"], "import:torch", [INT]),
        (["-m", "rdd_pipeline.launching.join", "localhost:1"], "import:torch", [TERM]),
        (["-m", "rdd_pipeline.datasets.prune"], "import:argparse", [TERM, TERM]),
        (["-m", "rdd_pipeline", *RUN[1:]], "import:kedro", [INT]),
    ],
)
def test_while_a_command_imports(project: Path, command, moment, numbers) -> None:
    check_one_line(interrupted(project, command, moment, numbers))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_along_a_run(project: Path, tmp_path_factory) -> None:
    """A dozen moments by the clock; before Kedro has come to this package they are Python's."""
    command = [sys.executable, *KEDRO]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
    }
    start = time.monotonic()
    subprocess.run(command, cwd=project, env=env, check=True, capture_output=True)
    whole = time.monotonic() - start
    stopped = 0
    for part in range(12):
        folder = tmp_path_factory.mktemp("part") / "project"
        shutil.copytree(project, folder)
        number = TERM if part % 2 else INT
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait((part + 0.5) * whole / 12)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
        if out or part > 2:
            stopped += done.returncode == 143
            if done.returncode != 0 or err:  # it had not ended before
                check_one_line(done)
        assert "RUNNING" not in statuses(folder)
    assert stopped >= 6
