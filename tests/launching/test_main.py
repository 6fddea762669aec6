"""`python -m rdd_pipeline.launching JOB.json`."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.config import TeacherParams, TrainerParams
from rdd_pipeline.data.index import to_rows
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.errors import UserError
from rdd_pipeline.launching import __main__ as command
from rdd_pipeline.launching.__main__ import run_job_file
from rdd_pipeline.networks import foreign, import_teacher, load_checkpoint, save_checkpoint
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.store import RunStore
from rdd_pipeline.training.training import Training
from tests import warm
from tests.training.conftest import LABELS, STUDENT, write_blocks

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{warm.ROOT}:{warm.ROOT / 'src'}"}


@pytest.fixture
def write_job(tmp_path, blocks, teacher, make_job):
    """Function that writes JOB.json beside an index and a teacher."""

    def write(job: TrainingJob | None = None, **fields):
        with (tmp_path / "index.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, to_rows(blocks.samples)[0])
            writer.writeheader()
            writer.writerows(to_rows(blocks.samples))
        save_checkpoint(teacher, tmp_path / "teacher.safetensors")
        content = {
            "job": (job or make_job()).model_dump(mode="json"),
            "root": str(blocks.root),
            "labels": LABELS.model_dump(mode="json"),
            "trainer": {
                "device": "cpu",
                "precision": "float32",
                "log_every": 1,
                "checkpoint_every": 1e-6,
                "threads": 1,
            },
            "index": "index.csv",
            "teacher": "teacher.safetensors",
            "output": "out",
            **fields,
        }
        path = tmp_path / "JOB.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_a_job_file_trains_as_the_function_does(write_job, make_job, blocks, teacher, tmp_path):
    summary = run_job_file(write_job())
    expected = train(Training(make_job(), blocks.images, teacher), TrainerParams(device="cpu"))
    network = load_checkpoint(tmp_path / "out" / "network.safetensors")
    assert network.digest() == expected.network.digest()
    assert summary["iterations"] == 8
    assert summary["fingerprint"] == expected.fingerprint
    assert set(summary["scores"]) == {"val", "test"}
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == summary
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert [row["iteration"] for row in history if "loss" in row] == list(range(1, 9))


def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(
    write_job, make_job, blocks, teacher, tmp_path
):
    """SIGKILL of a real process, then the same command (here: its function) again."""
    job = make_job(recipe={"iterations": 24, "validate_every": 12}, rdd={"tfe_length": 8})
    path = write_job(job)
    process = warm.start(["-m", "rdd_pipeline.launching", str(path)], cwd=tmp_path, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("work/*/state-*.ckpt")):
            assert process.poll() is None, "ended before its first state"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    assert not list((tmp_path / "out").glob("work/*/done.json"))

    (folder,) = (tmp_path / "out").glob("work/*")
    reached = RunStore(folder.parent, folder.name).latest().iteration
    assert 1 <= reached < 24
    run_job_file(path)
    expected = train(Training(job, blocks.images, teacher), TrainerParams(device="cpu"))
    state = RunStore(folder.parent, folder.name).finished_state()
    for name, tensor in expected.state.student.items():
        assert torch.equal(state.student[name], tensor), name
    network = load_checkpoint(tmp_path / "out" / "network.safetensors")
    assert network.digest() == expected.network.digest()


def test_paths_start_at_the_files_folder_and_the_folder_can_be_indexed_anew(
    write_job, make_job, tmp_path, monkeypatch
):
    write_blocks(tmp_path / "images")
    job = make_job("baseline", network=STUDENT, recipe={"iterations": 1})
    for mask in tmp_path.glob("images/*annot/*.png"):
        _replace_value(mask, 255, 11)
    here = {"root": "images", "labels": CAMVID.model_dump(mode="json"), "index": None}
    path = write_job(job, **here, layout="camvid", teacher=None, output="there/out")
    monkeypatch.chdir("/")
    run_job_file(path)
    assert (tmp_path / "there" / "out" / "result.json").exists()


def _replace_value(path, old: int, new: int) -> None:
    mask = np.array(Image.open(path))
    mask[mask == old] = new
    Image.fromarray(mask).save(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": None}, "names neither `index` nor `layout`"),
        ({"teacher": "gone.safetensors"}, "gone.safetensors does not exist"),
        ({"teacher": None}, "needs a teacher; none was given"),
        ({"trainer": {"devise": "cpu"}}, "(?s)job file .* is wrong: .*devise"),
        ({"index": "gone.csv"}, r"index .*gone.csv cannot be read \(No such file"),
        ({"iterations": 5}, "(?s)is wrong: .*iterations"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(write_job, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run_job_file(write_job(**change))
    assert not (tmp_path / "out").exists()


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"JOB.json cannot be read \(No such file"):
        run_job_file(tmp_path / "JOB.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_job(tmp_path, content):
    path = tmp_path / "JOB.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"JOB.json is wrong") as info:
        run_job_file(path)
    assert "\n" not in str(info.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "JOB.json")
    with pytest.raises(UserError, match=r"JOB.json is a named pipe"):
        run_job_file(tmp_path / "JOB.json")


def test_results_below_a_file_are_refused_before_anything_is_trained(write_job):
    with pytest.raises(UserError, match=r"index.csv is no folder, or not writable"):
        run_job_file(write_job(output="index.csv/out"))


def _status(monkeypatch, path) -> int:
    monkeypatch.setattr(sys, "argv", ["training", str(path)])
    return command.main()


def test_the_command_prints_scores_and_returns_zero(write_job, monkeypatch, capsys):
    assert _status(monkeypatch, write_job()) == 0
    lines = capsys.readouterr().out.splitlines()
    # Once another test has set Kedro's logging up, log lines come first.
    assert any(line.startswith("val: mIoU ") for line in lines)


def test_the_command_prints_one_line_and_returns_two_for_an_error(write_job, monkeypatch, capsys):
    assert _status(monkeypatch, write_job(teacher=None)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Method 'tse' distills")
    assert error.count("\n") == 1


def test_the_command_returns_143_when_it_was_stopped(write_job, monkeypatch, capsys):
    step = command.train

    def stopped(*args, **kwargs):
        return step(*args, **kwargs, on_log=lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(command, "train", stopped)
    assert _status(monkeypatch, write_job()) == 143
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["open:teacher.safetensors", "open:index.csv"])
def test_a_signal_at_any_moment_ends_the_command_in_one_line(write_job, tmp_path, moment):
    job = write_job()
    done = warm.run(
        ["-m", "rdd_pipeline.launching", str(job)],
        cwd=tmp_path,
        env={**ENVIRONMENT, "MOMENT": moment, "SIGNALS": "2,15"},
    )
    assert done.returncode == 143
    assert "Traceback" not in done.stderr
    assert sum("topped by SIG" in line for line in done.stderr.splitlines()) == 1


def test_the_code_of_a_teacher_runs_only_if_the_command_names_it(
    write_job, make_job, tmp_path, monkeypatch, capsys
):
    reference = "tests.networks.modules:plain"
    monkeypatch.setattr(foreign, "_permitted", {})
    path = write_job(make_job("kd", recipe={"iterations": 1, "validate_every": 1}))
    params = TeacherParams(network=STUDENT, module=reference)
    save_checkpoint(import_teacher(params, LABELS.names), tmp_path / "teacher.safetensors")
    foreign._permitted.clear()
    monkeypatch.setattr(sys, "argv", ["launching", str(path)])
    assert command.main() == 2
    assert f"or --teacher-module {reference} of" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["launching", str(path), "--teacher-module", reference])
    assert command.main() == 0
