"""SIGTERM and Ctrl-C: a command ends with status 143 and one line, whenever they come.

A command is more than its pipeline: seconds go into imports before it, and the interpreter takes
its time to leave. Where there is nothing to put in order, the command ends at once
(`leave_at_signals`, installed by the first import of this package). Meanwhile, `Signals` turns the
wish into an exception, so that processes are ended and runs are closed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rdd_pipeline.errors import INTERRUPTED, RunInterrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_WISH_SECONDS = 1.0
"""A terminal, a shell and a scheduler may each send a signal, and mean one and the same."""


class _Process:
    """What signals asked of this process, and whether the user has been told."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.name: str | None = None
        self.since = -SAME_WISH_SECONDS
        self.told = False


_process = _Process()


def _begin() -> None:
    """This process, which may be a forked one, is the command now."""
    global _process
    _process = _Process()


def is_command(words: list[str], program: list[str]) -> bool:
    """Whether this process is a command of this project, which nobody else's handlers serve.

    ``kedro run`` and ``python -m rdd_pipeline...``; not a notebook, a server or a test, where
    Ctrl-C means something else.

    Args:
        words: `sys.argv`.
        program: `sys.orig_argv`.
    """
    if words[:1] == ["-m"]:  # the module is still being looked for
        module = program[program.index("-m") + 1 :][:1]
        return module != [] and module[0].split(".")[0] == __name__.split(".")[0]
    # Kedro calls itself `python -m kedro` where it was started like that.
    return words[1:2] == ["run"] and Path(words[0]).name.split(" ")[-1] == "kedro"


def leave_at_signals() -> None:
    """End this process at once when a signal comes, from now on until `Signals` takes over."""
    if threading.current_thread() is not threading.main_thread():
        return
    _begin()
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)
    atexit.register(_too_late)  # what is registered first is called last


def leaves_at_signals() -> bool:
    """Whether this process is a command of this project (`leave_at_signals`)."""
    return signal.getsignal(signal.SIGTERM) is _leave


def note(number: int) -> bool:
    """Note a signal; whether it says something new."""
    now = time.monotonic()
    if now - _process.since < SAME_WISH_SECONDS:
        return False
    _process.name, _process.since = signal.Signals(number).name, now
    return True


def tell(line: str) -> None:
    """Print the one line about the signal, once."""
    if _process.told:
        return
    _process.told = True
    try:
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    except Exception:  # the signal came in the middle of writing, or nobody reads any more
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


def interruption(error: BaseException | None) -> RunInterrupted | None:
    """The interruption that an error comes from, through whatever it was wrapped in."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, RunInterrupted):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


class Signals:
    """Turns Ctrl-C and SIGTERM into `RunInterrupted` while there is something to put in order.

    Python's own KeyboardInterrupt passes Kedro's error hooks by, and SIGTERM ends the process: the
    MLflow run would stay RUNNING for ever. Training puts its own handlers in front and raises
    `RunInterrupted` itself when its checkpoint is on disk.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._unraisable: Callable[[Any], Any] | None = None
        self._received: str | None = None
        self._held = False

    def install(self) -> None:
        """Start; does nothing outside the main thread, which alone receives signals."""
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return
        self._received, self._held = None, False
        _begin()
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._stop)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._ask_again

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._unraisable is not None:
            sys.unraisablehook, self._unraisable = self._unraisable, None

    @property
    def received(self) -> str | None:
        """Name of the signal that came."""
        return self._received

    def check(self) -> None:
        """Stop now if some library has swallowed the exception."""
        if self._received is not None:
            raise RunInterrupted(self._message())

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Only note a signal in what follows, which is short; a second one ends the process."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != _process.pid:
            os._exit(INTERRUPTED)  # a forked worker: the command itself says what happened
        if not note(number):
            return
        before, self._received = self._received, signal.Signals(number).name
        if not self._held:
            raise RunInterrupted(self._message())
        if before is not None:
            _leave(number, frame)

    def _ask_again(self, unraisable: Any) -> None:
        """Where an exception goes that nobody can catch, as one raised in a destructor."""
        if isinstance(unraisable.exc_value, RunInterrupted):
            _process.since = -SAME_WISH_SECONDS
            repeat = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
            repeat.daemon = True
            repeat.start()
        elif self._unraisable is not None:
            self._unraisable(unraisable)

    def _message(self) -> str:
        return (
            f"The run was stopped by {self._received}. Repeat the command to go on from the last "
            "checkpoint."
        )


def run_command(main: Callable[[], int]) -> int:
    """Run the main function of a command; returns its exit status, 143 after a signal."""
    signals = Signals()
    signals.install()
    try:
        return main()
    except Exception as error:
        cause = interruption(error)
        if cause is None and signals.received is None:
            raise
        tell(str(cause) if cause is not None else signals._message())
        return INTERRUPTED
    finally:
        signals.restore()


def _leave(number: int, frame: FrameType | None) -> None:
    if os.getpid() == _process.pid and os.environ.get("RANK", "0") == "0":
        tell(f"Error: Stopped by {signal.Signals(number).name}. Repeat the command to go on.")
    os._exit(INTERRUPTED)


def _too_late() -> None:
    """Everything is done, and the status is known: no signal changes it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
