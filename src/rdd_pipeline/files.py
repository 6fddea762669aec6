"""Files that are whole or not there, and digests of content.

Whatever this project writes by itself goes through `written_whole`; whatever it recognizes by its
content goes through one of the digests.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rdd_pipeline.errors import UserError

TEMPORARY = ".tmp"
"""Suffix of files that are being written; one that was left behind may be removed."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def written_whole(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` at the end: aside, flushed to the disk, renamed.

    After an error `path` holds what it held before, and nothing is left behind. Several processes
    may write one path at once; the last one wins. `durable=False` does not wait for the disk: what
    can be made again may be lost with the power.

    Raises:
        UserError: The disk is full.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    size = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            size = aside.stat().st_size
            aside.unlink()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise UserError(
                f"{path} ({size / 1e6:.1f} MB) could not be written: {error.strerror}. Free "
                "some space and repeat the command; a training goes on from its last checkpoint, "
                "which is whole."
            ) from error
        raise
    if not durable:
        return
    with contextlib.suppress(OSError):  # not every file system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` by `written_whole`.

    Raises:
        UserError: The disk is full.
    """
    with written_whole(path, durable=durable) as file:
        file.write(data)


def content_digest(data: bytes) -> str:
    """Digest of bytes in memory, 32 hexadecimal digits (BLAKE2b): images, masks, tables."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def json_digest(facts: Any) -> str:
    """Digest of plain values, 16 hexadecimal digits (SHA-256), whatever the order of keys."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_checked_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object that carries its `json_digest`."""
    return json.dumps({"digest": json_digest(value), **value}, indent=1).encode()


def from_checked_json(data: bytes, source: str) -> dict[str, Any]:
    """Inverse of `to_checked_json`; `source` names the file in messages.

    Raises:
        UserError: It is no such object, or was changed since.
    """
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    except ValueError as error:
        raise UserError(f"{source} cannot be read: {error}.") from error
    digest = value.pop("digest", None)
    if digest != json_digest(value):
        found = "has no digest" if digest is None else "was changed: its digest does not fit"
        raise UserError(
            f"{source} {found}. Delete it, and repeat the command that wrote it: what was trained "
            "is not trained again."
        )
    return value


def file_digest(path: Path) -> str:
    """Digest of a file's content, 64 hexadecimal digits (SHA-256), without holding it in memory.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with path.expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"The weights file {path} cannot be read ({error.strerror}). "
            "Give the path of an existing file."
        ) from error
