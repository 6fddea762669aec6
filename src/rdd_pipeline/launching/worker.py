"""What each process of a training on several devices does: read the task, train, report.

It is started by torch's elastic launcher (`launch`), or by torchrun. Everything passes through
files in a folder that the launcher has filled: the task goes in as JSON and safetensors, and
whatever a process has to say meanwhile (points of the curves, log lines, the error it ends with)
comes back as lines of JSON. Nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rdd_pipeline.config import Params, TrainerParams
from rdd_pipeline.data.index import Sample
from rdd_pipeline.data.processes import end_with_parent
from rdd_pipeline.errors import (
    INTERRUPTED,
    DataProblem,
    NonFiniteLossError,
    RunInterrupted,
    UserError,
)
from rdd_pipeline.files import write_atomically
from rdd_pipeline.networks import NetworkCheckpoint, load_checkpoint
from rdd_pipeline.training import loop
from rdd_pipeline.training.device import resolve_device
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.loop import OnLog, TrainingResult
from rdd_pipeline.training.preparation import title_of
from rdd_pipeline.training.state import DamagedStateError, TrainState
from rdd_pipeline.training.stopping import TrainingInterruptedError
from rdd_pipeline.training.store import RunStore

logger = logging.getLogger(__name__)

# Errors that a restart does not cure. They end the run at once, as what they are.
FINAL: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        DataProblem,
        DamagedStateError,
        UserError,
        NonFiniteLossError,
        TrainingInterruptedError,
        RunInterrupted,
    )
}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_ABORT = "abort"


class Task(Params):
    """What every process is to do; the tensors lie beside it.

    `work` and `fingerprint` say where checkpoints live: on the first machine, None on the others.
    """

    job: TrainingJob
    trainer: TrainerParams
    samples: tuple[Sample, ...]
    work: Path | None
    fingerprint: str
    cwd: Path
    log_level: int


def faults(folder: Path) -> list[dict[str, Any]]:
    """What processes ended with, one entry for each that failed."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("fault-*.json"))]


def any_final(folder: Path) -> bool:
    """Whether a process ended with something that a restart does not cure."""
    return any(fault["final"] for fault in faults(folder))


def abort(folder: Path) -> None:
    """Let all processes of this machine end at once, also those that wait for others."""
    (folder / _ABORT).touch()


def work(path: str) -> None:
    """The whole life of a process; `path` is the folder with the task."""
    end_with_parent()
    folder = Path(path)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if any_final(folder):
        # The launcher starts them again after any fault; this one would come again.
        return
    stop = threading.Event()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: stop.set())
    try:
        _do(folder, rank, attempt, stop)
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in FINAL]
        fault = {
            "rank": rank,
            "attempt": attempt,
            "time": time.time(),
            "kind": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
            "final": kinds[0] if kinds else None,
            "peer": _lost_a_peer(error),
        }
        write_atomically(folder / f"fault-{attempt}-{rank}.json", json.dumps(fault).encode())
        # At once: a launcher that is leaving too does not take a result any more, and taking leave
        # of processes that are gone can take for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED if isinstance(error, RunInterrupted) else 2 if kinds else 1)


def _watch_for_abort(folder: Path) -> None:
    while not (folder / _ABORT).exists():
        time.sleep(0.3)
    os._exit(2)


def on_one_machine(trainer: TrainerParams) -> bool:
    """Whether all processes are on this machine: they meet by the loopback interface."""
    if trainer.nodes == 1 or trainer.rendezvous is None:
        return True
    return trainer.rendezvous.rpartition(":")[0] in ("127.0.0.1", "localhost")


def _do(folder: Path, rank: int, attempt: int, stop: threading.Event) -> None:
    task = Task.model_validate_json((folder / "task.json").read_text())
    os.chdir(task.cwd)
    events = _Events(folder / "events.jsonl")
    speaks = task.work is not None and os.environ.get("LOCAL_RANK", "0") == "0"
    _forward_log(events if speaks else None, task.log_level)
    if attempt and speaks:
        logger.warning(
            "%s: a process ended; all start again from the last checkpoint (%d of %d).",
            title_of(task.job),
            attempt,
            task.trainer.max_restarts,
        )
    teacher, start = folder / "teacher.safetensors", folder / "start.ckpt"
    if task.trainer.nodes > 1:
        threading.Thread(target=_watch_for_abort, args=(folder,), daemon=True).start()
    if "GLOO_SOCKET_IFNAME" not in os.environ and on_one_machine(task.trainer):
        # The machine's own name may resolve to nothing.
        names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        if names:
            os.environ["GLOO_SOCKET_IFNAME"] = names[0]
    train_in_group(
        task.job,
        task.samples,
        task.trainer,
        load_checkpoint(teacher) if teacher.exists() else None,
        TrainState.from_bytes(start.read_bytes(), source=str(start)) if start.exists() else None,
        None if task.work is None else RunStore(task.work, task.fingerprint),
        lambda iteration, values: events.write({"iteration": iteration, "values": dict(values)}),
        stop,
    )


def train_in_group(
    job: TrainingJob,
    samples: Sequence[Sample],
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None,
    initial_state: TrainState | None,
    store: RunStore | None,
    on_log: OnLog | None,
    stop: threading.Event | None,
) -> TrainingResult:
    """Train as one of the processes that RANK and WORLD_SIZE speak of."""
    device = resolve_device(trainer.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=trainer.timeout),
        )
    result = loop.train(
        job,
        samples,
        trainer=trainer,
        teacher=teacher,
        initial_state=initial_state,
        store=store,
        group=dist.group.WORLD,
        device=device,
        on_log=on_log,
        stop=stop,
    )
    # Not after an error: taking leave of a process that is gone can take for ever.
    if ours:
        dist.destroy_process_group()
    return result


def _lost_a_peer(error: BaseException) -> bool:
    """Whether a process fails because another one did."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and "gloo" in str(error).lower()
    )


class _Events:
    """Lines of JSON for the process that launched this one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, event: Mapping[str, Any]) -> None:
        """In one piece, or not at all."""
        self._file.write(json.dumps(event).encode() + b"\n")


class _Forward(logging.Handler):
    """Sends log records to the process that launched this one."""

    def __init__(self, events: _Events) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self._events.write(
            {"logger": record.name, "level": record.levelno, "message": record.getMessage()}
        )


def _forward_log(events: _Events | None, level: int) -> None:
    """Log to the launching process from now on; None: nowhere."""
    package = logging.getLogger(__name__.split(".")[0])
    package.handlers = [logging.NullHandler() if events is None else _Forward(events)]
    package.propagate = False
    package.setLevel(level)
