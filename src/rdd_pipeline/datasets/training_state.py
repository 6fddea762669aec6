"""Training states as catalog entries: what one training node hands to the next."""

from __future__ import annotations

from typing import Any

from rdd_pipeline.datasets._versioned import ContentDataset
from rdd_pipeline.training.state import digest, dumps, loads


class TrainingStateDataset(ContentDataset[dict[str, Any]]):
    """Nested dict of tensors, numbers, strings and None, in one checksummed file.

    Weights, optimizer, schedule, queues: everything the next stage goes on from. A damaged file is
    reported, never loaded, and no pickled object in it is ever run.

    ```yaml
    state_tfe:
      type: rdd_pipeline.datasets.TrainingStateDataset
      filepath: data/06_models/scenes/tfe/state.ckpt
      versioned: true
    ```
    """

    def _encode(self, data: dict[str, Any]) -> bytes:
        return dumps(data)

    def _decode(self, data: bytes, source: str) -> dict[str, Any]:
        return loads(data, source=source)

    def _same(self, data: dict[str, Any], other: dict[str, Any]) -> bool:
        # Not the bytes: torch.save writes equal content differently when storages are shared.
        return digest(data) == digest(other)
