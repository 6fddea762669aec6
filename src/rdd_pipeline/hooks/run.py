"""The MLflow run of one Kedro run, with a child for each namespace and for each seed of several."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rdd_pipeline.hooks.facts import curve_name
from rdd_pipeline.tracking import (
    Experiment,
    FileSink,
    MetricSink,
    Network,
    ParamSink,
    TrackingWriter,
    UsedData,
)


class OpenRun:
    """An MLflow run while Kedro runs.

    Everything, the creation of runs too, goes through a `TrackingWriter` and so returns at once.

    Args:
        writer: Writes in the background; `close` closes it.
        experiment: Where the runs belong.
        name: Name of the run.
        namespaces: Namespace of every node that will run, with repetition; with several different
            ones each gets a child run when its first node starts.
        tags: Of the run and of all its children.
        own_tags: Of the run alone.
        nested: Children there are in any case: a node trains for other than its namespace.
        given: MLflow's id of an existing run to log into; it is not closed at the end.

    Attributes:
        id: By which `writer` knows the run.
    """

    def __init__(
        self,
        writer: TrackingWriter,
        experiment: Experiment,
        name: str,
        *,
        namespaces: Counter[str],
        tags: Mapping[str, str],
        own_tags: Mapping[str, str],
        nested: bool = False,
        given: str | None = None,
    ) -> None:
        self.writer = writer
        self._experiment = experiment
        self._tags = dict(tags)
        self._left = Counter(namespaces)
        self._nested = nested or len(namespaces) > 1
        self._children: dict[tuple[str | None, str | None], str] = {}
        self._params: dict[str, dict[str, str]] = {}
        self._used: list[UsedData] = []
        self._told: dict[tuple[str, str], int] = {}
        self._settings: dict[str, dict[str, str]] = {}
        self._models: list[tuple[str, str, Network]] = []
        self._problems: dict[str | None, str] = {}
        self._lock = threading.RLock()
        self._owned = given is None
        # One namespace needs no child, its name belongs on the run itself.
        methods = {} if self._nested else {"method": name for name in namespaces}  # noqa: B035
        all_tags = {**self._tags, **own_tags, **methods}
        self.id = given or writer.start(name, experiment, all_tags)
        if given is not None:
            writer.tags(given, all_tags)

    def of(self, namespace: str | None, seed: str | None = None) -> str:
        """Id of the run in which a node of this namespace logs, or one of the node's seeds.

        Where a node works with several seeds each has a run below that of the namespace, with the
        same names of parameters, curves and metrics. A run has the parameters of the one above it.
        """
        if seed is None and (namespace is None or not self._nested):
            return self.id
        with self._lock:
            if (namespace, seed) not in self._children:
                parent = self.id if seed is None else self.of(namespace)
                own = {} if seed is None else {"seed": seed}
                self._children[namespace, seed] = child = self.writer.start(
                    " seed ".join(filter(None, (namespace, seed))),
                    self._experiment,
                    {**self._tags, "method": namespace or "", **own},
                    parent=parent,
                )
                settings = self._settings.get(namespace or "", {})
                self._params[child] = {**self._params.get(parent, {}), **settings, **own}
                self.writer.params(child, self._params[child])
                for data in self._used:
                    self.writer.used(child, data)
            return self._children[namespace, seed]

    def sink(self, namespace: str | None) -> MetricSink:
        """Where the curves go that a node of this namespace logs, or logs for another one.

        A step is told once: a training that was started again repeats those since its checkpoint,
        and one that goes on tells first what was trained before.
        """

        def tell(
            step: int, values: Mapping[str, float], seed: str | None, method: str | None
        ) -> None:
            run_id = self.of(method or namespace, seed)
            with self._lock:
                new = {k: v for k, v in values.items() if step > self._told.get((run_id, k), -1)}
                self._told.update({(run_id, key): step for key in new})
            self.writer.metrics(
                run_id, {curve_name(key): value for key, value in new.items()}, step=step
            )

        return tell

    def param_sink(self) -> ParamSink:
        """Where the settings go that a node logs of one of its trainings, which gets a run.

        What is said before the first number wins over what the run above it was told.
        """

        def tell(values: Mapping[str, str], method: str) -> None:
            with self._lock:
                self._settings.setdefault(method, dict(values))
                self.params(method, method, values)

        return tell

    def file_sink(self, namespace: str | None) -> FileSink:
        """Where the files go that a node of this namespace logs."""
        return lambda path, folder, seed: self.writer.artifact(
            self.of(namespace, seed), path, folder
        )

    def params(self, namespace: str | None, node: str, values: Mapping[str, str]) -> None:
        """Log a node's parameters, each key once; a second value for a key gets the node's name."""
        run_id = self.of(namespace)
        with self._lock:
            known = self._params.setdefault(run_id, {})
            named = {
                key if known.get(key, value) == value else f"{node}.{key}": value
                for key, value in values.items()
            }
            fresh = {key: value for key, value in named.items() if key not in known}
            known.update(fresh)
        self.writer.params(run_id, fresh)

    def used(self, data: Sequence[UsedData]) -> None:
        """Note for the run and its children, those to come included, what data they read."""
        with self._lock:
            fresh = [one for one in data if one not in self._used]
            self._used += fresh
            for run_id in (self.id, *self._children.values()):
                for one in fresh:
                    self.writer.used(run_id, one)

    def failed(self, problem: str, method: str) -> None:
        """Have the runs of one of a node's trainings end as failed, whatever the node comes to."""
        self._problems[method] = problem

    def has(self, namespace: str) -> bool:
        """Whether nodes of this namespace belong to the run."""
        return namespace in self._left

    def tags_of_all(self, values: Mapping[str, Any]) -> None:
        """Tag the run and its children, those to come included."""
        with self._lock:
            self._tags.update({str(key): str(value) for key, value in values.items()})
            for run_id in (self.id, *self._children.values()):
                self.writer.tags(run_id, values)

    def model(self, namespace: str | None, seed: str | None, name: str, network: Network) -> None:
        """Have a trained network registered under a name when the runs are closed."""
        self._models.append((self.of(namespace, seed), name, network))

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
                Children that were complete are FINISHED, others KILLED, and those that
                `failed` was told of FAILED.
            timeout: Seconds that sending may take; the rest stays in the file.
        """
        for (namespace, _), run_id in self._children.items():
            complete = status == "FINISHED" or self._left[namespace or ""] <= 0
            if namespace == failed:
                self.writer.tags(run_id, problem or {})
            end = status if namespace == failed else "FINISHED" if complete else "KILLED"
            if namespace in self._problems:
                end = "FAILED"
                self.writer.tags(run_id, {"error": self._problems[namespace]})
            self.writer.status(run_id, end)
        self.writer.tags(self.id, problem or {})
        if self._owned:
            self.writer.status(self.id, status)
        # Last: they take seconds each, and nothing else is to wait for them.
        for run_id, name, network in self._models:
            self.writer.model(run_id, name, network)
        self.writer.close(timeout)
