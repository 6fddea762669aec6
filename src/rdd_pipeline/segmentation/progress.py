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
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

LINE_EVERY = 15.0
"""Seconds between log lines where there is no terminal."""

T = TypeVar("T")


def tracked(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """The items, one after the other, while a bar shows how many there have been.

    Draws on rich's shared console, the one Kedro logs to, so that log lines do not tear the bar.
    """
    console = rich.get_console()
    begin = last_line = time.monotonic()
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        for number, item in enumerate(items, start=1):
            yield item
            bar.update(task, completed=number)
            now = time.monotonic()
            if not console.is_terminal and now - last_line > LINE_EVERY:
                last_line = now
                left = (now - begin) / number * (total - number)
                logger.info("%s %d/%d  %.0f s left", title, number, total, left)
