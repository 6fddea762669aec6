"""Equality bit for bit; independent of the project's digests."""

from __future__ import annotations

from typing import Any

import torch


def equal(one: Any, other: Any) -> bool:
    """Whether nested dicts and sequences of tensors and plain values are the same, types too."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def same_training(one: Any, other: Any) -> bool:
    """Whether two `TrainingResult` hold the same state, weights and predictions over the run."""
    names = ("student", "objective", "optimizer", "best", "iteration", "snapshots")
    states = (one.state.to_dict(), other.state.to_dict())
    first, second = ({name: state.get(name) for name in names} for state in states)
    return equal(first, second) and equal(one.network.tensors, other.network.tensors)
