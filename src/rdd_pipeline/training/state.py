"""The state of a training, and the checksummed file it is kept in.

A file is ``MAGIC | sha256 of the payload | payload`` and the payload is what ``torch.save`` writes.
torch, safetensors and zip readers accept a flipped bit in tensor data without a word; the digest in
front finds every changed or missing byte, so a damaged file is named and the older one is used.
Payloads are read with ``weights_only=True``: a pickled object in them is refused, never run.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypedDict

import torch
from torch import Tensor

from rdd_pipeline.errors import UserError

logger = logging.getLogger(__name__)

MAGIC = b"RDDSTATE1\n"
_HEADER = len(MAGIC) + 32
_ADDED = ("ema", "snapshots")
"""Fields of `TrainState` that are left out of files while they are None: they came later."""


class DamagedStateError(UserError):
    """A training state is torn, changed, or not one of ours."""


@dataclass(frozen=True)
class Best:
    """The best validation so far: mIoU in [0, 1], its iteration and the student's weights."""

    miou: float
    iteration: int
    tensors: dict[str, Tensor]


@dataclass
class Cost:
    """What the training took so far: images seen, seconds, most bytes held by the device."""

    images: int = 0
    seconds: float = 0.0
    peak_memory: int = 0


class Snapshot(TypedDict):
    """What the network predicted at one validation.

    Attributes:
        iteration: Of the validation.
        maps: (h, w) uint8 classes by name of the image.
    """

    iteration: int
    maps: dict[str, Tensor]


@dataclass
class TrainState:
    """Everything a training goes on from, after `iteration` of it.

    Attributes:
        iteration: Iterations done; they count from 1.
        student: Tensors of the network.
        ema: Tensors of its average; None where the recipe averages nothing.
        objective: Tensors of the losses: what they train and remember.
        optimizer: As torch's optimizers say it, and so is `adversary_optimizer`.
        best: None before the first validation with a score.
        snapshots: Small predictions at some validations, oldest first.
        history: One row a logged or validated iteration, oldest first.
        fingerprint: Of the training it belongs to.
    """

    iteration: int = 0
    student: dict[str, Tensor] = field(default_factory=dict)
    objective: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    adversary_optimizer: dict[str, Any] | None = None
    best: Best | None = None
    ema: dict[str, Tensor] | None = None
    snapshots: list[Snapshot] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    fingerprint: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "training state") -> Self:
        """Inverse of `to_dict`.

        Raises:
            DamagedStateError: Something is missing.
        """
        names = [known.name for known in fields(cls)]
        missing = [name for name in names if name not in values and name not in _ADDED]
        if missing:
            raise DamagedStateError(
                f"{source} holds no {', '.join(missing)}. Delete it; training goes on from an "
                "older state or from the start."
            )
        state = cls(**{name: values[name] for name in names if name in values})
        state.best = None if values["best"] is None else Best(**values["best"])
        state.cost = Cost(**values["cost"])
        return state

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and plain values, sharing the tensors: what a file holds."""
        best = None if self.best is None else dict(vars(self.best))
        values = {**vars(self), "best": best, "cost": dict(vars(self.cost))}
        for name in _ADDED:
            if values[name] is None:
                del values[name]
        return values

    def without_tensors(self, fingerprint: str) -> TrainState:
        """A copy for a training that goes on from here; its tensors are those of the networks."""
        return TrainState(
            self.iteration,
            best=self.best,
            snapshots=self.snapshots,
            history=list(self.history),
            cost=replace(self.cost),
            fingerprint=fingerprint,
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "training state") -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            DamagedStateError: It is not that.
        """
        return cls.from_dict(loads(data, source=source), source=source)

    def to_bytes(self) -> bytes:
        """The content of a file."""
        return dumps(self.to_dict())

    def digest(self) -> str:
        """Digest of what decides how the training goes on; curves and clocks are left out."""
        values = self.to_dict()
        for name in ("history", "cost", "fingerprint", "snapshots"):
            values.pop(name, None)
        return digest(values)


def dumps(state: Mapping[str, Any]) -> bytes:
    """Serialize nested dicts and lists of tensors, numbers, strings and None."""
    buffer = io.BytesIO()
    torch.save(copy_to_cpu(state), buffer)
    payload = buffer.getvalue()
    return MAGIC + hashlib.sha256(payload).digest() + payload


def loads(data: bytes, *, source: str = "training state") -> dict[str, Any]:
    """Inverse of `dumps`.

    Raises:
        DamagedStateError: Wrong magic, wrong digest, or content other than tensors and plain types.
    """
    if not data.startswith(MAGIC):
        raise DamagedStateError(
            f"{source} is not a training state of this project (it starts with {data[:10]!r}). "
            "Delete it; training goes on from an older state or from the start."
        )
    payload = data[_HEADER:]
    if hashlib.sha256(payload).digest() != data[len(MAGIC) : _HEADER]:
        raise DamagedStateError(
            f"{source} is damaged: its checksum does not fit its {len(payload)} bytes. "
            "Delete it; training goes on from an older state or from the start."
        )
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, all of them mean the same here
        raise DamagedStateError(
            f"{source} holds something other than tensors and plain values{_foreign(error)}. It "
            "was refused and nothing in it was run. Delete it; training goes on from an older "
            "state or from the start."
        ) from error
    if not isinstance(state, dict):
        raise DamagedStateError(f"{source} holds a {type(state).__name__}, expected a dict.")
    return state


def _foreign(error: Exception) -> str:
    """What torch found in a file, in a few words.

    Its own message is left out: it advises to load the file with `weights_only=False`.
    """
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" (it names {named[1]})" if named else ""


def digest(value: Any) -> str:
    """Content digest (32 hex digits) of nested dicts, sequences, tensors and plain values."""
    hasher = hashlib.sha256()
    for piece in _pieces(value):
        hasher.update(piece)
    return hasher.hexdigest()[:32]


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        yield f"T{tensor.dtype}{tuple(tensor.shape)}".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield b"{"
        for key in sorted(value, key=str):
            yield f"{type(key).__name__}{key}:".encode()
            yield from _pieces(value[key])
        yield b"}"
    elif isinstance(value, list | tuple):
        yield b"["
        for item in value:
            yield from _pieces(item)
            yield b","
        yield b"]"
    else:
        yield f"{type(value).__name__}{value!r}".encode()


def copy_to_cpu(value: Any) -> Any:
    """Copy nested tensors to the CPU, so that later steps change none of them."""
    if isinstance(value, Tensor):
        # clone(): a view would carry its whole storage into the file.
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_cpu(item) for item in value)
    return value
