"""New processes: what they must not import, and when they must end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator

ORPHANED = 113
"""Exit status of a process that lost its parent."""


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Keep new processes from importing the main script (the `kedro` command) again."""
    main = sys.modules["__main__"]
    saved = {name: main.__dict__.get(name) for name in ("__spec__", "__file__")}
    try:
        for name in saved:
            main.__dict__.pop(name, None)
        main.__dict__["__spec__"] = None
        yield
    finally:
        main.__dict__.update({name: value for name, value in saved.items() if value is not None})


def end_with_parent(*_: object) -> None:
    """Let this process end as soon as the one that asked for it is gone, even by `kill -9`.

    It is a child of the fork server, which may go on: the system does not tell it.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
