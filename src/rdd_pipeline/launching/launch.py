"""One training on several devices, of one machine or several, started from inside any function.

`train` is `loop.train` that first starts `trainer.devices` processes (see `worker`), by torch's
elastic launcher. The result comes back as the work's final state. Nobody but this process talks to
Kedro or MLflow. With `trainer.nodes` the other machines join it (see `exchange`, `join`).
"""

from __future__ import annotations

import contextlib
import contextvars
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

from rdd_pipeline.config import TrainerParams
from rdd_pipeline.data.processes import hidden_main
from rdd_pipeline.errors import RunInterrupted, UserError, WorkerFailedError
from rdd_pipeline.files import write_atomically
from rdd_pipeline.launching import worker
from rdd_pipeline.launching.exchange import FILES, Exchange, Failure, host
from rdd_pipeline.launching.worker import FINAL, STOP_SIGNALS, Task, train_in_group
from rdd_pipeline.networks import save_checkpoint
from rdd_pipeline.networks.checkpoint import permitted_module
from rdd_pipeline.training import loop
from rdd_pipeline.training.curves import OnLog
from rdd_pipeline.training.device import resolve_devices
from rdd_pipeline.training.stopping import TrainingInterruptedError
from rdd_pipeline.training.store import RunStore
from rdd_pipeline.training.training import Training, TrainingResult

logger = logging.getLogger(__name__)

_POLL = 0.2
"""Seconds between looks at what the processes have written."""
_PARTING = 5.0
"""Seconds for which a machine that is done waits for the others, which a signal may have ended."""


def train(
    training: Training, trainer: TrainerParams, on_log: OnLog | None = None
) -> TrainingResult:
    """`loop.train` on as many devices as `trainer.devices` says.

    With one device it is that very call. In a process that torchrun, or whatever else sets RANK
    and WORLD_SIZE, has started, it trains together with the others of its kind.

    Raises:
        UserError: The pieces do not fit together, or memory or disk space ran out.
        NonFiniteLossError: A loss, gradient or weight became NaN or infinite.
        TrainingInterruptedError: A signal asked to stop; the state was saved.
        WorkerFailedError: A process failed more often than `trainer.max_restarts`.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return train_in_group(training, trainer, on_log)
    processes = resolve_devices(trainer, training.job.recipe.batch_size)
    if processes * trainer.nodes > 1:
        if training.store is None:
            raise UserError(
                f"trainer.devices is {processes}: several processes meet in a work folder, but "
                "none was given. Give one, or set trainer.devices=1 and trainer.nodes=1."
            )
        training.check(processes * trainer.nodes)
        if training.store.finished_state() is None:
            trainer = trainer.model_copy(update={"devices": processes})
            return _launch(training, training.store, trainer, on_log)
    return loop.train(training, trainer, on_log=on_log)


def _launch(
    training: Training, store: RunStore, trainer: TrainerParams, on_log: OnLog | None
) -> TrainingResult:
    title = training.job.title
    begun = store.latest() or training.initial_state
    with own_folder(store.path.resolve(), "launch-") as folder:
        task = Task(
            job=training.job,
            trainer=trainer,
            images=training.images,
            work=store.path.parent.resolve(),
            fingerprint=store.fingerprint,
            cwd=Path.cwd(),
            log_level=logger.getEffectiveLevel(),
            teacher_module=permitted_module(training.teacher),
        )
        task.write(folder)
        if training.teacher is not None:
            save_checkpoint(training.teacher, folder / "teacher.safetensors")
        if training.initial_state is not None:
            write_atomically(folder / "start.ckpt", training.initial_state.to_bytes())
        logger.info(
            "%s: %d processes%s train together.",
            title,
            task.processes * trainer.nodes,
            f" on {trainer.nodes} machines" if trainer.nodes > 1 else "",
        )
        with _relayed(folder / "events.jsonl", on_log):
            _run(task, store, folder)
    state = store.finished_state()
    if state is None:
        raise WorkerFailedError(
            f"{title}: all processes came to their end, but {store.path} holds no final state. "
            "Look at the disk and repeat the command."
        )
    return training.result(state, trained=state.iteration - (begun.iteration if begun else 0))


@contextlib.contextmanager
def own_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder of this command alone: another one may train the same at this moment.

    It is removed at the end, and so is what killed commands have left: their locks are free.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for other in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _lock(other):
            shutil.rmtree(other)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder, _lock(Path(folder)):
        yield Path(folder)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _run(task: Task, store: RunStore, folder: Path) -> None:
    """Publish a training and take part in it."""
    trainer = task.trainer
    several = trainer.nodes > 1
    exchange = host(trainer)
    shared = [folder / name for name in FILES] if several else []
    files = {path.name: path.read_bytes() for path in shared if path.exists()}
    training = exchange.publish(files)
    error: Exception | None = None
    try:
        run_workers(exchange, training, folder, task)
    except (SignalException, ChildFailedError, RunInterrupted, RendezvousError) as caught:
        error = caught
    finally:
        exchange.retract(training)
    failures = exchange.failures(training)
    raise_final(failures)
    if error is not None:
        raise _explained(error, failures, task, store) from error


def run_workers(exchange: Exchange, training: int, folder: Path, task: Task) -> None:
    """Start the processes of this machine and wait for their end.

    Args:
        exchange: Where the machines meet.
        training: Number of the training there.
        folder: Where the processes find their task.
        task: How many they are, how often they are started again, how long machines wait.

    Raises:
        SignalException: This process got a signal; the others have ended.
        ChildFailedError: A process failed too often.
        RendezvousError: The machines do not find one another, or another one has ended the
            training.
    """
    # Otherwise processes that are started again read the addresses of dead ones, and hang
    # (pytorch#135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # A process is forked from one that has imported all this: seconds become tenths of one.
    multiprocessing.set_forkserver_preload(
        ["torch", "torch._dynamo", "torch.distributed", "torch.nn.parallel", worker.__name__]
    )
    trainer = task.trainer
    # The host's own name may not resolve.
    address = trainer.address or ("localhost" if exchange.on_loopback else None)
    rendezvous = exchange.rendezvous(training, trainer.nodes, address, trainer.timeout)
    spec = WorkerSpec(
        role="trainer",
        local_world_size=task.processes,
        entrypoint=worker.train_worker,
        args=(str(folder), exchange.endpoint, exchange.token, training),
        rdzv_handler=rendezvous,
        max_restarts=trainer.max_restarts,
        monitor_interval=0.1,
        local_addr=address,
    )
    agent = LocalElasticAgent(
        spec,
        DefaultLogsSpecs(log_dir=str(folder / "elastic")),
        start_method="forkserver",
        exit_barrier_timeout=_PARTING,
        shutdown_timeout=int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")),
    )
    closes = True
    _silence_elastic()
    with hidden_main(), _own_signal_handlers():
        try:
            result = agent.run()
        except SignalException:
            closes = exchange.is_host  # without another machine, they can wait for it to come back
            raise
        finally:
            # The agents of other machines end then, where they would wait for this one.
            if closes:
                rendezvous.shutdown()
    if result.is_failed():
        raise ChildFailedError(spec.role, result.failures)


@contextlib.contextmanager
def _relayed(path: Path, on_log: OnLog | None) -> Iterator[None]:
    """Pass the lines that the processes write on, to `on_log` and the log of this process."""
    path.touch()
    over = threading.Event()

    def follow() -> None:
        rest = b""
        with path.open("rb") as file:
            ends = False
            while not ends:
                ends = over.wait(_POLL)
                *lines, rest = (rest + file.read()).split(b"\n")
                for line in lines:
                    _pass_on(line, on_log)

    # Whoever listens to the curves listens in this context.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(follow,), name="worker logs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _pass_on(line: bytes, on_log: OnLog | None) -> None:
    try:
        event = json.loads(line)
    except ValueError:  # cut short by the end of its process
        return
    if "message" in event:
        logging.getLogger(event["logger"]).log(event["level"], "%s", event["message"])
    elif on_log is not None:
        on_log(event["iteration"], event["values"])


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


def _silence_elastic() -> None:
    """This module reports the outcome of torch elastic's many lines, in one."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).handlers = [logging.NullHandler()]
        logging.getLogger(name).propagate = False


def raise_final(failures: Sequence[Failure]) -> None:
    """Raise what a process ended the run with, as the same kind of error."""
    for failure in failures:
        if failure.final:
            raise FINAL[failure.final](failure.message)


def _explained(
    error: Exception, failures: Sequence[Failure], task: Task, store: RunStore
) -> Exception:
    """What became of processes that could not finish their task."""
    trainer, title = task.trainer, task.job.title
    processes = task.processes * trainer.nodes
    state = store.latest()
    kept = (
        f"The last checkpoint (iteration {state.iteration}) is whole; the same command goes on "
        "from there."
        if state is not None
        else "Nothing had been saved yet."
    )
    if isinstance(error, SignalException | RunInterrupted):
        return TrainingInterruptedError(f"{title} was asked to stop. {kept}")
    again = f"after {trainer.max_restarts} restart{'s' if trainer.max_restarts != 1 else ''}"
    attempt = max((failure.attempt for failure in failures), default=0)
    last = [failure for failure in failures if failure.attempt == attempt]
    for cause in last:
        if not cause.lost_peer:
            return WorkerFailedError(
                f"{cause.kind}: {cause.message}\n{title}: process {cause.rank} of {processes} "
                f"failed with it {again}. {kept}\n\n{cause.traceback}"
            )
    if isinstance(error, RendezvousError) and not isinstance(error, RendezvousClosedError):
        return WorkerFailedError(
            f"{title}: {trainer.nodes} machines did not come together at {trainer.rendezvous} "
            f"within {trainer.timeout:g} seconds (trainer.timeout). On each of the others run, "
            f"with its token: python -m rdd_pipeline.launching.join {trainer.rendezvous}. {kept}"
        )
    silent = sorted(set(range(processes)) - {failure.rank for failure in last})
    by = ""
    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        silent = silent or [rank]
        by = f" by {failure.signal_name()}" if failure.exitcode < 0 else ""
        if isinstance(failure.message, dict) and rank in silent:  # it failed before its report
            by = f" ({failure.message['message']})"
    return WorkerFailedError(
        f"{title}: process {silent[0] if silent else 0} of {processes} was ended from outside{by}, "
        f"{again}, perhaps by the system to free memory (trainer.workers and "
        f"recipe.batch_size decide how much is needed). {kept}"
    )
