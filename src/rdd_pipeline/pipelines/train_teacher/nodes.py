"""Nodes that check the networks of a run and train or import the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from rdd_pipeline.config import (
    EvaluationParams,
    MethodsParams,
    NetworkParams,
    RddParams,
    RecipeParams,
    TeacherParams,
    TrainerParams,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.distillation.methods import check_changes
from rdd_pipeline.distillation.objective import check_auxiliary_heads
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.cost import measure_cost
from rdd_pipeline.networks import NetworkCheckpoint, import_teacher, network_from_params
from rdd_pipeline.pipelines._shared import (
    local_network,
    local_teacher,
)
from rdd_pipeline.pipelines._training import (
    IMPORTED,
    Networks,
    confusion_of,
    joined_history,
    run_training,
    score_network,
    seeds_from,
    teacher_network,
    training_record,
)
from rdd_pipeline.reporting.comparison import Metrics
from rdd_pipeline.training.device import resolve_device
from rdd_pipeline.training.job import check_class_weights


def check_networks(
    images: Images,
    teacher: TeacherParams,
    student: NetworkParams,
    teacher_recipe: RecipeParams,
    recipe: RecipeParams,
    rdd: RddParams,
    methods: MethodsParams,
    seed: int,
    seeds: int,
    trainer: TrainerParams,
) -> dict[str, dict[str, Any]]:
    """Build both networks once, so that what does not fit is found before anything is trained.

    Returns:
        By role (teacher, student): name, parameters and MACs at the size of the first image (as it
        is used and, ``trained_``, with the auxiliary head), stride.

    Raises:
        UserError: Unknown network, weights that do not fit, other classes, impossible schedule.
    """
    labels = images.labels
    resolve_device(trainer.device)
    seeds_from(seed, seeds)
    check_changes(methods)
    warmup = rdd.warmup_iterations(recipe.iterations)
    if warmup > recipe.iterations:
        raise UserError(
            f"rdd.tfe_length is {warmup} iterations, the run has {recipe.iterations}. "
            "Lower rdd.tfe_length or raise recipe.iterations."
        )
    for name, a_recipe in (("recipe", recipe), ("teacher_recipe", teacher_recipe)):
        check_class_weights(a_recipe, labels, name)
    big = teacher_network(teacher, labels)
    if teacher.weights is None:
        big.check_trainable(teacher_recipe.batch_size)
    small = network_from_params(local_network(student), num_classes=labels.num_classes)
    small.check_trainable(recipe.batch_size)
    check_auxiliary_heads(
        rdd,
        warmup=warmup,
        iterations=recipe.iterations,
        teacher=big.auxiliary is not None,
        student=small.auxiliary is not None,
    )
    return {
        role: {
            "name": params.name,
            **measure_cost(network, images.input_size),
            "stride": network.stride,
        }
        for role, params, network in (
            ("teacher", teacher.network, big),
            ("student", student, small),
        )
    }


def train_teacher(
    images: Images,
    work_folder: Path,
    network_plan: dict[str, Any],
    teacher: TeacherParams,
    teacher_recipe: RecipeParams,
    rdd: RddParams,
    methods: MethodsParams,
    evaluation: EvaluationParams,
    seed: int,
    trainer: TrainerParams,
) -> tuple[dict[str, NetworkCheckpoint], pd.DataFrame, dict[str, dict[str, Any]]]:
    """Train the teacher on the task alone, or import the checkpoint that `teacher.weights` names.

    Returns:
        By its one seed the weights, the history (empty when imported) and the training's record.
    """
    teacher = local_teacher(teacher)
    if teacher.weights is not None:
        network = import_teacher(teacher, images.labels.names)
        record: dict[str, Any] = {"cost": {}, "notes": []}
        return {IMPORTED: network}, pd.DataFrame({"iteration": []}), {IMPORTED: record}
    result = run_training(
        method="teacher",
        stage="whole",
        images=images,
        work_folder=work_folder,
        network=teacher.network,
        recipe=teacher_recipe,
        rdd=rdd,
        methods=methods,
        evaluation=evaluation,
        seed=seed,
        trainer=trainer,
        teacher=None,
    )
    results = {str(seed): result}
    return (
        {str(seed): result.network},
        joined_history(results),
        {str(seed): training_record(result)},
    )


def evaluate_teacher(
    images: Images,
    work_folder: Path,
    weights: Networks,
    training: Mapping[str, dict[str, Any]],
    evaluation: EvaluationParams,
    trainer: TrainerParams,
) -> tuple[dict[str, Metrics], Figure]:
    """Score the teacher on the splits of `evaluation.splits`."""
    ((seed, network),) = weights.items()
    metrics = score_network(
        network,
        images,
        name="teacher",
        evaluation=evaluation,
        trainer=trainer,
        comparison="",
        work_folder=work_folder,
    )
    metrics["cost"] |= training[seed]["cost"]
    return {seed: metrics}, confusion_of({seed: metrics}, images.labels)
