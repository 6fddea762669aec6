"""Jobs before they are trained, and what a state hands on afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.config import RecipeParams, TrainerParams
from rdd_pipeline.data.delivery import check_shared_memory
from rdd_pipeline.data.index import Sample, index_digest, of_split
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.data.loading import crop_bytes
from rdd_pipeline.distillation.stages import stage_before
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import LossContext
from rdd_pipeline.networks import (
    NetworkCheckpoint,
    NetworkHeader,
    Preprocessing,
    SegmentationNetwork,
)
from rdd_pipeline.networks.probe import output_shapes
from rdd_pipeline.training.device import (
    check_devices,
    resolve_device,
    resolve_devices,
    resolve_precision,
    resolve_workers,
)
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.state import TrainState


def prepare_job(job: TrainingJob, trainer: TrainerParams) -> TrainingJob:
    """Fix what `auto` means on this machine, so that the fingerprint says what was computed."""
    device = resolve_device(trainer.device)
    return job.model_copy(update={"precision": resolve_precision(trainer.precision, device)})


def check_trainer(trainer: TrainerParams, recipes: Sequence[RecipeParams]) -> None:
    """Refuse what this machine cannot do, before anything is read.

    Raises:
        UserError: Devices that are not there, or too little shared memory for the loader processes.
    """
    check_devices(trainer)
    device = resolve_device(trainer.device)
    for recipe in recipes:
        processes = resolve_devices(trainer, recipe.batch_size)
        workers = resolve_workers(trainer.workers, device, processes)
        share = -(-recipe.batch_size // (processes * trainer.nodes))
        check_shared_memory(workers, crop_bytes(recipe.augment, share), processes)


def job_fingerprint(
    job: TrainingJob,
    samples: Sequence[Sample],
    teacher: NetworkCheckpoint | None,
    initial_state: TrainState | None,
) -> str:
    """Fingerprint of the job with these inputs; names its work folder."""
    return job.fingerprint(
        index_digest=index_digest(samples),
        teacher_digest=None if teacher is None else teacher.digest(),
        start_digest=None if initial_state is None else initial_state.digest(),
    )


def check_inputs(
    job: TrainingJob,
    samples: Sequence[Sample],
    teacher: NetworkCheckpoint | None,
    initial_state: TrainState | None,
    world: int = 1,
) -> None:
    """Raise a UserError when the pieces of a job do not fit together."""
    if not of_split(samples, "train"):
        raise UserError("The index has no image in split `train`. Add some or fix the layout.")
    if job.recipe.batch_size % (world * job.recipe.gradient_accumulation_steps):
        parts = (
            f" in {job.recipe.gradient_accumulation_steps} parts each"
            if job.recipe.gradient_accumulation_steps > 1
            else ""
        )
        raise UserError(
            f"recipe.batch_size is {job.recipe.batch_size}, not a multiple of {world} devices"
            f"{parts}. Change recipe.batch_size, recipe.gradient_accumulation_steps or "
            "trainer.devices."
        )
    if job.definition.needs_teacher:
        if teacher is None:
            raise UserError(f"Method {job.method!r} distills and needs a teacher; none was given.")
        check_teacher(teacher.header, job)
    if before := stage_before(job.definition.stages, job.stage):
        if initial_state is None:
            raise UserError(
                f"Stage `{job.stage}` goes on from the state of stage `{before}`; none was given."
            )
        if initial_state.iteration != job.first_iteration - 1:
            raise UserError(
                f"Stage `{job.stage}` starts after iteration {job.first_iteration - 1}, but the "
                f"state that was given stands at {initial_state.iteration}. Run distill_{before} "
                "with the same rdd.tfe_length and recipe.iterations."
            )


def loss_context(
    student: SegmentationNetwork,
    teacher: SegmentationNetwork,
    recipe: RecipeParams,
    labels: LabelSet,
    *,
    ranks: Collectives = ALONE,
    cross_image: Literal["global", "local"] = "global",
) -> LossContext:
    """What distillation losses are built for: both networks' maps of a training sample."""
    crop = recipe.augment.crop
    return LossContext(
        student=output_shapes(student, crop),
        teacher=output_shapes(teacher, crop),
        ignore_index=labels.ignore_index,
        aux_weight=recipe.aux_weight,
        ranks=ranks,
        cross_image=cross_image,
    )


def check_teacher(header: NetworkHeader, job: TrainingJob) -> None:
    """Raise a UserError when a teacher does not fit a job's label set."""
    if len(header.label_names) != job.labels.num_classes:
        raise UserError(
            f"Teacher has {len(header.label_names)} classes, the label set {job.labels.name!r} "
            f"{job.labels.num_classes}. Choose a teacher trained on this label set "
            "(params:teacher.weights), or none to train one here."
        )


def network_of(job: TrainingJob, state: TrainState) -> NetworkCheckpoint:
    """The weights a state hands on, with all that is needed to use them elsewhere.

    Of the best validation if the job keeps the best and the run is over, else the last ones; where
    every validation score is NaN there is no best one.
    """
    best = state.best
    over = state.iteration >= job.recipe.iterations
    if job.recipe.keep != "best" or not over or (best is not None and math.isnan(best.miou)):
        best = None
    header = NetworkHeader(
        network=job.network.model_copy(update={"pretrained": False}),
        label_names=job.labels.names,
        preprocessing=Preprocessing.for_network(job.network),
        provenance={
            "method": job.method,
            "seed": str(job.seed),
            "fingerprint": state.fingerprint,
            "iteration": str(state.iteration if best is None else best.iteration),
        },
    )
    return NetworkCheckpoint(state.student if best is None else best.tensors, header)


def title_of(job: TrainingJob) -> str:
    """What people call a job."""
    stage = "" if job.stage == "whole" else f" ({job.stage} stage)"
    return job.method + stage + (f", seed {job.seed}" if job.seed else "")
