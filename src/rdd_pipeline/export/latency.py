"""How long a program takes: warm-up, median, spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Latency(NamedTuple):
    """Milliseconds of one call: median and quartiles of so many runs."""

    median: float
    lower: float
    upper: float
    runs: int


def measure_latency(
    call: Callable[[], object],
    *,
    runs: int,
    warm_up: int = 2,
    seconds: float = 60.0,
    synchronize: Callable[[], object] | None = None,
) -> Latency:
    """Time a call.

    Args:
        call: What is timed.
        runs: How often, at most.
        warm_up: Calls before, which are not counted.
        seconds: Nothing is begun after so long, but three runs there are always.
        synchronize: Waits for the device's work, before and after each call.
    """
    wait = synchronize or (lambda: None)
    began = time.perf_counter()
    for _ in range(warm_up):
        call()
    times: list[float] = []
    while len(times) < runs and (len(times) < 3 or time.perf_counter() - began < seconds):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(1000 * (time.perf_counter() - start))
    lower, median, upper = (
        statistics.quantiles(times, method="inclusive") if len(times) > 1 else 3 * times
    )
    return Latency(median, lower, upper, len(times))
