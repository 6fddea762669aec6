"""Live curves: training code logs numbers, whoever set a sink decides where they go.

`log_metrics` and `log_file` do nothing without a sink. The experiment hook (rdd_pipeline.hooks)
sets one for the current context: points go through a `TrackingWriter` to a JSON-lines file at once
and from there to MLflow in a daemon thread: a server that is slow, away or deleted costs the
training nothing.
What is left in a file is sent by the next run, or by ``python -m rdd_pipeline.tracking FILE``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path

from rdd_pipeline.tracking.delivery import send_left
from rdd_pipeline.tracking.event_files import EventFile
from rdd_pipeline.tracking.records import Experiment, Network, UsedData
from rdd_pipeline.tracking.sender import Sender, calm_mlflow
from rdd_pipeline.tracking.writer import TrackingWriter

__all__ = [
    "CurveSink",
    "EventFile",
    "Experiment",
    "FailureSink",
    "FileSink",
    "MetricSink",
    "Network",
    "ParamSink",
    "Sender",
    "TrackingWriter",
    "UsedData",
    "calm_mlflow",
    "log_failure",
    "log_file",
    "log_metrics",
    "log_params",
    "send_left",
    "set_curve_sink",
    "set_failure_sink",
    "set_file_sink",
    "set_metric_sink",
    "set_param_sink",
]

MetricSink = Callable[[int, Mapping[str, float], str | None, str | None], None]
"""Is given step, values, seed and method, see `log_metrics`."""

CurveSink = Callable[[int, Mapping[str, float], str, str | None, str | None], None]
"""Is given step, values, training, seed and method, see `log_metrics`."""

FileSink = Callable[[Path, str, str | None], None]

ParamSink = Callable[[Mapping[str, str], str], None]
"""Is given values and method, see `log_params`."""

FailureSink = Callable[[str, str], None]
"""Is given problem and method, see `log_failure`."""

_SINK: ContextVar[MetricSink | None] = ContextVar("rdd_pipeline_metric_sink", default=None)
_CURVES: ContextVar[CurveSink | None] = ContextVar("rdd_pipeline_curve_sink", default=None)
_FILES: ContextVar[FileSink | None] = ContextVar("rdd_pipeline_file_sink", default=None)
_PARAMS: ContextVar[ParamSink | None] = ContextVar("rdd_pipeline_param_sink", default=None)

_FAILURES: ContextVar[FailureSink | None] = ContextVar("rdd_pipeline_failure_sink", default=None)


def log_metrics(
    step: int,
    values: Mapping[str, float],
    *,
    seed: str | None = None,
    method: str | None = None,
    training: str | None = None,
) -> None:
    """Hand named numbers of a training step to this context's sinks.

    Args:
        step: Iteration the values belong to, counted from 1.
        values: Python floats; a GPU tensor would be synchronized here.
        seed: Of the training, where a node trains several that go by the same names.
        method: Of the training, where a node trains by others than its own.
        training: Its fingerprint; None: the values are of no single training.
    """
    sink, curves = _SINK.get(), _CURVES.get()
    if sink is not None:
        sink(step, values, seed, method)
    if curves is not None and training is not None:
        curves(step, values, training, seed, method)


def set_metric_sink(sink: MetricSink | None) -> None:
    """Hand what this context logs to `sink` from now on; None: to nobody."""
    _SINK.set(sink)


def set_curve_sink(sink: CurveSink | None) -> None:
    """Hand the curves of this context's trainings to `sink`, too, from now on; None: to nobody."""
    _CURVES.set(sink)


def log_file(path: Path, folder: str, *, seed: str | None = None) -> None:
    """Hand a file to this context's sink.

    Args:
        path: Below the project.
        folder: Of the run's artifacts, where it goes.
        seed: Of the training it belongs to, as in `log_metrics`.
    """
    sink = _FILES.get()
    if sink is not None:
        sink(path, folder, seed)


def set_file_sink(sink: FileSink | None) -> None:
    """Hand files of this context to `sink` from now on; None: to nobody."""
    _FILES.set(sink)


def log_params(values: Mapping[str, str], method: str) -> None:
    """Hand settings of one of a node's trainings to this context's sink.

    Args:
        values: By name.
        method: What `log_metrics` is told of the same training.
    """
    sink = _PARAMS.get()
    if sink is not None:
        sink(values, method)


def set_param_sink(sink: ParamSink | None) -> None:
    """Hand settings of this context to `sink` from now on; None: to nobody."""
    _PARAMS.set(sink)


def log_failure(problem: str, method: str) -> None:
    """Tell this context's sink that one of a node's trainings failed, which the node survives.

    Args:
        problem: In one line.
        method: What `log_metrics` is told of the same training.
    """
    sink = _FAILURES.get()
    if sink is not None:
        sink(problem, method)


def set_failure_sink(sink: FailureSink | None) -> None:
    """Hand failures of this context to `sink` from now on; None: to nobody."""
    _FAILURES.set(sink)
