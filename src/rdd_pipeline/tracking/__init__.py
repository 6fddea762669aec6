"""Live curves: training code logs numbers, whoever set a sink decides where they go.

`log_metrics` does nothing without a sink. The experiment hook (rdd_pipeline.hooks) sets one for the
current context: points go through a `TrackingWriter` to a JSON-lines file at once and from there to
MLflow in a daemon thread: a server that is slow, away or deleted costs the training nothing.
What is left in a file is sent by the next run, or by ``python -m rdd_pipeline.tracking FILE``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar

from rdd_pipeline.tracking.delivery import send_left
from rdd_pipeline.tracking.records import Experiment
from rdd_pipeline.tracking.sender import Sender, calm_mlflow
from rdd_pipeline.tracking.writer import TrackingWriter

__all__ = [
    "Experiment",
    "MetricSink",
    "Sender",
    "TrackingWriter",
    "calm_mlflow",
    "log_metrics",
    "send_left",
    "set_metric_sink",
]

MetricSink = Callable[[int, Mapping[str, float], str | None], None]

_SINK: ContextVar[MetricSink | None] = ContextVar("rdd_pipeline_metric_sink", default=None)


def log_metrics(step: int, values: Mapping[str, float], *, seed: str | None = None) -> None:
    """Hand named numbers of a training step to this context's sink.

    Args:
        step: Iteration the values belong to, counted from 1.
        values: Python floats; a GPU tensor would be synchronized here.
        seed: Of the training, where a node trains several that go by the same names.
    """
    sink = _SINK.get()
    if sink is not None:
        sink(step, values, seed)


def set_metric_sink(sink: MetricSink | None) -> None:
    """Hand what this context logs to `sink` from now on; None: to nobody."""
    _SINK.set(sink)
