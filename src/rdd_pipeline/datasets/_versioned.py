"""What the versioned datasets share: atomic writes and no copies of equal content."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from copy import deepcopy
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

import fsspec  # type: ignore[import-untyped]
from kedro.io.core import (
    AbstractVersionedDataset,
    Version,
    get_filepath_str,
    get_protocol_and_path,
)

logger = logging.getLogger(__name__)

Content = TypeVar("Content")


class ContentDataset(AbstractVersionedDataset[Content, Content], Generic[Content]):
    """One file per version, written whole or not at all, through fsspec.

    A new version whose content equals the newest one becomes a hard link to it where the file
    system has hard links, so a run that only looks its finished work up costs no disk. Subclasses
    say how content becomes bytes and when two contents are equal.
    """

    def __init__(
        self,
        *,
        filepath: str,
        version: Version | None = None,
        credentials: dict[str, Any] | None = None,
        fs_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Make a dataset.

        Args:
            filepath: Path or URL of any file system that fsspec knows.
            version: Set by Kedro for a catalog entry with `versioned: true`.
            credentials: Passed on to the file system.
            fs_args: Passed on to the file system.
            metadata: Not read here; Kedro-Viz and the experiment hook read it.
        """
        protocol, path = get_protocol_and_path(filepath, version)
        arguments = deepcopy({**(credentials or {}), **(fs_args or {})})
        self._protocol = protocol
        self._fs = fsspec.filesystem(protocol, **arguments)
        self.metadata = metadata
        super().__init__(
            filepath=PurePosixPath(path),
            version=version,
            exists_function=self._fs.exists,
            glob_function=self._fs.glob,
        )

    @abstractmethod
    def _encode(self, data: Content) -> bytes:
        """Bytes of the file."""

    @abstractmethod
    def _decode(self, data: bytes, source: str) -> Content:
        """Inverse of `_encode`; `source` names the file in errors."""

    @abstractmethod
    def _same(self, data: Content, other: Content) -> bool:
        """Whether two contents are equal, whatever their provenance."""

    def load(self) -> Content:
        """Read the requested version, or the newest one."""
        return self._read(get_filepath_str(self._get_load_path(), self._protocol))

    def save(self, data: Content) -> None:
        """Write a new version."""
        path = get_filepath_str(self._get_save_path(), self._protocol)
        if not self._linked(data, path):
            self._write(path, self._encode(data))
        self._fs.invalidate_cache(get_filepath_str(self._filepath, self._protocol))

    def _read(self, path: str) -> Content:
        with self._fs.open(path, "rb") as file:
            return self._decode(file.read(), path)

    def _write(self, path: str, data: bytes) -> None:
        if self._protocol != "file":
            # Object stores show a file when its upload is complete.
            self._fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            self._fs.pipe_file(path, data)
            return
        from rdd_pipeline.files import write_atomically

        write_atomically(Path(path), data)

    def _linked(self, data: Content, path: str) -> bool:
        """Make `path` a hard link to the newest version if that one holds the same content."""
        if self._protocol != "file" or not self._version:
            return False
        newest = next(iter(self._get_versions()), None)
        try:
            if newest is None or not self._same(data, self._read(newest)):
                return False
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            os.link(newest, path)
        except Exception as error:
            # A damaged old version, or a file system without links: write the content itself.
            logger.debug("Not linked to %s: %s", newest, error)
            return False
        return True

    def _exists(self) -> bool:
        return bool(self._fs.exists(get_filepath_str(self._get_load_path(), self._protocol)))

    def _describe(self) -> dict[str, Any]:
        return {
            "filepath": self._filepath,
            "protocol": self._protocol,
            "version": self._version,
        }
