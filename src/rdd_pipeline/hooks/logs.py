"""Log lines where nobody looks on: whole, in plain text.

rich breaks lines at the width of a terminal and fills them up with blanks. In a file, in a pipe
and in the log of a cluster there is no width, and `grep` wants a line in one piece.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from rich.logging import RichHandler


class _PlainHandler(logging.StreamHandler[TextIO]):
    """Writes to what is `sys.stdout` at the time, as rich does."""

    def __init__(self, level: int) -> None:
        logging.Handler.__init__(self, level)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-8s %(message)s", "%H:%M:%S"))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


def log_whole_lines() -> None:
    """Take rich's place in the root logger unless there is a terminal or a notebook."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, RichHandler):
            console = handler.console
            if not (console.is_terminal or console.is_jupyter):
                root.removeHandler(handler)
                root.addHandler(_PlainHandler(handler.level))
