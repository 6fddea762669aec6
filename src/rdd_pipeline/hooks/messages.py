"""Errors that a user can cause are shown as their message, once, without a traceback."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from traceback import walk_tb
from types import TracebackType
from typing import Any

from kedro.io import DatasetError
from kedro.io.core import VersionNotFoundError
from kedro.validation import ParameterValidationError

from rdd_pipeline.errors import INTERRUPTED, NonFiniteLossError, UserError, WorkerFailedError
from rdd_pipeline.interruptions import interruption, tell
from rdd_pipeline.tracking.addresses import without_secrets

_OF_THE_MACHINE = {
    errno.ENOSPC: "There is no space left on the device",
    errno.EDQUOT: "The disk quota is used up",
    errno.EFBIG: "A file became larger than this system or `ulimit -f` allows",
    errno.EROFS: "The file system is read-only",
    errno.EACCES: "Permission denied",
    errno.EPERM: "Not permitted",
    errno.EMFILE: "Too many files are open (`ulimit -n`)",
    errno.ENFILE: "Too many files are open on this machine",
    errno.EIO: "The device cannot be read or written",
}
# Libraries in other languages raise errors of their own, with the system's words in them.
_IN_WORDS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "Read-only file system": errno.EROFS,
}
_KEDRO_SAYS_AGAIN = ("Node %s failed with error", "No nodes ran. Repeat", "There are ")
_KEDRO_LOGGERS = (
    "kedro.pipeline.node",
    "kedro.runner.sequential_runner",
    "kedro.runner.thread_runner",
    "kedro.runner.parallel_runner",
)


def show_user_errors_as_one_line() -> None:
    """Print errors that a user can cause as their message, everything else as before.

    Kedro's logging installs rich tracebacks as `sys.excepthook`; a page of them hides the one
    sentence that matters, and so does what Kedro logs about the node. The exception itself is not
    touched: callers of a session still catch it. ``RDD_TRACEBACK=1`` shows all. A command that a
    signal stopped ends with status 143.
    """
    if os.environ.get("RDD_TRACEBACK"):
        return
    for name in _KEDRO_LOGGERS:
        logging.getLogger(name).addFilter(_is_news)  # one and the same is added once
    if not isinstance(sys.excepthook, _ShortErrors):
        sys.excepthook = _ShortErrors(sys.excepthook)


def _is_news(record: logging.LogRecord) -> bool:
    """False for Kedro's words about an error that will be shown as one line."""
    error = sys.exc_info()[1]
    again = str(record.msg).startswith(_KEDRO_SAYS_AGAIN)
    return not (again and error is not None and user_message(error) is not None)


class _ShortErrors:
    def __init__(self, otherwise: Callable[..., Any]) -> None:
        self._otherwise = otherwise

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        stopped = interruption(error)
        message = user_message(error)
        if stopped is not None:
            tell(f"Error: {message}")
            raise SystemExit(INTERRUPTED)  # the interpreter takes it from an excepthook, too
        if message is None:
            self._otherwise(kind, error, trace)
        else:
            print(f"Error: {without_secrets(message)}", file=sys.stderr)


def user_message(error: BaseException) -> str | None:
    """What to tell the user instead of a traceback; None when the traceback is needed."""
    stopped = interruption(error)
    if stopped is not None:
        return str(stopped)
    chain = list(_causes(error))
    root = chain[-1]
    if isinstance(root, UserError | NonFiniteLossError | WorkerFailedError):
        return str(root)
    if isinstance(root, ParameterValidationError):
        # pydantic adds a link to its documentation to every fault
        lines = str(root).splitlines()
        return "\n".join(line for line in lines if "https://errors.pydantic.dev" not in line)
    return _of_the_machine(chain) or _of_a_file(chain) or _of_the_command(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and, where Kedro has wrapped another one, that: load and save do, several times."""
    yield error
    cause = error.__cause__ or error.__context__
    if isinstance(error, DatasetError) and cause is not None:
        yield from _causes(cause)


def _of_the_machine(chain: list[BaseException]) -> str | None:
    """Full disks and the like, at the end of whatever a library has made of them."""
    from rdd_pipeline.training.device import ran_out_of_memory  # torch, only where it is needed

    error: BaseException | None = chain[-1]
    while error is not None:
        if ran_out_of_memory(error):
            return (
                "Memory ran out. Lower batch_size or crop of the recipe, evaluation.batch_size or "
                "trainer.workers, or close other programs, and repeat the command: it goes on from "
                "what is done."
            )
        number = error.errno if isinstance(error, OSError) else None
        if number not in _OF_THE_MACHINE:
            number = next((n for words, n in _IN_WORDS.items() if words in str(error)), None)
        if number is not None:
            path = getattr(error, "filename", None) or _file_of(chain)
            where = f": {path}" if path else ""
            return (
                f"{_OF_THE_MACHINE[number]}{where}. Mend that and repeat the command: it goes on "
                "from what is done."
            )
        error = error.__cause__ or error.__context__
    return None


def _of_a_file(chain: list[BaseException]) -> str | None:
    """A file of the catalog that cannot be used: missing, empty, cut off, of another form."""
    root = chain[-1]
    words = str(chain[0])
    if not isinstance(chain[0], DatasetError):
        return None
    if "An exception occurred when parsing config for dataset" in words:
        return f"The catalog in conf/ is wrong: {_one_line(chain[0])}"
    if isinstance(root, VersionNotFoundError):
        return f"{_file_of(chain)} holds no version yet. Run the pipeline that makes it first."
    # What a save refuses may as well be the program's fault.
    loading = "Failed while loading data" in words and isinstance(root, ValueError)
    if not (loading or isinstance(root, OSError)):
        return None
    path = getattr(root, "filename", None) or _file_of(chain) or "A file of the catalog"
    return (
        f"{path} cannot be used ({_one_line(root)}). Delete it and run the pipeline that makes it "
        "again."
    )


def _file_of(chain: list[BaseException]) -> str | None:
    """The path in Kedro's description of a data set."""
    for error in reversed(chain):
        if isinstance(error, DatasetError):
            found = re.search(r"filepath=(?:\w+\()?'?([^',)]+)", str(error))
            if found:
                return found[1]
    return None


def _of_the_command(error: BaseException) -> str | None:
    """What Kedro itself says of names on the command line, or of the files in conf/.

    It raises ordinary errors; where they come from tells them from those of a program.
    """
    names = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    places = [name for name in names if name.split(".")[0] in ("kedro", "rdd_pipeline")]
    if not any(name.startswith("kedro.framework.cli") for name in places):
        return None
    last = places[-1] if places[-1] != "kedro.utils" else places[-2]
    if last.startswith("kedro.config"):
        return f"The files in conf/ cannot be read: {_one_line(error)}"
    ours = any(name.startswith("rdd_pipeline") for name in places)
    if not ours and last == "kedro.pipeline.pipeline":
        words = _one_line(error).rstrip(".")
        return f"{words}. `kedro registry describe PIPELINE` lists what there is."
    if not ours and last in ("kedro.framework.cli.utils", "kedro.framework.cli.project"):
        return f"The options of the command cannot be used: {_one_line(error)}"
    return None


def _one_line(error: BaseException) -> str:
    """Its words without the lines they are set in."""
    return " ".join(str(error).split()) or type(error).__name__
