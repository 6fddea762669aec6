"""Exponential moving average of a network in training (Polyak averaging), for `recipe.ema`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from rdd_pipeline.config import EmaParams
from rdd_pipeline.networks import SegmentationNetwork


def decay_at(params: EmaParams, iteration: int) -> float:
    """``min(decay, (1 + t) / (10 + t))`` after iteration t, which counts from 1.

    The random weights of the start are so forgotten within the first steps; as TensorFlow's
    ExponentialMovingAverage does with `num_updates`. A pure function of the iteration: nothing
    about it has to be stored or resumed.
    """
    return min(params.decay, (1 + iteration) / (10 + iteration))


class AveragedNetwork:
    """A second copy of a network, whose values follow the first one's.

    Weights are averaged, and so are batch norm's running statistics: those of the network belong
    to its own last weights, and would be put beside weights that are older on average. Counters
    (integer buffers) are copied. Frozen values stay what they are.

    Args:
        network: In training; where it lies, and in its layout, the copy lies too.
        params: How fast the average follows.

    Attributes:
        network: The average: what is validated, kept and handed on.
    """

    def __init__(self, network: SegmentationNetwork, params: EmaParams) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._params = params
        pairs = list(zip(_values(self.network), _values(network), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in what the network is after `iteration`."""
        mine, theirs = map(list, zip(*self._averaged, strict=True))
        torch._foreach_lerp_(mine, theirs, 1.0 - decay_at(self._params, iteration))
        for own, value in self._copied:
            own.copy_(value)


def _values(network: SegmentationNetwork) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
