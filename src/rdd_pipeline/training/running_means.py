"""Means and clock between two points of the curves."""

from __future__ import annotations

import time
from collections.abc import Mapping


class RunningMeans:
    """Sums between two points of the curves; its clock runs only while the network trains."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._images = 0
        self._seconds = 0.0
        self._mark = time.monotonic()

    def add(self, values: Mapping[str, float], images: int) -> float:
        """Count one step that ends now; returns the seconds it took."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._images += images
        now = time.monotonic()
        seconds = now - self._mark
        self._seconds += seconds
        self._mark = now
        return seconds

    def resume_clock(self) -> None:
        """Leave out what was done since the last step: validation, writing checkpoints."""
        self._mark = time.monotonic()

    def close(self) -> tuple[dict[str, float], int, float]:
        """Means, images and seconds since the last call.

        A value that only some of the steps have, as where TSE takes over from TFE, is the mean of
        those.
        """
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        images, seconds = self._images, self._seconds
        self._sums, self._counts, self._images, self._seconds = {}, {}, 0, 0.0
        return means, images, seconds
