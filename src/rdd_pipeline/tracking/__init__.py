"""Live curves: training code emits numbers, whoever listens decides where they go.

`emit` costs a list append, or nothing when nobody listens. A listener is installed for the current
context by the experiment hook (rdd_pipeline.hooks). It hands points to a `TrackingWriter`, whose
daemon thread talks to MLflow: a server that is slow, away or deleted costs the training loop
nothing, and what MLflow did not take ends up in a JSON-lines file that
``python -m rdd_pipeline.tracking FILE`` sends later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar

from rdd_pipeline.tracking.records import Experiment
from rdd_pipeline.tracking.sender import Sender, calm_mlflow
from rdd_pipeline.tracking.writer import TrackingWriter

__all__ = [
    "Experiment",
    "Listener",
    "Sender",
    "TrackingWriter",
    "calm_mlflow",
    "emit",
    "listen",
]

Listener = Callable[[int, Mapping[str, float], str | None], None]

_LISTENER: ContextVar[Listener | None] = ContextVar("rdd_pipeline_listener", default=None)


def emit(step: int, values: Mapping[str, float], *, seed: str | None = None) -> None:
    """Report named numbers of a training step to whoever listens in this context.

    Args:
        step: Iteration the values belong to, counted from 1.
        values: Python floats; a GPU tensor would be synchronized here.
        seed: Of the training, where a node trains several that go by the same names.
    """
    listener = _LISTENER.get()
    if listener is not None:
        listener(step, values, seed)


def listen(listener: Listener | None) -> None:
    """Send what this context emits to `listener` from now on; None: to nobody."""
    _LISTENER.set(listener)
