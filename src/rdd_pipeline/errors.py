"""Errors a user can cause: their message is the whole explanation, no traceback is needed."""


class UserError(ValueError):
    """Something the user gave does not fit: says what was found, expected, and what to do."""


class DataProblem(UserError):
    """One or several problems of the labelled images, all of them in one message."""


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; raised before the optimizer changed anything."""
