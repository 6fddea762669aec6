"""One training: a job with the images and states it works on, and what comes out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rdd_pipeline.data.images import Images
from rdd_pipeline.distillation.stages import stage_before
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import NetworkCheckpoint, NetworkHeader, Preprocessing
from rdd_pipeline.training.early_stopping import why_stopped
from rdd_pipeline.training.job import TrainingJob, check_class_weights, check_early_stopping
from rdd_pipeline.training.state import TrainState
from rdd_pipeline.training.store import RunStore


@dataclass(frozen=True)
class TrainingResult:
    """What a training hands on.

    Attributes:
        state: After the last iteration (CPU tensors and plain values).
        network: The weights to use: of the best validation or of the last iteration.
        trained: Iterations done in this call; 0 when all was there already.
    """

    state: TrainState
    network: NetworkCheckpoint
    trained: int

    @property
    def fingerprint(self) -> str:
        """Of the training it came from."""
        return self.state.fingerprint

    @property
    def history(self) -> list[dict[str, float]]:
        """One row a logged or validated iteration, oldest first."""
        return self.state.history


@dataclass(frozen=True)
class Training:
    """All that decides the result of a training, and where it is kept.

    Attributes:
        job: What to train.
        images: Splits `train` and, if there, `val` are used.
        teacher: Frozen network; required by methods that distill.
        initial_state: Of the stage before, if there is one.
        store: Where checkpoints live; None keeps nothing on disk. Of several ranks the first that
            has one writes and reads it for all; `initial_state` is that rank's, too.
    """

    job: TrainingJob
    images: Images
    teacher: NetworkCheckpoint | None = None
    initial_state: TrainState | None = None
    store: RunStore | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Digest (16 hex digits) of what decides the result; names its folder."""
        if self.store is not None:
            return self.store.fingerprint
        return self.job.fingerprint(
            self.images,
            teacher_digest=None if self.teacher is None else self.teacher.digest(),
            start_digest=None if self.initial_state is None else self.initial_state.digest(),
        )

    def stored_in(self, folder: Path) -> Training:
        """The same training, kept in a folder of its own below this one."""
        return replace(self, store=RunStore(folder, self.fingerprint))

    def check(self, world_size: int = 1) -> None:
        """Refuse pieces that do not fit together, before anything is read.

        Raises:
            UserError: No training images, a batch that cannot be shared, no teacher or one of
                other classes, or no state to go on from.
        """
        job, recipe = self.job, self.job.recipe
        if not self.images.split("train").samples:
            raise UserError("The index has no image in split `train`. Add some or fix the layout.")
        check_class_weights(recipe, self.images.labels)
        check_early_stopping(recipe, self.images)
        steps = recipe.gradient_accumulation_steps
        if recipe.batch_size % (world_size * steps):
            parts = f" in {steps} parts each" if steps > 1 else ""
            raise UserError(
                f"recipe.batch_size is {recipe.batch_size}, not a multiple of {world_size} devices"
                f"{parts}. Change recipe.batch_size, recipe.gradient_accumulation_steps or "
                "trainer.devices."
            )
        if job.definition.needs_teacher:
            self._check_teacher()
        if before := stage_before(job.definition.stages, job.stage):
            self._check_initial_state(before)

    def description(self) -> dict[str, Any]:
        """What is trained, as JSON, for people."""
        images = self.images
        return {
            **self.job.model_dump(mode="json"),
            "root": str(images.root),
            "labels": images.labels.model_dump(mode="json"),
            "image_size": images.image_size,
            "packs": None if images.packs is None else str(images.packs),
        }

    def result(self, state: TrainState, *, trained: int) -> TrainingResult:
        """What is handed on of the state after the last iteration."""
        return TrainingResult(state, self.network(state), trained)

    def network(self, state: TrainState) -> NetworkCheckpoint:
        """The weights a state hands on, with all that is needed to use them elsewhere.

        Of the best validation if the job keeps the best and the run is over, else the last ones,
        of the average where the recipe has one; where every validation score is NaN there is no
        best one.
        """
        job, best, labels = self.job, state.best, self.images.labels
        over = state.iteration >= job.recipe.iterations or bool(why_stopped(job, state.history))
        if job.recipe.keep != "best" or not over or (best is not None and math.isnan(best.miou)):
            best = None
        header = NetworkHeader(
            network=job.network.model_copy(update={"pretrained": False}),
            label_names=labels.names,
            colors=labels.colors,
            mask_values=labels.mask_values,
            image_size=self.images.image_size,
            preprocessing=Preprocessing.for_network(job.network),
            provenance={
                "method": job.method,
                "seed": str(job.seed),
                "fingerprint": state.fingerprint,
                "iteration": str(state.iteration if best is None else best.iteration),
            },
        )
        last = state.student if state.ema is None else state.ema
        return NetworkCheckpoint(last if best is None else best.tensors, header)

    def _check_teacher(self) -> None:
        job, labels = self.job, self.images.labels
        if self.teacher is None:
            raise UserError(f"Method {job.method!r} distills and needs a teacher; none was given.")
        classes = len(self.teacher.header.label_names)
        if classes != labels.num_classes:
            raise UserError(
                f"Teacher has {classes} classes, the label set {labels.name!r} "
                f"{labels.num_classes}. Choose a teacher trained on this label set "
                "(params:teacher.weights), or none to train one here."
            )

    def _check_initial_state(self, before: str) -> None:
        stage, done = self.job.stage, self.job.first_iteration - 1
        if self.initial_state is None:
            raise UserError(
                f"Stage `{stage}` goes on from the state of stage `{before}`; none was given."
            )
        if self.initial_state.iteration != done:
            raise UserError(
                f"Stage `{stage}` starts after iteration {done}, but the state that was given "
                f"stands at {self.initial_state.iteration}. Run distill_{before} with the same "
                "rdd.tfe_length and recipe.iterations."
            )
