"""One training in several processes, started by the function that wants its result."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.testing import assert_close

from rdd_pipeline.config import TrainerParams
from rdd_pipeline.errors import DataProblem, UserError, WorkerFailedError
from rdd_pipeline.evaluation.confusion import Scores
from rdd_pipeline.evaluation.predict import evaluate
from rdd_pipeline.segmentation.loading import evaluation_batches
from rdd_pipeline.training import launch, loop, machines, worker
from rdd_pipeline.training.checkpoints import WorkFolder
from rdd_pipeline.training.join import join
from rdd_pipeline.training.loop import TrainingInterruptedError, job_fingerprint

from . import faulty
from .conftest import CPU, LABELS

# A launch takes ten seconds on a quiet machine, a minute on a busy one.
pytestmark = pytest.mark.timeout(290)

TWO = CPU.model_copy(update={"devices": 2, "log_every": 1, "max_restarts": 1})


@pytest.fixture(scope="module")
def job(make_job):
    return make_job(recipe={"batch_size": 4, "keep": "last"})


@pytest.fixture(scope="module")
def run(blocks, teacher):
    """Function that trains a job on the blocks by `launch.train`."""

    def call(job, folder, *, trainer=TWO, teacher=teacher, samples=blocks.samples, **more):
        work = WorkFolder(folder, job_fingerprint(job, samples, teacher, None))
        return launch.train(job, samples, trainer=trainer, teacher=teacher, work=work, **more)

    return call


@pytest.fixture(scope="module")
def undisturbed(run, job, tmp_path_factory):
    """Folder, result and points of the curves of a run in two processes."""
    folder, points = tmp_path_factory.mktemp("undisturbed"), []
    result = run(job, folder, observe=lambda iteration, values: points.append((iteration, values)))
    return folder, result, points


@pytest.fixture
def no_processes(monkeypatch):
    monkeypatch.setattr(launch, "run_workers", lambda *_: pytest.fail("processes were started"))


def _same(one, other) -> None:
    for part in ("iteration", "student", "objective", "optimizer", "best"):
        assert_close(one.state[part], other.state[part], rtol=0, atol=0)
    assert_close(one.network.tensors, other.network.tensors, rtol=0, atol=0)


# ---- without a new process


def test_one_device_is_a_plain_call(run, make_job, blocks, teacher, tmp_path, no_processes):
    job = make_job()
    _same(
        run(job, tmp_path, trainer=CPU),
        loop.train(job, blocks.samples, trainer=CPU, teacher=teacher),
    )


def test_bad_input_is_the_same_user_error(run, make_job, tmp_path, no_processes):
    with pytest.raises(UserError, match="'tse' distills and needs a teacher; none was given"):
        run(make_job(recipe={"batch_size": 4}), tmp_path, teacher=None)


def test_a_batch_that_cannot_be_shared_is_refused(run, make_job, tmp_path, no_processes):
    with pytest.raises(UserError, match="batch_size is 3, not a multiple of 2 devices"):
        run(make_job(recipe={"batch_size": 3}), tmp_path)


def test_several_devices_need_a_work_folder(job, blocks, teacher, no_processes):
    with pytest.raises(UserError, match=r"devices is 2: .* work folder, but none was given"):
        launch.train(job, blocks.samples, trainer=TWO, teacher=teacher)


def test_an_error_names_its_kind_through_the_folder(tmp_path):
    for number, (kind, when) in enumerate([("NonFiniteLossError", 2.0), ("DataProblem", 1.0)]):
        (tmp_path / f"fault-0-{number}.json").write_text(
            f'{{"final": "{kind}", "message": "{kind}!", "time": {when}}}'
        )
    with pytest.raises(DataProblem, match=r"^DataProblem!$"):
        launch._raise_fault(tmp_path)


def test_several_machines_need_a_place_to_meet():
    with pytest.raises(ValueError, match=r"nodes is 2, but rendezvous is not set. Give HOST:PORT"):
        TrainerParams(nodes=2)


@pytest.mark.parametrize("endpoint", ["node1", "node1:", ":29400", "node1:http", "node1:70000"])
def test_an_address_that_is_none_is_refused(endpoint, run, job, tmp_path, no_processes):
    trainer = TWO.model_copy(update={"devices": 1, "nodes": 2, "rendezvous": endpoint})
    with pytest.raises(UserError, match="expected HOST:PORT, as in node1:29400"):
        run(job, tmp_path, trainer=trainer)


def test_an_address_of_another_machine_is_refused(run, job, tmp_path, no_processes):
    trainer = TWO.model_copy(
        update={"devices": 1, "nodes": 2, "rendezvous": "192.0.2.1:29400"}  # for documentation
    )
    with pytest.raises(UserError, match="this machine cannot listen there .* the first one"):
        run(job, tmp_path, trainer=trainer)


def test_a_machine_that_finds_no_training_says_so():
    with pytest.raises(UserError, match=r"no training at 127.0.0.1:1 after 0.1 seconds. Start it"):
        join("127.0.0.1:1", patience=0.1)


# ---- in two processes


def test_two_processes_train_one_network(undisturbed, job):
    _, result, points = undisturbed
    assert (result.trained, result.state["iteration"]) == (8, 8)
    assert result.state["cost"]["images"] == 32
    rows = [dict(row) for row in result.history]
    seen = [{"iteration": iteration, **values} for iteration, values in points]
    for row in seen:
        row.pop("images_per_second", None)
    assert seen == rows


def test_their_evaluation_is_that_of_one_process(undisturbed, job, blocks):
    _, result, _ = undisturbed
    matrix = evaluate(
        result.network.build(),
        result.network.header.preprocessing,
        evaluation_batches(
            [sample for sample in blocks.samples if sample.split == "val"],
            blocks.root,
            batch_size=4,
            lookup=LABELS.lookup,
        ),
        num_classes=3,
        ignore_index=255,
    )
    (last,) = (row for row in result.history if "val.miou" in row and row["iteration"] == 8)
    assert last["val.miou"] == Scores.from_matrix(matrix).miou


def test_what_is_done_is_loaded_and_the_way_there_is_cleared(undisturbed, run, job, no_processes):
    folder, result, _ = undisturbed
    again = run(job, folder)
    assert again.trained == 0
    _same(again, result)
    assert not list(folder.rglob("launch"))


def test_killed_once_it_ends_as_if_nothing_had_happened(
    undisturbed, run, job, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(worker, "work", faulty.killed_once)
    with caplog.at_level(logging.INFO):
        result = run(job, tmp_path)
    _same(result, undisturbed[1])
    assert result.trained == 8
    assert "a process ended; all start again from the last checkpoint (1 of 1)" in caplog.text
    assert "tse: going on after iteration 2." in caplog.text


def test_failing_again_and_again_it_ends_with_the_error_of_the_process(
    run, job, tmp_path, monkeypatch
):
    monkeypatch.setattr(worker, "work", faulty.always_fails)
    with pytest.raises(WorkerFailedError) as info:
        run(job, tmp_path)
    message = str(info.value)
    assert message.startswith("ZeroDivisionError: a fault of its own\n")
    assert "process 1 of 2 failed with it after 1 restart. " in message
    assert "The last checkpoint (iteration 2) is whole; the same command goes on" in message
    assert "faulty.py" in message  # its own traceback


def test_a_signal_saves_and_stops(run, job, tmp_path, monkeypatch, teacher, blocks):
    monkeypatch.setattr(worker, "work", faulty.slow)
    before = [signal.getsignal(number) for number in launch.STOP_SIGNALS]
    sent = []

    def observe(iteration, values):
        if not sent:
            sent.append(iteration)
            os.kill(os.getpid(), signal.SIGTERM)

    rare = TWO.model_copy(update={"checkpoint_every": 1e6})
    with pytest.raises(
        TrainingInterruptedError, match=r"after iteration \d of 8. Its state is sav"
    ):
        run(job, tmp_path, trainer=rare, observe=observe)
    assert [signal.getsignal(number) for number in launch.STOP_SIGNALS] == before
    work = WorkFolder(tmp_path, job_fingerprint(job, blocks.samples, teacher, None))
    assert sent[0] <= work.latest()["iteration"] < 8


@pytest.mark.slow
def test_what_the_user_has_to_mend_is_not_tried_again(run, job, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(worker, "work", faulty.wrong_input)
    with pytest.raises(UserError, match=r"^image 7 is not what it was. Put it back.$"):
        run(job, tmp_path)
    assert "start again" not in caplog.text


# ---- on two "machines": two launchers that share nothing but the loopback interface


class Machine:
    """The second one."""

    def __init__(self, endpoint: str, images: Path) -> None:
        self._command = [
            *(sys.executable, "-m", "rdd_pipeline.training.join", endpoint),
            *("--data", str(images), "--patience", "60"),
        ]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def workers(self) -> list[int]:
        """Processes of it that train: children of its fork server that have forked on."""
        return [pid for pid in _descendants(self.process.pid) if _trains(pid)]


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [below for child in found for below in _descendants(child)]


def _trains(pid: int) -> bool:
    """A process of gloo has threads of that name."""
    names = [path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")]
    return any("gloo" in name for name in names)


@pytest.fixture(scope="module")
def two_machines(blocks, tmp_path_factory):
    """Trainer of the first, and the second; its images are a copy at another place."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    images = tmp_path_factory.mktemp("second") / "images"
    shutil.copytree(blocks.root, images)
    machine = Machine(endpoint, images)
    updates = {"devices": 1, "nodes": 2, "rendezvous": endpoint, "threads": 1, "patience": 60}
    yield TWO.model_copy(update=updates), machine
    machines.close(endpoint, 1)
    output, _ = machine.process.communicate(timeout=60)
    assert machine.process.returncode == 0, output


def test_two_machines_come_to_what_two_processes_do(undisturbed, run, job, two_machines, tmp_path):
    trainer, _ = two_machines
    result = run(job, tmp_path, trainer=trainer)
    _same(result, undisturbed[1])
    assert result.trained == 8
    assert run(job, tmp_path, trainer=trainer).trained == 0
