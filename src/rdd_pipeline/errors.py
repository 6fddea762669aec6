"""Errors a user can cause: their message is the whole explanation, no traceback is needed."""

import re

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, colors or turns its text, or is no text at all."""


def printable(text: str, *, lines: bool = False) -> str:
    """The text with control characters as escapes; `lines`: ends of lines stay."""

    def escape(found: re.Match[str]) -> str:
        whole = found[0]
        return whole if lines and whole == "\n" else whole.encode("unicode_escape").decode()

    return _CONTROLS.sub(escape, text)


class UserError(ValueError):
    """Something the user gave does not fit: says what was found, expected, and what to do.

    Control characters of names in it are shown as escapes.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), lines=True)


class DataProblem(UserError):  # noqa: N818 - it is raised for one problem or many
    """One or several problems of the labelled images, all of them in one message."""


class NonFiniteLossError(RuntimeError):
    """A loss, gradient or weight became NaN or infinite; nothing of that step was kept."""


INTERRUPTED = 143
"""Exit status of a command that a signal stopped: 128 + SIGTERM, as shells count."""


class RunInterrupted(RuntimeError):  # noqa: N818 - no fault, the user wanted it
    """Ctrl-C or SIGTERM stopped the run; an Exception, so that Kedro's hooks see it."""


class WorkerFailedError(RuntimeError):
    """A worker kept failing; the message starts with its own error."""
