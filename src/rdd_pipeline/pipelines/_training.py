"""Nodes that every trained network shares: check, train, evaluate, draw."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from pydantic import ValidationError

from rdd_pipeline import tracking
from rdd_pipeline.commands import session_text
from rdd_pipeline.config import (
    FORMER_NAMES,
    DataParams,
    EvaluationParams,
    MethodsParams,
    NetworkParams,
    RddParams,
    RecipeParams,
    TeacherParams,
    TrainerParams,
)
from rdd_pipeline.data.index import Sample, index_digest
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
    images_root,
    label_set_of,
    local_network,
    local_teacher,
    packs_folder,
    rows_of,
    samples_of,
)
from rdd_pipeline.reporting.comparison import splits_of
from rdd_pipeline.reporting.figures import confusion_figure, training_curves
from rdd_pipeline.training.device import resolve_device, resolve_precision
from rdd_pipeline.training.job import Stage, TrainingJob
from rdd_pipeline.training.loop import TrainingResult
from rdd_pipeline.training.notes import training_notes
from rdd_pipeline.training.preparation import job_fingerprint, loss_context, prepare_job
from rdd_pipeline.training.state import TrainState
from rdd_pipeline.training.store import RunStore

logger = logging.getLogger(__name__)


class Repeat(NamedTuple):
    """One training of a method with one of the further seeds of `params:seeds`."""

    network: NetworkCheckpoint
    cost: dict[str, float]
    notes: list[str]


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
    evaluation: EvaluationParams,
    seed: int,
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None,
    initial_state: TrainState | None = None,
    prefix: str = "",
) -> TrainingResult:
    """Build the job, find its work folder, and train, resume or load.

    `prefix` is what the names of the curves begin with.

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
    samples = samples_of(raw_index)
    if not job.definition.needs_teacher:
        teacher = None
    store = RunStore(work_folder, job_fingerprint(job, samples, teacher, initial_state))
    return train(
        job,
        samples,
        trainer=trainer,
        teacher=teacher,
        initial_state=initial_state,
        store=store,
        on_log=lambda iteration, values: tracking.emit(
            iteration, {prefix + name: value for name, value in values.items()}
        ),
    )


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
    title: str | None = None,
    notes: Sequence[str] = (),
    packs: Path | None = None,
) -> dict[str, Any]:
    """Scores and cost of one network; looked up when the same network was scored before.

    `title` is what tables call it, the method's own where it is None; `notes` is what its training
    noted (`training.notes`).

    Returns:
        ``about`` (texts), one block of scores for each split, ``cost`` (numbers).
    """
    weights, scored = network.digest(), data_digest(samples, labels, data, evaluation)
    key = json_digest([weights, scored, evaluation.splits])
    provenance = network.header.provenance
    store = RunStore(work_folder, provenance.get("fingerprint", f"imported-{weights[:8]}"))
    scores = store.recall(f"scores-{key}")
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
        store.remember(f"scores-{key}", scores)
    first = samples[0]
    size = data.image_size or (first.height, first.width)
    return {
        "about": {
            "method": name,
            "title": title or find_method(name).title,
            "network": network.header.network.name,
            "seed": provenance.get("seed", ""),
            "iteration": provenance.get("iteration", ""),
            "fingerprint": store.fingerprint,
            "comparison": comparison,
            "data_digest": scored,
            "session": session_text(),
            "notes": list(notes),
        },
        **scores,
        "cost": size_of(network.build(), size),
    }


def size_of(network: SegmentationNetwork, size: tuple[int, int]) -> dict[str, int]:
    """Parameters and MACs of a network as it is used and, ``trained_``, with its auxiliary head."""
    cost = measure_cost(network, size)
    return {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "trained_parameters": cost.trained_parameters,
        "trained_macs": cost.trained_macs,
    }


def data_digest(
    samples: Sequence[Sample], labels: LabelSet, data: DataParams, evaluation: EvaluationParams
) -> str:
    """Digest of what networks are scored on: images, meaning of the masks, size, protocol."""
    return json_digest(
        [index_digest(samples), labels.meaning(), data.image_size, evaluation.protocol()]
    )


def comparison_key(
    samples: Sequence[Sample],
    labels: LabelSet,
    data: DataParams,
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
            data_digest(samples, labels, data, evaluation),
            student.model_dump(mode="json", context=FORMER_NAMES),
            recipe.model_dump(mode="json", context=FORMER_NAMES),
            labels.class_weights if recipe.class_weights else None,
            methods.model_dump(mode="json", exclude={"weights", "options"}, context=FORMER_NAMES),
            resolve_precision(trainer.precision, resolve_device(trainer.device)),
        ]
    )


def training_cost(state: TrainState) -> dict[str, float]:
    """Speed and memory of the training a state came from."""
    cost = state.cost
    return {
        "images_per_second": cost.images / cost.seconds if cost.seconds else 0.0,
        "training_seconds": cost.seconds,
        "peak_memory_bytes": cost.peak_memory,
    }


def make_train_node(method: str, stage: Stage, *, keep_state: bool = False) -> Callable[..., Any]:
    """Node function that trains the student by `method`, once for each seed.

    Its training states are handed on only where a node goes on from them: Kedro keeps what nobody
    takes until the run ends, and the queues of some methods are hundreds of megabytes.
    """

    def train_student(
        raw_images: Path,
        raw_index: pd.DataFrame,
        label_set: dict[str, Any],
        packed_images: dict[str, Any],
        work_folder: Path,
        method_plan: dict[str, Any],
        data: DataParams,
        student: NetworkParams,
        recipe: RecipeParams,
        rdd: RddParams,
        methods: MethodsParams,
        evaluation: EvaluationParams,
        seed: int,
        seeds: int,
        trainer: TrainerParams,
        teacher_weights: NetworkCheckpoint | None = None,
        start: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        given = [] if start is None else [start, *start.get("repeats", [])]
        starts = [TrainState.from_dict(state) for state in given]
        results = [
            run_training(
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
                evaluation=evaluation,
                seed=number,
                trainer=trainer,
                teacher=teacher_weights,
                initial_state=starts[number - seed] if number - seed < len(starts) else None,
                prefix="" if number == seed else f"seed_{number}.",
            )
            for number in seeds_from(seed, seeds)
        ]
        labels = label_set_of(label_set)
        noted = [
            training_notes(r.history, method=find_method(method, methods), labels=labels)
            for r in results
        ]
        first, *others = results
        history = pd.concat(
            [pd.DataFrame(r.history).assign(seed=seed + n) for n, r in enumerate(results)],
            ignore_index=True,
        )
        repeats = [
            Repeat(other.network, training_cost(other.state), notes)
            for other, notes in zip(others, noted[1:], strict=True)
        ]
        outputs = (first.network, history, training_cost(first.state), noted[0], repeats)
        if not keep_state:
            return outputs
        return (
            *outputs,
            first.state.to_dict() | {"repeats": [other.state.to_dict() for other in others]},
        )

    train_student.__name__ = f"train_{method}"
    return train_student


def make_evaluate_node(method: str) -> Callable[..., Any]:
    """Node function that scores the students of `method`, one for each seed."""

    def evaluate_student(
        raw_images: Path,
        raw_index: pd.DataFrame,
        label_set: dict[str, Any],
        packed_images: dict[str, Any],
        work_folder: Path,
        weights: NetworkCheckpoint,
        cost: dict[str, float],
        notes: list[str],
        repeats: list[Repeat],
        data: DataParams,
        student: NetworkParams,
        recipe: RecipeParams,
        rdd: RddParams,
        methods: MethodsParams,
        evaluation: EvaluationParams,
        trainer: TrainerParams,
    ) -> tuple[dict[str, Any], Figure]:
        labels = label_set_of(label_set)
        samples = samples_of(raw_index)
        comparison = comparison_key(
            samples, labels, data, student, recipe, methods, evaluation, trainer
        )

        title = method_title(method, rdd)

        def score(
            network: NetworkCheckpoint, cost: dict[str, float], notes: list[str]
        ) -> dict[str, Any]:
            metrics = score_network(
                network,
                samples,
                name=method,
                title=title,
                notes=notes,
                root=images_root(raw_images, data),
                labels=labels,
                data=data,
                evaluation=evaluation,
                trainer=trainer,
                comparison=comparison,
                work_folder=work_folder,
                packs=packs_folder(packed_images),
            )
            metrics["cost"] |= cost
            _log_scores(metrics)
            return metrics

        metrics = score(weights, cost, notes)
        if repeats:
            metrics["repeats"] = [score(*repeat) for repeat in repeats]
        return metrics, confusion_of(metrics, labels)

    evaluate_student.__name__ = f"evaluate_{method}"
    return evaluate_student


def _log_scores(metrics: dict[str, Any]) -> None:
    """One line, for runs that end before any table."""
    about = metrics["about"]
    scores = (f"{split} {100 * metrics[split]['miou']:.1f}" for split in splits_of(metrics))
    logger.info("%s, seed %s: mIoU in %%: %s", about["title"], about["seed"], ", ".join(scores))


def confusion_of(metrics: dict[str, Any], labels: LabelSet) -> Figure:
    """Confusion matrix of the last split that was evaluated (the test split where there is one)."""
    split = splits_of(metrics)[-1]
    matrix = torch.tensor(metrics[split]["confusion"], dtype=torch.int64)
    return confusion_figure(matrix, labels.names)


def draw_history(history: pd.DataFrame) -> Figure:
    """Loss, learning rate and validation mIoU over the iterations, of the first seed."""
    if "seed" in history and len(history):
        history = history[history["seed"] == history["seed"].iloc[0]].drop(columns="seed")
    return training_curves(rows_of(history))


def make_check_node(method: str) -> Callable[..., Any]:
    """Node function that refuses what a method's training would fail with after all others."""

    def check_method(
        label_set: dict[str, Any],
        network_plan: dict[str, Any],
        teacher: TeacherParams,
        student: NetworkParams,
        recipe: RecipeParams,
        rdd: RddParams,
        methods: MethodsParams,
    ) -> dict[str, Any]:
        labels = label_set_of(label_set)
        definition = find_method(method, methods)
        settings = definition.settings(rdd)
        with torch.device("meta"):  # shapes are enough; the weights were looked at before
            small = network_from_params(student, num_classes=labels.num_classes, pretrained=False)
            big = network_from_params(
                _teacher_params(teacher, labels), num_classes=labels.num_classes, pretrained=False
            )
        if definition.task == "rdd":
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
            "rdd": settings.model_dump(mode="json") if definition.task == "rdd" else None,
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
