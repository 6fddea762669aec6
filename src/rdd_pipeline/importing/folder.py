"""The files of an export: listed once, and nothing outside of the folder is ever opened."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
import stat
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from rdd_pipeline.data.layouts.base import IMAGE_SUFFIXES, passed_over
from rdd_pipeline.data.reading import read_bytes
from rdd_pipeline.errors import DataProblem, printable

_LITTER = {"thumbs.db", "desktop.ini"}
LARGEST_JSON = 1_000_000_000
"""Bytes; COCO's largest has half of that, and Python takes about ten times as much memory."""
_LARGEST_TABLE = 10_000_000


class Folder:
    """All files of a folder that count, by their path in it (with `/`).

    Hidden files and what operating systems leave are passed over.

    Raises:
        DataProblem: It is no folder, holds nothing, a link leads out of it, or a name is no text.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            found = "is a file" if root.exists() else "does not exist"
            hint = " Unpack it first." if root.suffix.lower() in (".zip", ".tar", ".gz") else ""
            raise DataProblem(f"import_data.source={root} {found}, expected a folder.{hint}")
        self.root = root
        self.files = tuple(sorted(self._walk()))
        if not self.files:
            raise DataProblem(f"import_data.source={root} holds no file.")

    def _walk(self) -> list[str]:
        found: list[str] = []
        inside = Path(os.path.realpath(self.root))

        def fail(error: OSError) -> None:
            raise DataProblem(f"{error.filename} cannot be read ({error.strerror}).")

        for place, folders, names in os.walk(self.root, onerror=fail):
            folders[:] = sorted(name for name in folders if not passed_over(name))
            for name in [*folders, *names]:
                path = Path(place, name)
                if name in folders and not path.is_symlink():
                    continue
                if passed_over(name) or name.lower() in _LITTER:
                    continue
                relative = path.relative_to(self.root).as_posix()
                if _is_no_text(relative):
                    raise DataProblem(f"The name {_shown(relative)} is no plain text. Rename it.")
                if path.is_symlink() and (
                    name in folders or not Path(os.path.realpath(path)).is_relative_to(inside)
                ):
                    raise DataProblem(
                        f"{path} is a link out of the folder or to a folder: it is not followed. "
                        "Put what it names in its place."
                    )
                if path.exists() and stat.S_ISREG(path.stat().st_mode):
                    found.append(relative)
        return found

    @cached_property
    def pictures(self) -> tuple[str, ...]:
        """Files with the suffix of an image."""
        return tuple(f for f in self.files if f.lower().endswith(IMAGE_SUFFIXES))

    @cached_property
    def by_stem(self) -> dict[str, str]:
        """Path of a picture without suffix -> its file."""
        return {stem(file): file for file in reversed(self.pictures)}

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for file in self.pictures:
            found[_normal(file.rpartition("/")[2])].append(file)
        return found

    def named(self, *names: str) -> list[str]:
        """Files of one of these names, in whatever folder."""
        return [f for f in self.files if f.rpartition("/")[2] in names]

    def ending(self, *suffixes: str) -> list[str]:
        """Files with one of these suffixes."""
        return [f for f in self.files if f.lower().endswith(suffixes)]

    def find_picture(self, text: str, beside: str) -> str | None:
        """The picture that the labels in the file `beside` call `text`; None: there is none.

        A path is taken from the folder of the labels, else the picture whose path ends most alike,
        if it is a single one.

        Raises:
            DataProblem: The path leads out of the folder.
        """
        given = unicodedata.normalize("NFC", text.replace("\\", "/"))
        absolute = given.startswith("/") or re.match("[A-Za-z]:/", given) is not None
        if not absolute:
            place = posixpath.normpath(posixpath.join(posixpath.dirname(beside), given))
            if place.startswith("../") or place == "..":
                raise DataProblem(
                    f"{printable(beside)} names the image {printable(text)!r}, which leads out of "
                    "the folder."
                )
            for known in (place, given):
                if known in self._known:
                    return self._known[known]
        wanted = [part for part in given.split("/") if part not in ("", ".", "..")]
        found = self._by_name.get(wanted[-1] if wanted else "", [])
        return _most_alike(found, wanted)

    @cached_property
    def _known(self) -> dict[str, str]:
        return {_normal(file): file for file in self.pictures}

    def json(self, file: str) -> Any:
        """Content of a JSON file.

        Raises:
            DataProblem: It cannot be read.
        """
        content = self.bytes(file, LARGEST_JSON)
        try:
            return json.loads(content)
        except RecursionError as error:
            raise DataProblem(f"{file} cannot be read: it is nested too deeply.") from error
        except (ValueError, MemoryError) as error:
            raise DataProblem(f"{file} is no JSON ({str(error)[:100]}).") from error

    def text(self, file: str) -> str:
        """Content of a small text file.

        Raises:
            DataProblem: It cannot be read.
        """
        try:
            return self.bytes(file, _LARGEST_TABLE).decode("utf-8-sig")
        except UnicodeError as error:
            raise DataProblem(f"{file} is no UTF-8 text.") from error

    def rows(self, file: str) -> list[list[str]]:
        """Cells of a CSV file, stripped; empty lines are left out.

        Raises:
            DataProblem: It cannot be read.
        """
        text = self.text(file)
        separator = ";" if text.partition("\n")[0].count(";") else ","
        try:
            rows = list(csv.reader(io.StringIO(text), delimiter=separator))
        except csv.Error as error:
            raise DataProblem(f"{file} is no table ({error}).") from error
        return [[cell.strip() for cell in row] for row in rows if any(map(str.strip, row))]

    def bytes(self, file: str, largest: int | None = None) -> bytes:
        """Content of a file.

        Raises:
            DataProblem: It cannot be read, is empty or too large.
        """
        path = self.root / file
        if largest is not None and path.exists() and path.stat().st_size > largest:
            raise DataProblem(
                f"{file} has {path.stat().st_size / 1e6:,.0f} MB, at most {largest / 1e6:,.0f} MB "
                "are read."
            )
        return read_bytes(path)


def stem(file: str) -> str:
    """The path without its suffix."""
    return PurePosixPath(file).with_suffix("").as_posix()


def _most_alike(files: list[str], wanted: list[str]) -> str | None:
    def alike(file: str) -> int:
        pairs = zip(reversed(file.split("/")), reversed(wanted), strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), len(wanted))

    ranked = sorted(files, key=alike, reverse=True)
    if not ranked or (len(ranked) > 1 and alike(ranked[0]) == alike(ranked[1])):
        return None
    return ranked[0]


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _is_no_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return printable(name) != name


def _shown(name: str) -> str:
    return printable(os.fsencode(name).decode(errors="backslashreplace"))
