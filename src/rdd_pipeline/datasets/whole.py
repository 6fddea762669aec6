"""Tables, figures and texts, written aside and renamed.

Two sessions may save one entry at once: whoever opens the file finds that of one of them, whole.
A version has a digest beside its file, ``NAME/VERSION/NAME.b2``, which ``b2sum -l 128 -c`` checks
too, and so does loading. Entries without versions are not read back by this project: what nodes
hand on is named by its content.
"""

from __future__ import annotations

import base64
import html
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from kedro.io.core import DatasetError, Version
from kedro_datasets._typing import HTMLPreview, ImagePreview
from kedro_datasets.json.json_dataset import JSONDataset
from kedro_datasets.pandas.csv_dataset import CSVDataset
from kedro_datasets.text.text_dataset import TextDataset
from PIL import Image

from rdd_pipeline.datasets.versions import Versions
from rdd_pipeline.drawing import Drawing
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import content_digest, folder_aside, move_whole, read_regular

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_BODY = re.compile(r"<body[^>]*>(.*)</body>", re.DOTALL)
_STYLE = re.compile(r"<style.*?</style>|<script.*?</script>", re.DOTALL)
_TAG = re.compile(r"(<[^>]*>)")

_SHOWS = "Shows"
"""Name of the text in a PNG file with the digest of what it shows."""


class _Whole(Versions):
    """Mixed into a dataset that writes one file."""

    _aside: PurePosixPath | None = None

    def save(self, data: Any) -> None:
        """Write the file into a folder beside it, then move it to its place, unless it is there."""
        self._forget()
        # Without Kedro's wrapper, which looks for the new version before it is in its place.
        save = inspect.unwrap(super().save)  # type: ignore[safe-super]
        if self._protocol != "file":  # object stores replace files whole
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
            content = (folder / target.name).read_bytes()
            newest = self._newest()
            if newest is not None and _whole(Path(newest)) == content:
                self._stands(Path(newest).parent.name)
                return
            _digest_file(folder / target.name).write_text(
                f"{content_digest(content)}  {target.name}\n"
            )
            move_whole(folder, target.parent)
        self._stands(target.parent.name)

    def load(self) -> Any:
        """Read the file; of a version only if it has its digest.

        Raises:
            UserError: It was changed since it was written.
        """
        if self._version and self._protocol == "file":
            _check(Path(self._get_load_path()))
        return inspect.unwrap(super().load)(self)  # type: ignore[safe-super]

    def _get_save_path(self) -> PurePosixPath:
        return self._aside or super()._get_save_path()


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.b2")


def _whole(path: Path) -> bytes | None:
    """Content of a version; None where it cannot be read, or is not what was written."""
    try:
        content = read_regular(path)
        expected = read_regular(_digest_file(path))[:32]
    except OSError:
        return None
    return content if content_digest(content).encode() == expected else None


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

    def preview(self) -> HTMLPreview:
        """What Kedro-Viz shows: an HTML page without its styles, tables of Markdown as tables."""
        text = self.load()
        if self._filepath.suffix != ".html":
            return HTMLPreview(_unmarked("".join(_as_html(text))))
        body = _BODY.search(text)
        # Its rules would hold for all of Kedro-Viz.
        return HTMLPreview(_unmarked(_STYLE.sub("", text if body is None else body[1])))


def _as_html(text: str) -> Iterator[str]:
    """Lines of a summary: tables, and sentences between them."""
    for is_table, lines in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        if is_table:
            cells = [html.escape(line).strip("| ").split(" | ") for line in lines]
            rows = ["<td>" + "</td><td>".join(row) + "</td>" for row in cells if len(row) > 1]
            yield "<table><tr>" + "</tr><tr>".join(rows) + "</tr></table>"
        else:
            yield "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)


def _unmarked(page: str) -> str:
    """The page as Kedro-Viz shows it unchanged.

    It takes HTML for Markdown, too: what is between two _ or * of a line is set in italics, also
    where it is part of a tag, and line breaks are kept. A line separator in a tag that shows
    nothing ends the line for it.
    """
    parts = _TAG.split(re.sub(r"\s*\n\s*", " ", page))
    parts[::2] = [re.sub(r"([_*])", '\\1<wbr title="-\u2028-">', text) for text in parts[::2]]
    parts[1::2] = [tag.replace("_", "-").replace("*", "") for tag in parts[1::2]]
    return "".join(parts)


class WholeFigureDataset(_Whole, TextDataset):  # type: ignore[misc]
    """`matplotlib.MatplotlibDataset`, whole; a `Drawing` that was saved before is not drawn again.

    A PNG file says what it shows. If the newest version says the same and has its digest, it stays
    the newest. matplotlib, which that dataset imports with pyplot, is left alone until something is
    drawn.
    """

    DEFAULT_FS_ARGS: ClassVar[dict[str, Any]] = {"open_args_save": {"mode": "wb"}}

    def __init__(
        self,
        *,
        filepath: str,
        save_args: dict[str, Any] | None = None,
        version: Version | None = None,
        credentials: dict[str, Any] | None = None,
        fs_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        TextDataset.__init__(
            self,
            filepath=filepath,
            version=version,
            credentials=credentials,
            fs_args=fs_args,
            metadata=metadata,
        )
        self._save_args = save_args or {}  # of Figure.savefig

    def load(self) -> NoReturn:
        """A picture is not read back.

        Raises:
            DatasetError: Always.
        """
        raise DatasetError(f"Loading not supported for '{type(self).__name__}'")

    def save(self, data: Figure | Drawing) -> None:
        """Save a figure, or draw it first if it has to be drawn."""
        super().save(self._picture(data))

    def preview(self) -> ImagePreview:
        """What Kedro-Viz shows."""
        with self._fs.open(str(self._get_load_path()), "rb") as file:
            return ImagePreview(base64.b64encode(file.read()).decode())

    def _describe(self) -> dict[str, Any]:
        return {**TextDataset._describe(self), "save_args": self._save_args}

    def _picture(self, data: Figure | Drawing) -> bytes:
        settings = dict(self._save_args)
        if isinstance(data, Drawing):
            if settings.get("format", "png") == "png":
                digest = data.digest(self._save_args)
                before = self._saved_before(digest)
                if before is not None:
                    return before
                settings["metadata"] = {**(settings.get("metadata") or {}), _SHOWS: digest}
            data = data.draw()
        file = io.BytesIO()
        data.savefig(file, **settings)
        if "matplotlib.pyplot" in sys.modules:  # which keeps the figures that it has made
            sys.modules["matplotlib.pyplot"].close("all")
        return file.getvalue()

    def _saved_before(self, digest: str) -> bytes | None:
        self._forget()
        if self._protocol != "file":
            return None
        newest = self._newest() if self._version else str(self._filepath)
        try:
            content = None if newest is None else read_regular(Path(newest))
            if newest is None or content is None or (self._version and not _whole(Path(newest))):
                return None
            with Image.open(io.BytesIO(content)) as picture:
                told = picture.info.get(_SHOWS)
                picture.verify()  # a file without versions has no digest beside it
        except (OSError, ValueError, SyntaxError):  # none, or no whole picture
            return None
        return content if told == digest else None
