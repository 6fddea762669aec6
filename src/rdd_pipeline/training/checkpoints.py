"""Training states on disk: one checksummed file each, the newest two of a piece of work kept.

A file is ``MAGIC | sha256 of the payload | payload`` and the payload is what ``torch.save`` writes.
torch, safetensors and zip readers accept a flipped bit in tensor data without a word; the digest in
front finds every changed or missing byte, so a damaged file is named and the older one is used.
Payloads are read with ``weights_only=True``: a pickled object in them is refused, never run.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import write_atomically

logger = logging.getLogger(__name__)

MAGIC = b"RDDSTATE1\n"
_HEADER = len(MAGIC) + 32
_NAME = re.compile(r"state-(\d{9})\.ckpt")
KEPT = 2

State = dict[str, Any]


class DamagedStateError(UserError):
    """A training state is torn, changed, or not one of ours."""


def dumps(state: Mapping[str, Any]) -> bytes:
    """Serialize nested dicts and lists of tensors, numbers, strings and None."""
    buffer = io.BytesIO()
    torch.save(copy_to_cpu(state), buffer)
    payload = buffer.getvalue()
    return MAGIC + hashlib.sha256(payload).digest() + payload


def loads(data: bytes, *, source: str = "training state") -> State:
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


class RunStore:
    """Everything on disk about one piece of training work, under its fingerprint.

    ``job.json`` says in words what the fingerprint stands for, ``state-ITERATION.ckpt`` are the
    checkpoints, ``done.json`` names the final one, ``KEY.json`` are remembered results.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.path = root / fingerprint
        self.fingerprint = fingerprint
        self._unusable: set[Path] = set()

    def describe(self, job: Mapping[str, Any]) -> None:
        """Write ``job.json`` once, for people who look into the folder."""
        if not (self.path / "job.json").exists():
            text = json.dumps(job, indent=1, sort_keys=True, default=str)
            write_atomically(self.path / "job.json", text.encode())

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write the state of ``state["iteration"]`` and drop all but it and the one before.

        States that `latest` has found damaged do not count: training goes on from before them, and
        what it writes there would be the first to go.
        """
        path = self.path / f"state-{state['iteration']:09d}.ckpt"
        write_atomically(path, dumps({**state, "fingerprint": self.fingerprint}))
        self._unusable.discard(path)
        others = [p for p in self._states() if p != path and p not in self._unusable]
        for old in others[KEPT - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> State | None:
        """Newest state that is whole, or None; damaged ones are named in the log and skipped."""
        for path in self._states():
            try:
                state = loads(path.read_bytes(), source=str(path))
                if state.get("fingerprint") != self.fingerprint:
                    raise DamagedStateError(
                        f"{path} belongs to other work ({state.get('fingerprint')})."
                    )
            except (DamagedStateError, OSError) as error:
                logger.warning("%s Trying the one before it.", error)
                self._unusable.add(path)
                continue
            return state
        return None

    def finish(self, iteration: int) -> None:
        """Mark the work as complete: its last state is the one of `iteration`.

        Older states go: they were kept to fall back on, and the work can be loaded now.
        """
        write_atomically(self.path / "done.json", json.dumps({"iteration": iteration}).encode())
        for path in self._states():
            if path.name != f"state-{iteration:09d}.ckpt":
                path.unlink(missing_ok=True)

    def finished_state(self) -> State | None:
        """Final state of complete work; None when it is not complete or no longer readable."""
        try:
            final = json.loads((self.path / "done.json").read_text())["iteration"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        state = self.latest()
        return state if state is not None and state["iteration"] == final else None

    def remember(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep a JSON result that belongs to this work (an evaluation, say)."""
        write_atomically(self.path / f"{key}.json", json.dumps(value).encode())

    def recall(self, key: str) -> dict[str, Any] | None:
        """What was remembered under `key`, or None."""
        try:
            value = json.loads((self.path / f"{key}.json").read_text())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _states(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted((p for p in self.path.iterdir() if _NAME.fullmatch(p.name)), reverse=True)
