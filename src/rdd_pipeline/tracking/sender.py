"""Requests to MLflow: batches of records, runs made once, refusals told apart."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from rdd_pipeline.tracking.addresses import remember_secrets
from rdd_pipeline.tracking.database import is_damage, make_database
from rdd_pipeline.tracking.records import (
    Experiment,
    Network,
    Record,
    Request,
    UsedData,
    database_path,
    first_line,
)
from rdd_pipeline.tracking.registry import register

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

logger = logging.getLogger(__name__)

LOCAL_ID = "local_id"
"""Tag of a created run: the id it was asked for with, so that asking twice makes one run."""

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment for which MLflow's pages open on the table of runs, not on traces."""

# Error codes that mean: this will never be taken. The first two are about the run, whatever it is
# sent; the others may be about one record of many.
_HOPELESS_RUN = {"RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"}
_HOPELESS = {*_HOPELESS_RUN, "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"}
# An MLflow without a registry answers so.
_HOPELESS |= {"ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"}


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
        below: Folders that may hold what is uploaded, and a new experiment's artifacts; None:
            anywhere, since the records are this process's own.

    Attributes:
        runs: MLflow's ids of the runs that were made, by the ids in the records.
    """

    def __init__(
        self,
        tracking_uri: str,
        client: MlflowClient | None = None,
        *,
        below: Sequence[Path] | None = None,
    ) -> None:
        remember_secrets(tracking_uri)
        self.tracking_uri = tracking_uri
        self.runs: dict[str, str] = {}
        self._client = client
        self._below = below
        self._inode: int | None = None
        self._check_database()

    def send(self, batch: Sequence[Record]) -> list[bool]:
        """Write records that go into one request (`ship`).

        Returns:
            For each of them, whether it was taken; False: MLflow refuses it for good.

        Raises:
            Exception: MLflow cannot be reached. Some of the batch may have been taken; to send all
                of it again does no harm.
        """
        self._check_database()
        self._connected()
        try:
            self._request(batch)
            return [True] * len(batch)
        except Exception as error:
            if not _is_hopeless(error):
                raise
            if len(batch) == 1 or self._is_gone(batch[0].run_id, error):
                more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
                what = f"{batch[0].kind} {batch[0].key!r}{more}"
                logger.warning("MLflow refuses %s: %s", what, first_line(error))
                return [False] * len(batch)
        # One record spoils the batch: it is found without a request for each.
        half = len(batch) // 2
        return self.send(batch[:half]) + self.send(batch[half:])

    def has_lost_runs(self) -> bool:
        """Whether MLflow no longer knows a run that was made: its database is another one now."""
        for run_id in self.runs.values():
            try:
                self._connected().get_run(run_id)
            except Exception as error:
                if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return True
        return False

    def end_dead_runs(self, time: int) -> None:
        """End the runs that are still going on as killed: the process that would have is gone."""
        for run_id in self.runs.values():
            try:
                if self._connected().get_run(run_id).info.status == "RUNNING":
                    self._connected().set_tag(run_id, "error", "the process died")
                    self._connected().set_terminated(run_id, "KILLED", time)
            except Exception as error:  # somebody may have deleted it
                if not _is_hopeless(error):
                    raise

    def _check_database(self) -> None:
        """Notice that a sqlite file was deleted: its open connection goes on writing to nowhere."""
        path = database_path(self.tracking_uri)
        if path is not None:
            inode = path.stat().st_ino if path.exists() else None
            if self._inode not in (None, inode):
                raise ConnectionError(f"the database was deleted or replaced: {path}")
            self._inode = inode

    def _connected(self) -> MlflowClient:
        if self._client is None:
            make_database(self.tracking_uri)
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.tracking_uri)
        return self._client

    def _request(self, batch: Sequence[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client = self._connected()
        first = batch[0]
        run_id = self.runs.get(first.run_id, first.run_id)
        if first.kind == "run":
            self._create(client, first)
        elif first.kind == "status":
            client.set_terminated(run_id, str(first.value), first.timestamp)
        elif first.kind == "model":
            self._allow(Path(Network.read(str(first.value)).path))
            register(client, run_id, first)
        elif first.kind == "input":
            client.log_inputs(run_id, [_dataset_input(str(first.value))])
        elif first.kind == "artifact":
            path = Path(str(first.value))
            self._allow(path)
            log = client.log_artifacts if path.is_dir() else client.log_artifact
            log(run_id, str(path), first.key)
        else:
            points = [record for record in batch if record.kind == "metric"]
            client.log_batch(
                run_id,
                metrics=[Metric(r.key, float(r.value), r.timestamp, r.step) for r in points],
                params=[Param(r.key, str(r.value)) for r in batch if r.kind == "param"],
                tags=[RunTag(r.key, str(r.value)) for r in batch if r.kind == "tag"],
            )

    def _allow(self, path: Path) -> None:
        """Refuse files that a stranger's records name."""
        if self._below is not None and not is_below(path, self._below):
            raise ValueError(f"outside of the project (--artifacts FOLDER allows it): {path}")

    def _create(self, client: MlflowClient, record: Record) -> None:
        request = Request.read(str(record.value))
        wanted = request.experiment
        experiment = self._experiment(client, wanted)
        # If it was asked for before, the answer may be what was lost, not the request.
        found = client.search_runs([experiment], f"tags.{LOCAL_ID} = '{record.run_id}'")
        if found:
            run = found[0]
        else:
            tags = {**request.tags, LOCAL_ID: record.run_id}
            if request.parent is not None:
                tags["mlflow.parentRunId"] = self.runs.get(request.parent, request.parent)
            run = client.create_run(experiment, record.timestamp, tags, record.key)
        self.runs[record.run_id] = str(run.info.run_id)
        if request.parent is None:
            logger.info("MLflow run %s in experiment %s", run.info.run_id, wanted.name)

    def _experiment(self, client: MlflowClient, wanted: Experiment) -> str:
        """Id of an experiment, which is made, or restored from the bin, if it has to be."""
        found = client.get_experiment_by_name(wanted.name)
        if found is None:
            # A server knows where its files are, a database does not.
            place, database = wanted.artifact_location, database_path(self.tracking_uri)
            if database is not None:
                if place is not None and self._below is not None:
                    local = place.removeprefix("file://")
                    place = place if is_below(Path(unquote(local)), self._below) else None
                place = place or (database.absolute().parent / "mlartifacts").as_uri()
            elif place is not None and place.startswith("file:"):
                place = None
            try:
                return str(client.create_experiment(wanted.name, place, KIND))
            except Exception:
                found = client.get_experiment_by_name(wanted.name)
                if found is None:  # no other command has made it in the meantime
                    raise
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        for key, value in KIND.items():
            if key not in found.tags:  # kedro-mlflow made it, or an older version of this project
                self._tag_experiment(client, found.experiment_id, key, value)
        return str(found.experiment_id)

    @staticmethod
    def _tag_experiment(client: MlflowClient, experiment: str, key: str, value: str) -> None:
        """Set a tag that a user of a shared server may not be allowed to set: nothing needs it."""
        try:
            client.set_experiment_tag(experiment, key, value)
        except Exception as error:
            if not _is_hopeless(error):
                raise

    def _is_gone(self, run_id: str, error: Exception) -> bool:
        """Whether an error means that the run takes nothing at all."""
        if getattr(error, "error_code", None) in _HOPELESS_RUN:
            return True
        run = self._connected().get_run(self.runs.get(run_id, run_id))
        return bool(run.info.lifecycle_stage == "deleted")


def _dataset_input(text: str) -> DatasetInput:
    """What a record of kind `input` says, as MLflow takes it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    used = UsedData.read(text)
    source = json.dumps({"uri": used.source})
    dataset = Dataset(used.name, used.digest, "local", source, profile=json.dumps(used.profile))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", used.context)])


def _is_hopeless(error: Exception) -> bool:
    if is_damage(error):
        return False
    if isinstance(error, OSError):  # of an artifact's file; the network has others
        return isinstance(error, FileNotFoundError | PermissionError)
    if isinstance(error, ValueError | TypeError | KeyError):  # what was asked for makes no sense
        return True
    return getattr(error, "error_code", None) in _HOPELESS


def is_below(path: Path, folders: Sequence[Path]) -> bool:
    """Whether a path lies in one of some folders, links followed."""
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)
