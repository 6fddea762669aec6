"""Hugging Face: Parquet or Arrow files of the package datasets, or folders with metadata.

Parquet: columns that are images, a structure of `bytes` and `path`, one of them the label; the
file's name or folder says the split (`data/train-00000-of-00001.parquet`). Folders:
`metadata.jsonl` or `metadata.csv` whose columns `file_name` or `*_file_name` are paths from its
folder. Numbers of classes have the names of `id2label.json` if it is there.
https://huggingface.co/docs/datasets/image_dataset
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.export import Export, split_of, words
from rdd_pipeline.importing.folder import Folder, stem
from rdd_pipeline.importing.masks import looks_like_a_mask
from rdd_pipeline.importing.names import find_names
from rdd_pipeline.importing.pairs import Pair, export_of

_TABLES = ("metadata.jsonl", "metadata.csv")
_OF_LABELS = {
    "label", "labels", "mask", "masks", "annotation", "annotations", "segmentation", "seg",
    "semantic", "gt", "groundtruth", "target",
}  # fmt: skip


def recognises(folder: Folder) -> bool:
    """A Parquet or Arrow file with two columns of images, or a table that names two pictures."""
    files = folder.ending(".parquet", ".arrow")
    if files and len(_columns(_open(folder, files[0]).schema)) > 1:
        return True
    return any(len(_paths(folder, table)) > 1 for table in folder.named(*_TABLES))


def read(folder: Folder) -> Export:
    """Read all tables of the folder.

    Raises:
        DataProblem: One of them is damaged, or which column is the label cannot be told.
    """
    remarks: list[str] = []
    pairs: list[Pair] = []
    for file in folder.ending(".parquet", ".arrow"):
        table = _open(folder, file)
        columns = _columns(table.schema)
        if len(columns) > 1:
            pairs += _of_table(file, table, columns, remarks)
    for file in folder.named(*_TABLES) if not pairs else ():
        pairs += _of_metadata(folder, file, remarks)
    return export_of("Hugging Face", pairs, find_names(folder), remarks)


# ---- Parquet and Arrow


class _Table:
    """Rows of a file, of which a group at a time is in memory."""

    def __init__(self, folder: Folder, file: str) -> None:
        path = folder.root / file
        self.file = file
        self._lock = threading.Lock()
        try:
            if file.lower().endswith(".parquet"):
                self._parquet = pq.ParquetFile(path)
                self.schema = self._parquet.schema_arrow
                meta = self._parquet.metadata
                self.sizes = [meta.row_group(n).num_rows for n in range(meta.num_row_groups)]
            else:
                self._parquet = None
                with pa.memory_map(str(path)) as source:
                    self._batches = pa.ipc.open_stream(source).read_all().to_batches()
                self.schema = self._batches[0].schema if self._batches else pa.schema([])
                self.sizes = [batch.num_rows for batch in self._batches]
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:100]
            raise DataProblem(f"{file} cannot be read ({reason}).") from error
        self._group = lru_cache(maxsize=2)(self._read_group)

    def _read_group(self, group: int, columns: tuple[str, ...]) -> Any:
        try:
            if self._parquet is not None:
                return self._parquet.read_row_group(group, columns=list(columns))
            return self._batches[group]
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:100]
            raise DataProblem(f"{self.file} cannot be read ({reason}).") from error

    def names(self, column: str) -> list[str]:
        """What the rows' images were called; empty where it is not said."""
        found: list[str] = []
        for group in range(len(self.sizes)):
            field = self.schema.field(column).type
            if not pa.types.is_struct(field) or field.get_field_index("path") < 0:
                return [""] * sum(self.sizes)
            part = f"{column}.path" if self._parquet is not None else column
            values = self._read_group(group, (part,)).column(column).to_pylist()
            found += [(value or {}).get("path") or "" for value in values]
        return found

    def reader(self, column: str, columns: tuple[str, ...], row: int) -> Callable[[], bytes]:
        """Reads the encoded picture of a row."""
        group = 0
        while row >= self.sizes[group]:
            row -= self.sizes[group]
            group += 1

        def read() -> bytes:
            with self._lock:
                value = self._group(group, columns).column(column)[row].as_py()
            data = value.get("bytes") if isinstance(value, Mapping) else value
            if not isinstance(data, bytes) or not data:
                raise DataProblem(
                    f"{self.file}, column {column}, row {row}: no picture in it (a path only?)."
                )
            return data

        return read


def _open(folder: Folder, file: str) -> _Table:
    return _Table(folder, file)


def _columns(schema: Any) -> list[str]:
    """Columns that hold encoded pictures."""
    found = []
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            found.append(field.name)
    return found


def _of_table(file: str, table: _Table, columns: Sequence[str], remarks: list[str]) -> list[Pair]:
    total = sum(table.sizes)
    if not total:
        return []
    wanted = tuple(columns)
    image, label = _image_and_label(columns, lambda c: table.reader(c, wanted, 0)(), file, remarks)
    both = (image, label)
    split = split_of(stem(file))
    pairs = []
    for row, path in enumerate(table.names(image)):
        name = PurePosixPath(path).stem if path else f"{row:06d}"
        source = f"{file}, row {row}"
        pairs.append(
            Pair(
                f"{PurePosixPath(file).stem}/{name}",
                table.reader(image, both, row),
                table.reader(label, both, row),
                split,
                source,
            )
        )
    return pairs


def _image_and_label(
    columns: Sequence[str],
    first: Callable[[str], bytes],
    file: str,
    remarks: list[str],
) -> tuple[str, str]:
    """Names decide, and what the first row holds where they do not.

    Raises:
        DataProblem: They do not tell.
    """
    said = [c for c in columns if {*words(c)} & _OF_LABELS]
    masks = [c for c in columns if looks_like_a_mask(first(c))]
    labels = [c for c in said if c in masks] or (said if len(said) == 1 else masks)
    images = [c for c in columns if c not in masks and c not in said] or [
        c for c in columns if c not in labels
    ]
    if not labels or not images:
        raise DataProblem(f"{file}: which of the columns {', '.join(columns)} is the label?")
    others = [c for c in columns if c not in (images[0], labels[0])]
    remark = f"The columns {', '.join(others)} are left out."
    if others and remark not in remarks:
        remarks.append(remark)
    return images[0], labels[0]


# ---- folders with metadata


def _rows(folder: Folder, file: str) -> list[dict[str, Any]]:
    if file.endswith(".csv"):
        rows = folder.rows(file)
        return [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]
    try:
        found = [json.loads(line) for line in folder.text(file).splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataProblem(f"{file} is no JSON, a value a line.") from error
    return [row for row in found if isinstance(row, dict)]


def _paths(folder: Folder, file: str) -> dict[str, str]:
    """Column -> picture of the first row, of the columns that name one."""
    try:
        rows = _rows(folder, file)
    except DataProblem:
        return {}
    found = {}
    for column, value in rows[0].items() if rows else ():
        picture = folder.find_picture(value, file) if isinstance(value, str) and value else None
        if picture is not None:
            found[column] = picture
    return found


def _of_metadata(folder: Folder, file: str, remarks: list[str]) -> list[Pair]:
    columns = _paths(folder, file)
    if len(columns) < 2:
        return []
    image, label = _image_and_label(
        list(columns), lambda column: folder.bytes(columns[column]), file, remarks
    )
    pairs = []
    missing = []
    for row in _rows(folder, file):
        places = [folder.find_picture(str(row.get(column, "")), file) for column in (image, label)]
        picture, mask = places
        if picture is None or mask is None:
            missing.append(str(row.get(image)))
            continue
        read = _reader(folder, mask)
        pairs.append(Pair(stem(picture), picture, read, split_of(picture), mask))
    if missing:
        remarks.append(f"{len(missing)} rows of {file} have no files ({missing[0]}).")
    return pairs


def _reader(folder: Folder, file: str) -> Callable[[], bytes]:
    return lambda: folder.bytes(file)
