"""Writing to MLflow in the background, and never losing anything because of it."""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rdd_pipeline.tracking.delivery import ship
from rdd_pipeline.tracking.journal import Journal
from rdd_pipeline.tracking.records import Experiment, Record, clean, clean_name, first_line, now
from rdd_pipeline.tracking.sender import Sender

logger = logging.getLogger(__name__)


class TrackingWriter:
    """Writes records to a file, and from there to MLflow in a daemon thread.

    It never raises because of MLflow. Records are sent in order, in batches, every few seconds;
    while MLflow fails, with exponential back-off, and one warning says so. The file is removed by
    `close` when MLflow has taken everything.

    Args:
        sender: Talks to MLflow, in the thread only.
        file: Where records are written; made at once.
        every: Seconds between batches.
        longest_pause: Seconds between attempts after many failures.
        warned: Whether the user knows already that MLflow is away.
    """

    def __init__(
        self,
        sender: Sender,
        file: Path,
        *,
        every: float = 2.0,
        longest_pause: float = 60.0,
        warned: bool = False,
    ) -> None:
        self._sender = sender
        self._journal = Journal(file, sender.tracking_uri, new=True)
        self._sender.runs = self._journal.sent.runs
        self._every = every
        self._longest_pause = longest_pause
        self._changed = threading.Condition()
        self._failures = 0
        self._warned = warned
        self._hurry = self._closing = self._closed = self._lost = False
        self._process = os.getpid()
        self._thread: threading.Thread | None = None

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
        request = {"experiment": asdict(experiment), "tags": clean(tags, 5000), "parent": parent}
        self.add([Record(own, "run", name, json.dumps(request), timestamp=now())])
        self.flush(0.0)  # at once
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

    def artifact(self, run_id: str, path: Path, folder: str) -> None:
        """Let a local file or folder be uploaded into `folder` of the run's artifacts."""
        self.add([Record(run_id, "artifact", folder, str(path))])

    def status(self, run_id: str, status: str) -> None:
        """Write the end of a run: FINISHED, FAILED or KILLED, with the time of this call."""
        self.add([Record(run_id, "status", "status", status, timestamp=now())])

    def add(self, records: Iterable[Record]) -> None:
        """Write records."""
        if os.getpid() != self._process or self._closed:
            return  # a forked process has neither the thread nor a lock it could trust
        with self._changed:
            try:
                self._journal.append(records)
            except OSError as error:
                if not self._lost:
                    self._lost = True
                    logger.warning("Records for MLflow are lost: %s", error)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="rdd-tracking", daemon=True)
                self._thread.start()

    def flush(self, timeout: float) -> bool:
        """Send now, and wait until everything is sent, but at most `timeout` seconds.

        While MLflow is known to be away it does not wait at all.

        Returns:
            Whether nothing is left to send.
        """
        if os.getpid() != self._process or self._closed:
            return True
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle() or self._failures > 0, timeout)
            return self._idle()

    def close(self, timeout: float = 15.0) -> int:
        """Try once more to send everything.

        Args:
            timeout: Seconds it may take at most.

        Returns:
            How many records MLflow did not take; they are in the file, and one line says so.
        """
        if os.getpid() != self._process or self._closed:
            return 0
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        with self._changed:
            self._closed = True
            left = self._journal.close()
        if left:
            logger.warning(
                "MLflow did not take %d records. Send them later: "
                "python -m rdd_pipeline.tracking %s",
                left,
                os.path.relpath(self._journal.path),
            )
        return left

    def _idle(self) -> bool:
        """Whether MLflow was offered everything."""
        return not self._failures and self._journal.sent.offset == self._journal.size

    def _work(self) -> None:
        while True:
            pause = min(self._every * 2**self._failures, self._longest_pause)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or (self._hurry and not self._failures), pause
                )
                self._hurry = False
                closing = self._closing
            try:
                for taken in ship(self._journal, self._sender):
                    if self._closed:
                        return
                    if self._warned and all(taken):
                        logger.info("MLflow can be reached again.")
                    self._failures, self._warned = 0, False
            except Exception as error:  # whatever is wrong with tracking, training goes on
                self._failures = min(self._failures + 1, 16)
                if not self._warned:
                    self._warned = True
                    logger.warning(
                        "MLflow cannot be reached (%s). The run goes on; its curves are kept and "
                        "sent when MLflow is back.",
                        first_line(error),
                    )
            with self._changed:
                self._changed.notify_all()
            if closing:
                return
