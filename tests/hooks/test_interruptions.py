"""Signals stop a run in an orderly way."""

from __future__ import annotations

import os
import signal
import time

import pytest

from rdd_pipeline.errors import RunInterrupted
from rdd_pipeline.hooks.interruptions import Signals


def test_a_swallowed_stop_signal_stops_the_next_node() -> None:
    signals = Signals()
    signals.install()
    try:
        signals.check()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Exception:
            pass  # what some library does
        with pytest.raises(RunInterrupted, match="SIGTERM"):
            signals.check()
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
