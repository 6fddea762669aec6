"""Students of a run that are trained together, under one teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rdd_pipeline import tracking
from rdd_pipeline.config import TrainerParams
from rdd_pipeline.distillation.methods import find_method
from rdd_pipeline.training.shared import Student, train_together
from rdd_pipeline.training.state import TrainState
from rdd_pipeline.training.training import Training


def train_students(
    own: Training, methods: Sequence[str], trainer: TrainerParams, *, seed: str | None
) -> None:
    """Train a run's students of one seed into their work folders, if this one is not done yet.

    Their nodes find them done. A method that goes on from the state of another one of these is
    trained after it.

    Args:
        own: Of the node; it has a store.
        methods: What the run trains. Those that ask no teacher are left to their own nodes.
        trainer: How to run here.
        seed: For the curves, where the run trains several.

    Raises:
        UserError: As `train_together`.
        TrainingInterruptedError: As `train_together`.
    """
    assert own.store is not None
    folder = own.store.path.parent
    before = {
        name: definition.stage_before
        for name, definition in ((name, find_method(name)) for name in methods)
        if definition.needs_teacher
    }

    def student(method: str, state: TrainState | None = None) -> Student:
        training = replace(own, job=own.job.by(method), initial_state=state, store=None)
        training = training.stored_in(folder)
        following = [name for name in before if before[name] == method]
        return Student(
            training,
            partial(tracking.log_metrics, seed=seed, method=method, training=training.fingerprint),
            then=partial(student, following[0]) if following else None,
        )

    first = [name for name in before if before[name] is None]
    if len(first) > 1 and own.store.finished_state() is None:
        train_together([student(name) for name in first], trainer)
