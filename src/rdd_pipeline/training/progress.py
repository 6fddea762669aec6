"""What a person sees of a training: one bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.progress import TextColumn

from rdd_pipeline.segmentation.progress import LINE_EVERY, work_bar

logger = logging.getLogger(__name__)


class TrainingProgress:
    """Progress of iterations `first`..`last` with loss, learning rate, images/s and time left.

    Of several processes that train together all but one are `silent`.
    """

    def __init__(self, title: str, first: int, last: int, *, silent: bool = False) -> None:
        self._title = title
        self._first, self._last = first, last
        self._silent = silent
        self._bar = work_bar(TextColumn("{task.fields[facts]}"), shown=not silent)
        self._task = self._bar.add_task(title, total=last, completed=first - 1, facts="")
        self._begin = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(
        self, iteration: int, *, loss: float, lr: float, rate: float, miou: float | None
    ) -> None:
        """Show the state after `iteration`; `rate` is images a second."""
        if self._silent:
            return
        facts = f"loss {loss:.3f}  lr {lr:.2g}  {rate:.1f} img/s"
        if miou is not None:
            facts += f"  mIoU {100 * miou:.1f}"
        self._bar.update(self._task, completed=iteration, facts=facts)
        now = time.monotonic()
        done = iteration >= self._last
        if not self._bar.console.is_terminal and (done or now - self._last_line > LINE_EVERY):
            self._last_line = now
            steps = iteration - self._first + 1
            left = (now - self._begin) / steps * (self._last - iteration)
            end = "done" if done else f"{left:.0f} s left"
            logger.info("%s %d/%d  %s  %s", self._title, iteration, self._last, facts, end)
