"""Nodes and wiring that every trained network shares: train, evaluate, draw.

One factory makes the pipeline of a method in its own namespace, so that each of them has the same
nodes, the same data set names (`student_{method}`, `metrics_{method}`, `history_{method}`) and the
same MLflow keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from kedro.pipeline import Node, Pipeline
from matplotlib.figure import Figure
from pydantic import ValidationError

from rdd_pipeline import tracking
from rdd_pipeline.config import (
    DataParams,
    EvaluationParams,
    MethodsParams,
    NetworkParams,
    RddParams,
    RecipeParams,
    TrainerParams,
)
from rdd_pipeline.distillation.methods import find_method
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.comparison import splits_of
from rdd_pipeline.evaluation.cost import count_macs, count_parameters
from rdd_pipeline.evaluation.figures import confusion_figure, training_curves
from rdd_pipeline.evaluation.scoring import score_splits
from rdd_pipeline.networks import NetworkCheckpoint
from rdd_pipeline.pipelines._shared import (
    images_root,
    label_set_of,
    local_network,
    packs_folder,
    rows_of,
    samples_of,
)
from rdd_pipeline.segmentation.index import Sample, index_digest
from rdd_pipeline.segmentation.labels import LabelSet
from rdd_pipeline.training.checkpoints import State, WorkFolder
from rdd_pipeline.training.device import resolve_device
from rdd_pipeline.training.job import Stage, TrainingJob, json_digest
from rdd_pipeline.training.loop import TrainingResult, job_fingerprint, prepare_job, train

SHARED_PARAMETERS = {
    "params:data",
    "params:student",
    "params:recipe",
    "params:rdd",
    "params:methods",
    "params:seed",
    "params:trainer",
    "params:evaluation",
}


def run_training(
    *,
    method: str,
    stage: Stage,
    raw_images: Path,
    raw_index: pd.DataFrame,
    label_set: dict[str, Any],
    packed_images: dict[str, Any],
    work_folder: Path,
    data: DataParams,
    network: NetworkParams,
    recipe: RecipeParams,
    rdd: RddParams,
    methods: MethodsParams,
    seed: int,
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None,
    start: State | None = None,
) -> TrainingResult:
    """Build the job, find its work folder, and train, resume or load.

    Raises:
        UserError: Parameters that do not fit together.
    """
    try:
        job = TrainingJob(
            method=method,
            stage=stage,
            seed=seed,
            network=local_network(network),
            labels=label_set_of(label_set),
            root=images_root(raw_images, data),
            image_size=data.image_size,
            packs=packs_folder(packed_images),
            recipe=recipe,
            rdd=rdd,
            weights=methods.weights.get(method, {}),
        )
    except ValidationError as error:
        # Kedro checks the types of models only; the seed is a plain number.
        faults = (
            f"params:{'.'.join(map(str, fault['loc']))}: {fault['msg']}, found {fault['input']!r}"
            if fault["loc"]
            else fault["msg"].removeprefix("Value error, ")
            for fault in error.errors()
        )
        raise UserError(" ".join(faults)) from error
    job = prepare_job(job, trainer)
    samples = samples_of(raw_index)
    if not job.definition.needs_teacher:
        teacher = None
    work = WorkFolder(work_folder, job_fingerprint(job, samples, teacher, start))
    return train(
        job,
        samples,
        trainer=trainer,
        teacher=teacher,
        start=start,
        work=work,
        observe=tracking.emit,
    )


def score_network(
    network: NetworkCheckpoint,
    samples: Sequence[Sample],
    *,
    name: str,
    root: Path,
    labels: LabelSet,
    data: DataParams,
    evaluation: EvaluationParams,
    trainer: TrainerParams,
    comparison: str,
    work_folder: Path,
    packs: Path | None = None,
) -> dict[str, Any]:
    """Scores and cost of one network; looked up when the same network was scored before.

    Returns:
        ``about`` (text), one block of scores for each split, ``cost`` (numbers).
    """
    weights, images = network.digest(), index_digest(samples)
    key = json_digest(
        [
            weights,
            images,
            evaluation.model_dump(mode="json", exclude={"figure_images", "batch_size"}),
            data.image_size,
        ]
    )
    provenance = network.header.provenance
    work = WorkFolder(work_folder, provenance.get("fingerprint", f"imported-{weights[:8]}"))
    scores = work.recall(f"scores-{key}")
    if scores is None:
        scores = score_splits(
            network,
            samples,
            root,
            labels=labels,
            params=evaluation,
            image_size=data.image_size,
            device=resolve_device(trainer.device),
            packs=packs,
        )
        work.remember(f"scores-{key}", scores)
    first = samples[0]
    size = data.image_size or (first.height, first.width)
    built = network.build()
    return {
        "about": {
            "method": name,
            "title": find_method(name).title,
            "network": network.header.network.name,
            "seed": provenance.get("seed", ""),
            "iteration": provenance.get("iteration", ""),
            "fingerprint": work.fingerprint,
            "comparison": comparison,
            "data_digest": images,
        },
        **scores,
        "cost": {
            "parameters": count_parameters(built),
            "macs": count_macs(built, size),
        },
    }


def comparison_key(
    raw_index: pd.DataFrame,
    data: DataParams,
    student: NetworkParams,
    recipe: RecipeParams,
    evaluation: EvaluationParams,
) -> str:
    """Digest of what must be equal for two students to be compared: data, network, recipe."""
    return json_digest(
        [
            index_digest(samples_of(raw_index)),
            data.image_size,
            student.model_dump(mode="json"),
            recipe.model_dump(mode="json"),
            evaluation.model_dump(mode="json", include={"scales", "flip", "average"}),
        ]
    )


def training_cost(state: State) -> dict[str, float]:
    """Speed and memory of the training a state came from."""
    cost = state["cost"]
    seconds = cost["seconds"]
    return {
        "images_per_second": cost["images"] / seconds if seconds else 0.0,
        "training_seconds": seconds,
        "peak_memory_bytes": cost["peak_memory"],
    }


def make_train_node(method: str, stage: Stage) -> Callable[..., Any]:
    """Node function that trains the student by `method`."""

    def train_student(
        raw_images: Path,
        raw_index: pd.DataFrame,
        label_set: dict[str, Any],
        packed_images: dict[str, Any],
        work_folder: Path,
        network_plan: dict[str, Any],
        data: DataParams,
        student: NetworkParams,
        recipe: RecipeParams,
        rdd: RddParams,
        methods: MethodsParams,
        seed: int,
        trainer: TrainerParams,
        teacher_weights: NetworkCheckpoint | None = None,
        start: dict[str, Any] | None = None,
    ) -> tuple[NetworkCheckpoint, pd.DataFrame, dict[str, float], dict[str, Any]]:
        result = run_training(
            method=method,
            stage=stage,
            raw_images=raw_images,
            raw_index=raw_index,
            label_set=label_set,
            packed_images=packed_images,
            work_folder=work_folder,
            data=data,
            network=student,
            recipe=recipe,
            rdd=rdd,
            methods=methods,
            seed=seed,
            trainer=trainer,
            teacher=teacher_weights,
            start=start,
        )
        history = pd.DataFrame(result.history)
        return result.network, history, training_cost(result.state), result.state

    train_student.__name__ = f"train_{method}"
    return train_student


def make_evaluate_node(method: str) -> Callable[..., Any]:
    """Node function that scores the student of `method`."""

    def evaluate_student(
        raw_images: Path,
        raw_index: pd.DataFrame,
        label_set: dict[str, Any],
        packed_images: dict[str, Any],
        work_folder: Path,
        weights: NetworkCheckpoint,
        cost: dict[str, float],
        data: DataParams,
        student: NetworkParams,
        recipe: RecipeParams,
        evaluation: EvaluationParams,
        trainer: TrainerParams,
    ) -> tuple[dict[str, Any], Figure]:
        labels = label_set_of(label_set)
        metrics = score_network(
            weights,
            samples_of(raw_index),
            name=method,
            root=images_root(raw_images, data),
            labels=labels,
            data=data,
            evaluation=evaluation,
            trainer=trainer,
            comparison=comparison_key(raw_index, data, student, recipe, evaluation),
            work_folder=work_folder,
            packs=packs_folder(packed_images),
        )
        metrics["cost"] |= cost
        return metrics, confusion_of(metrics, labels)

    evaluate_student.__name__ = f"evaluate_{method}"
    return evaluate_student


def confusion_of(metrics: dict[str, Any], labels: LabelSet) -> Figure:
    """Confusion matrix of the last split that was evaluated (the test split where there is one)."""
    split = splits_of(metrics)[-1]
    matrix = torch.tensor(metrics[split]["confusion"], dtype=torch.int64)
    return confusion_figure(matrix, labels.names)


def draw_history(history: pd.DataFrame) -> Figure:
    """Loss, learning rate and validation mIoU over the iterations."""
    return training_curves(rows_of(history))


def method_pipeline(
    method: str,
    *,
    stage: Stage = "whole",
    start: str | None = None,
    keep_state: bool = False,
    namespace: str | None = None,
) -> Pipeline:
    """Train and evaluate the student by one method, in a namespace of its own.

    Args:
        method: Key of `distillation.methods.METHODS`.
        stage: Stage of an RDD run.
        start: Data set with the training state of the stage before.
        keep_state: Put the training state into the catalog as ``state_{method}``.
        namespace: Of the nodes; None: the method's name.
    """
    inputs = {
        "raw_images": "raw_images",
        "raw_index": "raw_index",
        "label_set": "label_set",
        "packed_images": "packed_images",
        "work_folder": "work_folder",
    }
    training_inputs = {
        **inputs,
        "network_plan": "network_plan",
        "data": "params:data",
        "student": "params:student",
        "recipe": "params:recipe",
        "rdd": "params:rdd",
        "methods": "params:methods",
        "seed": "params:seed",
        "trainer": "params:trainer",
    }
    upstream = {"network_plan"}
    if find_method(method).needs_teacher:
        training_inputs["teacher_weights"] = "teacher_weights"
        upstream.add("teacher_weights")
    if start is not None:
        training_inputs["start"] = start
        upstream.add(start)
    nodes = Pipeline(
        [
            Node(
                make_train_node(method, stage),
                name=f"train_{method}_node",
                inputs=training_inputs,
                outputs=["weights", "history", "training_cost", "state"],
                tags=["gpu", "training"],
            ),
            Node(
                make_evaluate_node(method),
                name=f"evaluate_{method}_node",
                inputs={
                    **inputs,
                    "weights": "weights",
                    "cost": "training_cost",
                    "data": "params:data",
                    "student": "params:student",
                    "recipe": "params:recipe",
                    "evaluation": "params:evaluation",
                    "trainer": "params:trainer",
                },
                outputs=["metrics", "confusion"],
                tags=["gpu", "evaluation"],
            ),
            Node(
                draw_history,
                name=f"draw_{method}_history_node",
                inputs="history",
                outputs="curves",
                tags=["figures"],
            ),
        ]
    )
    outputs = {
        "weights": f"student_{method}",
        "history": f"history_{method}",
        "metrics": f"metrics_{method}",
        "confusion": f"confusion_{method}",
        "curves": f"curves_{method}",
    }
    if keep_state:
        outputs["state"] = f"state_{method}"
    return Pipeline(
        nodes,
        namespace=namespace or method,
        tags=[f"method_{method}"],
        inputs={*inputs, *upstream},
        outputs=outputs,
        parameters=SHARED_PARAMETERS,
    )
