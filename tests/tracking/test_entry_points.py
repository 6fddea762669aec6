"""No command, server or notebook of this project talks to anything but this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kedro_project import CONF, ROOT
from tests.mlflow_store import new_store

GUARD = """
import os, socket, sys

LOCAL = {"localhost", "127.0.0.1", "::1", socket.gethostname(), None}

def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if host not in LOCAL:
        with open(os.environ["GUARDED"], "a") as file:
            file.write(f"{event} {host} of {sys.argv}\\n")
        raise OSError(f"this test has no network: {host}")

sys.addaudithook(watch)
"""

# What would switch telemetry off although nothing of ours did.
OTHERS = (
    *("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY"),
    *("HF_HUB_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST"),
)

NOTEBOOK = """
import rdd_pipeline
from huggingface_hub import constants
from kedro_telemetry.plugin import _check_for_telemetry_consent
from mlflow.telemetry.client import get_telemetry_client
from mlflow.telemetry.utils import is_telemetry_disabled
from pathlib import Path
assert is_telemetry_disabled() and get_telemetry_client() is None
assert constants.HF_HUB_DISABLE_TELEMETRY
assert not _check_for_telemetry_consent(Path("nowhere"))
"""


def _environment(folder: Path) -> dict[str, str]:
    """As in a shell without this environment and without settings, with the guard in front."""
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    paths = f"{folder / 'guard'}{os.pathsep}{folder / 'project' / 'src'}"
    own = {"PATH": "/usr/bin:/bin", "PYTHONPATH": paths, "GUARDED": str(folder / "talked")}
    return {name: value for name, value in os.environ.items() if name not in OTHERS} | own


def test_whoever_imports_the_package_first_is_not_tracked(tmp_path: Path) -> None:
    environment = _environment(tmp_path) | {"PYTHONPATH": f"{tmp_path / 'guard'}:{ROOT / 'src'}"}
    words = [sys.executable, "-c", NOTEBOOK]
    done = subprocess.run(words, env=environment, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 0
    assert not (tmp_path / "talked").exists()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CONF, project / "conf")
    shutil.copy(ROOT / "pyproject.toml", project)
    new_store(project / "mlflow.db")
    return project


@contextlib.contextmanager
def _server(words: list[str], folder: Path, environment: dict[str, str]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*words, "--port", str(port)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it has children, which share its process group
    )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 150
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
                break
            assert process.poll() is None, "it has ended"
            assert time.monotonic() < deadline, "it does not start"
            time.sleep(0.2)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["kedro", "run", "--pipeline=data_ingestion", "--env=test"],
        ["python", "-m", "rdd_pipeline", "--pipeline=data_ingestion", "--env=test"],
        ["python", "-m", "rdd_pipeline.tracking", "data"],
        ["python", "-m", "rdd_pipeline.launching", "--help"],
        ["python", "-m", "rdd_pipeline.launching.join", "--help"],
        ["python", "-m", "rdd_pipeline.datasets.prune"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_a_command_talks_to_nobody(words: list[str], copy: Path, tmp_path: Path) -> None:
    (copy / "data").mkdir()
    record = '{"run_id": "x", "kind": "tag", "key": "a", "value": "b"}'
    header = f'{{"tracking_uri": "sqlite:///{copy}/mlflow.db"}}'
    (copy / "data" / "left.jsonl").write_text(f"{header}\n{record}\n")
    words = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    done = subprocess.run(words, cwd=copy, env=_environment(tmp_path), check=False, timeout=200)
    assert done.returncode == (1 if words[2].endswith("tracking") else 0)
    assert not (tmp_path / "talked").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words", [["mlflow", "ui"], ["viz", "run", "--no-browser"]])
def test_a_server_listens_here_and_talks_to_nobody(
    words: list[str], copy: Path, tmp_path: Path
) -> None:
    kedro = str(Path(sys.executable).with_name("kedro"))
    with _server([kedro, *words], copy, _environment(tmp_path)) as address:
        # What the browser asks for: kedro-viz looks for a newer version, MLflow for settings.
        page = "/api/version" if words[0] == "viz" else "/ajax-api/3.0/mlflow/ui-telemetry"
        with urllib.request.urlopen(address + page, timeout=60) as answer:
            assert answer.status == 200
    assert not (tmp_path / "talked").exists()
