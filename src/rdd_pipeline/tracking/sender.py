"""Requests to MLflow: batches of records, runs that are created late, refusals told apart."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdd_pipeline.errors import UserError
from rdd_pipeline.tracking.addresses import remember_secrets, without_secrets
from rdd_pipeline.tracking.records import (
    Experiment,
    Record,
    RunRequest,
    append,
    database_path,
    first_line,
    read,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

LOCAL_ID = "local_id"
"""Tag of a created run: the id it was asked for with, so that asking twice makes one run."""

# MLflow's limits for one log_batch request, which takes these three kinds together.
_LIMITS: dict[str, int] = {"metric": 1000, "param": 100, "tag": 100}

# Error codes that mean: this will never be taken.
_HOPELESS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "PERMISSION_DENIED",
}


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


class Sender:
    """Writes records to MLflow.

    Args:
        tracking_uri: Where MLflow is.
        client: Connected to it; None: connect when there is something to send.
    """

    def __init__(self, tracking_uri: str, client: MlflowClient | None = None) -> None:
        remember_secrets(tracking_uri)
        self.tracking_uri = tracking_uri
        self._client = client
        self._database = _Database(tracking_uri)
        self._ids: dict[str, str] = {}
        self._asked: set[str] = set()
        self._experiments: dict[Experiment, str] = {}

    def ask_again(self, run_ids: Iterable[str]) -> None:
        """These runs may have been asked for before: look for them first."""
        self._asked.update(run_ids)

    def send(self, batch: Sequence[Record]) -> list[Record]:
        """Write records that go into one request (`take_batch`).

        Returns:
            The records that MLflow refuses for good.

        Raises:
            Exception: MLflow cannot be reached; nothing of the batch counts as sent.
        """
        self._database.check()
        try:
            self._request(batch)
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
            if self.send([record]):
                refused.append(record)
                in_a_row += 1
            else:
                in_a_row = 0
        return refused

    def _connected(self) -> MlflowClient:
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.tracking_uri)
        return self._client

    def _request(self, batch: Sequence[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client = self._connected()
        first = batch[0]
        run_id = self._ids.get(first.run_id, first.run_id)
        if first.kind == "run":
            self._create(client, first)
        elif first.kind == "status":
            client.set_terminated(run_id, str(first.value), first.timestamp)
        elif first.kind == "artifact":
            path = Path(str(first.value))
            log = client.log_artifacts if path.is_dir() else client.log_artifact
            log(run_id, str(path), first.key)
        else:
            client.log_batch(
                run_id,
                metrics=[
                    Metric(record.key, float(record.value), record.timestamp, record.step)
                    for record in batch
                    if record.kind == "metric"
                ],
                params=[Param(r.key, str(r.value)) for r in batch if r.kind == "param"],
                tags=[RunTag(r.key, str(r.value)) for r in batch if r.kind == "tag"],
            )

    def _create(self, client: MlflowClient, record: Record) -> None:
        request = RunRequest.from_json(str(record.value))
        experiment = self._experiment(client, request.experiment)
        tags = {**request.tags, LOCAL_ID: record.run_id}
        if request.parent is not None:
            tags["mlflow.parentRunId"] = self._ids.get(request.parent, request.parent)
        found: Sequence[Any] = ()
        if record.run_id in self._asked:  # the answer may be what was lost, not the request
            found = client.search_runs([experiment], f"tags.{LOCAL_ID} = '{record.run_id}'")
        self._asked.add(record.run_id)
        if found:
            run = found[0]
        else:
            run = client.create_run(experiment, record.timestamp, tags, record.key)
        self._ids[record.run_id] = str(run.info.run_id)
        if request.parent is None:
            logger.info("MLflow run %s in experiment %s", run.info.run_id, request.experiment.name)

    def _experiment(self, client: MlflowClient, wanted: Experiment) -> str:
        """Id of an experiment, which is made, or restored from the bin, if it has to be."""
        if wanted not in self._experiments:
            found = client.get_experiment_by_name(wanted.name)
            if found is None:
                made = client.create_experiment(wanted.name, self._files(wanted))
                self._experiments[wanted] = str(made)
            else:
                if found.lifecycle_stage == "deleted":
                    client.restore_experiment(found.experiment_id)
                self._experiments[wanted] = str(found.experiment_id)
        return self._experiments[wanted]

    def _files(self, experiment: Experiment) -> str | None:
        """Where a new experiment keeps its files: a server knows, a database does not."""
        place = experiment.artifact_location
        database = database_path(self.tracking_uri)
        if database is None:
            return None if place is not None and place.startswith("file:") else place
        return place or (database.absolute().parent / "mlartifacts").as_uri()


def take_batch(waiting: deque[Record]) -> list[Record]:
    """Take the records that go into the next request: of one run, and of kinds that mix."""
    batch: list[Record] = []
    count = dict.fromkeys(_LIMITS, 0)
    while waiting:
        record = waiting[0]
        if batch and (record.run_id != batch[0].run_id or batch[0].kind not in _LIMITS):
            break
        if record.kind not in _LIMITS and batch:
            break
        if record.kind in _LIMITS:
            count[record.kind] += 1
            if count[record.kind] > _LIMITS[record.kind] or len(batch) >= 1000:
                break
        batch.append(waiting.popleft())
    return batch


def send_file(path: Path, tracking_uri: str | None = None) -> int:
    """Send a file of unsent records to MLflow and delete it when everything was taken.

    Sending twice does no harm: MLflow keeps one point for each step and time, and a run that was
    asked for twice is created once.

    Args:
        path: A file that `TrackingWriter` left behind.
        tracking_uri: Where to send it; None: where it should have gone.

    Returns:
        How many records were refused; they stay in the file.

    Raises:
        UserError: This is no such file, or MLflow cannot be reached; the file stays as it is.
    """
    intended, records = read(path)
    uri = tracking_uri or _with_login(intended)
    runs = [record for record in records if record.kind == "run"]
    sender = Sender(uri)
    sender.ask_again(run.run_id for run in runs)
    waiting = deque(records)
    refused: list[Record] = []
    try:
        while waiting:
            refused += sender.send(take_batch(waiting))
    except Exception as error:
        raise UserError(
            f"MLflow at {without_secrets(uri)} cannot be reached ({first_line(error)}). {path} "
            "stays as it is: repeat the command when MLflow is there, or say with --tracking-uri "
            "where it is now."
        ) from error
    kept = path.with_name(f"{path.name}.tmp")
    kept.unlink(missing_ok=True)
    if refused:
        append(kept, intended, [*runs, *(r for r in refused if r.kind != "run")])
        kept.replace(path)
    else:
        path.unlink()
    return len(refused)


def _with_login(address: str) -> str:
    """The address in MLFLOW_TRACKING_URI if it is this one: files hold no passwords."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if given and without_secrets(given) == address else address


def _is_hopeless(error: Exception) -> bool:
    return getattr(error, "error_code", None) in _HOPELESS or isinstance(error, FileNotFoundError)


class _Database:
    """Notices that a sqlite file was deleted: an open connection goes on writing to nowhere."""

    def __init__(self, uri: str) -> None:
        self._path = database_path(uri)
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
