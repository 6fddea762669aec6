"""Writing to MLflow in the background, and never losing anything because of it."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rdd_pipeline.tracking.addresses import without_secrets
from rdd_pipeline.tracking.database import explain
from rdd_pipeline.tracking.delivery import ship
from rdd_pipeline.tracking.journal import Journal
from rdd_pipeline.tracking.records import (
    Experiment,
    Network,
    Record,
    Request,
    UsedData,
    clean,
    clean_name,
    now,
)
from rdd_pipeline.tracking.sender import Sender

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0
"""Seconds between attempts after many failures."""


class TrackingWriter:
    """Writes records to a file, from which a daemon thread sends them to MLflow, in order.

    It never raises because of MLflow: while that fails, the thread tries again with exponential
    back-off, and one warning says so.

    Args:
        sender: Talks to MLflow, in the thread only.
        file: Where records are written; made at once, and removed when MLflow has all of it.
        every: Seconds between batches.
        warned: Whether the user knows already that MLflow is away.
    """

    def __init__(
        self, sender: Sender, file: Path, *, every: float = 2.0, warned: bool = False
    ) -> None:
        self._sender = sender
        self._journal = Journal(file, sender.tracking_uri, new=True)
        self._every = every
        self._warned = warned
        self._lost = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name="rdd-tracking", daemon=True)

    def start(
        self,
        name: str,
        experiment: Experiment,
        tags: Mapping[str, Any],
        *,
        parent: str | None = None,
    ) -> str:
        """Ask for a run.

        Returns:
            The id by which this writer knows the run; MLflow gives it another one.
        """
        own = uuid.uuid4().hex
        if experiment.artifact_location is not None:
            place = without_secrets(experiment.artifact_location)
            experiment = replace(experiment, artifact_location=place)
        request = Request(experiment, clean(tags, 5000), parent)
        self.add([Record(own, "run", name, request.written(), timestamp=now())])
        return own

    def metrics(self, run_id: str, values: Mapping[str, float], *, step: int = 0) -> None:
        """Write points of one step; names that MLflow forbids are adapted."""
        time = now()
        self.add(
            Record(run_id, "metric", clean_name(key), float(value), step, time)
            for key, value in values.items()
        )

    def params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Write parameters; values longer than MLflow takes are cut."""
        self.add(Record(run_id, "param", *item) for item in clean(values, 6000).items())

    def tags(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Write tags; values longer than MLflow takes are cut."""
        self.add(Record(run_id, "tag", *item) for item in clean(values, 5000).items())

    def artifact(self, run_id: str, path: Path, folder: str, *, as_it_is: bool = False) -> None:
        """Have a local file or folder uploaded into `folder` of the run's artifacts.

        Args:
            run_id: Of the run.
            path: The file or folder.
            folder: Where it goes.
            as_it_is: Upload what the file holds now: another run may write it anew at any time.
        """
        if as_it_is and path.is_file():
            path = self._journal.keep(path)
        self.add([Record(run_id, "artifact", folder, str(path))])

    def used(self, run_id: str, data: UsedData) -> None:
        """Note that a run reads a data set."""
        data = replace(data, source=without_secrets(data.source))
        self.add([Record(run_id, "input", data.name, data.written(), timestamp=now())])

    def model(self, run_id: str, name: str, network: Network) -> None:
        """Have a trained network logged as a model of the run and registered under a name."""
        self.add([Record(run_id, "model", name, network.written(), timestamp=now())])

    def status(self, run_id: str, status: str) -> None:
        """Write the end of a run: FINISHED, FAILED or KILLED, with the time of this call."""
        self.add([Record(run_id, "status", "status", status, timestamp=now())])

    def add(self, records: Iterable[Record]) -> None:
        """Write records."""
        if os.getpid() != self._process or self._closing.is_set():
            return  # a forked process has neither the thread nor a lock it could trust
        with self._lock:
            try:
                self._journal.append(records)
            except OSError as error:
                if not self._lost:
                    logger.warning("Records for MLflow are lost: %s", error)
                self._lost = True
            if self._thread.ident is None:
                self._thread.start()

    def close(self, timeout: float = 15.0) -> int:
        """Try once more to send everything.

        Args:
            timeout: Seconds it may take at most.

        Returns:
            How many records MLflow did not take; they are in the file, and one line says so.
        """
        if os.getpid() != self._process or self._closing.is_set():
            return 0
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        with self._lock:
            left = self._journal.close()
        if left:
            logger.warning(
                "MLflow did not take %d records. Send them later: "
                "python -m rdd_pipeline.tracking %s",
                left,
                os.path.relpath(self._journal.path),
            )
        return left

    def _work(self) -> None:
        failures = 0
        while True:
            closing = self._closing.is_set()
            try:
                for taken in ship(self._journal, self._sender):
                    if self._warned and all(taken):
                        logger.info("MLflow can be reached again.")
                    failures, self._warned = 0, False
            except Exception as error:  # whatever is wrong with tracking, training goes on
                failures = min(failures + 1, 16)
                if not self._warned:
                    logger.warning(
                        "MLflow cannot be reached (%s). The run goes on; its curves are kept and "
                        "sent when MLflow is back.",
                        explain(error, self._sender.tracking_uri),
                    )
                self._warned = True
            if closing:
                return
            self._closing.wait(min(self._every * 2**failures, LONGEST_PAUSE))
