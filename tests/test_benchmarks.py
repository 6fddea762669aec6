"""The scripts behind the figures in README and docs still run, at their smallest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rdd_pipeline.config import SceneParams
from rdd_pipeline.scenes.write import write_scenes
from tests.kedro_project import ROOT, Project, bootstrap

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
    "predict.py": ["--images", "40", "--side", "2200", "--network", "fcn_test_efficientnet"],
    "relations.py": ["--rounds", "1", "--quick"],
    "shared_teacher.py": [
        *("--iterations", "2", "--rounds", "1", "--methods", "kd", "tse", "--output", "OUTPUT")
    ],
    "soak.py": ["--kills", "1", "--iterations", "15"],
    "step.py": [
        *("--size", "64", "64", "--batch", "2", "--iterations", "1", "--warm-up", "0"),
        *("--teacher", "deeplabv3_test_efficientnet", "--student", "deeplabv3_test_efficientnet"),
        *("--methods", "cwd", "--output", "OUTPUT"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs(name, tmp_path):
    _run(name, *(str(tmp_path) if word == "OUTPUT" else word for word in SMALLEST[name]))


@pytest.mark.slow
def test_the_camvid_study_runs_goes_on_and_makes_a_table(tmp_path):
    size = {"height": 48, "width": 64}
    write_scenes(tmp_path / "data", SceneParams(train=4, val=2, test=2, **size))
    output = ["--output", str(tmp_path / "out")]
    words = [
        *("--data", str(tmp_path / "data"), *output, "--device", "cpu", "--side-by-side", "2"),
        *("--scale", "0.004", "--batch-size", "2", "--crop", "48", "--methods", "alone", "rdd"),
        *("--teacher", "deeplabv3_test_efficientnet", "--student", "fcn_test_efficientnet"),
    ]
    assert "done: 3, stopped: none, not begun: 0" in _run("camvid.py", *words, "--seeds", "0")
    assert "done: 5, stopped: none, not begun: 0" in _run("camvid.py", *words, "--seeds", "0", "1")
    rows = [json.loads(row) for row in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {(row["variant"], row["seed"]) for row in rows} == {
        *(("teacher", 0), ("alone", 0), ("rdd", 0), ("alone", 1), ("rdd", 1))
    }
    assert all(0 < row["waiting"] < 1 and row["images_per_second"] > 0 for row in rows)
    table = _run("camvid.py", *output, "--table").splitlines()
    assert [line.split(" | ")[:2] for line in table[-3:]] == [
        *(["| teacher", "1"], ["| student alone", "2"], ["| RDD", "2"])
    ]


@pytest.mark.slow
def test_the_study_of_exports_runs_and_makes_a_table(tmp_path):
    pytest.importorskip("onnxruntime")
    write_scenes(tmp_path / "data", SceneParams(train=4, val=2, test=2, height=48, width=64))
    output = ["--output", str(tmp_path / "out")]
    words = ["--data", str(tmp_path / "data"), *output, "--networks", "fcn_test_efficientnet"]
    words += ["--images", "2", "--calibration", "2", "--iterations", "2", "--crop", "32"]
    _run("export.py", *words, "--formats", "onnx", "pt2")
    table = _run("export.py", *output, "--table").splitlines()
    assert [line.split(" | ")[:2] for line in table[-2:]] == [
        *(["| fcn_test_efficientnet", "onnx"], ["| fcn_test_efficientnet", "pt2"])
    ]


@pytest.mark.slow
def test_the_share_of_wrong_labels_found_is_counted(tmp_path):
    project = Project(tmp_path)
    bootstrap()
    project.run("distill_tse")
    table = _run("label_errors.py", "--data", str(tmp_path / "data"), "--dataset", "test")
    assert "% of the labeled pixels are wrong" in table
    assert "| both networks, sum | " in table


def test_every_script_is_looked_at():
    found = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert found == {
        *SMALLEST,
        "camvid.py",
        "export.py",
        "label_errors.py",
        "structure.py",
        "siege.py",
    }


def _run(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *words],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
