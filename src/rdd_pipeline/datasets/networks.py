"""Trained networks as catalog entries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from kedro.io import Version
from kedro.utils import find_kedro_project
from kedro_datasets._typing import TablePreview

from rdd_pipeline.datasets.by_seed import BySeedDataset
from rdd_pipeline.datasets.metrics import MetricsDataset
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks.checkpoint import METADATA_KEY, NetworkCheckpoint
from rdd_pipeline.networks.files import read_tensor_table


class NetworksDataset(BySeedDataset[NetworkCheckpoint]):
    """A `NetworkCheckpoint` for each seed: weights, architecture, labels, preprocessing.

    ```yaml
    "student_{method}":
      type: rdd_pipeline.datasets.NetworksDataset
      filepath: data/06_models/scenes/student_{method}
      versioned: true
    ```
    """

    suffix = ".safetensors"

    def preview(self, scores: str | None = None) -> TablePreview:
        """What Kedro-Viz shows: where the first seed's network comes from, then its tensors.

        Only the header of the file is read.

        Args:
            scores: Folder of the `MetricsDataset` with its scores, from the project on.
        """
        path = self._files()[0]
        with self._fs.open(path, "rb") as file:
            try:
                content = read_tensor_table(file, whole=False)
            except ValueError as error:
                raise UserError(f"{path} is not a safetensors file.") from error
        told = json.loads((content.pop("__metadata__", None) or {}).get(METADATA_KEY, "{}"))
        tensors = {n: t for n, t in content.items() if not n.endswith("num_batches_tracked")}
        values = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
        facts: dict[str, Any] = {}
        if told:
            facts = {"network": told["network"]["name"], **_scores(scores, told["provenance"])}
            facts |= {"data set": self._filepath.parent.name, **told["provenance"]}
            facts["classes"] = ", ".join(told["label_names"])
        facts |= {
            "values": f"{values:,} in {len(tensors)} tensors",
            "size": f"{self._fs.size(path) / 1e6:.2f} MB",
        }
        rows = [[name, str(value)] for name, value in facts.items()]
        rows += [
            [name, f"{' x '.join(map(str, tensor['shape']))} {tensor['dtype']}"]
            for name, tensor in tensors.items()
        ]
        return TablePreview(
            {
                "index": list(range(len(rows))),
                "columns": ["", f"seed {PurePosixPath(path).stem}"],
                "data": rows,
            }
        )

    def _encode(self, data: NetworkCheckpoint) -> bytes:
        return data.to_bytes()

    def _decode(self, data: bytes, source: str) -> NetworkCheckpoint:
        return NetworkCheckpoint.from_bytes(data, source=source)

    def _same(self, data: NetworkCheckpoint, other: NetworkCheckpoint) -> bool:
        return data.digest() == other.digest()


def _scores(folder: str | None, provenance: Mapping[str, str]) -> dict[str, str]:
    """The mIoU by split, where the newest scores are of this network."""
    place = (find_kedro_project(Path.cwd()) or Path.cwd()) / (folder or "")
    if folder is None or not place.is_dir():
        return {}
    newest = MetricsDataset(filepath=str(place), version=Version(None, None)).load()
    of_this = newest.get(provenance.get("seed", "imported"))
    if of_this is None or of_this["about"]["iteration"] != provenance.get("iteration", ""):
        return {}
    return {
        f"mIoU {split}": f"{100 * scores['miou']:.1f} %"
        for split, scores in of_this["splits"].items()
    }
