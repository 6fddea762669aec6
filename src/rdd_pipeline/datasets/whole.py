"""Kedro's own datasets for files that people read, written aside and renamed.

Two sessions may save one entry at once: whoever opens the file finds that of one of them, whole.
Nothing of this project reads these entries back: what nodes hand on is named by its content.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path, PurePosixPath
from typing import Any

from kedro_datasets.json.json_dataset import JSONDataset
from kedro_datasets.matplotlib.matplotlib_dataset import MatplotlibDataset
from kedro_datasets.pandas.csv_dataset import CSVDataset
from kedro_datasets.text.text_dataset import TextDataset


class _Whole:
    """Mixed into a dataset that writes one file without versions."""

    _filepath: PurePosixPath

    def save(self, data: Any) -> None:
        """Write the file under another name beside it, then rename it."""
        path = self._filepath
        if getattr(self, "_protocol", "file") != "file":  # object stores replace files whole
            super().save(data)  # type: ignore[misc]
            return
        # The format follows from the suffix, so that one stays.
        self._filepath = PurePosixPath(path.parent / f".{secrets.token_hex(4)}.{path.name}")
        try:
            super().save(data)  # type: ignore[misc]
            os.replace(self._filepath, path)
        finally:
            Path(self._filepath).unlink(missing_ok=True)
            self._filepath = path


class WholeCSVDataset(_Whole, CSVDataset):  # type: ignore[misc]
    """`pandas.CSVDataset`, whole."""


class WholeJSONDataset(_Whole, JSONDataset):  # type: ignore[misc]
    """`json.JSONDataset`, whole."""


class WholeTextDataset(_Whole, TextDataset):  # type: ignore[misc]
    """`text.TextDataset`, whole."""


class WholeFigureDataset(_Whole, MatplotlibDataset):  # type: ignore[misc]
    """`matplotlib.MatplotlibDataset`, whole."""
