"""What a person should know of a training besides its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.distillation.methods import Method
from rdd_pipeline.training.difficulty import difficulty_notes


def training_notes(
    history: Sequence[Mapping[str, float]], *, method: Method, labels: LabelSet
) -> list[str]:
    """Sentences that belong below every table with the result of a training.

    Args:
        history: Of the whole training, oldest row first (`TrainingResult.history`).
        method: What was trained, with the run's weights and options.
        labels: Its classes.
    """
    return difficulty_notes(history, labels.names) if method.uses_rdd else []
