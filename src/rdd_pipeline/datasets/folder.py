"""A folder that nodes read from, as a catalog entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from kedro.io import AbstractDataset, DatasetError

from rdd_pipeline.errors import UserError


class FolderDataset(AbstractDataset[NoReturn, Path]):
    """Hands a node the absolute path of a folder; what is in it is the node's business.

    ```yaml
    raw_images:
      type: rdd_pipeline.datasets.FolderDataset
      filepath: data/01_raw/camvid        # relative to the project; ~/images works too
    ```
    """

    def __init__(
        self,
        *,
        filepath: str,
        must_exist: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Make a handle.

        Args:
            filepath: The folder. Kedro makes a relative path start at the project.
            must_exist: Whether loading fails when there is no such folder.
            metadata: Not read here.
        """
        self._path = _expanded(filepath)
        self._must_exist = must_exist
        self.metadata = metadata

    def load(self) -> Path:
        """Path of the folder, which need not exist unless `must_exist` is set."""
        if self._must_exist and not self._path.is_dir():
            found = "is a file" if self._path.exists() else "does not exist"
            raise UserError(
                f"The folder {self._path} {found}. Put the data there, or change `filepath` of "
                "its catalog entry."
            )
        return self._path

    def save(self, data: NoReturn) -> None:
        """Refuse: a folder is filled by nodes or by people, not by the catalog."""
        raise DatasetError(
            f"The folder {self._path} is only read. Name another catalog entry as the node's "
            "output."
        )

    def _exists(self) -> bool:
        return self._path.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._path.as_posix(), "must_exist": self._must_exist}


def _expanded(filepath: str) -> Path:
    """Expand ``~``, also behind the project path, which Kedro puts before it."""
    path = Path(filepath)
    for position, part in enumerate(path.parts):
        if part.startswith("~"):
            return Path(*path.parts[position:]).expanduser()
    return path
