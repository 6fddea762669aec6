"""Training states as catalog entries: what one training node hands to the next."""

from __future__ import annotations

from rdd_pipeline.datasets.by_seed import BySeedDataset
from rdd_pipeline.training.state import TrainState, digest


class TrainingStatesDataset(BySeedDataset[TrainState]):
    """A `TrainState` for each seed in a checksummed file.

    Weights, optimizer, schedule, queues: everything the next stage goes on from. A damaged file is
    reported, never loaded, and no pickled object in it is ever run.

    ```yaml
    state_tfe:
      type: rdd_pipeline.datasets.TrainingStatesDataset
      filepath: data/06_models/scenes/state_tfe
      versioned: true
    ```
    """

    suffix = ".ckpt"

    def _encode(self, data: TrainState) -> bytes:
        return data.to_bytes()

    def _decode(self, data: bytes, source: str) -> TrainState:
        return TrainState.from_bytes(data, source=source)

    def _same(self, data: TrainState, other: TrainState) -> bool:
        # Not the bytes: torch.save writes equal content differently when storages are shared.
        return digest(data.to_dict()) == digest(other.to_dict())
