"""What each process of a training on several devices does: read the task, train, report.

Elastic agents start it (`launch`). The task lies in a folder, as JSON and safetensors; what a
process has to say meanwhile (points of the curves, log lines) comes back as lines of JSON in that
folder, the error it ends with through the `Exchange`. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from rdd_pipeline.config import Params, TrainerParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import usable_cores
from rdd_pipeline.data.processes import end_with_parent
from rdd_pipeline.errors import DataProblem, NonFiniteLossError, RunInterrupted, UserError
from rdd_pipeline.files import write_atomically
from rdd_pipeline.launching.exchange import LOOPBACK, Exchange, Failure
from rdd_pipeline.networks import load_checkpoint, permit
from rdd_pipeline.training import loop
from rdd_pipeline.training.curves import OnLog
from rdd_pipeline.training.device import resolve_device
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.state import DamagedStateError, TrainState
from rdd_pipeline.training.stopping import TrainingInterruptedError
from rdd_pipeline.training.store import RunStore
from rdd_pipeline.training.training import Training, TrainingResult

logger = logging.getLogger(__name__)

AGREED = (NonFiniteLossError, TrainingInterruptedError)
"""Errors that all ranks of a training end with, in the same iteration."""
FINAL: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (DataProblem, DamagedStateError, UserError, RunInterrupted, *AGREED)
}
"""Errors that a restart does not cure. They end the run, as what they are."""
_SIOCGIFADDR = 0x8915
"""Linux's request for the address of a network interface."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Task(Params):
    """What every process is to do; the tensors lie beside it.

    Attributes:
        trainer: `devices` is a number there, of processes on each machine.
        work: Where checkpoints live, with `fingerprint`: on the first machine; None on the others.
        teacher_module: What the user has named as the code of the teacher, if it has any.
    """

    job: TrainingJob
    trainer: TrainerParams
    images: Images
    work: Path | None
    fingerprint: str
    cwd: Path
    log_level: int
    teacher_module: str | None = None

    @property
    def processes(self) -> int:
        """Processes on each machine."""
        return int(self.trainer.devices)

    def write(self, folder: Path) -> None:
        """Put it where the processes of this machine look for it."""
        write_atomically(folder / "task.json", self.model_dump_json().encode())


def train_worker(path: str, endpoint: str, token: str, training: int) -> None:
    """The whole life of a process.

    Elastic's agent records an error that is raised here and starts all processes of the training
    again. A normal return ends it on this machine.

    Args:
        path: Folder with the task.
        endpoint: HOST:PORT of the `Exchange`.
        token: Opens it.
        training: Number of the training there.
    """
    end_with_parent()
    exchange = Exchange.connect(endpoint, token)
    if any(failure.final for failure in exchange.failures(training)):
        # The agent starts them again after any failure; this one would come again.
        return
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in STOP_SIGNALS}
    try:
        _do(Path(path), exchange, stop)
    except BaseException as error:
        with contextlib.suppress(dist.DistError):  # the first machine is gone
            exchange.report(training, _failure(error))
        # An agent that a signal has ended takes no result any more.
        if not isinstance(error, AGREED) or stop.is_set():
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure(error: BaseException) -> Failure:
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in FINAL]
    return Failure(
        rank=int(os.environ["RANK"]),
        attempt=_attempt(),
        kind=type(error).__name__,
        message=str(error),
        traceback=traceback.format_exc()[-100_000:],
        final=kinds[0] if kinds else None,
        lost_peer=isinstance(error, dist.DistError)
        or (type(error) is RuntimeError and "gloo" in str(error).lower()),
    )


def _attempt() -> int:
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def _do(folder: Path, exchange: Exchange, stop: threading.Event) -> None:
    task = Task.model_validate_json((folder / "task.json").read_text())
    os.chdir(task.cwd)
    events = _Events(folder / "events.jsonl")
    speaks = task.work is not None and os.environ["LOCAL_RANK"] == "0"
    _forward_log(events if speaks else logging.NullHandler(), task.log_level)
    if _attempt() and speaks:
        logger.warning(
            "%s: a process ended; all start again from the last checkpoint (%d of %d).",
            task.job.title,
            _attempt(),
            task.trainer.max_restarts,
        )
    if task.teacher_module is not None:
        permit(task.teacher_module)
    teacher, start = folder / "teacher.safetensors", folder / "start.ckpt"
    training = Training(
        task.job,
        task.images,
        load_checkpoint(teacher) if teacher.exists() else None,
        TrainState.from_bytes(start.read_bytes(), source=str(start)) if start.exists() else None,
        None if task.work is None else RunStore(task.work, task.fingerprint),
    )
    trainer = task.trainer
    if trainer.threads is None and resolve_device(trainer.device).type == "cpu":
        # Each process would take all cores.
        threads = max(1, usable_cores() // task.processes)
        trainer = trainer.model_copy(update={"threads": threads})
    train_in_group(
        training,
        trainer,
        lambda iteration, values: events.write({"iteration": iteration, "values": dict(values)}),
        stop,
        exchange=exchange,
    )


def train_in_group(
    training: Training,
    trainer: TrainerParams,
    on_log: OnLog | None,
    stop: threading.Event | None = None,
    *,
    exchange: Exchange | None = None,
) -> TrainingResult:
    """Train as one of the processes that RANK and WORLD_SIZE speak of.

    `exchange`: where they find one another; None: at the MASTER_ADDR of torchrun.
    """
    device = resolve_device(trainer.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        _init_process_group(device, trainer, exchange)
    result = loop.train(
        training, trainer, group=dist.group.WORLD, device=device, on_log=on_log, stop=stop
    )
    # Not after an error: taking leave of a process that is gone can take for ever.
    if ours:
        dist.destroy_process_group()
    return result


def _init_process_group(
    device: torch.device, trainer: TrainerParams, exchange: Exchange | None
) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=trainer.timeout)
    if exchange is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    # Otherwise they choose one by this machine's name, which may resolve to nothing.
    address = trainer.address if trainer.nodes > 1 else None
    if interface := _interface(address or exchange.store.local_address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    elif address and sys.platform == "linux":
        logger.warning(
            "No network interface here has the address %s (trainer.address, --address): gloo and "
            "NCCL choose one by themselves. Give the address of one, or leave it out.",
            address,
        )
    exchange.store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        timeout=timeout,
        store=PrefixStore(os.environ["MASTER_ADDR"], exchange.store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def _interface(name: str) -> str | None:
    """The network interface with an IPv4 address; None: there is none, or the system is no Linux.

    The one of the loopback is found elsewhere, too.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_one:
        address = socket.gethostbyname(name)
        for _, interface in socket.if_nameindex():
            if address == LOOPBACK and interface.startswith("lo"):
                return interface
            request = struct.pack("256s", interface.encode()[:15])
            with contextlib.suppress(OSError):  # it has no address
                found = fcntl.ioctl(any_one, _SIOCGIFADDR, request)
                if socket.inet_ntoa(found[20:24]) == address:
                    return interface
    return None


class _Events(logging.Handler):
    """Lines of JSON for the process that launched this one: points of curves, log records."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("ab", buffering=0)

    def write(self, event: Mapping[str, Any]) -> None:
        """In one piece, or not at all."""
        self._file.write(json.dumps(event).encode() + b"\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.write({"logger": record.name, "level": record.levelno, "message": record.getMessage()})


def _forward_log(handler: logging.Handler, level: int) -> None:
    """Log to the launching process from now on."""
    package = logging.getLogger(__name__.split(".")[0])
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(level)
