"""The output folder: masks, overlays, and a manifest of what is finished."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdd_pipeline.errors import UserError, printable
from rdd_pipeline.files import not_a_file, remove_leftovers, write_atomically, written_whole

LOCK = ".lock"
MANIFEST = "manifest.jsonl"
TABLE = "predictions.csv"
PROBLEMS = "problems.json"
CLASSES = "classes.json"
MASKS, OVERLAYS = "masks", "overlays"
_LONGEST_JPEG = 65_500
"""Pixels of a side."""

Row = dict[str, str | int | float]


class Results:
    """Everything in an output folder; a context in which no other command writes to it.

    A line of the manifest is written after the files it names, which are whole or not there: what
    has a line and is as large as it says is finished, also after `kill -9`. A result counts for the
    same content of its source under the same settings only.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        """Name the folder.

        Args:
            folder: It is made when the context is entered.
            settings: Digest of everything but the sources that decides the results.
        """
        self.folder = folder
        self._settings = settings
        self._lines: dict[str, dict[str, Any]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Lock the folder and read what is finished.

        Raises:
            UserError: Another command writes to it, the folder cannot be written, or something
                that is no file stands where the lock or the manifest has its place.
        """
        for name in (LOCK, MANIFEST):
            instead = not_a_file(self.folder / name)
            if instead not in (None, "does not exist"):
                raise UserError(
                    f"{self.folder / name} {instead}; expected a file of earlier predictions. "
                    "Remove it, or set another predict.output."
                )
        if not (self.folder / LOCK).exists():
            # Makes the folder, too, or says why it cannot be made.
            write_atomically(self.folder / LOCK, b"", durable=False)
        lock = self._stack.enter_context((self.folder / LOCK).open("ab"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stack.close()
            raise UserError(
                f"Another command is writing to {self.folder}. Wait for its end, or set another "
                "predict.output."
            ) from error
        except OSError:  # not every file system has locks
            pass
        try:
            remove_leftovers(self.folder / MASKS, self.folder / OVERLAYS)
            self._lines = dict(_read_manifest(self.folder / MANIFEST))
            # Anew, without lines that were replaced or torn.
            with written_whole(self.folder / MANIFEST) as file:
                for line in self._lines.values():
                    file.write(_encoded(line))
            self._manifest = self._stack.enter_context((self.folder / MANIFEST).open("ab"))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def finished(self, name: str, digest: str, files: Sequence[str]) -> Row | None:
        """The row of a result that is there, of this content and these settings; else None."""
        line = self._lines.get(name)
        if line is None or line["digest"] != digest or line["settings"] != self._settings:
            return None
        sizes = {file: _size(self.folder / file) for file in files}
        if None in sizes.values() or sizes != line["files"]:
            return None
        row: Row = line["row"]
        return row

    def write(self, name: str, data: bytes) -> int:
        """Write a file below the folder, whole; its size.

        Raises:
            UserError: A link leads out of the folder, or the disk is full.
        """
        path = self.folder / name
        place = Path(os.path.realpath(path.parent))  # also of links that lead in a circle
        if not place.is_relative_to(self.folder.resolve()):
            raise UserError(
                f"{path.parent} is a link to {place}, outside of {self.folder}. Remove the link, "
                "or set another predict.output."
            )
        write_atomically(path, data, durable=False)
        return len(data)

    def record(self, name: str, digest: str, files: Mapping[str, int], row: Row) -> None:
        """Note that a result is finished."""
        line = {
            "name": name,
            "digest": digest,
            "settings": self._settings,
            "files": dict(files),
            "row": row,
        }
        self._lines[name] = line
        self._manifest.write(_encoded(line))
        self._manifest.flush()

    def write_table(self, rows: Sequence[Row]) -> None:
        """One line for each image, as CSV."""
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        write_atomically(self.folder / TABLE, text.getvalue().encode())

    def write_json(self, name: str, content: Any) -> None:
        """A small file for people and other programs."""
        write_atomically(self.folder / name, json.dumps(content, indent=1).encode())


def shown_path(path: str) -> str:
    """A path as it may stand in a table: no control characters, nothing that is no text."""
    return printable(path)


def index_png(values_HW: NDArray[np.uint8], colors: Sequence[tuple[int, int, int]] | None) -> bytes:
    """Class numbers as a PNG of 8 bits; with colors as its palette, so that it can be looked at."""
    picture = Image.fromarray(values_HW)
    if colors is not None:
        picture.putpalette([channel for color in colors for channel in color])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def color_png(mask_HW: NDArray[np.uint8], values: Sequence[tuple[int, int, int]]) -> bytes:
    """A mask of colors, as PNG."""
    buffer = io.BytesIO()
    colors = np.array(values, np.uint8)[mask_HW]
    Image.fromarray(colors).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def overlay_suffix(height: int, width: int) -> str:
    """JPEG, but for sides that it cannot have."""
    return ".jpg" if max(height, width) <= _LONGEST_JPEG else ".png"


def encoded_overlay(picture: Image.Image) -> bytes:
    """A photograph-like picture in the kind of file that `overlay_suffix` says."""
    buffer = io.BytesIO()
    if overlay_suffix(picture.height, picture.width) == ".jpg":
        picture.save(buffer, "JPEG", quality=90)
    else:
        picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _read_manifest(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines that are whole, by name; later ones win."""
    expected = {"name": str, "digest": str, "settings": str, "files": dict, "row": dict}
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Remove it.") from error
    with open(descriptor, "rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and all(
                isinstance(line.get(key), kind) for key, kind in expected.items()
            ):
                yield line["name"], line
