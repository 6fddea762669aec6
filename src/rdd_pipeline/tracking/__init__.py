"""Live curves: training code emits numbers, whoever listens decides where they go.

`emit` costs a list append, or nothing when nobody listens. A listener is installed for the current
context by the experiment hook (rdd_pipeline.hooks) or by `connected` in a worker process.
`MlflowSink` hands points to a `TrackingWriter`, whose daemon thread talks to MLflow: a server that
is slow, away or deleted costs the training loop nothing, and what MLflow did not take ends up in a
JSON-lines file that ``python -m rdd_pipeline.tracking FILE`` sends later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from rdd_pipeline.tracking.writer import TrackingWriter, calm_mlflow

__all__ = ["MlflowSink", "Sink", "TrackingWriter", "connected", "connection", "emit", "listen"]

logger = logging.getLogger(__name__)

Sink = Callable[[int, Mapping[str, float]], None]

_SINK: ContextVar[Sink | None] = ContextVar("rdd_pipeline_metric_sink", default=None)


def emit(step: int, values: Mapping[str, float]) -> None:
    """Report named numbers of a training step to whoever listens in this context.

    Args:
        step: Iteration the values belong to, counted from 1.
        values: Python floats; a GPU tensor would be synchronized here.
    """
    sink = _SINK.get()
    if sink is not None:
        sink(step, values)


def listen(sink: Sink | None) -> None:
    """Send what this context emits to `sink` from now on; None: to nobody."""
    _SINK.set(sink)


def connection() -> dict[str, str] | None:
    """What a worker process needs to go on listening (`connected`), or None if nobody listens.

    Plain strings: it may be pickled, or be written to a job file.
    """
    sink = _SINK.get()
    return sink.connection() if isinstance(sink, MlflowSink) else None


@contextmanager
def connected(connection: Mapping[str, str] | None) -> Iterator[None]:
    """Send what is emitted inside the block to the run that `connection` names.

    For the first process of a distributed training; None or a machine without MLflow: to nobody.
    """
    if connection is None:
        yield
        return
    try:
        from mlflow import MlflowClient
    except ImportError:
        logger.warning("mlflow is not installed here: the curves of this training are not live.")
        yield
        return
    calm_mlflow()
    client = MlflowClient(tracking_uri=connection["tracking_uri"])
    writer = TrackingWriter(client, Path(connection["folder"]))
    listen(MlflowSink(connection["run_id"], writer, prefix=connection["prefix"]))
    try:
        yield
    finally:
        listen(None)
        writer.close()


class MlflowSink:
    """Sends emitted numbers to one MLflow run.

    Args:
        run_id: The run; addressed by id because MLflow's active run belongs to a thread.
        writer: Writes in the background.
        prefix: What the names begin with in the run.
    """

    def __init__(self, run_id: str, writer: TrackingWriter, *, prefix: str = "") -> None:
        self.run_id = run_id
        self._writer = writer
        self._prefix = prefix

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Take the points of one step."""
        if self._prefix:
            values = {f"{self._prefix}{key}": value for key, value in values.items()}
        self._writer.metrics(self.run_id, values, step=step)

    def connection(self) -> dict[str, str]:
        """See `connection`."""
        return {
            "run_id": self.run_id,
            "tracking_uri": str(self._writer.client.tracking_uri),
            "folder": str(self._writer.folder),
            "prefix": self._prefix,
        }
