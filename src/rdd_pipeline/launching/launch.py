"""One training on several devices, of one machine or several, started from inside any function.

`train` is `loop.train` that first starts `trainer.devices` processes (see `worker`), by torch's
elastic launcher. The result comes back as the work's final state. Nobody but this process talks to
Kedro or MLflow. With `trainer.nodes` the other machines join it (see `machines`, `join`).
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
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rdd_pipeline.config import TrainerParams
from rdd_pipeline.data.index import Sample, usable_cores
from rdd_pipeline.data.processes import hidden_main
from rdd_pipeline.errors import RunInterrupted, UserError, WorkerFailedError
from rdd_pipeline.files import write_atomically
from rdd_pipeline.launching import machines, worker
from rdd_pipeline.launching.worker import FINAL, STOP_SIGNALS, Task, faults, train_in_group
from rdd_pipeline.networks import NetworkCheckpoint, save_checkpoint
from rdd_pipeline.training import loop
from rdd_pipeline.training.device import resolve_device, resolve_devices
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.loop import OnLog, TrainingResult
from rdd_pipeline.training.preparation import check_inputs, network_of, title_of
from rdd_pipeline.training.state import TrainState
from rdd_pipeline.training.stopping import TrainingInterruptedError
from rdd_pipeline.training.store import RunStore

logger = logging.getLogger(__name__)

_POLL = 0.2
"""Seconds between looks at what the processes have written."""


def train(
    job: TrainingJob,
    samples: Sequence[Sample],
    *,
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None = None,
    initial_state: TrainState | None = None,
    store: RunStore | None = None,
    on_log: OnLog | None = None,
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
        return train_in_group(job, samples, trainer, teacher, initial_state, store, on_log, None)
    processes = resolve_devices(trainer, job.recipe.batch_size)
    if processes * trainer.nodes > 1:
        if store is None:
            raise UserError(
                f"trainer.devices is {processes}: several processes meet in a work folder, but "
                "none was given. Give one, or set trainer.devices=1 and trainer.nodes=1."
            )
        check_inputs(job, samples, teacher, initial_state, processes * trainer.nodes)
        if store.finished_state() is None:
            return _launch(job, samples, trainer, teacher, initial_state, store, on_log, processes)
    return loop.train(
        job,
        samples,
        trainer=trainer,
        teacher=teacher,
        initial_state=initial_state,
        store=store,
        on_log=on_log,
    )


def _launch(
    job: TrainingJob,
    samples: Sequence[Sample],
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None,
    initial_state: TrainState | None,
    store: RunStore,
    on_log: OnLog | None,
    processes: int,
) -> TrainingResult:
    title = title_of(job)
    begun = store.latest() or initial_state
    folder = store.path.resolve() / "launch"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        task = Task(
            job=job,
            trainer=trainer,
            samples=tuple(samples),
            work=store.path.parent.resolve(),
            fingerprint=store.fingerprint,
            cwd=Path.cwd(),
            log_level=logger.getEffectiveLevel(),
        )
        write_task(task, folder, processes)
        if teacher is not None:
            save_checkpoint(teacher, folder / "teacher.safetensors")
        if initial_state is not None:
            write_atomically(folder / "start.ckpt", initial_state.to_bytes())
        logger.info(
            "%s: %d processes%s train together.",
            title,
            processes * trainer.nodes,
            f" on {trainer.nodes} machines" if trainer.nodes > 1 else "",
        )
        try:
            with _Relay(folder, on_log):
                if trainer.nodes == 1:
                    run_workers(folder, processes, trainer)
                else:
                    _run_with_others(folder, processes, trainer)
        except (SignalException, ChildFailedError, RunInterrupted, RendezvousError) as error:
            _raise_fault(folder)
            world = processes * trainer.nodes
            _raise_otherwise(error, title, store, folder, world, trainer)
        _raise_fault(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    state = store.finished_state()
    if state is None:
        raise WorkerFailedError(
            f"{title}: all processes came to their end, but {store.path} holds no final state. "
            "Look at the disk and repeat the command."
        )
    return TrainingResult(
        state=state,
        network=network_of(job, state),
        fingerprint=store.fingerprint,
        trained=state.iteration - (begun.iteration if begun is not None else 0),
    )


def write_task(task: Task, folder: Path, processes: int) -> None:
    """Put a task where the processes of this machine look for it."""
    if resolve_device(task.trainer.device).type == "cpu" and task.trainer.threads is None:
        # Each of them would take all cores.
        threads = max(1, usable_cores() // processes)
        trainer = task.trainer.model_copy(update={"threads": threads})
        task = task.model_copy(update={"trainer": trainer})
    write_atomically(folder / "task.json", task.model_dump_json().encode())


def _run_with_others(folder: Path, processes: int, trainer: TrainerParams) -> None:
    """Hand the training out to the other machines and take part in it."""
    assert trainer.rendezvous is not None, "a rule of TrainerParams"
    exchange = machines.host(trainer.rendezvous)
    files = {
        path.name: path.read_bytes()
        for path in (folder / "task.json", folder / "teacher.safetensors")
        if path.exists()
    }
    run = uuid.uuid4().hex
    training = exchange.hand_out(files, {"run": run, "processes": processes})
    watching, known = machines.Exchange.connect(trainer.rendezvous), 0

    def look() -> bool:
        nonlocal known
        known = watching.fetch_faults(training, folder, known)
        return worker.any_final(folder)

    try:
        with machines.Watch(folder, look):
            run_workers(folder, processes, trainer, run)
    finally:
        exchange.call_off(training)
        watching.fetch_faults(training, folder, known)


def run_workers(folder: Path, processes: int, trainer: TrainerParams, run: str = "") -> None:
    """Start the processes of this machine and wait for their end.

    Args:
        folder: Where they find their task.
        processes: How many.
        trainer: How often they are started again, and where several machines meet.
        run: Name of a training on several machines, the same on all of them.

    Raises:
        SignalException: This process got a signal; the others have ended.
        ChildFailedError: A process failed too often.
        RendezvousError: The machines do not find one another.
    """
    # Otherwise processes that are started again read the addresses of dead ones, and hang
    # (pytorch#135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # A process is forked from one that has imported all this: seconds become tenths of one.
    multiprocessing.set_forkserver_preload(
        ["torch", "torch._dynamo", "torch.distributed", "torch.nn.parallel", worker.__name__]
    )
    endpoint, meeting = "localhost:0", {}
    address = "localhost" if worker.on_one_machine(trainer) else None
    if trainer.nodes > 1 and trainer.rendezvous is not None:
        endpoint, address = trainer.rendezvous, trainer.address or address
        # The store is there already.
        meeting = {"is_host": "false", "join_timeout": str(round(trainer.timeout))}
    config = LaunchConfig(
        min_nodes=trainer.nodes,
        max_nodes=trainer.nodes,
        nproc_per_node=processes,
        run_id=run or uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs=meeting,
        local_addr=address,  # the host's own name may not resolve
        max_restarts=trainer.max_restarts,
        monitor_interval=0.1,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "elastic")),
    )
    with hidden_main(), _own_signal_handlers(), _elastic_is_quiet():
        elastic_launch(config, worker.work)(str(folder))


class _Relay:
    """Passes on what the processes write, to the observer and the log of this one."""

    def __init__(self, folder: Path, on_log: OnLog | None) -> None:
        self._path = folder / "events.jsonl"
        self._observe = on_log
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
    silence = logging.NullHandler()
    names = ("torch.distributed.elastic", "torch.multiprocessing.spawn")
    before = {name: logging.getLogger(name).propagate for name in names}
    for name in names:
        logging.getLogger(name).addHandler(silence)
        logging.getLogger(name).propagate = False
    try:
        yield
    finally:
        for name, propagate in before.items():
            logging.getLogger(name).propagate = propagate
            logging.getLogger(name).removeHandler(silence)


def _raise_fault(folder: Path) -> None:
    """Raise what a process ended the run with, as the same kind of error."""
    final = [fault for fault in faults(folder) if fault["final"]]
    if final:
        first = min(final, key=lambda fault: float(fault["time"]))
        raise FINAL[first["final"]](first["message"])


def _raise_otherwise(
    error: Exception,
    title: str,
    store: RunStore,
    folder: Path,
    processes: int,
    trainer: TrainerParams,
) -> NoReturn:
    """Raise what became of processes that could not finish their task."""
    state = store.latest()
    kept = (
        f"The last checkpoint (iteration {state.iteration}) is whole; the same command goes on "
        "from there."
        if state is not None
        else "Nothing had been saved yet."
    )
    if isinstance(error, SignalException | RunInterrupted):
        raise TrainingInterruptedError(f"{title} was asked to stop. {kept}") from error
    restarts = trainer.max_restarts
    again = f"after {restarts} restart{'s' if restarts != 1 else ''}"
    found = faults(folder)
    attempt = max((fault["attempt"] for fault in found), default=0)
    found = [fault for fault in found if fault["attempt"] == attempt]
    causes = [fault for fault in found if not fault["peer"]]
    if causes:
        first = min(causes, key=lambda fault: float(fault["time"]))
        raise WorkerFailedError(
            f"{first['kind']}: {first['message']}\n{title}: process {first['rank']} of {processes} "
            f"failed with it {again}. {kept}\n\n{first['traceback']}"
        ) from None
    if not isinstance(error, ChildFailedError):
        raise WorkerFailedError(
            f"{title}: {trainer.nodes} machines did not come together at {trainer.rendezvous} "
            f"within {trainer.timeout:g} seconds (trainer.timeout). On each of the others run: "
            f"python -m rdd_pipeline.launching.join {trainer.rendezvous}. {kept}"
        ) from error
    silent = sorted(set(range(processes)) - {fault["rank"] for fault in found})
    rank, failure = error.get_first_failure()
    by = f" by {failure.signal_name()}" if failure.exitcode < 0 else ""
    raise WorkerFailedError(
        f"{title}: process {(silent or [rank])[0]} of {processes} was ended from outside{by}, "
        f"{again}, perhaps by the system for want of memory (trainer.workers and "
        f"recipe.batch_size decide how much is needed). {kept}"
    ) from error
