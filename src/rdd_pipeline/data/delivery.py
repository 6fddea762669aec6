"""What can go wrong between loader processes and training, found or ended in one line.

Batches travel through shared memory, of which containers have little. A process that the system
kills, or that waits for a disk that is gone, must not make the training wait for ever.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor

from rdd_pipeline.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps it; other systems have no limit that could be looked up."""

PREFETCHED = 2
"""Batches that each loader process has ready."""

LOOK_EVERY = 5.0
"""Seconds after which a waiting training looks whether the loader processes are still there."""

AnyBatch = TypeVar("AnyBatch", bound=NamedTuple)


def check_shared_memory(workers: int, batch_bytes: int, trainings: int = 1) -> None:
    """Refuse loader processes whose batches do not fit the shared memory.

    Args:
        workers: Loader processes of each training process.
        batch_bytes: Size of one batch.
        trainings: Training processes on this machine.

    Raises:
        UserError: There is less.
    """
    free = _free_bytes(SHARED_MEMORY)
    # One more is in the hands of the training.
    needed = trainings * (workers * PREFETCHED + 1) * batch_bytes
    if workers > 0 and free is not None and needed > free:
        raise UserError(
            f"The shared memory {SHARED_MEMORY} has {_size(free)} free, batches on their way from "
            f"the loader processes take {_size(needed)} (trainer.workers: {workers}, {PREFETCHED} "
            f"batches of {_size(batch_bytes)} each, and one in use"
            + (f"; {trainings} trainings at once" if trainings > 1 else "")
            + f"). {_more(needed)}"
        )


def share(batch: AnyBatch) -> AnyBatch:
    """Put the tensors of a batch into shared memory, in a loader process.

    DataLoader would do it later in a thread of its own, which prints a traceback when there is no
    room and leaves the training waiting.

    Raises:
        UserError: There is no room, or too many files are open.
    """
    for item in batch:
        if isinstance(item, Tensor):
            try:
                item.share_memory_()  # type: ignore[no-untyped-call]
            except (RuntimeError, OSError) as error:
                text = str(error).partition("\n")[0]
                if "Too many open files" in text:
                    raise UserError(
                        "Too many files are open for another batch of a loader process. Raise the "
                        "limit (ulimit -n 65536), or set trainer.workers=0."
                    ) from error
                raise UserError(
                    f"A batch of {_size(_bytes(batch))} does not fit the shared memory "
                    f"{SHARED_MEMORY}, of which {_size(_free_bytes(SHARED_MEMORY) or 0)} are free "
                    f"({text}). {_more(8 * _bytes(batch))}"
                ) from error
    return batch


@dataclass(frozen=True)
class Started:
    """Loader processes, and threads that receive what they send."""

    processes: list[BaseProcess] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def dead(self, timeout: float) -> list[BaseProcess]:
        """Processes that have ended; where none has, one may be about to."""
        wait([process.sentinel for process in self.processes], timeout)
        return [process for process in self.processes if not process.is_alive()]

    def kill(self) -> None:
        """End the processes even when they are stopped, which SIGTERM does not."""
        for process in self.processes:
            process.kill()


_LOST = (
    "A process that loader processes come from died, perhaps by the system to free memory. Lower "
    "trainer.workers, or set trainer.workers=0, which loads in the training process."
)


@contextmanager
def started_here() -> Iterator[Started]:
    """What the block starts, listed when it ends.

    Raises:
        LoaderFailedError: Python's fork server, which starts them, was lost.
    """
    processes, threads = set(multiprocessing.active_children()), set(threading.enumerate())
    started = Started()
    try:
        yield started
    except (EOFError, ConnectionError) as error:
        raise LoaderFailedError(_LOST) from error
    started.processes.extend(set(multiprocessing.active_children()) - processes)
    started.threads.extend(set(threading.enumerate()) - threads)


class LoaderFailedError(UserError):
    """Loader processes died or deliver nothing; what was computed of their batches is right."""


def deliver(
    batches: Iterator[AnyBatch],
    started: Started,
    timeout: float,
    stop: threading.Event | None = None,
) -> Iterator[AnyBatch]:
    """The batches of a DataLoader, each within `timeout` seconds.

    Args:
        batches: Iterator of a DataLoader with a timeout, after which it may be asked again.
        started: What it has started; killed when it is at fault.
        timeout: Seconds to wait for a batch.
        stop: Once it is set, there are no more batches as soon as one would have to be waited for.

    Raises:
        LoaderFailedError: None came, or a loader process died.
    """
    stop = stop or threading.Event()
    watch = _Watch(started, timeout + LOOK_EVERY, stop)
    with _silent(started.threads):
        try:
            while True:
                watch.waiting_since = time.monotonic()
                try:
                    batch = _next(batches, started, timeout, stop)
                except StopIteration:
                    return
                watch.waiting_since = None
                yield batch
        finally:
            watch.leave()


def _next(
    batches: Iterator[AnyBatch], started: Started, timeout: float, stop: threading.Event
) -> AnyBatch:
    start = time.monotonic()
    while True:
        try:
            return next(batches)
        except (RuntimeError, OSError, EOFError) as error:
            late = time.monotonic() - start >= timeout
            if stop.is_set():
                started.kill()
                raise StopIteration from error
            lost = isinstance(error, EOFError | ConnectionError | FileNotFoundError)
            dead = started.dead(LOOK_EVERY if lost else 0.0)
            if "DataLoader timed out" in str(error) and not dead and not late:
                continue  # it goes on where it was
            # A traceback keeps the iterator, which would end them when it is collected.
            started.kill()
            if late:
                raise LoaderFailedError(
                    f"No batch came from the loader processes for {timeout:g} s (trainer.timeout)"
                    ". Set trainer.workers=0, which loads in the training process, or raise "
                    "trainer.timeout if the disk is that slow."
                ) from error
            if dead:
                raise LoaderFailedError(_death(dead[0])) from error
            if lost:
                raise LoaderFailedError(_LOST) from error
            raise


@contextmanager
def _silent(threads: Sequence[threading.Thread]) -> Iterator[None]:
    """Let these threads end without a traceback: the training says what has happened."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.thread not in threads:
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        if threading.excepthook is hook:
            threading.excepthook = before


class _Watch:
    """Kills loader processes that the training waits for in a way that has no time limit.

    Fetching the memory of a batch asks the process that sent it, which may have been stopped.
    """

    def __init__(self, started: Started, timeout: float, stop: threading.Event) -> None:
        self.waiting_since: float | None = None
        self._started = started
        self._timeout = timeout
        self._stop = stop
        self._left = threading.Event()
        threading.Thread(target=self._run, name="watch over loaders", daemon=True).start()

    def leave(self) -> None:
        """End the thread."""
        self._left.set()

    def _run(self) -> None:
        while not self._left.wait(min(1.0, self._timeout)):
            since = self.waiting_since
            limit = min(self._timeout, 2 * LOOK_EVERY) if self._stop.is_set() else self._timeout
            if since is not None and time.monotonic() - since > limit:
                self._started.kill()
                return


def _death(process: BaseProcess) -> str:
    code = process.exitcode or 0
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"status {code}"
    if -code == signal.SIGBUS:
        reason = f"as happens when the shared memory {SHARED_MEMORY} is full. {_more(0)}"
    else:
        reason = (
            "perhaps by the system to free memory. Lower trainer.workers, or set "
            "trainer.workers=0, which loads in the training process."
        )
    return f"A loader process died ({name}), {reason}"


def _more(needed: int) -> str:
    gigabytes = max(1, math.ceil(2 * needed / 2**30))
    return (
        f"Give the container more (docker run --shm-size={gigabytes}g, or --ipc=host), or set "
        "trainer.workers=0, which needs none."
    )


def _free_bytes(folder: Path) -> int | None:
    """Free space of a file system in memory; None where it is missing or has no limit."""
    try:
        status = os.statvfs(folder)
    except (OSError, AttributeError):
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def _bytes(batch: NamedTuple) -> int:
    return sum(item.nbytes for item in batch if isinstance(item, Tensor))


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
