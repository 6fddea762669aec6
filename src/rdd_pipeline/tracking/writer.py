"""Writing to MLflow in the background, and never losing anything because of it."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rdd_pipeline.tracking.addresses import without_secrets
from rdd_pipeline.tracking.records import (
    Experiment,
    Record,
    RunRequest,
    append,
    clean_name,
    first_line,
    now,
)
from rdd_pipeline.tracking.sender import Sender, take_batch

logger = logging.getLogger(__name__)


class TrackingWriter:
    """Writes records to MLflow from a daemon thread, and never raises because of MLflow.

    Records are sent in order, in batches, every few seconds. While MLflow fails they are kept and
    tried again, more and more rarely; one warning says so. What is left at `close`, what MLflow
    refuses for good and what exceeds `capacity` goes to `file`.

    Args:
        sender: Talks to MLflow, in the thread only.
        file: Where unsent records are written.
        every: Seconds between batches.
        capacity: Records kept in memory.
        longest_pause: Seconds between attempts after many failures.
        warned: Whether the user knows already that MLflow is away.
    """

    def __init__(
        self,
        sender: Sender,
        file: Path,
        *,
        every: float = 2.0,
        capacity: int = 200_000,
        longest_pause: float = 60.0,
        warned: bool = False,
    ) -> None:
        self._sender = sender
        self._file = file
        self._every = every
        self._capacity = capacity
        self._longest_pause = longest_pause
        self._changed = threading.Condition()
        self._waiting: deque[Record] = deque()
        self._in_flight: Sequence[Record] = ()
        self._requests: dict[str, Record] = {}  # for runs that the file does not know
        self._unsent = 0
        self._failures = 0
        self._warned = warned
        self._hurry = False
        self._closed = False
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
        """Queue the creation of a run.

        Returns:
            The id by which this writer knows the run; MLflow gives it another one.
        """
        own = uuid.uuid4().hex
        request = RunRequest(experiment, _clean(tags, 5000), parent)
        record = Record(own, "run", name, request.to_json(), timestamp=now())
        self._requests[own] = record
        self.add([record], at_once=True)
        return own

    def metrics(self, run_id: str, values: Mapping[str, float], *, step: int = 0) -> None:
        """Queue points of one step; names that MLflow forbids are adapted."""
        time = now()
        self.add(
            Record(run_id, "metric", clean_name(key), float(value), step, time)
            for key, value in values.items()
        )

    def params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Queue parameters; values longer than MLflow takes are cut."""
        self.add(Record(run_id, "param", *item) for item in _clean(values, 6000).items())

    def tags(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Queue tags; values longer than MLflow takes are cut."""
        self.add(Record(run_id, "tag", *item) for item in _clean(values, 5000).items())

    def artifact(self, run_id: str, path: Path, folder: str) -> None:
        """Queue a local file or folder for upload into `folder` of the run's artifacts."""
        self.add([Record(run_id, "artifact", folder, str(path))])

    def status(self, run_id: str, status: str) -> None:
        """Queue the end of a run: FINISHED, FAILED or KILLED, with the time of this call."""
        self.add([Record(run_id, "status", "status", status, timestamp=now())])

    def add(self, records: Iterable[Record], *, at_once: bool = False) -> None:
        """Queue records and return; `at_once` does not wait for the next batch to be due."""
        if os.getpid() != self._process:
            return  # a forked process has neither the thread nor a lock it could trust
        with self._changed:
            self._waiting.extend(records)
            if len(self._waiting) > self._capacity:
                self._make_room()
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="rdd-tracking", daemon=True)
                self._thread.start()
            if at_once:
                self._hurry = True
                self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until everything is sent, but at most `timeout` seconds.

        While MLflow is known to be away it does not wait at all.

        Returns:
            Whether nothing is left to send.
        """
        if os.getpid() != self._process:
            return True
        with self._changed:
            if self._thread is None:
                return not self._waiting
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle() or self._failures > 0, timeout)
            return self._idle()

    def close(self, timeout: float = 15.0) -> int:
        """Try once more to send everything, then write what is left to the file.

        Args:
            timeout: Seconds it may take at most.

        Returns:
            How many records MLflow did not take; they are in the file, and one line says so.
        """
        if os.getpid() != self._process:
            return 0
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        with self._changed:
            self._spool([*self._in_flight, *self._waiting])
            self._waiting.clear()
            total, self._unsent = self._unsent, 0
        if total:
            logger.warning(
                "MLflow did not take %d records. Send them later: "
                "python -m rdd_pipeline.tracking %s",
                total,
                os.path.relpath(self._file),
            )
        return total

    def _idle(self) -> bool:
        return not self._waiting and not self._in_flight

    def _work(self) -> None:
        while True:
            pause = min(self._every * 2**self._failures, self._longest_pause)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or (self._hurry and not self._failures), pause
                )
                self._hurry = False
                closing = self._closed
            self._send_all()
            with self._changed:
                self._changed.notify_all()
            if closing:
                return

    def _send_all(self) -> None:
        """Send batch by batch until nothing is left or MLflow fails."""
        while True:
            with self._changed:
                batch = self._in_flight = take_batch(self._waiting)
            if not batch:
                return
            try:
                refused = self._sender.send(batch)
            except Exception as error:  # whatever is wrong with tracking, training goes on
                with self._changed:
                    self._waiting.extendleft(reversed(batch))
                    self._in_flight = ()
                    self._failures = min(self._failures + 1, 16)
                if not self._warned:
                    self._warned = True
                    logger.warning(
                        "MLflow cannot be reached (%s). The run goes on; its curves are kept and "
                        "sent when MLflow is back.",
                        first_line(error),
                    )
                return
            with self._changed:
                self._in_flight = ()
                if self._warned and not refused:
                    logger.info("MLflow can be reached again.")
                self._failures = 0
                self._warned = False
                self._spool(refused)

    def _make_room(self) -> None:
        """Move the older half to the file, so that this does not happen at every step."""
        count = len(self._waiting) - self._capacity // 2
        oldest = [self._waiting.popleft() for _ in range(count)]
        # Without its run in MLflow nothing of it is taken.
        self._waiting.extendleft(reversed([r for r in oldest if r.kind == "run"]))
        self._spool([record for record in oldest if record.kind != "run"])

    def _spool(self, records: Sequence[Record]) -> None:
        """Append records to the file, each after the request for its run, created or not."""
        self._unsent += len(records)
        lines: list[Record] = []
        for record in records:
            lines += self._take_requests(record.run_id)
            lines += [record] if record.kind != "run" else []
        try:
            if lines:
                append(self._file, self._sender.tracking_uri, lines)
        except OSError as error:
            logger.warning("Unsent MLflow records were lost: %s", error)

    def _take_requests(self, run_id: str) -> list[Record]:
        """What asks for a run and its parents, where the file does not know them yet."""
        record = self._requests.pop(run_id, None)
        if record is None:
            return []
        parent = RunRequest.from_json(str(record.value)).parent
        return [*(self._take_requests(parent) if parent else ()), record]


def _clean(values: Mapping[str, Any], longest: int) -> dict[str, str]:
    return {clean_name(key): without_secrets(str(value))[:longest] for key, value in values.items()}
