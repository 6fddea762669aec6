"""What earlier looks at the files of a data set found, so that only changed ones are read again.

A pair is known again by path, size, and times of change of both of its files. The cache is one
file: a line with its format and the digest of the rest, then JSON. A damaged one, or one of
another label set or folder, is not used; then every file is read, so it never decides what is
found, only how fast.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from rdd_pipeline.data.layouts.base import Pair
from rdd_pipeline.data.reading import ImageFacts
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import content_digest, read_regular, write_atomically

logger = logging.getLogger(__name__)

_FORMAT = b"checked files 4 "
"""First bytes of the file; raised with every change of what is checked or how files are read."""
SAVE_EVERY = 30.0
"""Seconds of work that are lost at most when the process is killed."""
SETTLED = 2_000_000_000
"""Nanoseconds. A file that changed so shortly before it was read may change again within the same
tick of the file system's clock, unseen: it is read again the next time."""


class Stamp(NamedTuple):
    """What tells whether two files changed since, without reading them."""

    image: tuple[int, int, int]
    """Size, time of the content's change and of the entry's, in nanoseconds."""
    mask: tuple[int, int, int]
    seen: int
    """When this was looked up."""


class Facts(NamedTuple):
    """What reading a pair without any problem gave."""

    height: int
    width: int
    image_digest: str
    mask_digest: str
    pixels: dict[int, int]
    """Class (the number of classes for ignored pixels) -> pixels, where there are any."""
    image: ImageFacts
    palette: dict[int, int]
    """Of a mask read by palette indices: value -> color (0xRRGGBB), of those that occur."""


class ScanCache:
    """Facts about pairs by the stamp of their files.

    Args:
        path: The file; None: nothing is remembered.
        key: What else decides the facts; facts under another key are forgotten.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path = path
        self._key = content_digest(key.encode())
        self._known = _load(path, self._key) if path is not None else {}
        self._kept: dict[str, list[Any]] = {}
        self._changed = False
        self._saved = time.monotonic()

    def recall(self, root: Path, pair: Pair) -> tuple[Stamp | None, Facts | None]:
        """Stamp of the pair's files, and what is known of files with this stamp."""
        if self._path is None:
            return None, None
        try:
            now = time.time_ns()
            stamp = Stamp(_stat(root / pair.image), _stat(root / pair.mask), now)
        except OSError:
            return None, None
        row = self._known.get(_name(pair))
        if row is None:
            return stamp, None
        image, mask, seen, height, width, image_digest, mask_digest, pixels, facts, palette = row
        if (tuple(image), tuple(mask)) != (stamp.image, stamp.mask):
            return stamp, None
        if max(*image[1:], *mask[1:]) > seen - SETTLED:
            return stamp, None
        # The time of the look that gave the facts, not of this one.
        return stamp._replace(seen=seen), Facts(
            height,
            width,
            image_digest,
            mask_digest,
            {int(number): count for number, count in pixels.items()},
            ImageFacts(*facts),
            {int(value): color for value, color in palette.items()},
        )

    def keep(self, pair: Pair, stamp: Stamp | None, facts: Facts, *, new: bool) -> None:
        """Remember the facts; saved now and then."""
        if self._path is None or stamp is None:
            return
        self._kept[_name(pair)] = [*stamp, *facts]
        self._changed |= new
        if self._changed and time.monotonic() - self._saved > SAVE_EVERY:
            self._write({**self._known, **self._kept})

    def save(self, *, complete: bool) -> None:
        """Write the cache; `complete`: forget all pairs that were not looked at this time."""
        if self._path is None:
            return
        rows = self._kept if complete else {**self._known, **self._kept}
        if self._changed or rows.keys() != self._known.keys():
            self._write(rows)

    def _write(self, rows: dict[str, list[Any]]) -> None:
        assert self._path is not None
        self._saved = time.monotonic()
        body = json.dumps({"key": self._key, "pairs": rows}, separators=(",", ":")).encode()
        try:
            write_atomically(self._path, _FORMAT + _digest(body) + b"\n" + body, durable=False)
        except (OSError, UserError) as error:
            logger.warning(
                "%s cannot be written (%s): the next ingestion reads every file again.",
                self._path,
                error,
            )


def _load(path: Path, key: str) -> dict[str, list[Any]]:
    """Pairs of the cache; none if there is none that can be used."""
    try:
        head, _, body = read_regular(path).partition(b"\n")
    except OSError:
        return {}
    if head.startswith(_FORMAT.split(b" ")[0]) and not head.startswith(_FORMAT):
        return {}  # of another version of this project
    if head != _FORMAT + _digest(body):
        logger.warning("%s is damaged: every file is read again.", path)
        return {}
    content = json.loads(body)
    rows: dict[str, list[Any]] = content["pairs"]
    return rows if content["key"] == key else {}


def _digest(body: bytes) -> bytes:
    return content_digest(body).encode()


def _name(pair: Pair) -> str:
    return f"{pair.image}\n{pair.mask}"


def _stat(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
