"""What is written to MLflow: one record for each thing, in memory or as a line of a file."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rdd_pipeline.errors import UserError

logger = logging.getLogger(__name__)

Kind = Literal["run", "param", "tag", "metric", "artifact", "status"]


@dataclass(frozen=True, slots=True)
class Record:
    """One thing to be written to a run.

    Attributes:
        run_id: MLflow's id of the run, or the id a `run` record gives to the run it asks for.
        kind: `run` asks for a run: `key` is its name, `value` a `RunRequest` as JSON.
        timestamp: milliseconds since 1970.
    """

    run_id: str
    kind: Kind
    key: str
    value: float | str
    step: int = 0
    timestamp: int = 0


@dataclass(frozen=True, slots=True)
class Experiment:
    """Where runs belong; made when it does not exist yet."""

    name: str
    artifact_location: str | None = None


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A run that MLflow is to create.

    Attributes:
        parent: Id of the run it is nested in.
    """

    experiment: Experiment
    tags: Mapping[str, str]
    parent: str | None = None

    def to_json(self) -> str:
        """For `Record.value`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunRequest:
        """Inverse of `to_json`."""
        content = json.loads(text)
        return cls(Experiment(**content.pop("experiment")), **content)


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


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


def database_path(uri: str) -> Path | None:
    """The file of a local sqlite database; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def append(path: Path, tracking_uri: str, records: Sequence[Record]) -> None:
    """Add records to a file, which begins with a line that says where they should have gone.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        if not file.tell():
            file.write(json.dumps({"tracking_uri": without_password(tracking_uri)}) + "\n")
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def read(path: Path) -> tuple[str, list[Record]]:
    """Tracking URI and records of a file that `append` has written.

    A last line that a killed process has left half-written is dropped, with a warning.

    Raises:
        UserError: This is no such file.
    """
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
