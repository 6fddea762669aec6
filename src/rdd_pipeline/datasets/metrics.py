"""Scores as catalog entries: those of one method, and all that there are."""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import fsspec  # type: ignore[import-untyped]
from kedro.io import AbstractDataset, DatasetError
from kedro.io.core import get_protocol_and_path
from kedro_datasets._typing import TablePreview

from rdd_pipeline.datasets.by_seed import BySeedDataset
from rdd_pipeline.datasets.versions import LATEST
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import from_checked_json, read_regular, to_checked_json

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]


class MetricsDataset(BySeedDataset[Metrics]):
    """``{about, cost, splits}`` of one network for each seed, each a JSON file with its digest.

    The digest is checked whenever the file is read: scores that were changed by hand, or half
    copied, are not believed.

    ```yaml
    "metrics_{method}":
      type: rdd_pipeline.datasets.MetricsDataset
      filepath: data/07_model_output/scenes/metrics/{method}
      versioned: true
    ```
    """

    suffix = ".json"

    def preview(self) -> TablePreview:
        """What Kedro-Viz shows: scores in %, those of the classes below, by seed and split."""
        columns: dict[str, dict[str, str]] = {}
        for seed, metrics in self.load().items():
            for split, scores in metrics["splits"].items():
                numbers = {"mIoU": scores["miou"], **scores, **scores["iou"]}
                columns[f"{split}, seed {seed}"] = {
                    name.replace("_", " "): f"{100 * value:.1f}"
                    for name, value in numbers.items()
                    if isinstance(value, float) and name != "miou"
                }
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
        return TablePreview(
            {"index": list(range(len(rows))), "columns": ["in %", *columns], "data": rows}
        )

    def _encode(self, data: Metrics) -> bytes:
        return to_checked_json(data)

    def _decode(self, data: bytes, source: str) -> Metrics:
        return from_checked_json(data, source)

    def _same(self, data: Metrics, other: Metrics) -> bool:
        return data == other


class TrainedMetricsDataset(AbstractDataset[NoReturn, list[Metrics]]):
    """Read-only list of all versions of the metrics of all methods and seeds in a folder.

    ```yaml
    trained_metrics:
      type: rdd_pipeline.datasets.TrainedMetricsDataset
      filepath: data/07_model_output/scenes/metrics
    ```
    """

    def __init__(
        self,
        *,
        filepath: str,
        credentials: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Make a dataset.

        Args:
            filepath: Folder that holds one versioned `MetricsDataset` per method.
            credentials: Passed on to the file system.
            metadata: Not read here.
        """
        protocol, path = get_protocol_and_path(filepath)
        self._fs = fsspec.filesystem(protocol, **(credentials or {}))
        self._filepath = PurePosixPath(path)
        self.metadata = metadata

    def load(self) -> list[Metrics]:
        """Read everything, ordered by method, then by version, oldest first, then by seed.

        Returns:
            The content of each file with `method` (folder name) and `version` added; an empty list
            when nothing has been saved yet. A file that cannot be believed is named in a warning
            and left out, and so are those of versions of this project that had one for all seeds.
        """
        found = []
        for path in self._paths():
            try:
                content = from_checked_json(self._content(path), str(path))
            except (OSError, UserError) as error:
                logger.warning("Left out: %s", error)
                continue
            found.append({**content, "method": path.parts[-2], "version": path.parts[-3]})
        old = self._fs.glob((self._filepath / "*.json" / "*" / "*.json").as_posix())
        if old:
            logger.warning(
                "%d metrics files of an older rdd_pipeline, of %s, are left out. To have them in "
                "the tables, repeat their commands: what was trained is not trained again.",
                len(old),
                ", ".join(sorted({PurePosixPath(path).stem for path in old})),
            )
        return found

    def save(self, data: NoReturn) -> None:
        """Refuse: every method saves its own file."""
        raise DatasetError(
            f"{self._filepath} is only read. Save through the versioned entry of one method."
        )

    def _content(self, path: PurePosixPath) -> bytes:
        if "file" in self._fs.protocol:
            return read_regular(Path(path))
        return bytes(self._fs.cat_file(path.as_posix()))

    def _paths(self) -> list[PurePosixPath]:
        # invalidate: files of this very run may be newer than a cached listing.
        self._fs.invalidate_cache()
        pattern = (self._filepath / "*" / "*" / "*" / "*.json").as_posix()
        paths = [PurePosixPath(path) for path in self._fs.glob(pattern)]
        ours = (p for p in paths if p.parts[-2] == p.parts[-4] and p.parts[-3] != LATEST)
        return sorted(ours, key=lambda path: (path.parts[-4:-1], len(path.name), path.name))

    def _exists(self) -> bool:
        return bool(self._paths())

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
