"""What is written to MLflow: one record for each thing, which is one line of a file."""

from __future__ import annotations

import hashlib
import posixpath
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rdd_pipeline.tracking.addresses import without_secrets

LONGEST_NAME = 250
"""Characters that MLflow takes for the name of a metric, parameter or tag."""

Kind = Literal["run", "param", "tag", "metric", "artifact", "status"]


class Record(NamedTuple):
    """One thing to be written to a run.

    Attributes:
        run_id: MLflow's id of the run, or the id a `run` record gives to the run it asks for.
        kind: `run` asks for a run: `key` is its name, `value` a JSON object of `experiment`
            (an `Experiment`), `tags` and `parent` (id of the run it is nested in, or null).
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


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


@lru_cache(maxsize=4096)  # curves have the same names at every step
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


def clean(values: Mapping[str, Any], longest: int) -> dict[str, str]:
    """Parameters or tags as MLflow takes them: names cleaned, values cut, without secrets."""
    return {clean_name(key): without_secrets(str(value))[:longest] for key, value in values.items()}


def first_line(error: BaseException) -> str:
    """Type and first words of an error, without secrets that an address in it may hold."""
    text = without_secrets(str(error).strip()).partition("\n")[0]
    return f"{type(error).__name__}: {text[:120]}"


def database_path(uri: str) -> Path | None:
    """The file of a local sqlite database; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
