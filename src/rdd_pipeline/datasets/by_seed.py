"""What the results of a method have in common: one file for each seed, written whole."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Generic, TypeVar

import fsspec  # type: ignore[import-untyped]
from kedro.io.core import (
    AbstractVersionedDataset,
    DatasetError,
    Version,
    get_filepath_str,
    get_protocol_and_path,
)

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import folder_aside, move_whole, read_regular, write_atomically

logger = logging.getLogger(__name__)

Content = TypeVar("Content")


class BySeedDataset(
    AbstractVersionedDataset[Mapping[str, Content], dict[str, Content]], Generic[Content]
):
    """A folder per version with a file per seed, through fsspec: ``NAME/VERSION/NAME/SEED.ext``.

    A version is there whole or not at all. A file whose content equals that of the same seed in the
    newest version becomes a hard link to it where the file system has hard links, so a run that
    only looks its finished work up costs no disk. Subclasses say how content becomes bytes and when
    two contents are equal.
    """

    suffix: ClassVar[str]

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
            filepath: Folder, a path or URL of any file system that fsspec knows.
            version: Set by Kedro for a catalog entry with `versioned: true`.
            credentials: Passed on to the file system.
            fs_args: Passed on to the file system.
            metadata: Not read here; Kedro-Viz and the experiment hook read it.
        """
        protocol, path = get_protocol_and_path(filepath, version)
        arguments = deepcopy({**(credentials or {}), **(fs_args or {})})
        self._protocol = protocol
        self._fs = fsspec.filesystem(protocol, **arguments)
        self._saved = False
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

    def load(self) -> dict[str, Content]:
        """Read the requested version, or what was saved through this entry, or the newest one.

        Returns:
            Content by seed, in the order of the seeds.
        """
        return {PurePosixPath(path).stem: self._read(path) for path in self._files()}

    def save(self, data: Mapping[str, Content]) -> None:
        """Write a new version."""
        if not data:
            raise DatasetError(f"Nothing to save in {self._filepath}: there is no seed.")
        folder = get_filepath_str(self._get_save_path(), self._protocol)
        if self._protocol == "file" and self._version:
            # Beside the dataset's folder: in it, it would look like a version.
            with folder_aside(Path(self._filepath)) as aside:
                self._write_all(data, str(aside / self._filepath.name))
                move_whole(aside, Path(folder).parent)
        else:
            self._write_all(data, folder)
        self._saved = True
        self._fs.invalidate_cache(get_filepath_str(self._filepath, self._protocol))

    def resolve_load_version(self) -> str | None:
        """The version that `load` reads."""
        # Another run of this project may have saved a newer one since.
        if self._version and self._saved and not self._version.load:
            return self.resolve_save_version()
        return super().resolve_load_version()

    def _files(self) -> list[str]:
        folder = get_filepath_str(self._get_load_path(), self._protocol)
        paths = [str(path) for path in self._fs.glob(f"{folder}/*{self.suffix}")]
        if not paths:
            raise UserError(
                f"{folder} holds no file SEED{self.suffix}. Delete that folder, or repeat the "
                "command that wrote it: what was trained is not trained again."
            )
        return sorted(paths, key=lambda path: (len(path), path))  # seed 10 after seed 9

    def _write_all(self, data: Mapping[str, Content], folder: str) -> None:
        newest = next(iter(self._get_versions()), None) if self._version else None
        for seed, content in data.items():
            name = f"{seed}{self.suffix}"
            if newest is None or not self._linked(content, f"{newest}/{name}", f"{folder}/{name}"):
                self._write(f"{folder}/{name}", self._encode(content))

    def _read(self, path: str) -> Content:
        if self._protocol == "file":
            return self._decode(read_regular(Path(path)), path)
        with self._fs.open(path, "rb") as file:
            return self._decode(file.read(), path)

    def _write(self, path: str, data: bytes) -> None:
        if self._protocol != "file":
            # Object stores show a file when its upload is complete.
            self._fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            self._fs.pipe_file(path, data)
            return
        write_atomically(Path(path), data)

    def _linked(self, data: Content, newest: str, path: str) -> bool:
        """Make `path` a hard link to the file `newest` if that one holds the same content."""
        if self._protocol != "file":
            return False
        try:
            if not self._same(data, self._read(newest)):
                return False
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            os.link(newest, path)
        except Exception as error:
            # No such seed, a damaged file, or no links here: write the content itself.
            logger.debug("Not linked to %s: %s", newest, error)
            return False
        return True

    def _exists(self) -> bool:
        return bool(self._fs.exists(get_filepath_str(self._get_load_path(), self._protocol)))

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath, "protocol": self._protocol, "version": self._version}
