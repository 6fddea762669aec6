"""From a journal to MLflow: by the thread of a run, by the next run, or by a command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from rdd_pipeline.errors import UserError
from rdd_pipeline.tracking.addresses import without_secrets
from rdd_pipeline.tracking.database import explain
from rdd_pipeline.tracking.journal import Journal, Line
from rdd_pipeline.tracking.records import database_path
from rdd_pipeline.tracking.sender import Sender, is_below

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

UNTRACKED = Path("data/07_model_output/untracked")
"""Where records stay until MLflow has taken them, relative to the project."""

# How many records MLflow takes in one request; of other kinds one.
_LIMITS = {"metric": 1000, "param": 100, "tag": 100}


def ship(journal: Journal, sender: Sender, *, again: bool = False) -> Iterator[list[bool]]:
    """Send what MLflow was not offered yet, after what it has refused if `again`.

    Yields:
        For each request, which of its records were taken.

    Raises:
        Exception: MLflow cannot be reached.
    """
    sender.runs = journal.sent.runs
    for batch in _batches(journal.unsent(again=again)):
        records = [line.record for line in batch if line.record is not None]
        taken = sender.send(records) if records else [False] * len(batch)
        if not records:
            more = f" and {len(batch) - 1} after it" if len(batch) > 1 else ""
            logger.warning(
                *("Line %d%s of %s is left out, and kept: %s", journal.number(batch[0]), more),
                *(journal.path, batch[0].fault),
            )
        if journal.closed:
            return  # the answer came too late
        journal.settle(batch, taken)
        yield taken


def _batches(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Lines that go into one request: of one run and one kind; unreadable ones by themselves."""
    for key, group in groupby(lines, lambda line: line.record and line.record[:2]):
        while batch := list(islice(group, _LIMITS.get(key[1], 1) if key else 1000)):
            yield batch


def send_file(
    path: Path, tracking_uri: str | None = None, *, artifacts: Sequence[Path] = ()
) -> int:
    """Send what is left of a file of an ended process, or was refused, and remove the file.

    Sending twice does no harm: MLflow keeps one point for each step and time, and a run that was
    asked for twice is created once.

    Args:
        path: A file that `TrackingWriter` left behind.
        tracking_uri: Where to send it; None: where it should have gone.
        artifacts: Folders beside the project from which its files may be uploaded, too.

    Returns:
        How many records were refused; they stay in the file.

    Raises:
        UserError: This is no such file, its run goes on (`JournalInUseError`), or MLflow cannot be
            reached; the file stays as it is.
    """
    journal = Journal(path, tracking_uri)
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    # Files hold no passwords: the login is the environment's, if that is the same MLflow.
    same = without_secrets(given) == journal.tracking_uri
    uri = tracking_uri or (given if same else journal.tracking_uri)
    project = _project(path)
    database = database_path(uri)
    foreign = database is not None and not database.exists() and not is_below(database, [project])
    if foreign and uri == journal.tracking_uri:  # anybody may have written it into the file
        raise UserError(
            f"{path} belongs to {database}, which is not there. Say with --tracking-uri "
            "sqlite:///PATH where its records shall go."
        )
    try:
        return _finish(journal, Sender(uri, below=(project, *artifacts)), again=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {without_secrets(uri)} cannot be reached ({explain(error, uri)}). {path} "
            "stays as it is: repeat the command when MLflow is there, or say with --tracking-uri "
            "where it is now."
        ) from error


def send_left(folder: Path, tracking_uri: str, client: MlflowClient) -> None:
    """Send what killed processes, and runs that ended while this MLflow was away, have left for it.

    Nothing is raised, and what was refused is not offered again: it is up to the user.
    """
    for path in sorted(folder.glob("*.jsonl")):
        try:
            journal = Journal(path)
            if journal.tracking_uri == without_secrets(tracking_uri):
                sender = Sender(tracking_uri, client, below=[_project(path)])
                _finish(journal, sender, again=False)
            else:
                journal.close(done=False)
        except Exception as error:
            logger.debug("%s was not sent: %s", path, error)


def _project(path: Path) -> Path:
    """The project that a file of records belongs to; of one that lies elsewhere: this folder."""
    folder = path.absolute().parent
    return folder.parents[2] if folder.match(str(UNTRACKED)) else Path.cwd()


def _finish(journal: Journal, sender: Sender, *, again: bool) -> int:
    """Send the rest of a journal whose process has ended; how many records are left."""
    done = False
    try:
        sender.runs = journal.sent.runs
        if journal.has_rest(again=again) and sender.has_lost_runs():
            journal.begin_again()
        for _ in ship(journal, sender, again=again):
            pass
        if journal.sent.offset < journal.size:
            logger.warning("%s ends in the middle of a record, which is left out.", journal.path)
        sender.end_dead_runs(int(journal.path.stat().st_mtime * 1000))
        done = True
    finally:
        left = journal.close(done=done)
    return left
