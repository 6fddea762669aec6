"""Errors a user can cause: their message is the whole explanation, no traceback is needed."""


class UserError(ValueError):
    """Something the user gave does not fit: says what was found, expected, and what to do."""


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
