"""One training on several devices of this machine, started from inside any function.

`train` is `loop.train` that first starts `trainer.devices` processes, by torch's elastic launcher.
Everything passes through files in the work folder: the task goes in as JSON, safetensors and a
training state, the result comes back as the work's final state, and whatever a process has to say
meanwhile (points of the curves, log lines, the error it ends with) as lines of JSON. Nothing is
unpickled, and nobody but this process talks to Kedro or MLflow.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rdd_pipeline.config import Params, TrainerParams
from rdd_pipeline.errors import (
    INTERRUPTED,
    DataProblem,
    NonFiniteLossError,
    RunInterrupted,
    UserError,
    WorkerFailedError,
)
from rdd_pipeline.networks import NetworkCheckpoint, load_checkpoint, save_checkpoint
from rdd_pipeline.segmentation.index import Sample, usable_cores
from rdd_pipeline.segmentation.processes import end_with_parent, hidden_main
from rdd_pipeline.training import loop
from rdd_pipeline.training.checkpoints import (
    DamagedStateError,
    State,
    WorkFolder,
    dumps,
    loads,
    write_atomically,
)
from rdd_pipeline.training.device import resolve_device, resolve_devices
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.loop import Observer, TrainingInterruptedError, TrainingResult

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
_POLL = 0.2
"""Seconds between looks at what the processes have written."""


def train(
    job: TrainingJob,
    samples: Sequence[Sample],
    *,
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None = None,
    start: State | None = None,
    work: WorkFolder | None = None,
    observe: Observer | None = None,
) -> TrainingResult:
    """`loop.train` on as many devices as `trainer.devices` says.

    With one device it is that very call. In a process that torchrun, or whatever else sets RANK
    and WORLD_SIZE, has started, it trains together with the others of its kind.

    Raises:
        UserError: The pieces do not fit together, or memory or disk space ran out.
        NonFiniteLossError: A loss became NaN or infinite; the step was not taken.
        TrainingInterruptedError: A signal asked to stop; the state was saved.
        WorkerFailedError: A process failed more often than `trainer.max_restarts`.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _train_in_group(job, samples, trainer, teacher, start, work, observe, None)
    processes = resolve_devices(trainer, job.recipe.batch_size)
    if processes > 1:
        if work is None:
            raise UserError(
                f"trainer.devices is {processes}: several processes meet in a work folder, but "
                "none was given. Give one, or set trainer.devices=1."
            )
        loop.check_inputs(job, samples, teacher, start, processes)
        if work.finished_state() is None:
            return _launch(job, samples, trainer, teacher, start, work, observe, processes)
    return loop.train(
        job, samples, trainer=trainer, teacher=teacher, start=start, work=work, observe=observe
    )


# ---- in the process that launches


class _Task(Params):
    """What every process is to do; the tensors lie beside it."""

    job: TrainingJob
    trainer: TrainerParams
    samples: tuple[Sample, ...]
    work: Path
    fingerprint: str
    cwd: Path
    log_level: int


def _launch(
    job: TrainingJob,
    samples: Sequence[Sample],
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None,
    start: State | None,
    work: WorkFolder,
    observe: Observer | None,
    processes: int,
) -> TrainingResult:
    title = loop.title_of(job)
    begun = work.latest() or start
    folder = work.path.resolve() / "launch"
    shutil.rmtree(folder, ignore_errors=True)
    if resolve_device(trainer.device).type == "cpu" and trainer.threads is None:
        # Each of them would take all cores.
        threads = max(1, usable_cores() // processes)
        trainer = trainer.model_copy(update={"threads": threads})
    try:
        task = _Task(
            job=job,
            trainer=trainer,
            samples=tuple(samples),
            work=work.path.parent.resolve(),
            fingerprint=work.fingerprint,
            cwd=Path.cwd(),
            log_level=logger.getEffectiveLevel(),
        )
        write_atomically(folder / "task.json", task.model_dump_json().encode())
        if teacher is not None:
            save_checkpoint(teacher, folder / "teacher.safetensors")
        if start is not None:
            write_atomically(folder / "start.ckpt", dumps(start))
        logger.info("%s: %d processes train together.", title, processes)
        try:
            with _Relay(folder, observe), _own_signal_handlers(), _elastic_is_quiet():
                _run_workers(folder, processes, trainer.max_restarts)
        except (SignalException, ChildFailedError, RunInterrupted) as error:
            _raise_fault(folder)
            _raise_otherwise(error, title, work, folder, processes, trainer.max_restarts)
        _raise_fault(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    state = work.finished_state()
    if state is None:
        raise WorkerFailedError(
            f"{title}: all processes came to their end, but {work.path} holds no final state. "
            "Look at the disk and repeat the command."
        )
    return TrainingResult(
        state=state,
        network=loop.network_of(job, state),
        fingerprint=work.fingerprint,
        trained=state["iteration"] - (begun["iteration"] if begun is not None else 0),
    )


def _run_workers(folder: Path, processes: int, max_restarts: int) -> None:
    # Otherwise processes that are started again read the addresses of dead ones, and hang
    # (pytorch#135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # A process is forked from one that has imported all this: seconds become tenths of one.
    multiprocessing.set_forkserver_preload(
        ["torch", "torch._dynamo", "torch.distributed", "torch.nn.parallel", __name__]
    )
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # the host's own name may not resolve
        max_restarts=max_restarts,
        monitor_interval=0.1,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "elastic")),
    )
    with hidden_main():
        elastic_launch(config, _worker)(str(folder))


class _Relay:
    """Passes on what the processes write, to the observer and the log of this one."""

    def __init__(self, folder: Path, observe: Observer | None) -> None:
        self._path = folder / "events.jsonl"
        self._observe = observe
        self._position = 0
        self._over = threading.Event()
        # Whoever listens to the curves listens in this context.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._follow,), name="curves of the workers", daemon=True
        )

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(_POLL):
            self._pass_on()
        self._pass_on()

    def _pass_on(self) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                lines = file.read()
        except FileNotFoundError:
            return
        whole = lines[: lines.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # cut short by the end of its process
                continue
            if "values" in event and self._observe is not None:
                self._observe(event["iteration"], event["values"])
            elif "message" in event:
                logging.getLogger(event["logger"]).log(event["level"], "%s", event["message"])


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put the handlers back that the launcher replaces and forgets."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _elastic_is_quiet() -> Iterator[None]:
    """What matters of the launcher's many lines is said by this module, in one."""
    elastic = logging.getLogger("torch.distributed.elastic")
    silence, propagate = logging.NullHandler(), elastic.propagate
    elastic.addHandler(silence)
    elastic.propagate = False
    try:
        yield
    finally:
        elastic.propagate = propagate
        elastic.removeHandler(silence)


def _raise_fault(folder: Path) -> None:
    """Raise what a process ended the run with, as the same kind of error."""
    faults = [fault for fault in _faults(folder) if fault["final"]]
    if faults:
        first = min(faults, key=lambda fault: float(fault["time"]))
        raise FINAL[first["final"]](first["message"])


def _raise_otherwise(
    error: Exception, title: str, work: WorkFolder, folder: Path, processes: int, restarts: int
) -> NoReturn:
    """Raise what became of processes that could not finish their task."""
    state = work.latest()
    kept = (
        f"The last checkpoint (iteration {state['iteration']}) is whole; the same command goes on "
        "from there."
        if state is not None
        else "Nothing had been saved yet."
    )
    if not isinstance(error, ChildFailedError):
        raise TrainingInterruptedError(f"{title} was asked to stop. {kept}") from error
    again = f"after {restarts} restart{'s' if restarts != 1 else ''}"
    faults = _faults(folder)
    attempt = max((fault["attempt"] for fault in faults), default=0)
    faults = [fault for fault in faults if fault["attempt"] == attempt]
    causes = [fault for fault in faults if not fault["peer"]]
    if causes:
        first = min(causes, key=lambda fault: float(fault["time"]))
        raise WorkerFailedError(
            f"{first['kind']}: {first['message']}\n{title}: process {first['rank']} of {processes} "
            f"failed with it {again}. {kept}\n\n{first['traceback']}"
        ) from None
    silent = sorted(set(range(processes)) - {fault["rank"] for fault in faults})
    rank, failure = error.get_first_failure()
    by = f" by {failure.signal_name()}" if failure.exitcode < 0 else ""
    raise WorkerFailedError(
        f"{title}: process {(silent or [rank])[0]} of {processes} was ended from outside{by}, "
        f"{again}, perhaps by the system for want of memory (trainer.workers and "
        f"recipe.batch_size decide how much is needed). {kept}"
    ) from error


def _faults(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("fault-*.json"))]


# ---- in the processes that train


def _worker(path: str) -> None:
    """What each of the processes does."""
    end_with_parent()
    folder = Path(path)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if any(fault["final"] for fault in _faults(folder)):
        return  # the launcher starts them again after any fault; this one would come again
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
        if not kinds:
            raise
        # At once: a launcher that is leaving too does not take a result any more.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED if isinstance(error, RunInterrupted) else 2)


def _do(folder: Path, rank: int, attempt: int, stop: threading.Event) -> None:
    task = _Task.model_validate_json((folder / "task.json").read_text())
    os.chdir(task.cwd)
    events = _Events(folder / "events.jsonl")
    _forward_log(events if rank == 0 else None, task.log_level)
    if attempt and rank == 0:
        logger.warning(
            "%s: a process ended; all start again from the last checkpoint (%d of %d).",
            loop.title_of(task.job),
            attempt,
            task.trainer.max_restarts,
        )
    teacher, start = folder / "teacher.safetensors", folder / "start.ckpt"
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # They are on one machine, whose own name may resolve to nothing.
        names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        if names:
            os.environ["GLOO_SOCKET_IFNAME"] = names[0]
    _train_in_group(
        task.job,
        task.samples,
        task.trainer,
        load_checkpoint(teacher) if teacher.exists() else None,
        loads(start.read_bytes(), source=str(start)) if start.exists() else None,
        WorkFolder(task.work, task.fingerprint),
        lambda iteration, values: events.write({"iteration": iteration, "values": dict(values)}),
        stop,
    )


def _train_in_group(
    job: TrainingJob,
    samples: Sequence[Sample],
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None,
    start: State | None,
    work: WorkFolder | None,
    observe: Observer | None,
    stop: threading.Event | None,
) -> TrainingResult:
    """Train as one of the processes that RANK and WORLD_SIZE speak of."""
    device = resolve_device(trainer.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    result = loop.train(
        job,
        samples,
        trainer=trainer,
        teacher=teacher,
        start=start,
        work=work,
        group=dist.group.WORLD,
        device=device,
        observe=observe,
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
