"""Errors that a user can cause are shown as their message, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from kedro.io import DatasetError
from kedro.validation import ParameterValidationError

from rdd_pipeline.errors import (
    INTERRUPTED,
    NonFiniteLossError,
    RunInterrupted,
    UserError,
    WorkerFailedError,
)


def show_user_errors_as_one_line() -> None:
    """Print errors that a user can cause as their message, everything else as before.

    Kedro's logging installs rich tracebacks as `sys.excepthook`; a page of them hides the one
    sentence that matters. The exception itself is not touched: callers of a session still catch
    it. ``RDD_TRACEBACK=1`` shows the traceback. A command that a signal stopped ends with
    status 143.
    """
    if os.environ.get("RDD_TRACEBACK") or isinstance(sys.excepthook, _ShortErrors):
        return
    sys.excepthook = _ShortErrors(sys.excepthook)


class _ShortErrors:
    def __init__(self, otherwise: Callable[..., Any]) -> None:
        self._otherwise = otherwise

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        message = user_message(error)
        if message is None:
            self._otherwise(kind, error, trace)
        else:
            print(f"Error: {message}", file=sys.stderr)
        if isinstance(error, RunInterrupted):
            raise SystemExit(INTERRUPTED)  # the interpreter takes it from an excepthook, too


def user_message(error: BaseException) -> str | None:
    """What to tell the user instead of a traceback; None when the traceback is needed."""
    if isinstance(error, UserError | RunInterrupted | NonFiniteLossError | WorkerFailedError):
        return str(error)
    if isinstance(error, ParameterValidationError):
        # pydantic adds a link to its documentation to every fault
        lines = str(error).splitlines()
        return "\n".join(line for line in lines if "https://errors.pydantic.dev" not in line)
    if isinstance(error, DatasetError) and isinstance(error.__cause__, UserError):
        return str(error.__cause__)  # Kedro wraps what a dataset's load or save raises
    return None
