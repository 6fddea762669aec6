"""Writing to MLflow in the background, and never losing anything because of it."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rdd_pipeline.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

Kind = Literal["metric", "param", "tag", "artifact", "status"]


def calm_mlflow() -> None:
    """Let a server that is away cost seconds, not mlflow's four minutes, and one warning.

    What the user has set in the environment stays.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # A server that is asleep, or on a busy machine, needs a while for its first answer.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # It would print a line for each run, in the middle of a progress bar.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # They report every attempt, mlflow with a page of traceback, beside our own one warning.
    for noisy in ("urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Record:
    """One thing to be written to a run."""

    run_id: str
    kind: Kind
    key: str
    value: float | str
    step: int = 0
    timestamp: int = 0
    """Milliseconds since 1970."""


class TrackingWriter:
    """Writes records to MLflow from a daemon thread, and never raises because of MLflow.

    Records are sent in order, in batches, every few seconds. While MLflow fails they are kept and
    tried again, more and more rarely; one warning says so. What is left at `close`, what MLflow
    refuses for good and what exceeds `capacity` goes to FOLDER/RUN_ID.jsonl.

    Args:
        client: The MLflow client all calls go through.
        folder: Where unsent records are written.
        every: Seconds between batches.
        capacity: Records kept in memory.
        longest_pause: Seconds between attempts after many failures.
    """

    def __init__(
        self,
        client: MlflowClient,
        folder: Path,
        *,
        every: float = 2.0,
        capacity: int = 200_000,
        longest_pause: float = 60.0,
    ) -> None:
        self.client = client
        self.folder = folder
        self._every = every
        self._capacity = capacity
        self._longest_pause = longest_pause
        self._database = _Database(str(client.tracking_uri))
        self._changed = threading.Condition()
        self._waiting: deque[Record] = deque()
        self._in_flight: Sequence[Record] = ()
        self._unsent: dict[str, int] = {}
        self._failures = 0
        self._warned = False
        self._hurry = False
        self._closed = False
        self._process = os.getpid()
        self._thread: threading.Thread | None = None

    def metrics(self, run_id: str, values: Mapping[str, float], *, step: int = 0) -> None:
        """Queue points of one step; names that MLflow forbids are adapted."""
        now = int(time.time() * 1000)
        self.add(
            Record(run_id, "metric", clean_name(key), float(value), step, now)
            for key, value in values.items()
        )

    def params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Queue parameters; values longer than MLflow takes are cut."""
        self.add(
            Record(run_id, "param", clean_name(key), str(value)[:6000])
            for key, value in values.items()
        )

    def tags(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Queue tags; values longer than MLflow takes are cut."""
        self.add(
            Record(run_id, "tag", clean_name(key), str(value)[:5000])
            for key, value in values.items()
        )

    def artifact(self, run_id: str, path: Path, folder: str) -> None:
        """Queue a local file or folder for upload into `folder` of the run's artifacts."""
        self.add([Record(run_id, "artifact", folder, str(path))])

    def status(self, run_id: str, status: str) -> None:
        """Queue the end of a run: FINISHED, FAILED or KILLED, with the time of this call."""
        now = int(time.time() * 1000)
        self.add([Record(run_id, "status", "status", status, timestamp=now)])

    def add(self, records: Iterable[Record]) -> None:
        """Queue records; returns at once."""
        if os.getpid() != self._process:
            return  # a forked process has neither the thread nor a lock it could trust
        with self._changed:
            self._waiting.extend(records)
            excess = len(self._waiting) - self._capacity
            if excess > 0:
                # Half, so that this does not happen at every step from now on.
                oldest = [self._waiting.popleft() for _ in range(excess + self._capacity // 2)]
                self._spool(oldest)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="rdd-tracking", daemon=True)
                self._thread.start()

    @property
    def failing(self) -> bool:
        """Whether the last request failed, so that another one would only cost time."""
        return self._failures > 0

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
        """Try once more to send everything, then write what is left to the folder.

        Args:
            timeout: Seconds it may take at most.

        Returns:
            How many records MLflow did not take; they are in the folder, and one line says so.
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
        total = sum(self._unsent.values())
        if total:
            single = len(self._unsent) == 1
            logger.warning(
                "MLflow did not take %d records. Send them later: "
                "python -m rdd_pipeline.tracking %s",
                total,
                os.path.relpath(self._file(*self._unsent) if single else self.folder),
            )
        self._unsent = {}
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
                batch = self._in_flight = self._next_batch()
            if not batch:
                return
            try:
                self._database.check()
                refused = _send(self.client, batch)
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
                if self._failures and not refused:
                    logger.info("MLflow can be reached again.")
                self._failures = 0
                self._warned = False
                self._spool(refused)

    def _next_batch(self) -> list[Record]:
        """Take the records that go into the next request: of one run, and of kinds that mix."""
        batch: list[Record] = []
        count = dict.fromkeys(_LIMITS, 0)
        while self._waiting:
            record = self._waiting[0]
            if batch and (record.run_id != batch[0].run_id or batch[0].kind not in _LIMITS):
                break
            if record.kind not in _LIMITS and batch:
                break
            if record.kind in _LIMITS:
                count[record.kind] += 1
                if count[record.kind] > _LIMITS[record.kind] or len(batch) >= 1000:
                    break
            batch.append(self._waiting.popleft())
        return batch

    def _spool(self, records: Sequence[Record]) -> None:
        """Append records to the files of their runs."""
        for record in records:
            self._unsent[record.run_id] = self._unsent.get(record.run_id, 0) + 1
        try:
            for run_id in dict.fromkeys(record.run_id for record in records):
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._file(run_id).open("a", encoding="utf-8") as file:
                    if not file.tell():
                        uri = without_password(str(self.client.tracking_uri))
                        file.write(json.dumps({"tracking_uri": uri}) + "\n")
                    file.writelines(
                        json.dumps(asdict(record)) + "\n"
                        for record in records
                        if record.run_id == run_id
                    )
        except OSError as error:
            logger.warning("Unsent MLflow records were lost: %s", error)

    def _file(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.jsonl"


# MLflow's limits for one log_batch request.
_LIMITS: dict[str, int] = {"metric": 1000, "param": 100, "tag": 100}

# Error codes that mean: this will never be taken.
_HOPELESS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "PERMISSION_DENIED",
}


def _send(client: MlflowClient, batch: Sequence[Record]) -> list[Record]:
    """Write one batch.

    Returns:
        The records that MLflow refuses for good.

    Raises:
        Exception: MLflow cannot be reached; nothing of the batch counts as sent.
    """
    try:
        _send_at_once(client, batch)
        return []
    except Exception as error:
        if not _is_hopeless(error):
            raise
        if len(batch) == 1:
            logger.warning(
                "MLflow refuses %s %r: %s", batch[0].kind, batch[0].key, first_line(error)
            )
            return list(batch)
    # One record spoils the batch, or the run is gone: find out without a thousand requests.
    refused: list[Record] = []
    in_a_row = 0
    for position, record in enumerate(batch):
        if in_a_row == 3:
            return refused + list(batch[position:])
        if _send(client, [record]):
            refused.append(record)
            in_a_row += 1
        else:
            in_a_row = 0
    return refused


def _send_at_once(client: MlflowClient, batch: Sequence[Record]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    first = batch[0]
    if first.kind == "status":
        client.set_terminated(first.run_id, str(first.value), first.timestamp)
    elif first.kind == "artifact":
        path = Path(str(first.value))
        log = client.log_artifacts if path.is_dir() else client.log_artifact
        log(first.run_id, str(path), first.key)
    else:
        client.log_batch(
            first.run_id,
            metrics=[
                Metric(record.key, float(record.value), record.timestamp, record.step)
                for record in batch
                if record.kind == "metric"
            ],
            params=[Param(r.key, str(r.value)) for r in batch if r.kind == "param"],
            tags=[RunTag(r.key, str(r.value)) for r in batch if r.kind == "tag"],
        )


def _is_hopeless(error: Exception) -> bool:
    return getattr(error, "error_code", None) in _HOPELESS or isinstance(error, FileNotFoundError)


class _Database:
    """Notices that a sqlite file was deleted: an open connection goes on writing to nowhere."""

    def __init__(self, uri: str) -> None:
        self._path = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        self._identity = self._look()

    def _look(self) -> tuple[int, int] | None:
        if self._path is None or not self._path.exists():
            return None
        status = self._path.stat()
        return status.st_dev, status.st_ino

    def check(self) -> None:
        if self._identity is None:
            self._identity = self._look()
        elif self._look() != self._identity:
            raise ConnectionError(f"the database was deleted or replaced: {self._path}")


def clean_name(name: str) -> str:
    """The name with every character that MLflow forbids replaced by ``_``, 250 at most."""
    return re.sub(r"[^/\w.\- ]", "_", name)[:250]


def first_line(error: BaseException) -> str:
    """Type and first words of an error, without a password that a URI in it may hold."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {without_password(text)[:120]}"


def without_password(uri: str) -> str:
    """The URI as it may be shown and stored."""
    return re.sub(r"//[^/@]+@", "//", uri)


def send_file(path: Path, tracking_uri: str | None = None) -> int:
    """Send a file of unsent records to MLflow and delete it when everything was taken.

    Sending twice does no harm: MLflow keeps one point for each step and time.

    Args:
        path: A file that `TrackingWriter` left behind. A last line that a killed process has
            left half-written is dropped, with a warning.
        tracking_uri: Where to send it; None: where it should have gone.

    Returns:
        How many records were refused; they stay in the file.

    Raises:
        UserError: This is no such file, or MLflow cannot be reached; the file stays as it is.
    """
    from mlflow import MlflowClient

    intended, records = _read(path)
    uri = tracking_uri or intended
    refused: list[Record] = []
    try:
        client = MlflowClient(tracking_uri=uri)
        for kind in ("param", "tag", "metric", "artifact", "status"):
            for run_id in dict.fromkeys(record.run_id for record in records):
                same = [r for r in records if r.kind == kind and r.run_id == run_id]
                size = _LIMITS.get(kind, 1)
                for start in range(0, len(same), size):
                    refused += _send(client, same[start : start + size])
    except Exception as error:
        raise UserError(
            f"MLflow at {without_password(uri)} cannot be reached ({first_line(error)}). {path} "
            "stays as it is: repeat the command when MLflow is there, or say with --tracking-uri "
            "where it is now."
        ) from error
    if refused:
        kept = [json.dumps({"tracking_uri": intended}), *(json.dumps(asdict(r)) for r in refused)]
        path.write_text("\n".join(kept) + "\n", "utf-8")
    else:
        path.unlink()
    return len(refused)


def _read(path: Path) -> tuple[str, list[Record]]:
    """Tracking URI and records of a file of unsent records."""
    if not path.exists():
        raise UserError(f"There is no file or folder {path}. Nothing may be left to send.")
    try:
        about, *lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            logger.warning("%s ends in the middle of a record, which is left out.", path)
            lines.pop()
        uri = str(json.loads(about)["tracking_uri"])
        return uri, [Record(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is no file of unsent MLflow records ({first_line(error)}). Give a file of "
            "data/07_model_output/untracked."
        ) from error
