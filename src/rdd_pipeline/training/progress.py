"""What a person sees of a training: one bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.progress import TextColumn

from rdd_pipeline.data.progress import LINE_EVERY, work_bar

logger = logging.getLogger(__name__)


class TrainingProgress:
    """Progress of iterations `first`..`last` with loss, learning rate, images/s and time left.

    `best` is the best mIoU of the iterations before `first`. Of several processes that train
    together all but one are `silent`. Where there is no terminal,
    the last line comes when all is over: a validation after the last iteration is in it.
    """

    def __init__(
        self, title: str, first: int, last: int, *, best: float | None = None, silent: bool = False
    ) -> None:
        self._title = title
        self._first, self._last = first, last
        self._silent = silent
        self._bar = work_bar(TextColumn("{task.fields[facts]}"), shown=not silent)
        self._task = self._bar.add_task(title, total=last, completed=first - 1, facts="")
        self._begin = self._last_line = time.monotonic()
        self._iteration, self._facts = first - 1, ""
        self._scores = "" if best is None else f"  best mIoU {100 * best:.1f}"
        self._stopped = False

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
        if kind is None and (self._iteration >= self._last or self._stopped):
            self._line("stopped early" if self._stopped else "done")

    def show(
        self, iteration: int, *, loss: float, lr: float, rate: float, waiting: float = 0.0
    ) -> None:
        """Show the state after `iteration`.

        Args:
            iteration: The last one done.
            loss: Mean since the last call.
            lr: Learning rate.
            rate: Images a second.
            waiting: Share of the time in which the network waited for images; shown from 5 % on.
        """
        self.tell(iteration, f"loss {loss:.3f}  lr {lr:.2g}  {speed(rate, waiting)}")

    def tell(self, iteration: int, facts: str) -> None:
        """Show `facts` after `iteration`."""
        self._iteration, self._facts = iteration, facts
        self._update()
        now = time.monotonic()
        if iteration < self._last and now - self._last_line > LINE_EVERY:
            self._last_line = now
            steps = iteration - self._first + 1
            left = (now - self._begin) / steps * (self._last - iteration)
            self._line(f"{left:.0f} s left")

    def validated(self, miou: float, *, best: float) -> None:
        """Show the scores of a validation from now on, both in [0, 1]; `best` is that so far."""
        self._scores = f"  mIoU {100 * miou:.1f}"
        if best > miou:
            self._scores += f", best {100 * best:.1f}"
        self._update()

    def stopped_early(self) -> None:
        """No further iteration comes."""
        self._stopped = True

    def _update(self) -> None:
        self._bar.update(self._task, completed=self._iteration, facts=self._facts + self._scores)

    def _line(self, end: str) -> None:
        if self._silent or self._bar.console.is_terminal:
            return
        logger.info(
            "%s %d/%d  %s%s  %s",
            *(self._title, self._iteration, self._last, self._facts, self._scores, end),
        )


def speed(rate: float, waiting: float) -> str:
    """Images a second, and the share of the time that was spent waiting for them."""
    return f"{rate:.1f} img/s" + (f" ({100 * waiting:.0f} % waiting)" if waiting >= 0.05 else "")
