"""What is looked at on this machine before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from rdd_pipeline.config import NetworkParams, RecipeParams, TrainerParams
from rdd_pipeline.data.delivery import check_shared_memory
from rdd_pipeline.data.loading import crop_bytes
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import network_from_params
from rdd_pipeline.training.device import (
    check_devices,
    resolve_device,
    resolve_devices,
    resolve_precision,
    resolve_workers,
)
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.known import is_known


def prepare_job(job: TrainingJob, trainer: TrainerParams) -> TrainingJob:
    """Fix what `auto` means on this machine, so that the fingerprint says what was computed."""
    device = resolve_device(trainer.device)
    return job.model_copy(update={"precision": resolve_precision(trainer.precision, device)})


def check_trainer(trainer: TrainerParams, recipes: Sequence[RecipeParams]) -> None:
    """Refuse what this machine cannot do, before anything is read.

    Raises:
        UserError: Devices that are not there, several where students share a teacher, or too
            little shared memory for the loader processes.
    """
    check_devices(trainer)
    device = resolve_device(trainer.device)
    for recipe in recipes:
        processes = resolve_devices(trainer, recipe.batch_size)
        if trainer.share_teacher and (processes > 1 or "RANK" in os.environ):
            raise UserError(
                f"trainer.share_teacher is {trainer.share_teacher}, but {processes} devices, or "
                "processes of torchrun, train each network together. Students share a teacher on "
                "one device: set trainer.devices=1 and leave torchrun out, or share_teacher."
            )
        workers = resolve_workers(trainer.workers, device, processes)
        share = -(-recipe.batch_size // (processes * trainer.nodes))
        check_shared_memory(workers, crop_bytes(recipe.augment, share), processes)


def check_names(networks: Sequence[NetworkParams], work_folder: Path | None = None) -> None:
    """Refuse networks that do not exist or cannot be built, before anything is read.

    Those that are known in the folder with all work are not built again.

    Raises:
        UserError: There is no such head or backbone, or it gives no feature maps.
    """
    with torch.device("meta"):  # shapes only; the classes are not known yet
        for params in networks:
            if work_folder is None or not is_known(params, work_folder):
                network_from_params(params, num_classes=2, pretrained=False)
