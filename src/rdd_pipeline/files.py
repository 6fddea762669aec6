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
import stat
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


def not_a_file(path: Path) -> str | None:
    """What `path` is instead of a regular file (or a link to one), in words; None where it is one.

    Nothing is opened: opening a pipe waits for a writer, and some devices never end.
    """
    try:
        mode = path.expanduser().stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError, RuntimeError) as error:
        return f"cannot be used ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISREG(mode):
        return None
    kinds = {
        stat.S_IFDIR: "is a folder",
        stat.S_IFIFO: "is a named pipe",
        stat.S_IFSOCK: "is a socket",
        stat.S_IFCHR: "is a device",
        stat.S_IFBLK: "is a device",
    }
    return kinds.get(stat.S_IFMT(mode), "is no regular file")


def require_regular_file(path: Path, what: str, *, largest: int | None = None) -> Path:
    """The path of a file that a user gave, `~` expanded, before it is opened.

    Args:
        path: What was given.
        what: What it should be ("Weights file"): the message begins with it.
        largest: Bytes it may have at most.

    Raises:
        UserError: There is no such file, it is a folder, pipe, socket or device, or too large.
    """
    found = not_a_file(path)
    if found is None and largest is not None:
        size = path.expanduser().stat().st_size
        if size > largest:
            found = f"has {size / 1e6:,.1f} MB, at most {largest / 1e6:,.1f} MB are read"
    if found is not None:
        raise UserError(f"{what} {path} {found}. Give the path of an existing file.")
    return path.expanduser()


def file_digest(path: Path) -> str:
    """Digest of a file's content, 64 hexadecimal digits (SHA-256), without holding it in memory.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with require_regular_file(path, "The weights file").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"The weights file {path} cannot be read ({error.strerror}). "
            "Give the path of an existing file."
        ) from error
