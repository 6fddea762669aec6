"""What is written to MLflow: one record for each thing, in memory or as a line of a file."""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rdd_pipeline.errors import UserError
from rdd_pipeline.tracking.addresses import without_secrets

logger = logging.getLogger(__name__)

LONGEST_NAME = 250
"""Characters that MLflow takes for the name of a metric, parameter or tag."""

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
    """The name as MLflow takes it: another one for every name, most names as they are.

    A character that MLflow forbids becomes ``_xHEX_`` with its code point; so does the ``_`` of a
    name in which that is written already. Names that are no path to MLflow (``/a``, ``a//b``) get
    their slashes written so. 250 characters at most: a digest ends longer ones.
    """
    path = posixpath.normpath(name)
    is_path = path == name and path not in (".", "..") and not path.startswith(("/", "../"))
    allowed = r"\w.\- /" if is_path else r"\w\- "
    written = re.sub(
        rf"[^{allowed}]|_(?=x[0-9a-f]{{2,6}}(?:_|[^{allowed}]))",
        lambda found: f"_x{ord(found[0]):02x}_",
        name,
    )
    if len(written) <= LONGEST_NAME:
        return written
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{written[: LONGEST_NAME - 17]}-{digest}"


def first_line(error: BaseException) -> str:
    """Type and first words of an error, without secrets that an address in it may hold."""
    text = without_secrets(str(error).strip()).partition("\n")[0]
    return f"{type(error).__name__}: {text[:120]}"


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
            file.write(json.dumps({"tracking_uri": without_secrets(tracking_uri)}) + "\n")
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
