"""Trained networks as catalog entries."""

from __future__ import annotations

import math

from kedro_datasets._typing import TablePreview

from rdd_pipeline.datasets.by_seed import BySeedDataset
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks.checkpoint import NetworkCheckpoint
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

    def preview(self) -> TablePreview:
        """Tensors, shapes and types for Kedro-Viz, from the header of the first seed alone."""
        path = self._files()[0]
        with self._fs.open(path, "rb") as file:
            try:
                content = read_tensor_table(file, whole=False)
            except ValueError as error:
                raise UserError(f"{path} is not a safetensors file.") from error
        content.pop("__metadata__", None)
        rows = [
            [name, " x ".join(map(str, entry["shape"])), entry["dtype"], math.prod(entry["shape"])]
            for name, entry in content.items()
        ]
        rows.insert(0, ["(all)", f"{len(rows)} tensors", "", sum(row[-1] for row in rows)])
        return TablePreview(
            {
                "index": list(range(len(rows))),
                "columns": ["tensor", "shape", "type", "values"],
                "data": rows,
            }
        )

    def _encode(self, data: NetworkCheckpoint) -> bytes:
        return data.to_bytes()

    def _decode(self, data: bytes, source: str) -> NetworkCheckpoint:
        return NetworkCheckpoint.from_bytes(data, source=source)

    def _same(self, data: NetworkCheckpoint, other: NetworkCheckpoint) -> bool:
        return data.digest() == other.digest()
