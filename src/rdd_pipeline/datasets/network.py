"""Trained networks as catalog entries."""

from __future__ import annotations

import json
import math
from typing import Any

from kedro.io.core import get_filepath_str
from kedro_datasets._typing import TablePreview

from rdd_pipeline.datasets._versioned import ContentDataset
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks.checkpoint import NetworkCheckpoint

_LARGEST_HEADER = 100_000_000


class NetworkDataset(ContentDataset[NetworkCheckpoint]):
    """A `NetworkCheckpoint` in one safetensors file: weights, architecture, labels, preprocessing.

    ```yaml
    "student_{method}":
      type: rdd_pipeline.datasets.NetworkDataset
      filepath: data/06_models/scenes/{method}/student.safetensors
      versioned: true
    ```
    """

    def preview(self) -> TablePreview:
        """Tensors, shapes and types for Kedro-Viz, from the header alone."""
        path = get_filepath_str(self._get_load_path(), self._protocol)
        with self._fs.open(path, "rb") as file:
            # The safetensors format: 8 bytes length, little endian, then JSON.
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _LARGEST_HEADER:
                raise UserError(f"{path} is not a safetensors file.")
            content: dict[str, Any] = json.loads(file.read(length))
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
