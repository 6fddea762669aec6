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

from rdd_pipeline.datasets.versions import Versions
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import folder_aside, move_whole, read_regular, write_atomically

logger = logging.getLogger(__name__)

Content = TypeVar("Content")


class BySeedDataset(
    Versions, AbstractVersionedDataset[Mapping[str, Content], dict[str, Content]], Generic[Content]
):
    """A folder per version with a file per seed, through fsspec: ``NAME/VERSION/NAME/SEED.ext``.

    A version is there whole or not at all. What equals the newest version seed by seed is no new
    one, so a run that only looks its finished work up costs no disk. Of more seeds, those that are
    there become hard links where the file system has them. Subclasses say how content becomes bytes
    and when two contents are equal.
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
        self.metadata = metadata
        super().__init__(
            filepath=PurePosixPath(path),
            version=version,
            exists_function=self._fs.exists,
            glob_function=self._fs.glob,
        )

    @property
    def filepath(self) -> PurePosixPath:
        """The newest file of the first seed, for whoever wants to know its size."""
        return PurePosixPath(self._files()[0])

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
        self._forget()
        folder = get_filepath_str(self._get_save_path(), self._protocol)
        newest = self._newest()
        equal = {} if newest is None else self._equal(data, newest)
        if newest is not None and all(equal.values()) and len(self._in(newest)) == len(data):
            self._stands(PurePosixPath(newest).parent.name)
            return
        there = {seed: f"{newest}/{seed}{self.suffix}" for seed, same in equal.items() if same}
        if self._protocol == "file" and self._version:
            # Beside the dataset's folder: in it, it would look like a version.
            with folder_aside(Path(self._filepath)) as aside:
                self._write_all(data, str(aside / self._filepath.name), there)
                move_whole(aside, Path(folder).parent)
        else:
            self._write_all(data, folder, there)
        self._fs.invalidate_cache(get_filepath_str(self._filepath, self._protocol))
        self._stands(self.resolve_save_version())

    def _files(self) -> list[str]:
        folder = get_filepath_str(self._get_load_path(), self._protocol)
        paths = self._in(folder)
        if not paths:
            raise UserError(
                f"{folder} holds no file SEED{self.suffix}. Delete that folder, or repeat the "
                "command that wrote it: what was trained is not trained again."
            )
        return sorted(paths, key=lambda path: (len(path), path))  # seed 10 after seed 9

    def _in(self, folder: str) -> list[str]:
        return [str(path) for path in self._fs.glob(f"{folder}/*{self.suffix}")]

    def _equal(self, data: Mapping[str, Content], newest: str) -> dict[str, bool]:
        """By seed, whether the newest version holds the same."""
        equal = {}
        for seed, content in data.items():
            try:
                equal[seed] = self._same(content, self._read(f"{newest}/{seed}{self.suffix}"))
            except Exception as error:  # no such seed, or a damaged file
                logger.debug("Not compared with %s: %s", newest, error)
                equal[seed] = False
        return equal

    def _write_all(
        self, data: Mapping[str, Content], folder: str, there: Mapping[str, str]
    ) -> None:
        for seed, content in data.items():
            path = f"{folder}/{seed}{self.suffix}"
            if seed not in there or not self._linked(there[seed], path):
                self._write(path, self._encode(content))

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

    def _linked(self, there: str, path: str) -> bool:
        """Make `path` a hard link to a file that holds the same."""
        if self._protocol != "file":
            return False
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            os.link(there, path)
        except OSError as error:  # no links here
            logger.debug("Not linked to %s: %s", there, error)
            return False
        return True

    def _exists(self) -> bool:
        return bool(self._fs.exists(get_filepath_str(self._get_load_path(), self._protocol)))

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath, "protocol": self._protocol, "version": self._version}
