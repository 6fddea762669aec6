"""What a step says of itself, on its way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rdd_pipeline.losses.class_counts import PixelsOfClass


@dataclass(frozen=True)
class Reading:
    """The numbers of one step. Asking for them waits until the device has computed them.

    Attributes:
        iteration: Of the step.
    """

    iteration: int
    _numbers: Tensor
    _arrived: torch.cuda.Event | None
    _values: tuple[str, ...]
    _norms: tuple[str, ...]

    @classmethod
    def of(
        cls, numbers: Tensor, iteration: int, values: tuple[str, ...], norms: tuple[str, ...]
    ) -> Reading:
        """Begin the one transfer of a step, and do not wait for its end.

        Args:
            numbers: Float32: the values, the norms, then the pixels of each class, if they were
                counted.
            iteration: Of the step.
            values: Their names.
            norms: Their names.
        """
        arrived = None
        if numbers.is_cuda:
            target = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = target.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return cls(iteration, numbers, arrived, values, norms)

    @cached_property
    def _on_host(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.cpu()

    @cached_property
    def values(self) -> dict[str, float]:
        """What goes into the curves, by name."""
        return dict(zip(self._values, self._on_host[: len(self._values)].tolist(), strict=True))

    @property
    def norms(self) -> dict[str, float]:
        """What else has to be finite, by name."""
        first = len(self._values)
        found = self._on_host[first : first + len(self._norms)].tolist()
        return dict(zip(self._norms, found, strict=True))

    @property
    def counts(self) -> Tensor | None:
        """Pixels of each class (fields of `PixelsOfClass`, classes), where they were counted."""
        counts = self._on_host[len(self._values) + len(self._norms) :]
        return counts.view(len(PixelsOfClass._fields), -1) if len(counts) else None
