"""Signals at a named moment: a process that calls `arm` first of all sends them to itself there.

MOMENT is ``import:MODULE`` or another audit event with a part of its first argument; SIGNALS are
their numbers.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def arm() -> None:
    """Do nothing without MOMENT; processes that this one starts are left alone."""
    kind, _, what = os.environ.pop("MOMENT", "").partition(":")
    numbers = [int(number) for number in os.environ.pop("SIGNALS", "").split(",") if number]

    def stop(event: str, arguments: Any) -> None:
        if numbers and event == kind and what in str(arguments[0]):
            while numbers:
                os.kill(os.getpid(), numbers.pop(0))

    if kind:
        sys.addaudithook(stop)
