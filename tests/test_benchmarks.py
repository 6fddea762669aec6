"""The scripts behind the figures in README and docs still run, at their smallest."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rdd_pipeline.config import SceneParams
from rdd_pipeline.scenes.write import write_scenes
from tests.kedro_project import ROOT

SMALLEST = {
    "determinism.py": ["--small", "--iterations", "2", "--methods", "tse"],
    "input_pipeline.py": [
        *("--height", "64", "--width", "96", "--images", "4", "--rounds", "1", "--seconds", "0.2")
    ],
    "label_noise.py": [
        *("--output", "OUTPUT", "--train-images", "8", "--iterations", "2", "--teachers", "2"),
        *("--noise", "0.1", "--seeds", "0", "--methods", "alone", "xor_cwd", "--workers", "1"),
    ],
    "losses.py": ["--rounds", "1"],
    "relations.py": ["--rounds", "1", "--quick"],
    "soak.py": ["--kills", "1", "--iterations", "15"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs(name, tmp_path):
    _run(name, *(str(tmp_path) if word == "OUTPUT" else word for word in SMALLEST[name]))


@pytest.mark.slow
def test_the_camvid_benchmark_runs(tmp_path):
    size = {"height": 48, "width": 64}
    write_scenes(tmp_path / "data", SceneParams(train=4, val=2, test=2, **size))
    done = _run(
        "camvid.py",
        *("--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")),
        *("--iterations", "2", "--batch-size", "2", "--crop", "48"),
        *("--teacher", "deeplabv3_test_efficientnet", "--student", "fcn_test_efficientnet"),
        *("--methods", "tse"),
    )
    assert done.splitlines()[-1].startswith("tse ")


def test_every_script_is_looked_at():
    found = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert found == {*SMALLEST, "camvid.py"}


def _run(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *words],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
