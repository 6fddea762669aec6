"""The tests for a GPU machine do not rot: they are collected without Kedro, and some run here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kedro_project import ROOT

# What a machine that only trains does not have; the last two are pytest's.
MISSING = ("kedro", "kedro_datasets", "kedro_mlflow", "mlflow", "pandas", "pytest_timeout", "xdist")
SOME = "[xor-kept-share-weighted-0.7] or [tse_cwd-cnn-bfloat16] or [fitnet] or [flip-imagenet]"
KILLED = "test_killed_it"  # it starts processes

PROGRAM = """
import json, sys

sys.modules.update(dict.fromkeys({missing!r}))  # an import of them fails
import pytest

class Count:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        marked = [item for item in items if item.get_closest_marker("gpu")]
        print(json.dumps({{"all": len(items), "marked": len(marked)}}))

sys.exit(pytest.main({arguments!r}, plugins=[Count()]))
"""


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """On a machine without Kedro and pytest's plugins, with the CPU in the part of the GPU."""
    program = PROGRAM.format(missing=MISSING, arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={
            **os.environ,
            "RDD_TEST_DEVICE": "cpu",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": f"{ROOT / 'src'}",
        },
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.parametrize(
    "some", [SOME, pytest.param(KILLED, marks=pytest.mark.slow)], ids=["light", "killed"]
)
def test_they_are_collected_without_kedro_and_some_pass_on_the_cpu(some: str):
    done = _pytest("-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "-k", some)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(re.search(r"\{.*\}", done.stdout).group())
    assert counts["marked"] == counts["all"] >= 40
    count = some.count(" or ") + 1
    assert re.search(rf"^{count} passed", done.stdout, re.M) or "." * count in done.stdout


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "gpu").glob("*.py")), ids=lambda p: p.name
)
def test_they_know_only_what_trains(path: Path):
    words = re.findall(r"^(?:from|import) (\S+)", path.read_text(), re.M)
    rim = ("pipelines", "datasets", "hooks", "tracking")
    assert not [w for w in words if w.startswith(tuple(f"rdd_pipeline.{part}" for part in rim))]
