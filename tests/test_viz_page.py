"""The page that `make docs-viz` builds, opened in a browser."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.kedro_project import CONF, ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.shows,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of the page, served as by any web server."""
    pytest.importorskip("kedro_viz")
    project: Path = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "pyproject.toml", project)
    shutil.copytree(CONF, project / "conf")
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "kedro", "viz", "build", "--include-previews"],
        cwd=project,
        env={**os.environ, "KEDRO_ENV": "test", "PYTHONPATH": str(project / "src")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(project / "build"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("pipeline", "shown", "folded"),
    [
        ("distill_tse", {"tfe", "tse", "results", "student_tse", "pixels_tse"}, "work_folder"),
        ("distill_baselines", {"cwd", "metrics_cwd", "teacher_weights"}, "curves_cwd"),
        ("evaluation", {"compare_methods", "comparison_report"}, "no_such"),
    ],
)
def test_the_boxes_are_there_by_name(address, pipeline, shown, folded, tmp_path):
    assert CHROMIUM is not None
    page = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000",
            "--window-size=1280,800", f"{address}/index.html?pid={pipeline}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout  # fmt: skip
    drawn = set(page.split('class="pipeline-node__text"')[1:])
    names = {part.partition(">")[2].partition("<")[0] for part in drawn}
    assert shown <= names
    assert folded not in names
