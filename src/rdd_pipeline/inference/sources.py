"""What is to be predicted: files of a folder, a glob or a list, with the names of their results."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rdd_pipeline.data.layouts.base import IMAGE_SUFFIXES
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import content_digest, not_a_file, require_regular_file
from rdd_pipeline.inference.results import CLASSES, MANIFEST, MASKS, OVERLAYS

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
LIST_SUFFIXES = (".txt", ".lst")
_LARGEST_LIST = 2**28
"""Bytes of a list of files."""


@dataclass(frozen=True)
class Source:
    """A file with one or several images.

    Attributes:
        path: Where it is.
        shown: Its path below the folder of all sources, which the table shows.
        name: Path of its results below the output folder, without a suffix; unique.
    """

    path: Path
    shown: str
    name: str

    @property
    def is_video(self) -> bool:
        """By its suffix."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(given: Path, leave_out: Sequence[Path] = ()) -> list[Source]:
    """The files that are meant, in the order of their names; those of a list in its order.

    Args:
        given: A folder (all images and videos below it, but no masks and overlays of earlier runs;
            links to folders are not followed), a glob, a text file with a path in each line, an
            image or a video. Absolute.
        leave_out: Folders whose files do not count: where this run writes.

    Raises:
        UserError: There is nothing, or no image in it.
    """
    if os.path.isdir(given):  # of what is no path at all, too, `not_a_file` says why
        root, paths = given, sorted(_below(given, leave_out))
        if not paths:
            raise UserError(
                f"The folder {given} holds no images. Expected files ending in "
                f"{', '.join((*IMAGE_SUFFIXES, '.gif', *VIDEO_SUFFIXES))}."
            )
        return _named(paths, root)
    if glob.has_magic(str(given)) and not os.path.exists(given):
        paths = [Path(path) for path in sorted(glob.glob(str(given), recursive=True))]
        begun = str(given)[: min(str(given).find(c) % (1 << 30) for c in "*?[")]
        root = Path(os.path.dirname(begun))
        paths = [
            path
            for path in paths
            if not path.is_dir() and not _is_in(path, leave_out) and not _is_result(path, root)
        ]
        if not paths:
            raise UserError(f"No file matches {given}. Give a folder, or another glob in quotes.")
        return _named(paths, root)
    instead = not_a_file(given)
    if instead is not None:
        raise UserError(
            f"predict.images {given} {instead}. Give a folder, a glob in quotes, a list of files "
            f"({' or '.join(LIST_SUFFIXES)}), an image or a video."
        )
    if given.suffix.lower() not in LIST_SUFFIXES:
        return _named([given], given.parent)
    paths = _listed(given)
    return _named(paths, Path(os.path.commonpath([path.parent for path in paths])))


def _below(root: Path, leave_out: Sequence[Path]) -> Iterator[Path]:
    suffixes = (*IMAGE_SUFFIXES, ".gif", *VIDEO_SUFFIXES)
    skipped = {os.path.realpath(path) for path in leave_out}
    for place, folders, files in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and not _holds_results(Path(place, name))
            and os.path.realpath(os.path.join(place, name)) not in skipped
        ]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(suffixes):
                yield Path(place, name)


def _holds_results(folder: Path) -> bool:
    """Whether these are the masks or overlays of an earlier run, with another output folder too."""
    beside = [folder.parent / name for name in (MANIFEST, CLASSES)]
    return folder.name in (MASKS, OVERLAYS) and all(path.exists() for path in beside)


def _is_result(path: Path, root: Path) -> bool:
    """Whether a file lies in a folder of results below `root`."""
    below = path.relative_to(root).parents
    return any(_holds_results(root / folder) for folder in below if folder.name)


def _is_in(path: Path, folders: Sequence[Path]) -> bool:
    place = Path(os.path.realpath(path))
    return any(place.is_relative_to(os.path.realpath(folder)) for folder in folders)


def _listed(path: Path) -> list[Path]:
    """Files that a list names; relative ones start at the list's folder."""
    require_regular_file(path, "List of images", largest=_LARGEST_LIST)
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The list {path} cannot be read ({error}). Expected UTF-8 text with a path in each "
            "line."
        ) from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise UserError(f"The list {path} names no file. Expected a path in each line.")
    try:
        # Without `..`, which must not lead out of the output folder.
        paths = [Path(os.path.abspath(path.parent / Path(name).expanduser())) for name in names]
    except (ValueError, RuntimeError) as error:
        raise UserError(f"The list {path} holds what is no path ({error}).") from error
    twice = [str(path) for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise UserError(f"The list {path} names {twice[0]} twice. Remove one.")
    return paths


def _named(paths: Sequence[Path], root: Path) -> list[Source]:
    shown = [path.relative_to(root).as_posix() for path in paths]
    return [
        Source(path, text, name)
        for path, text, name in zip(paths, shown, unique_names(shown), strict=True)
    ]


def unique_names(paths: Sequence[str]) -> list[str]:
    """A name for each path: without its suffix, unless another path would have the same one.

    `a.jpg` and `a.png` keep theirs. Small and capital letters count as equal, as some disks take
    them.
    """
    whole: set[int] = set()
    while True:
        names = [
            path if number in whole else os.path.splitext(path)[0]
            for number, path in enumerate(paths)
        ]
        equal = set(_repeated(names))
        if equal <= whole:
            break
        whole |= equal
    for number in equal:
        names[number] += f"~{content_digest(os.fsencode(paths[number]))[:8]}"
    return names


def _repeated(names: Iterable[str]) -> list[int]:
    folded = [name.casefold() for name in names]
    counts = Counter(folded)
    return [number for number, name in enumerate(folded) if counts[name] > 1]
