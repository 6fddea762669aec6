"""Nodes that every trained network shares: check, train, evaluate, draw."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from pydantic import ValidationError

from rdd_pipeline import tracking
from rdd_pipeline.commands import session_text
from rdd_pipeline.config import (
    FORMER_NAMES,
    EvaluationParams,
    MethodsParams,
    NetworkParams,
    RddParams,
    RecipeParams,
    TeacherParams,
    TrainerParams,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.distillation.methods import find_method, method_title
from rdd_pipeline.distillation.objective import check_auxiliary_heads, check_losses
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.cost import measure_cost
from rdd_pipeline.evaluation.scoring import score_splits
from rdd_pipeline.files import json_digest
from rdd_pipeline.launching.launch import train
from rdd_pipeline.networks import (
    NetworkCheckpoint,
    SegmentationNetwork,
    import_teacher,
    network_from_params,
)
from rdd_pipeline.pipelines._shared import (
    local_network,
    local_teacher,
    rows_of,
)
from rdd_pipeline.reporting.comparison import Metrics
from rdd_pipeline.reporting.figures import confusion_figure, training_curves
from rdd_pipeline.training.build import loss_context
from rdd_pipeline.training.device import resolve_device, resolve_precision
from rdd_pipeline.training.difficulty import training_notes
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.preparation import prepare_job
from rdd_pipeline.training.state import TrainState
from rdd_pipeline.training.store import RunStore
from rdd_pipeline.training.training import Training, TrainingResult

logger = logging.getLogger(__name__)


Networks = Mapping[str, NetworkCheckpoint]
"""Networks by seed; the teacher's is alone."""

IMPORTED = "imported"
"""In the place of the seed for a network that was not trained here."""


def run_training(
    *,
    method: str,
    stage: str,
    images: Images,
    work_folder: Path,
    network: NetworkParams,
    recipe: RecipeParams,
    rdd: RddParams,
    methods: MethodsParams,
    evaluation: EvaluationParams,
    seed: int,
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None,
    initial_state: TrainState | None = None,
    curves: str | None = None,
) -> TrainingResult:
    """Build the job, find its work folder, and train, resume or load.

    `curves` is the seed that the curves are filed under; None: under the method itself.

    Raises:
        UserError: Parameters that do not fit together.
    """
    try:
        job = TrainingJob(
            method=method,
            stage=stage,
            seed=seed,
            network=local_network(network),
            recipe=recipe,
            rdd=rdd,
            methods=methods,
            evaluation=evaluation,
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
    training = Training(
        job,
        images,
        teacher if job.definition.needs_teacher else None,
        initial_state,
    ).stored_in(work_folder)
    return train(training, trainer, partial(tracking.log_metrics, seed=curves))


def seeds_from(seed: int, seeds: int) -> range:
    """The seeds of a run: `seeds` of them, from `seed` on.

    Raises:
        UserError: They are no whole numbers, or there is none.
    """
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise UserError(
            "params:seeds: it is the number of seeds, 1 or more (seed, seed + 1, ...), no list, "
            f"found {seeds!r}"
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"params:seed: expected a whole number, 0 or more, found {seed!r}")
    return range(seed, seed + seeds)


def score_network(
    network: NetworkCheckpoint,
    images: Images,
    *,
    name: str,
    evaluation: EvaluationParams,
    trainer: TrainerParams,
    comparison: str,
    work_folder: Path,
    title: str | None = None,
    notes: Sequence[str] = (),
) -> Metrics:
    """Scores and cost of one network; looked up when the same network was scored before.

    `title` is what tables call it, the method's own where it is None; `notes` is what its training
    noted (`training.notes`).

    Returns:
        ``about`` (texts), ``cost`` (numbers) and ``splits``: the scores by split.
    """
    weights, scored = network.digest(), data_digest(images, evaluation)
    key = json_digest([weights, scored, evaluation.splits])
    provenance = network.header.provenance
    store = RunStore(work_folder, provenance.get("fingerprint", f"imported-{weights[:8]}"))
    scores = store.recall(f"scores-{key}")
    if scores is None:
        scores = score_splits(network, images, evaluation, device=resolve_device(trainer.device))
        store.remember(f"scores-{key}", scores)
    return {
        "about": {
            "method": name,
            "title": title or find_method(name).title,
            "network": network.header.network.name,
            "seed": provenance.get("seed", ""),
            "iteration": provenance.get("iteration", ""),
            "fingerprint": store.fingerprint,
            "protocol_digest": comparison,
            "data_digest": scored,
            "session": session_text(),
            "notes": list(notes),
        },
        "cost": measure_cost(network.build(), images.input_size),
        "splits": scores,
    }


def data_digest(images: Images, evaluation: EvaluationParams) -> str:
    """Digest of what networks are scored on: images, meaning of the masks, size, protocol."""
    return json_digest(
        [
            images.index_digest,
            images.labels.meaning(),
            images.image_size,
            evaluation.protocol(),
        ]
    )


def protocol_digest(
    images: Images,
    student: NetworkParams,
    recipe: RecipeParams,
    methods: MethodsParams,
    evaluation: EvaluationParams,
    trainer: TrainerParams,
) -> str:
    """Digest of what must be equal for two students to be compared.

    That is: what they are scored on, the network, the recipe, the precision of the training and
    what `methods` says of all methods alike. Left out is what makes one method: RDD's settings,
    weights and options of single methods; those are what a comparison is about.
    """
    return json_digest(
        [
            data_digest(images, evaluation),
            student.model_dump(mode="json", context=FORMER_NAMES),
            recipe.model_dump(mode="json", context=FORMER_NAMES),
            images.labels.class_weights if recipe.class_weights else None,
            methods.model_dump(mode="json", exclude={"weights", "options"}, context=FORMER_NAMES),
            resolve_precision(trainer.precision, resolve_device(trainer.device)),
        ]
    )


def training_record(result: TrainingResult, notes: Sequence[str] = ()) -> dict[str, Any]:
    """What a result's metrics say of its training: ``cost`` (numbers) and ``notes``."""
    cost = result.state.cost
    return {
        "cost": {
            "images_per_second": cost.images / cost.seconds if cost.seconds else 0.0,
            "training_seconds": cost.seconds,
            "peak_memory_bytes": cost.peak_memory,
        },
        "notes": list(notes),
    }


def the_only(networks: Networks) -> NetworkCheckpoint:
    """The one network of an entry with one."""
    (network,) = networks.values()
    return network


def joined_history(results: Mapping[str, TrainingResult]) -> pd.DataFrame:
    """Curves of all seeds in one table, with a column for the seed."""
    tables = [pd.DataFrame(r.history).assign(seed=int(seed)) for seed, r in results.items()]
    return pd.concat(tables, ignore_index=True)


def make_train_node(method: str, stage: str, *, keep_state: bool = False) -> Callable[..., Any]:
    """Node function that trains the student by `method`, once for each seed.

    Its training states are handed on only where a node goes on from them: Kedro keeps what nobody
    takes until the run ends, and the queues of some methods are hundreds of megabytes.
    """

    def train_student(
        images: Images,
        work_folder: Path,
        method_plan: dict[str, Any],
        student: NetworkParams,
        recipe: RecipeParams,
        rdd: RddParams,
        methods: MethodsParams,
        evaluation: EvaluationParams,
        seed: int,
        seeds: int,
        trainer: TrainerParams,
        teacher_weights: Networks | None = None,
        initial_states: Mapping[str, TrainState] | None = None,
    ) -> tuple[Any, ...]:
        results = {
            str(number): run_training(
                method=method,
                stage=stage,
                images=images,
                work_folder=work_folder,
                network=student,
                recipe=recipe,
                rdd=rdd,
                methods=methods,
                evaluation=evaluation,
                seed=number,
                trainer=trainer,
                teacher=None if teacher_weights is None else the_only(teacher_weights),
                initial_state=(initial_states or {}).get(str(number)),
                curves=str(number) if seeds > 1 else None,
            )
            for number in seeds_from(seed, seeds)
        }
        labels, definition = images.labels, find_method(method, methods)
        outputs = (
            {seed: result.network for seed, result in results.items()},
            joined_history(results),
            {
                seed: training_record(
                    result, training_notes(result.history, method=definition, labels=labels)
                )
                for seed, result in results.items()
            },
        )
        if not keep_state:
            return outputs
        return (*outputs, {seed: result.state for seed, result in results.items()})

    train_student.__name__ = f"train_{method}"
    return train_student


def make_evaluate_node(method: str) -> Callable[..., Any]:
    """Node function that scores the students of `method`, one for each seed."""

    def evaluate_student(
        images: Images,
        work_folder: Path,
        weights: Networks,
        training: Mapping[str, dict[str, Any]],
        student: NetworkParams,
        recipe: RecipeParams,
        rdd: RddParams,
        methods: MethodsParams,
        evaluation: EvaluationParams,
        trainer: TrainerParams,
    ) -> tuple[dict[str, Metrics], Figure]:
        comparison = protocol_digest(images, student, recipe, methods, evaluation, trainer)
        metrics = {}
        for seed, network in weights.items():
            metrics[seed] = score_network(
                network,
                images,
                name=method,
                title=method_title(method, rdd),
                notes=training[seed]["notes"],
                evaluation=evaluation,
                trainer=trainer,
                comparison=comparison,
                work_folder=work_folder,
            )
            metrics[seed]["cost"] |= training[seed]["cost"]
            _log_scores(metrics[seed])
        return metrics, confusion_of(metrics, images.labels)

    evaluate_student.__name__ = f"evaluate_{method}"
    return evaluate_student


def _log_scores(metrics: Metrics) -> None:
    """One line, for runs that end before any table."""
    about = metrics["about"]
    scores = (f"{split} {100 * found['miou']:.1f}" for split, found in metrics["splits"].items())
    logger.info("%s, seed %s: mIoU in %%: %s", about["title"], about["seed"], ", ".join(scores))


def confusion_of(metrics: Mapping[str, Metrics], labels: LabelSet) -> Figure:
    """Confusion matrix of the first seed on the last split (the test split where there is one)."""
    *_, scores = next(iter(metrics.values()))["splits"].values()
    return confusion_figure(torch.tensor(scores["confusion"], dtype=torch.int64), labels.names)


def draw_history(history: pd.DataFrame) -> Figure:
    """Loss, learning rate and validation mIoU over the iterations, of the first seed."""
    if "seed" in history and len(history):
        history = history[history["seed"] == history["seed"].iloc[0]].drop(columns="seed")
    return training_curves(rows_of(history))


def make_check_node(method: str) -> Callable[..., Any]:
    """Make a node that checks, before any training, that `method` fits networks and parameters."""

    def check_method(
        images: Images,
        network_plan: dict[str, Any],
        teacher: TeacherParams,
        student: NetworkParams,
        recipe: RecipeParams,
        rdd: RddParams,
        methods: MethodsParams,
    ) -> dict[str, Any]:
        labels = images.labels
        definition = find_method(method, methods)
        settings = definition.settings(rdd)
        with torch.device("meta"):  # shapes are enough; the weights were looked at before
            small = network_from_params(student, num_classes=labels.num_classes, pretrained=False)
            big = network_from_params(
                _teacher_params(teacher, labels), num_classes=labels.num_classes, pretrained=False
            )
        if definition.uses_rdd:
            check_auxiliary_heads(
                settings,
                warmup=settings.warmup_iterations(recipe.iterations),
                iterations=recipe.iterations,
                teacher=big.auxiliary is not None,
                student=small.auxiliary is not None,
            )
        try:
            check_losses(definition, loss_context(small, big, recipe, labels))
        except UserError as error:
            raise UserError(f"Method {method!r} cannot be trained. {error}") from error
        return {
            "title": method_title(method, rdd),
            "task": definition.task,
            "weights": definition.weights,
            "rdd": settings.model_dump(mode="json") if definition.uses_rdd else None,
        }

    check_method.__name__ = f"check_{method}"
    return check_method


def _teacher_params(teacher: TeacherParams, labels: LabelSet) -> NetworkParams:
    """Architecture of the teacher: of its checkpoint where there is one."""
    if teacher.weights is None:
        return teacher.network
    return import_teacher(local_teacher(teacher), labels.names).header.network


def teacher_network(teacher: TeacherParams, labels: LabelSet) -> SegmentationNetwork:
    """The teacher as it will be: imported, or new with random weights."""
    teacher = local_teacher(teacher)
    if teacher.weights is not None:
        return import_teacher(teacher, labels.names).build()
    return network_from_params(teacher.network, num_classes=labels.num_classes)
