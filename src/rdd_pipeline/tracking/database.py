"""MLflow's local database: whole or not there, and what to do about one that is neither.

MLflow makes its tables by dozens of migrations in the file itself. One that is killed meanwhile
leaves a file that no later MLflow can use, and two at once spoil each other's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rdd_pipeline.files import TEMPORARY
from rdd_pipeline.tracking.records import database_path, first_line

OTHERS_SECONDS = 60.0
"""How long another command may take to make the database, which takes seconds."""

LOCKED_SECONDS = 5.0
"""How long the database may be locked at the start; in each later request 20, by MLflow."""

_DAMAGED = ("malformed", "not a database", "no such table", "no such column", "disk I/O error")
_HALF_MADE = ("already exists", "duplicate column name", *_DAMAGED)
_OTHER_VERSION = ("out-of-date database schema", "Can't locate revision")


def make_database(uri: str) -> None:
    """Make a local database that is not there; it appears when it is complete.

    Args:
        uri: MLflow's address; nothing is done for a server.

    Raises:
        Exception: It cannot be made, or one that is there cannot be read.
    """
    path = database_path(uri)
    if path is None:
        return
    if not _is_made(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent) as alone:
            if alone:  # what is being written now would be ours
                for left in path.parent.glob(f".{path.name}.*{TEMPORARY}*"):
                    left.unlink(missing_ok=True)
            if not _is_made(path):
                _make(path)
    with contextlib.closing(
        sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=LOCKED_SECONDS)
    ) as connection:
        # MLflow would try for minutes.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchall()


def is_damage(error: Exception) -> bool:
    """Whether an error is about the database as a whole, not about what was sent."""
    return any(sign in str(error) for sign in _DAMAGED)


def explain(error: BaseException, uri: str) -> str:
    """First line of an error, with what to do if a local database is the reason."""
    path, text, line = database_path(uri), str(error), first_line(error)
    if path is None:
        return line
    if "locked" in text:
        return f"{line}; another program keeps {path} locked: end it"
    if any(sign in text for sign in _OTHER_VERSION):
        command = f"mlflow db upgrade sqlite:///{path}"
        return f"{line}; another version of MLflow made it: {command}, or move it away"
    if any(sign in text for sign in _HALF_MADE):
        return f"{line}; {path} is damaged or half-made: mv {path} {path}.old, a new one is made"
    return line


def _is_made(path: Path) -> bool:
    """Whether there is more than the empty file of a process that was killed at once."""
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no file")
    return path.exists() and path.stat().st_size > 0


def _migrate(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new: Any = SqlAlchemyStore
    artifacts = path.absolute().parent / "mlartifacts"
    new(f"sqlite:///{path.as_posix()}", artifacts.as_uri()).engine.dispose()


def _make(path: Path) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        _migrate(aside)
        # A journal of a database that was moved away would be played back into the new one.
        for suffix in ("-journal", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                journal = path.with_name(path.name + suffix)
                journal.replace(path.with_name(f"{path.name}.old{suffix}"))
        if not _is_made(path):
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Wait until no other process is in here for this folder; False: there are no locks here."""
    handle, alone = os.open(folder, os.O_RDONLY), False
    deadline = time.monotonic() + OTHERS_SECONDS
    try:
        while not alone:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"another command has been making it for {OTHERS_SECONDS:.0f} s"
                    ) from None
                time.sleep(0.05)
            except OSError:
                break
        yield alone
    finally:
        if alone:  # closing is not enough where a forked process has the handle, too
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
