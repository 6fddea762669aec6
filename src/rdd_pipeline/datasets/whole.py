"""Tables, figures and texts, written aside and renamed.

Two sessions may save one entry at once: whoever opens the file finds that of one of them, whole.
A version has a digest beside its file, ``NAME/VERSION/NAME.b2``, which ``b2sum -l 128 -c`` checks
too, and so does loading. Entries without versions are not read back by this project: what nodes
hand on is named by its content.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from kedro_datasets.json.json_dataset import JSONDataset
from kedro_datasets.matplotlib.matplotlib_dataset import MatplotlibDataset
from kedro_datasets.pandas.csv_dataset import CSVDataset
from kedro_datasets.text.text_dataset import TextDataset
from matplotlib.figure import Figure
from PIL import Image

from rdd_pipeline.drawing import Drawing
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import content_digest, folder_aside, move_whole, read_regular

logger = logging.getLogger(__name__)

_SHOWS = "Shows"
"""Name of the text in a PNG file with the digest of what it shows."""


class _Whole:
    """Mixed into a dataset that writes one file."""

    _filepath: PurePosixPath
    _version: Any
    _get_load_path: Callable[[], PurePosixPath]
    _aside: PurePosixPath | None = None

    def save(self, data: Any) -> None:
        """Write the file into a folder beside it, then move it to its place."""
        # Without Kedro's wrapper, which looks for the new version before it is in its place.
        save = inspect.unwrap(super().save)  # type: ignore[misc]
        if getattr(self, "_protocol", "file") != "file":  # object stores replace files whole
            save(self, data)
            return
        target = Path(self._get_save_path())
        with folder_aside(Path(self._filepath)) as folder:
            self._aside = PurePosixPath(folder / target.name)
            try:
                save(self, data)
            finally:
                self._aside = None
            if not self._version:
                os.replace(folder / target.name, target)
                return
            digest = content_digest((folder / target.name).read_bytes())
            _digest_file(folder / target.name).write_text(f"{digest}  {target.name}\n")
            move_whole(folder, target.parent)

    def load(self) -> Any:
        """Read the file; of a version only if it has its digest.

        Raises:
            UserError: It was changed since it was written.
        """
        if self._version and getattr(self, "_protocol", "file") == "file":
            _check(Path(self._get_load_path()))
        return inspect.unwrap(super().load)(self)  # type: ignore[misc]

    def _get_save_path(self) -> PurePosixPath:
        return self._aside or super()._get_save_path()  # type: ignore[misc]


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.b2")


def _check(path: Path) -> None:
    try:
        expected = read_regular(_digest_file(path))[:32]
    except FileNotFoundError:
        logger.info("%s has no digest: it is of an earlier version and not checked.", path)
        return
    if content_digest(read_regular(path)).encode() != expected:
        raise UserError(
            f"{path} was changed since it was written: its digest does not fit. Delete the folder "
            f"{path.parent}, and repeat the command that wrote it: what was trained is not "
            "trained again."
        )


class WholeCSVDataset(_Whole, CSVDataset):  # type: ignore[misc]
    """`pandas.CSVDataset`, whole."""


class WholeJSONDataset(_Whole, JSONDataset):  # type: ignore[misc]
    """`json.JSONDataset`, whole."""


class WholeTextDataset(_Whole, TextDataset):  # type: ignore[misc]
    """`text.TextDataset`, whole."""


class WholeFigureDataset(_Whole, MatplotlibDataset):  # type: ignore[misc]
    """`matplotlib.MatplotlibDataset`, whole; a `Drawing` that was saved before is not drawn again.

    A PNG file says what it shows. If the newest version says the same and has its digest, the new
    version is a copy of it.
    """

    def save(self, data: Figure | Drawing) -> None:
        """Save a figure, or draw it first if it has to be drawn."""
        if isinstance(data, Drawing):
            if self._save_args.get("format", "png") == "png":
                digest = data.digest(self._save_args)
                data = _Picture(data, digest, self._saved_before(digest))  # type: ignore[assignment]
            else:
                data = data.draw()
        super().save(data)

    def _saved_before(self, digest: str) -> bytes | None:
        if not self._version or getattr(self, "_protocol", "file") != "file":
            return None
        paths = sorted(Path(self._filepath).glob(f"*/{PurePosixPath(self._filepath).name}"))
        try:
            content = read_regular(paths[-1])
            whole = read_regular(_digest_file(paths[-1]))[:32] == content_digest(content).encode()
            same = whole and Image.open(io.BytesIO(content)).info.get(_SHOWS) == digest
        except (IndexError, OSError, ValueError, SyntaxError):  # none, or none that can be read
            return None
        return content if same else None


class _Picture:
    """What matplotlib's dataset saves: a figure, as far as it asks."""

    def __init__(self, drawing: Drawing, digest: str, before: bytes | None) -> None:
        self._drawing, self._digest, self._before = drawing, digest, before

    def savefig(self, file: BinaryIO, **settings: Any) -> None:
        """Write the picture of before, or draw it."""
        if self._before is not None:
            file.write(self._before)
            return
        told = {**(settings.pop("metadata", None) or {}), _SHOWS: self._digest}
        self._drawing.draw().savefig(file, metadata=told, **settings)
