"""What a person sees of work on many files: a bar in a terminal, a log line elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

LINE_EVERY = 15.0
"""Seconds between log lines where there is no terminal."""

T = TypeVar("T")


def work_bar(*facts: ProgressColumn, shown: bool = True) -> Progress:
    """A bar with count, `facts`, time gone and time left; hidden where there is no terminal.

    Draws on rich's shared console, the one Kedro logs to, so that log lines do not tear the bar.
    """
    console = rich.get_console()
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *facts,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown or not console.is_terminal,
    )


def tracked(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """The items, one after the other, while a bar shows how many there have been."""
    begin = last_line = time.monotonic()
    with work_bar() as bar:
        task = bar.add_task(title, total=total)
        for number, item in enumerate(items, start=1):
            yield item
            bar.update(task, completed=number)
            now = time.monotonic()
            if not bar.console.is_terminal and now - last_line > LINE_EVERY:
                last_line = now
                left = (now - begin) / number * (total - number)
                logger.info("%s %d/%d  %.0f s left", title, number, total, left)
