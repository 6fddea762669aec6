"""A training that is asked to stop does so between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rdd_pipeline import interruptions
from rdd_pipeline.errors import RunInterrupted


class TrainingInterruptedError(RunInterrupted):
    """A signal asked the training to stop; its state is on disk."""


@contextmanager
def stop_signals(given: threading.Event | None) -> Iterator[threading.Event]:
    """Turn the first SIGTERM or SIGINT into a flag, so that a step is never cut in half.

    A second one acts as it did before. Elsewhere than in the main thread nothing is changed, nor
    where a flag is given.
    """
    stop = threading.Event() if given is None else given
    if given is not None or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        interruptions.note(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
