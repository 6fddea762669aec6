"""One training in several processes, started by the function that wants its result."""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from rdd_pipeline.config import TrainerParams
from rdd_pipeline.data.index import to_rows
from rdd_pipeline.errors import DataProblem, NonFiniteLossError, UserError, WorkerFailedError
from rdd_pipeline.evaluation.confusion import Scores
from rdd_pipeline.evaluation.predict import evaluate
from rdd_pipeline.launching import exchange, launch, worker
from rdd_pipeline.launching.channel import TOKEN_VARIABLE, new_token
from rdd_pipeline.launching.join import join
from rdd_pipeline.networks import load_checkpoint, save_checkpoint
from rdd_pipeline.training import loop
from rdd_pipeline.training.stopping import TrainingInterruptedError
from rdd_pipeline.training.store import RunStore
from rdd_pipeline.training.training import Training
from tests.equal import same_training
from tests.training.conftest import CPU, LABELS

from . import faulty

# A launch takes ten seconds on a quiet machine, a minute on a busy one.
pytestmark = pytest.mark.timeout(290)

TWO = CPU.model_copy(update={"devices": 2, "log_every": 1, "max_restarts": 1})


@pytest.fixture(scope="module")
def job(make_job):
    return make_job(recipe={"batch_size": 4, "keep": "last"})


@pytest.fixture(scope="module")
def run(blocks, teacher):
    """Function that trains a job on the blocks by `launch.train`."""

    def call(job, folder, *, trainer=TWO, teacher=teacher, images=blocks.images, **more):
        training = Training(job, images, teacher).stored_in(folder)
        return launch.train(training, trainer, **more)

    return call


@pytest.fixture(scope="module")
def undisturbed(run, job, tmp_path_factory):
    """Folder, result and points of the curves of a run in two processes."""
    folder, points = tmp_path_factory.mktemp("undisturbed"), []
    result = run(job, folder, on_log=lambda iteration, values: points.append((iteration, values)))
    return folder, result, points


@pytest.fixture(scope="module")
def token():
    """The one that is in the environment of all machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, value := new_token())
        yield value


@pytest.fixture
def no_processes(monkeypatch):
    monkeypatch.setattr(launch, "run_workers", lambda *_: pytest.fail("processes were started"))


# ---- without a new process


def test_one_device_is_a_plain_call(run, make_job, blocks, teacher, tmp_path, no_processes):
    job = make_job()
    assert same_training(
        run(job, tmp_path, trainer=CPU),
        loop.train(Training(job, blocks.images, teacher), CPU),
    )


def test_bad_input_is_the_same_user_error(run, make_job, tmp_path, no_processes):
    with pytest.raises(UserError, match="'tse' distills and needs a teacher; none was given"):
        run(make_job(recipe={"batch_size": 4}), tmp_path, teacher=None)


def test_a_batch_that_cannot_be_shared_is_refused(run, make_job, tmp_path, no_processes):
    with pytest.raises(UserError, match="batch_size is 3, not a multiple of 2 devices"):
        run(make_job(recipe={"batch_size": 3}), tmp_path)


def test_several_devices_need_a_work_folder(job, blocks, teacher, no_processes):
    with pytest.raises(UserError, match=r"devices is 2: .* work folder, but none was given"):
        launch.train(Training(job, blocks.images, teacher), TWO)


def test_an_error_names_its_kind_through_the_exchange():
    here = exchange.host(TWO)
    training = here.publish({})
    for rank, (kind, final) in enumerate(
        [("RuntimeError", None), ("DataProblem", "DataProblem"), ("UserError", "UserError")]
    ):
        failure = exchange.Failure(
            rank=rank,
            attempt=0,
            kind=kind,
            message=f"{kind}!",
            traceback="",
            final=final,
            lost_peer=False,
        )
        exchange.Exchange.connect(here.endpoint, here.token).report(training, failure)
    with pytest.raises(DataProblem, match=r"^DataProblem!$"):
        launch.raise_final(here.failures(training))


def test_commands_have_folders_of_their_own_and_what_killed_ones_left_is_removed(tmp_path):
    (tmp_path / "launch-killed").mkdir()
    (tmp_path / "launch-killed" / "task.json").touch()
    own = launch.own_folder
    with own(tmp_path, "launch-") as one, own(tmp_path, "launch-") as other:
        assert set(tmp_path.iterdir()) == {one, other}
    assert not list(tmp_path.iterdir())


def test_what_is_no_folder_of_a_killed_command_is_left_alone(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    os.mkfifo(tmp_path / "launch-fifo")  # one would wait for its writer
    (tmp_path / "launch-link").symlink_to(precious)
    with launch.own_folder(tmp_path, "launch-"):
        pass
    names = {"launch-fifo", "launch-link", "precious"}
    assert {path.name for path in tmp_path.iterdir()} == names


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
    with pytest.raises(UserError, match=r"this machine cannot listen there .* the first one"):
        run(job, tmp_path, trainer=trainer)


def test_a_machine_that_finds_no_training_says_so(token):
    with pytest.raises(
        UserError, match=r"no training at 127.0.0.1:1 after 0.1 seconds \(.*Start it"
    ):
        join("127.0.0.1:1", timeout=0.1)


# ---- in two processes


def test_two_processes_train_one_network(undisturbed, job):
    _, result, points = undisturbed
    assert (result.trained, result.state.iteration) == (8, 8)
    assert result.state.cost.images == 32
    # What is counted class by class stays in the history.
    rows = [
        {k: v for k, v in row.items() if k.rpartition(".")[2] not in LABELS.names}
        for row in result.history
    ]
    seen = [{"iteration": iteration, **values} for iteration, values in points]
    for row in seen:
        row.pop("images_per_second", None)
        row.pop("waiting_for_images", None)
    assert seen == rows


def test_their_evaluation_is_that_of_one_process(undisturbed, job, blocks):
    _, result, _ = undisturbed
    matrix = evaluate(
        result.network.build(),
        result.network.header.preprocessing,
        blocks.images.split("val").evaluation_batches(4),
        num_classes=3,
        ignore_index=255,
    )
    (last,) = (row for row in result.history if "val.miou" in row and row["iteration"] == 8)
    assert last["val.miou"] == Scores.from_matrix(matrix).miou


def test_what_is_done_is_loaded_and_the_way_there_is_cleared(undisturbed, run, job, no_processes):
    folder, result, _ = undisturbed
    again = run(job, folder)
    assert again.trained == 0
    assert same_training(again, result)
    assert not list(folder.rglob("launch-*"))


def test_killed_once_it_ends_as_if_nothing_had_happened(
    undisturbed, run, job, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(worker, "train_worker", faulty.killed_once)
    with caplog.at_level(logging.INFO):
        result = run(job, tmp_path)
    assert same_training(result, undisturbed[1])
    assert result.trained == 8
    assert "a process ended; all start again from the last checkpoint (1 of 1)" in caplog.text
    assert "tse: going on after iteration 2." in caplog.text


def test_failing_again_and_again_it_ends_with_the_error_of_the_process(
    run, job, tmp_path, monkeypatch
):
    monkeypatch.setattr(worker, "train_worker", faulty.always_fails)
    with pytest.raises(WorkerFailedError) as info:
        run(job, tmp_path)
    message = str(info.value)
    assert message.startswith("ZeroDivisionError: a fault of its own\n")
    assert "process 1 of 2 failed with it after 1 restart. " in message
    assert "The last checkpoint (iteration 2) is whole; the same command goes on" in message
    assert "faulty.py" in message  # its own traceback


def test_a_signal_saves_and_stops(run, job, tmp_path, monkeypatch, teacher, blocks):
    monkeypatch.setattr(worker, "train_worker", faulty.slow)
    before = [signal.getsignal(number) for number in launch.STOP_SIGNALS]
    sent = []

    def on_log(iteration, values):
        if not sent:
            sent.append(iteration)
            os.kill(os.getpid(), signal.SIGTERM)

    rare = TWO.model_copy(update={"checkpoint_every": 1e6})
    with pytest.raises(
        TrainingInterruptedError, match=r"after iteration \d of 8. Its state is sav"
    ):
        run(job, tmp_path, trainer=rare, on_log=on_log)
    assert [signal.getsignal(number) for number in launch.STOP_SIGNALS] == before
    store = RunStore(tmp_path, Training(job, blocks.images, teacher).fingerprint)
    assert sent[0] <= store.latest().iteration < 8


@pytest.mark.slow
def test_what_the_user_has_to_mend_is_not_tried_again(run, job, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(worker, "train_worker", faulty.wrong_input)
    with pytest.raises(UserError, match=r"^image 7 is not what it was. Put it back.$"):
        run(job, tmp_path)
    assert "start again" not in caplog.text


def test_what_all_processes_end_with_ends_the_run_at_once(run, job, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(worker, "train_worker", faulty.diverges)
    with pytest.raises(NonFiniteLossError, match=r"^loss = nan. The step was not taken.$"):
        run(job, tmp_path)
    assert "start again" not in caplog.text
    assert not list(tmp_path.rglob("launch*"))


def _listening(pids: list[int]) -> set[tuple[str, int]]:
    """Where processes listen for TCP connections: address in the kernel's hexadecimal, port."""
    links = []
    for fd in (fd for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(fd))
    tables = [Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table]
    return {
        (row[1].split(":")[0], int(row[1].split(":")[1], 16))
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in links
    }


class _Evil:
    """What touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return Path.touch, (self._mark,)


def _attack(port: int, mark: Path) -> bool:
    """Put a pickle where elastic unpickles its state; returns whether a store took it."""
    time_limit = {"timeout": timedelta(seconds=1)}
    try:
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, **time_limit)
        for training in range(1, 10):
            state = base64.b64encode(pickle.dumps(_Evil(mark))).decode()
            store.set(f"torch.rendezvous.training-{training}", state)
    except dist.DistError:
        return False
    return True


def test_on_one_machine_nothing_listens_to_another_and_strangers_run_no_code(
    undisturbed, run, job, tmp_path, caplog
):
    found, taken, files, seen = set(), [], [], []
    token = exchange.host(TWO).token.encode()

    def on_log(iteration, values):
        if iteration == 2:
            found.update(_listening([os.getpid(), *_descendants(os.getpid())]))
            taken.extend(_attack(port, tmp_path / "mark") for _, port in found)
            files.extend(path for path in tmp_path.rglob("*") if path.is_file())
            seen.extend(path for path in files if token in path.read_bytes())

    with caplog.at_level(logging.INFO):
        result = run(job, tmp_path / "work", on_log=on_log)
    assert {address for address, _ in found} == {"0100007F"}  # 127.0.0.1
    assert not any(taken)
    assert files
    assert not seen  # no file has the token
    assert not (tmp_path / "mark").exists()
    assert caplog.text.count("to the rendezvous was closed") == 1
    assert same_training(result, undisturbed[1])


# ---- by torchrun


def _write_job_file(folder: Path, job, trainer, images, teacher) -> Path:
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, to_rows(images.samples)[0])
        writer.writeheader()
        writer.writerows(to_rows(images.samples))
    save_checkpoint(teacher, folder / "teacher.safetensors")
    content = {
        "job": job.model_dump(mode="json"),
        "root": str(images.root),
        "labels": images.labels.model_dump(mode="json"),
        "trainer": {**trainer.model_dump(mode="json"), "precision": "float32"},
        **{"index": "index.csv", "teacher": "teacher.safetensors", "output": "out"},
    }
    path = folder / "JOB.json"
    path.write_text(json.dumps(content))
    return path


def _free_endpoint() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.slow
def test_two_launchers_of_torchrun_come_to_the_same(undisturbed, job, blocks, teacher, tmp_path):
    trainer = CPU.model_copy(update={"threads": 1, "log_every": 1})
    path = _write_job_file(tmp_path, job, trainer, blocks.images, teacher)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={_free_endpoint()}", "--local-addr=localhost"),
        *("-m", "rdd_pipeline.launching", str(path)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launchers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ends = [launcher.communicate(timeout=200) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], ends
    assert b"".join(out for out, _ in ends).count(b"val: mIoU") == 1
    network = load_checkpoint(tmp_path / "out" / "network.safetensors")
    assert network.digest() == undisturbed[1].network.digest()


# ---- on two "machines": two launchers that share nothing but the loopback interface


class Machine:
    """The second one."""

    def __init__(self, endpoint: str, images: Path) -> None:
        self._command = [
            *(sys.executable, "-m", "rdd_pipeline.launching.join", endpoint),
            *("--data", str(images), "--timeout", "60"),
        ]
        self.images = images
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
def two_machines(blocks, tmp_path_factory, token):
    """Trainer of the first, and the second; its images are a copy at another place."""
    endpoint = _free_endpoint()
    images = tmp_path_factory.mktemp("second") / "images"
    shutil.copytree(blocks.root, images)
    machine = Machine(endpoint, images)
    updates = {"devices": 1, "nodes": 2, "rendezvous": endpoint, "threads": 1, "timeout": 60}
    yield TWO.model_copy(update=updates), machine
    exchange.close(endpoint)
    output, _ = machine.process.communicate(timeout=60)
    assert machine.process.returncode == 0, output


def test_two_machines_come_to_what_two_processes_do(undisturbed, run, job, two_machines, tmp_path):
    trainer, _ = two_machines
    result = run(job, tmp_path, trainer=trainer)
    assert same_training(result, undisturbed[1])
    assert result.trained == 8
    assert run(job, tmp_path, trainer=trainer).trained == 0


@pytest.mark.slow  # on one machine: `killed_once`
def test_a_process_of_the_second_machine_is_killed(
    undisturbed, run, job, two_machines, tmp_path, monkeypatch, caplog
):
    trainer, machine = two_machines
    monkeypatch.setattr(worker, "train_worker", faulty.slow)  # on this one; the other waits for it
    killed = []

    def on_log(iteration, values):
        if iteration == 3 and not killed:
            killed.extend(machine.workers())
            os.kill(killed[0], signal.SIGKILL)

    with caplog.at_level(logging.INFO):
        result = run(job, tmp_path, trainer=trainer, on_log=on_log)
    assert len(killed) == 1
    assert "going on after iteration" in caplog.text
    assert same_training(result, undisturbed[1])


@pytest.mark.slow  # on one machine: `an_error_names_its_kind_through_the_exchange`
def test_what_is_wrong_on_the_second_machine_is_said_on_the_first(
    run, job, two_machines, blocks, tmp_path
):
    trainer, machine = two_machines
    image = machine.images / next(s.image for s in blocks.samples if s.split == "train")
    content = image.read_bytes()
    image.write_bytes(content[:50])
    try:
        with pytest.raises(DataProblem, match=image.name):
            run(job, tmp_path, trainer=trainer)
    finally:
        image.write_bytes(content)


@pytest.mark.slow
def test_the_second_machine_is_lost_and_comes_back(
    undisturbed, run, job, two_machines, tmp_path, monkeypatch
):
    trainer, machine = two_machines
    monkeypatch.setattr(worker, "train_worker", faulty.slow)
    lost = []

    def on_log(iteration, values):
        if iteration == 3 and not lost:
            lost.append(machine.workers())
            machine.process.kill()
            machine.process.communicate()
            threading.Timer(3, machine.start).start()

    assert same_training(run(job, tmp_path, trainer=trainer, on_log=on_log), undisturbed[1])
    assert not any(Path(f"/proc/{pid}").exists() for pid in lost[0])


@pytest.mark.slow
def test_a_signal_to_the_second_machine_saves_and_stops_all(
    run, job, two_machines, tmp_path, monkeypatch
):
    trainer, machine = two_machines
    monkeypatch.setattr(worker, "train_worker", faulty.slow)

    def on_log(iteration, values):
        if iteration == 3:
            machine.process.terminate()

    begun = time.monotonic()
    with pytest.raises(TrainingInterruptedError, match="was asked to stop after iteration"):
        run(job, tmp_path, trainer=trainer, on_log=on_log)
    assert time.monotonic() - begun < 30
    output, _ = machine.process.communicate(timeout=30)
    assert machine.process.returncode == 143
    assert "Stopped" in output
    machine.start()
    assert 0 < run(job, tmp_path, trainer=trainer).trained < 8


@pytest.mark.slow
def test_a_signal_to_the_first_machine_lets_the_second_wait_for_the_next_command(
    undisturbed, run, job, two_machines, tmp_path, monkeypatch
):
    trainer, machine = two_machines
    monkeypatch.setattr(worker, "train_worker", faulty.slow)
    sent = []

    def on_log(iteration, values):
        if iteration == 3 and not sent:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterruptedError, match="was asked to stop after iteration"):
        run(job, tmp_path, trainer=trainer, on_log=on_log)
    assert time.monotonic() - sent[0] < 30
    assert machine.process.poll() is None
    assert same_training(run(job, tmp_path, trainer=trainer), undisturbed[1])


@pytest.mark.slow
def test_without_the_second_machine_the_first_gives_up_in_time(run, job, tmp_path):
    endpoint = _free_endpoint()
    updates = {"devices": 1, "nodes": 2, "rendezvous": endpoint, "threads": 1, "timeout": 5}
    with pytest.raises(WorkerFailedError, match=r"2 machines did not come together .* 5 seconds"):
        run(job, tmp_path, trainer=TWO.model_copy(update=updates))
    exchange.close(endpoint)


@pytest.mark.slow
def test_the_first_machine_is_killed_and_starts_again(
    undisturbed, job, two_machines, blocks, teacher, tmp_path
):
    """Its processes end with it, the second machine waits for it, the end is the same."""
    trainer, machine = two_machines
    if trainer.rendezvous in exchange._hosted:  # the port is the command's now
        exchange.close(trainer.rendezvous)
        machine.process.wait(30)
        machine.start()
    path = _write_job_file(tmp_path, job, trainer, blocks.images, teacher)
    command = [sys.executable, "-m", "rdd_pipeline.launching", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while not list((tmp_path / "out").glob("work/*/state-*.ckpt")):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.002)
    below = _descendants(first.pid)
    first.kill()
    first.communicate()
    assert not list((tmp_path / "out").glob("work/*/done.json"))
    time.sleep(2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "going on after iteration" in done.stderr
    network = load_checkpoint(tmp_path / "out" / "network.safetensors")
    assert network.digest() == undisturbed[1].network.digest()
    machine.process.wait(30)
    assert machine.process.returncode == 0
