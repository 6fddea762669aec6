"""Files that are whole or not there, and digests of content.

Whatever this project writes by itself goes through `written_whole` or `folder_aside`; whatever it
recognizes by its content goes through one of the digests.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rdd_pipeline.errors import UserError

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp"
"""Suffix of what is being written."""
_HOST = hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()
_ASIDE = re.compile(r"\..+\.([0-9a-f]{8})-[0-9a-f]{8}\.tmp")
"""Names of what is being written, with the writer's machine."""
_FORMER_ASIDE = re.compile(
    r"\..+\.([0-9a-f]{8}|\d+)\.tmp|\.[0-9a-f]{8}\..+|.+\.pack\.[0-9a-f]{8}\.tmp"
)
"""As earlier versions of this project named it."""
VERSION = re.compile(r"\d{4}-\d\d-\d\dT\d\d\.\d\d\.\d\d\.\d{3}Z")
"""Kedro's time stamps: they sort by age."""
_LONGEST_NAME = 255
"""Bytes of a name on nearly every disk."""
_ABANDONED = 86_400.0
"""Seconds after which something half-written whose writer cannot be asked is taken for left."""
_EMPTY = 3600.0
"""Seconds after which nobody comes back to an empty folder of a version."""

_ROOM = "Free some space"
_PERMISSION = "Make it writable or choose another folder"
_IN_THE_WAY = "Remove what is in its place"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EROFS: _PERMISSION,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EIO: "Look after the disk",
    errno.EISDIR: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.ENOTEMPTY: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.ENAMETOOLONG: "Choose shorter names",
}


class NotWrittenError(UserError):
    """A file could not be written: the disk is full or read-only, or a limit was reached."""


@contextlib.contextmanager
def written_whole(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` at the end: aside, flushed to the disk, renamed.

    After an error `path` holds what it held before, and nothing is left behind. Several processes
    may write one path at once; the last one wins. `durable=False` does not wait for the disk: what
    can be made again may be lost with the power.

    Raises:
        NotWrittenError: The disk is full or read-only, or the file too large for a limit.
    """
    aside: Path | None = None
    try:
        _make_folder(path.parent)
        aside, file = _open_aside(path)
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            aside.replace(path)  # before it is closed: until then it is locked
    except BaseException as error:
        size = 0
        if aside is not None:
            with contextlib.suppress(OSError):
                size = aside.stat().st_size
                aside.unlink()
        _raise_explained(error, path, size)
        raise
    if durable:
        _flush_folder(path.parent)


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, for something that is made in it and then moved away.

    It is removed at the end, with what is still in it.

    Raises:
        NotWrittenError: As for `written_whole`.
    """
    aside: Path | None = None
    descriptor = -1
    try:
        _make_folder(path.parent)
        while True:
            aside = _aside_name(path)
            aside.mkdir()
            descriptor = os.open(aside, os.O_RDONLY)
            if _is_ours(descriptor, aside):
                break
            os.close(descriptor)
        yield aside
    except OSError as error:
        _raise_explained(error, path)
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def move_whole(aside: Path, path: Path) -> None:
    """Rename something made in a `folder_aside`, or that folder, to `path`; flush the folder."""
    _make_folder(path.parent)
    aside.replace(path)
    _flush_folder(path.parent)


def link_whole(target: str, path: Path) -> None:
    """Make `path` a symbolic link to `target`, in the place of another one that may be there.

    Raises:
        OSError: The file system has no such links, or `path` is a folder.
    """
    aside = _aside_name(path)
    try:
        os.symlink(target, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(*roots: Path) -> list[Path]:
    """Remove what killed writers left below these folders, and empty folders of versions.

    A writer holds a lock on what it writes, which ends with its process. What was begun on another
    machine, or on a file system without locks, is removed when nobody wrote to it for a day.

    Returns:
        What was removed.
    """
    removed: list[Path] = []
    for root in roots:
        for place, folders, files in os.walk(root):
            left = [n for n in (*folders, *files) if n.endswith(TEMPORARY) or n.startswith(".")]
            removed += [path for name in left if _removed(path := Path(place, name))]
            folders[:] = [name for name in folders if name not in left]
            here = Path(place)
            if VERSION.fullmatch(here.name) and _age(here) > _EMPTY:
                with contextlib.suppress(OSError):  # mostly that it is not empty
                    here.rmdir()
                    removed.append(here)
    if removed:
        logger.info("Removed %d things that killed commands had left half-written.", len(removed))
    return removed


def _removed(path: Path) -> bool:
    """Remove what nobody writes any more."""
    aside = _ASIDE.fullmatch(path.name)
    if aside is None and _FORMER_ASIDE.fullmatch(path.name) is None:
        return False
    descriptor = -1
    try:
        free = False
        if aside is not None and aside[1] == _HOST:
            with contextlib.suppress(OSError):  # no locks here
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                free = True
        if not free and _age(path) <= _ABANDONED:
            return False
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:  # its writer or another process was faster, or may do more than this one
        return False
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return True


def _age(path: Path) -> float:
    return time.time() - path.lstat().st_mtime


def _aside_name(path: Path) -> Path:
    ending = f".{_HOST}-{secrets.token_hex(4)}{TEMPORARY}"
    room = _LONGEST_NAME - len(ending) - 1
    # A name that the disk just takes would be too long with more in front and behind.
    name = os.fsencode(path.name)[:room].decode(errors="ignore")
    return path.with_name(f".{name}{ending}")


def _open_aside(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        aside = _aside_name(path)
        file = aside.open("xb")
        if _is_ours(file.fileno(), aside):
            return aside, file
        file.close()


def _is_ours(descriptor: int, aside: Path) -> bool:
    """Lock it while it is open; False: it was taken for left behind before it was locked."""
    with contextlib.suppress(OSError):  # not every file system has locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return aside.exists()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "Choose another folder")
        raise NotWrittenError(
            f"The folder {path} could not be made: {error.strerror}. {remedy} and repeat the "
            "command."
        ) from error


def _flush_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can flush a folder
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _raise_explained(error: BaseException, path: Path, size: int = 0) -> None:
    """Say in one line why `path`, of which there were `size` bytes, could not be written."""
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    if isinstance(error, OSError) and remedy is not None:
        what = f"{path} ({size / 1e6:.1f} MB)" if size else f"{path}"
        raise NotWrittenError(
            f"{what} could not be written: {error.strerror}. {remedy} and repeat the command: it "
            "goes on from what is done."
        ) from error


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` by `written_whole`.

    Raises:
        NotWrittenError: As for `written_whole`.
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
    except (ValueError, RecursionError) as error:
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


def read_regular(path: Path) -> bytes:
    """Content of a regular file: a pipe in its place would be waited for, a device have no end.

    Raises:
        OSError: There is none, or it is something else.
    """
    instead = not_a_file(path)
    if instead not in (None, "does not exist"):
        raise OSError(errno.EINVAL, instead, str(path))
    return path.read_bytes()


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
