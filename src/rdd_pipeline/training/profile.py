"""Where the time of a training goes, on request: a table by phase and a trace.

After some steps to warm up come `TIMED` ones in which each phase is waited for, which makes them
slower and their parts comparable, and `TRACED` ones as they always are, under torch's profiler.
"""

from __future__ import annotations

import csv
import io
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from rdd_pipeline.files import write_atomically

logger = logging.getLogger(__name__)

WARM_UP, TIMED, TRACED = 3, 10, 3
"""Steps, one after the other."""
FILES = ("phases.csv", "trace.json.gz")

_clock: PhaseClock | None = None


class PhaseClock:
    """Seconds of each phase of each step; waits for the device at both ends of a phase."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.steps: list[dict[str, float]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure a phase; several of one name in a step add up."""
        begin = self._now()
        yield
        self.add(name, self._now() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Count what was measured elsewhere."""
        step = self.steps[-1]
        step[name] = step.get(name, 0.0) + seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def phase(name: str) -> AbstractContextManager[None]:
    """Context of a phase of the step; costs nothing where nobody measures."""
    return nullcontext() if _clock is None else _clock.measure(name)


class Profile:
    """Profiles the first steps inside of its context.

    Args:
        device: Where the training computes.
        folder: Gets `FILES`, as far as the training is long enough.
        title: Of the training, for a line in the log.
    """

    def __init__(self, device: torch.device, folder: Path, title: str) -> None:
        self._device, self._folder, self._title = device, folder, title
        self._step = 0
        self._trace: torch.profiler.profile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_timing()
        self._end_trace()

    def begin_step(self, waited: float) -> None:
        """A batch is there, for which was waited so many seconds."""
        global _clock
        self._step += 1
        if self._step == WARM_UP + TIMED + 1:
            self._end_timing()
            self._trace = torch.profiler.profile(
                activities=[
                    torch.profiler.ProfilerActivity.CPU,
                    *([torch.profiler.ProfilerActivity.CUDA] * (self._device.type == "cuda")),
                ]
            )
            self._trace.start()
        elif self._step == WARM_UP + TIMED + TRACED + 1:
            self._end_trace()
        elif self._step == WARM_UP + 1:
            _clock = PhaseClock(self._device)
        if _clock is not None:
            _clock.steps.append({"data": waited})

    def _end_timing(self) -> None:
        global _clock
        clock, _clock = _clock, None
        if clock is None or not clock.steps:
            return
        names = list(dict.fromkeys(name for step in clock.steps for name in step))
        medians = {
            name: statistics.median(step.get(name, 0.0) for step in clock.steps) for name in names
        }
        total = sum(medians.values()) or 1.0
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["phase", "ms", "share"])
        for name, seconds in medians.items():
            rows.writerow([name, f"{1e3 * seconds:.3f}", f"{seconds / total:.4f}"])
        write_atomically(self._folder / "phases.csv", text.getvalue().encode())
        shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in medians.items())
        logger.info("%s: time of a step: %s (%s).", self._title, shares, self._folder)

    def _end_trace(self) -> None:
        trace, self._trace = self._trace, None
        if trace is None:
            return
        trace.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, FILES[1])
            trace.export_chrome_trace(str(file))
            write_atomically(self._folder / FILES[1], file.read_bytes())
