"""Ctrl-C and SIGTERM as an exception that Kedro's hooks see."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from rdd_pipeline.errors import RunInterrupted


class Signals:
    """Turns Ctrl-C and SIGTERM into `RunInterrupted` while a pipeline runs.

    Python's own KeyboardInterrupt passes Kedro's error hooks by, and SIGTERM ends the process: the
    MLflow run would stay RUNNING for ever. Training puts its own handlers in front and raises
    `RunInterrupted` itself when its checkpoint is on disk.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._received: str | None = None

    def install(self) -> None:
        """Start; does nothing outside the main thread, which alone receives signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._stop)

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def check(self) -> None:
        """Stop now if some library has swallowed the exception."""
        if self._received is not None:
            raise RunInterrupted(self._message())

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        raise RunInterrupted(self._message())

    def _message(self) -> str:
        return (
            f"The run was stopped by {self._received}. Repeat the command to go on from the last "
            "checkpoint."
        )
