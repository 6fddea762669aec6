"""Every version of a family of JSON datasets in one read: all metrics of everything trained."""

from __future__ import annotations

import json
import logging
from pathlib import PurePosixPath
from typing import Any, NoReturn

import fsspec  # type: ignore[import-untyped]
from kedro.io import AbstractDataset, DatasetError
from kedro.io.core import get_protocol_and_path

logger = logging.getLogger(__name__)


class VersionsDataset(AbstractDataset[NoReturn, list[dict[str, Any]]]):
    """Read-only list of all versions of the JSON files in a folder.

    The layout is the one that Kedro's versioned datasets make:
    FOLDER/METHOD.json/VERSION/METHOD.json.

    ```yaml
    all_metrics:
      type: rdd_pipeline.datasets.VersionsDataset
      filepath: data/07_model_output/scenes/metrics
    ```
    """

    def __init__(
        self,
        *,
        filepath: str,
        pattern: str = "*.json",
        credentials: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Make a dataset.

        Args:
            filepath: Folder that holds one versioned JSON dataset per method.
            pattern: File names that belong to the family.
            credentials: Passed on to the file system.
            metadata: Not read here.
        """
        protocol, path = get_protocol_and_path(filepath)
        self._fs = fsspec.filesystem(protocol, **(credentials or {}))
        self._filepath = PurePosixPath(path)
        self._pattern = pattern
        self.metadata = metadata

    def load(self) -> list[dict[str, Any]]:
        """Read everything, ordered by method, then by version, oldest first.

        Returns:
            The content of each file with `method` (file name without extension) and `version`
            added; an empty list when nothing has been saved yet. A file that is not a JSON object
            is named in a warning and left out.
        """
        found = []
        for path in self._paths():
            try:
                content = json.loads(self._fs.cat_file(path.as_posix()))
                if not isinstance(content, dict):
                    raise ValueError(f"expected a JSON object, found {type(content).__name__}")
            except (OSError, ValueError) as error:
                logger.warning("%s is left out, it cannot be read: %s", path, error)
                continue
            found.append({**content, "method": path.stem, "version": path.parent.name})
        return found

    def save(self, data: NoReturn) -> None:
        """Refuse: every method saves its own file."""
        raise DatasetError(
            f"{self._filepath} is only read. Save through the versioned entry of one method."
        )

    def _paths(self) -> list[PurePosixPath]:
        # invalidate: files of this very run may be newer than a cached listing.
        self._fs.invalidate_cache()
        pattern = (self._filepath / self._pattern / "*" / self._pattern).as_posix()
        paths = [PurePosixPath(path) for path in self._fs.glob(pattern)]
        return sorted(path for path in paths if path.name == path.parent.parent.name)

    def _exists(self) -> bool:
        return bool(self._paths())

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix(), "pattern": self._pattern}
