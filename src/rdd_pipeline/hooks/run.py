"""The MLflow run of one Kedro run, with a child for each namespace when there are several."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rdd_pipeline.hooks.facts import is_alive, process_tags
from rdd_pipeline.tracking import MlflowSink, TrackingWriter

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

CREATION_PAUSE = 60.0
"""Seconds until the creation of a child run is tried again after a failure."""


class Place(NamedTuple):
    """Where something is logged: a run, and what its keys begin with there."""

    run_id: str
    prefix: str = ""


class OpenRun:
    """An MLflow run while Kedro runs.

    Everything but the creation of runs goes through a `TrackingWriter` and so returns at once.

    Args:
        client: The MLflow client.
        experiment: Id of the experiment.
        name: Name of the run.
        namespaces: Namespace of every node that will run, with repetition; with several different
            ones each gets a child run when its first node starts.
        tags: Of the run and of all its children.
        own_tags: Of the run alone.
        folder: Where the writer leaves what MLflow did not take.
        given: Id of an existing run to log into; it is not closed at the end.

    Raises:
        Exception: MLflow cannot create the run.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment: str,
        name: str,
        *,
        namespaces: Counter[str],
        tags: Mapping[str, str],
        own_tags: Mapping[str, str],
        folder: Path,
        given: str | None = None,
    ) -> None:
        self._client = client
        self._experiment = experiment
        self._tags = dict(tags)
        self._left = Counter(namespaces)
        self._nested = len(namespaces) > 1
        self._children: dict[str, str] = {}
        self._next_try = 0.0
        self._params: dict[Place, dict[str, str]] = {}
        self._lock = threading.RLock()
        self._owned = given is None
        # One namespace needs no child, its name belongs on the run itself.
        methods = {} if self._nested else {"method": name for name in namespaces}  # noqa: B035
        own = {**own_tags, **methods}
        self.id = given or self._create(name, own)
        self.writer = TrackingWriter(client, folder)
        if given is not None:
            self.writer.tags(given, {**self._tags, **own})

    def _create(self, name: str, tags: Mapping[str, str]) -> str:
        run = self._client.create_run(self._experiment, run_name=name, tags={**self._tags, **tags})
        return str(run.info.run_id)

    def place(self, namespace: str | None) -> Place:
        """Where a node of this namespace logs.

        While MLflow cannot create the namespace's own run, its keys go to the parent, prefixed.
        """
        if namespace is None or not self._nested:
            return Place(self.id)
        with self._lock:
            due = time.monotonic() >= self._next_try and not self.writer.failing
            if namespace not in self._children and due:
                try:
                    self._children[namespace] = self._create(
                        namespace, {"method": namespace, "mlflow.parentRunId": self.id}
                    )
                except Exception as error:
                    self._next_try = time.monotonic() + CREATION_PAUSE
                    logger.warning(
                        "MLflow cannot create the run of %s (%s); it is logged into %s.",
                        namespace,
                        type(error).__name__,
                        self.id,
                    )
            if namespace in self._children:
                return Place(self._children[namespace])
            return Place(self.id, f"{namespace}.")

    def sink(self, namespace: str | None) -> MlflowSink:
        """What a node of this namespace emits to."""
        place = self.place(namespace)
        return MlflowSink(place.run_id, self.writer, prefix=place.prefix)

    def params(self, namespace: str | None, node: str, values: Mapping[str, str]) -> None:
        """Log a node's parameters, each key once; a second value for a key gets the node's name."""
        place = self.place(namespace)
        with self._lock:
            known = self._params.setdefault(place, {})
            named = {
                key if known.get(key, value) == value else f"{node}.{key}": value
                for key, value in values.items()
            }
            fresh = {key: value for key, value in named.items() if key not in known}
            known.update(fresh)
        if fresh:
            self.writer.params(
                place.run_id, {f"{place.prefix}{key}": value for key, value in fresh.items()}
            )

    def metrics(self, namespace: str | None, values: Mapping[str, float]) -> None:
        """Log final numbers."""
        place = self.place(namespace)
        self.writer.metrics(
            place.run_id, {f"{place.prefix}{key}": value for key, value in values.items()}
        )

    def artifact(self, namespace: str | None, path: Path, folder: str) -> None:
        """Upload a file."""
        place = self.place(namespace)
        self.writer.artifact(place.run_id, path, f"{folder}/{place.prefix}".rstrip("./"))

    def tags(self, namespace: str | None, values: Mapping[str, Any]) -> None:
        """Tag the run of a namespace."""
        place = self.place(namespace)
        self.writer.tags(
            place.run_id, {f"{place.prefix}{key}": value for key, value in values.items()}
        )

    def tags_of_all(self, values: Mapping[str, Any]) -> None:
        """Tag the run and its children, those to come included."""
        with self._lock:
            self._tags.update({str(key): str(value) for key, value in values.items()})
            for run_id in (self.id, *self._children.values()):
                self.writer.tags(run_id, values)

    def node_done(self, namespace: str | None) -> None:
        """Count a finished node: a namespace is complete when all of its nodes are."""
        if namespace is not None:
            with self._lock:
                self._left[namespace] -= 1

    def close(
        self,
        status: str,
        *,
        problem: Mapping[str, str] | None = None,
        failed: str | None = None,
        timeout: float,
    ) -> None:
        """End all runs.

        Args:
            status: FINISHED, FAILED or KILLED.
            problem: Tags that say what went wrong.
            failed: Namespace of the node that failed: its run gets `status` and `problem`.
                Children that were complete are FINISHED, others KILLED.
            timeout: Seconds until unsent records are written to a file instead.
        """
        for namespace, run_id in self._children.items():
            complete = status == "FINISHED" or self._left[namespace] <= 0
            if namespace == failed:
                self.writer.tags(run_id, problem or {})
            end = status if namespace == failed else "FINISHED" if complete else "KILLED"
            self.writer.status(run_id, end)
        self.writer.tags(self.id, problem or {})
        if self._owned:
            self.writer.status(self.id, status)
        self.writer.close(timeout)


def close_dead_runs(client: MlflowClient, experiment: str, project: Path) -> None:
    """Mark runs of this project as killed whose process no longer exists.

    A run that was ended by SIGKILL or a power cut stays RUNNING in MLflow. Only runs of this host
    are looked at.
    """
    own = process_tags(project)
    running = client.search_runs(
        [experiment],
        f"attributes.status = 'RUNNING' and tags.process_host = '{own['process_host']}'",
    )
    for run in running:
        tags = run.data.tags
        if tags.get("process_project") != own["process_project"]:
            continue
        if not is_alive(int(tags["process_id"]), tags.get("process_start")):
            client.set_tag(run.info.run_id, "error", "the process died")
            client.set_terminated(run.info.run_id, "KILLED")
