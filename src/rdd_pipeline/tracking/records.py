"""What is written to MLflow: one record for each thing, which is one line of a file."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from rdd_pipeline.tracking.addresses import without_secrets

LONGEST_NAME = 250
"""Characters that MLflow takes for the name of a metric, parameter or tag."""

Kind = Literal["run", "param", "tag", "metric", "artifact", "status", "model", "input"]

STATUSES = ("FINISHED", "FAILED", "KILLED")


class Record(NamedTuple):
    """One thing to be written to a run.

    Attributes:
        run_id: MLflow's id of the run, or the id a `run` record gives to the run it asks for.
        kind: `run` asks for a run: `key` is its name, `value` a `Request`.
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
class Request:
    """The value of a `run` record: where a run belongs, its tags, the run it is nested in."""

    experiment: Experiment
    tags: Mapping[str, str]
    parent: str | None = None

    def written(self) -> str:
        """As `read` takes it."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Self:
        """Inverse of `written`.

        Raises:
            ValueError, TypeError, KeyError: It is no such text.
        """
        fields = json.loads(text)
        experiment = Experiment(**fields["experiment"])
        request = cls(**{**fields, "experiment": experiment})
        place, parent = experiment.artifact_location, request.parent
        _expect_texts(experiment.name, place or "", parent or "")
        _expect_texts(*request.tags, *dict(request.tags).values())
        return request


@dataclass(frozen=True, slots=True)
class Network:
    """The value of a `model` record: a trained network to be registered.

    Attributes:
        path: Its safetensors file.
        score: mIoU on val in [0, 1], by which the best one is known; None: not evaluated there.
        scored_on: Digest of what it was scored on; scores on other things are not compared.
        metrics: Of the network.
        facts: What a registered version says of it.
    """

    path: str
    score: float | None
    scored_on: str
    metrics: Mapping[str, float]
    facts: Mapping[str, str]

    def written(self) -> str:
        """As `read` takes it."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Self:
        """Inverse of `written`.

        Raises:
            ValueError, TypeError, KeyError: It is no such text.
        """
        network = cls(**json.loads(text))
        _expect_texts(network.path, network.scored_on)
        _expect_texts(*network.facts, *dict(network.facts).values(), *network.metrics)
        for value in (network.score or 0.0, *dict(network.metrics).values()):
            if type(value) not in (int, float):
                raise TypeError(f"{value!r} is no number")
        return network


@dataclass(frozen=True, slots=True)
class UsedData:
    """The value of an `input` record: a data set that a run reads; no pixel of it.

    Attributes:
        name: Of the data set.
        digest: Of its contents; MLflow takes 36 characters.
        source: The folder.
        context: What it is used for: ``train``, ``val``, ``test``.
        profile: Numbers about it.
    """

    name: str
    digest: str
    source: str
    context: str
    profile: Mapping[str, int]

    def written(self) -> str:
        """As `read` takes it."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Self:
        """Inverse of `written`.

        Raises:
            ValueError, TypeError, KeyError: It is no such text.
        """
        used = cls(**json.loads(text))
        _expect_texts(used.name, used.digest, used.source, used.context, *used.profile)
        if not all(type(number) is int for number in dict(used.profile).values()):
            raise TypeError(f"{used.profile!r} holds more than whole numbers")
        return used


def read_record(fields: Mapping[str, Any]) -> Record:
    """A record of its fields, as they were found in a file.

    Raises:
        ValueError, TypeError, KeyError: MLflow would not know what to do with it.
    """
    record = Record(**fields)
    _expect_texts(record.run_id, record.kind, record.key)
    if record.kind not in get_args(Kind):
        raise ValueError(f"its kind {record.kind!r} is unknown")
    if not all(type(n) is int and abs(n) < 2**63 for n in (record.step, record.timestamp)):
        raise ValueError("its step or its time is no whole number")
    if record.kind == "metric":
        if type(record.value) not in (int, float):
            raise ValueError(f"the metric {record.key!r} is no number")
        return record._replace(value=float(record.value))
    _expect_texts(record.value)
    if record.kind == "run":
        Request.read(str(record.value))
    if record.kind == "model":
        Network.read(str(record.value))
    if record.kind == "input":
        UsedData.read(str(record.value))
    if record.kind == "artifact" and not _is_path(record.key):
        raise ValueError(f"{record.key!r} is no folder of artifacts")
    if record.kind == "status" and record.value not in STATUSES:
        raise ValueError(f"the status {record.value!r} is unknown")
    return record


def _expect_texts(*values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is no text")
        value.encode()  # half of a surrogate pair is none that a database takes


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
    allowed = r"\w.\- /" if _is_path(name) else r"\w\- "
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
    return {clean_name(key): _clean_value(value)[:longest] for key, value in values.items()}


def _is_path(name: str) -> bool:
    """Whether MLflow takes it for a path below a folder."""
    path = posixpath.normpath(name)
    return path == name and path not in (".", "..") and not path.startswith(("/", "../"))


def _clean_value(value: Any) -> str:
    # A file name may hold bytes that are no UTF-8; a database takes none.
    return without_secrets(str(value)).encode("utf-8", "backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """Type and first words of an error, without secrets that an address in it may hold."""
    text = without_secrets(str(error).strip()).partition("\n")[0]
    return f"{type(error).__name__}: {text[:120]}"


def database_path(uri: str) -> Path | None:
    """The file of a local sqlite database; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
