"""Nodes that every trained network shares: check, plan, train, evaluate, draw.

What they hand on of a method is a dictionary by seed: jobs, weights, states, metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pandas as pd
import torch
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
from rdd_pipeline.distillation.methods import METHODS, check_changes, find_method, method_title
from rdd_pipeline.distillation.objective import check_losses
from rdd_pipeline.distillation.stages import stage_span
from rdd_pipeline.drawing import Drawing, code_digest
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.cost import measure_cost
from rdd_pipeline.evaluation.scoring import SCORES_FORMAT, score_splits
from rdd_pipeline.files import file_digest, json_digest
from rdd_pipeline.launching.launch import train
from rdd_pipeline.lazy import Lazy
from rdd_pipeline.losses.base import LossContext, TeacherLacksError
from rdd_pipeline.networks import (
    Network,
    NetworkCheckpoint,
    NetworkOutput,
    Preprocessing,
    SegmentationNetwork,
    network_from_params,
)
from rdd_pipeline.networks.probe import output_shapes
from rdd_pipeline.pipelines.paths import local_network
from rdd_pipeline.pipelines.together import train_students
from rdd_pipeline.reporting.caption import captioned, provenance
from rdd_pipeline.reporting.comparison import Metrics
from rdd_pipeline.training.build import loss_context
from rdd_pipeline.training.curves import OnLog, curve_points
from rdd_pipeline.training.device import resolve_device
from rdd_pipeline.training.difficulty import training_notes
from rdd_pipeline.training.early_stopping import why_never, why_stopped
from rdd_pipeline.training.job import TrainingJob, check_class_weights, check_early_stopping
from rdd_pipeline.training.known import told_by
from rdd_pipeline.training.preparation import prepare_job
from rdd_pipeline.training.state import Snapshot, TrainState, digest
from rdd_pipeline.training.store import RunStore, is_fingerprint
from rdd_pipeline.training.training import Training, TrainingResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# Most figures are there already: matplotlib is imported to draw one.
_reporting = Lazy("rdd_pipeline.reporting")

Networks = Mapping[str, NetworkCheckpoint]
"""By seed; the teacher's is alone."""

Plan = dict[str, TrainingJob]
"""By seed."""


class TrainingRecord(NamedTuple):
    """What the metrics of a network say of its training."""

    cost: dict[str, float]
    notes: list[str]
    snapshots: Sequence[Snapshot] = ()


# ---- check and plan


def measure_networks(
    images: Images,
    given_teacher: Networks,
    teacher: TeacherParams,
    student: NetworkParams,
    teacher_recipe: RecipeParams,
    recipe: RecipeParams,
    work_folder: Path,
) -> dict[str, dict[str, Any]]:
    """Build both networks once, so that what does not fit is found before anything is trained.

    What building them has told before is looked up, but for a teacher of other code.

    Returns:
        By role (teacher, student): ``network``, what it is built from; whether its weights are
        ``given``; parameters and MACs at the size of the first image (as it is used and,
        ``trained_``, with the auxiliary head); stride; shapes of the ``outputs`` for one image of
        the size ``crop``.

    Raises:
        UserError: Unknown network, weights that do not fit, other classes.
    """
    given = the_only(given_teacher) if given_teacher else None
    big = local_network(teacher.network) if given is None else given.header.network
    sizes = images.input_size, recipe.augment.crop
    plan = {}
    for role, params, weights, batch_size in (
        ("teacher", big, given, teacher_recipe.batch_size),
        ("student", local_network(student), None, recipe.batch_size),
    ):
        classes = images.labels.num_classes
        measure = partial(_measure, params, weights, classes, batch_size, sizes)
        if weights is None:
            told = told_by(params, work_folder, [classes, batch_size, sizes], measure)
        elif weights.header.module is None:
            # Backbone weights are not read again.
            architecture = params.model_copy(update={"pretrained": False})
            decides = [weights.digest(), params.pretrained, sizes]
            told = told_by(architecture, work_folder, decides, measure)
        else:  # the code of others may have changed
            told = measure()
        about = {"network": params.model_dump(mode="json"), "given": weights is not None}
        plan[role] = about | told
    return plan


def _measure(
    params: NetworkParams,
    weights: NetworkCheckpoint | None,
    classes: int,
    batch_size: int,
    sizes: tuple[tuple[int, int], tuple[int, int]],
) -> dict[str, Any]:
    """What `measure_networks` says of one that it builds, with the weights if they are given."""
    network: Network
    if weights is None:
        network = network_from_params(params, num_classes=classes)
        network.check_trainable(batch_size)
    else:
        network = weights.build()
    image, crop = sizes
    seen = Preprocessing.for_network(params)
    output = output_shapes(network, seen.size(crop))
    stride = round(seen.size(crop)[0] / output.logits.shape[2])
    told = {
        **measure_cost(network, seen.size(image)),
        "stride": network.stride if isinstance(network, SegmentationNetwork) else stride,
        "outputs": {
            "logits": list(output.logits.shape),
            "aux_logits": None if output.aux_logits is None else list(output.aux_logits.shape),
            "feature": list(output.feature.shape),
            "stages": [list(stage.shape) for stage in output.stages],
        },
    }
    # Of other code, which plans are not to run again, a sample has to do for every crop.
    return told | ({"crop": list(crop)} if isinstance(network, SegmentationNetwork) else {})


def check_networks(
    images: Images,
    measured_networks: dict[str, dict[str, Any]],
    teacher_recipe: RecipeParams,
    recipe: RecipeParams,
    rdd: RddParams,
    methods: MethodsParams,
) -> dict[str, dict[str, Any]]:
    """Hand on what `measure_networks` says once it is known that teacher and RDD can be trained.

    Raises:
        UserError: Impossible schedule, or losses that do not suit the networks.
    """
    check_changes(methods)
    plan = measured_networks
    make_plan_node("teacher")(images, plan, teacher_recipe, rdd, methods, EvaluationParams(), 0)
    if not plan["teacher"]["given"]:
        # Whatever is trained now: a teacher that RDD cannot use must not train for days.
        make_plan_node("tse")(images, plan, recipe, rdd, methods, EvaluationParams(), 0)
    return plan


def make_plan_node(method: str) -> Callable[..., Plan]:
    """Node function that says what is trained by `method`, and refuses what cannot be."""

    def plan_training(
        images: Images,
        network_plan: Mapping[str, Mapping[str, Any]],
        recipe: RecipeParams,
        rdd: RddParams,
        methods: MethodsParams,
        evaluation: EvaluationParams,
        seed: int,
        seeds: int = 1,
    ) -> Plan:
        role, labels = "teacher" if method == "teacher" else "student", images.labels
        own = network_plan[role]
        if own["given"]:
            return {}
        try:
            job = TrainingJob(
                method=method,
                stage=find_method(method).trains,
                seed=seed,
                network=NetworkParams.model_validate(own["network"]),
                recipe=recipe,
                rdd=rdd,
                methods=methods,
                evaluation=evaluation,
            )
        except ValidationError as error:
            faults = (fault["msg"].removeprefix("Value error, ") for fault in error.errors())
            raise UserError(" ".join(faults)) from error
        name = "recipe" if role == "student" else "teacher_recipe"
        check_class_weights(recipe, labels, name)
        check_early_stopping(recipe, images, name)
        if job.definition.needs_teacher:
            _check_pair(job, labels, network_plan)
        if (remark := why_never(job)) is not None:
            _warn_once(remark)
        return {str(n): job.model_copy(update={"seed": n}) for n in range(seed, seed + seeds)}

    plan_training.__name__ = f"plan_{method}"
    return plan_training


@cache
def _warn_once(remark: str) -> None:
    """Log what many methods have to say alike, in one line."""
    logger.warning("%s", remark)


def _check_pair(
    job: TrainingJob, labels: LabelSet, network_plan: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse a method whose losses do not suit the two networks.

    Raises:
        UserError: It cannot be trained.
    """
    crop = job.recipe.augment.crop

    def shapes(role: str) -> NetworkOutput:
        found = network_plan[role]
        if "outputs" in found and found.get("crop", list(crop)) == list(crop):
            return _outputs(found["outputs"])
        params = NetworkParams.model_validate(found["network"])  # a plan of another run
        with torch.device("meta"):  # shapes are enough; the weights were looked at before
            network = network_from_params(params, num_classes=labels.num_classes, pretrained=False)
        return output_shapes(network, Preprocessing.for_network(params).size(crop))

    context = loss_context(job, labels, shapes("student"), shapes("teacher"))
    try:
        check_losses(job.definition, context)
    except TeacherLacksError as error:
        raise UserError(
            f"Method {job.method!r} cannot be trained. {error} Let it return a mapping with that, "
            f"too, or choose methods that do without: {', '.join(_without_maps(context))}."
        ) from error
    except UserError as error:
        raise UserError(f"Method {job.method!r} cannot be trained. {error}") from error


def _outputs(shapes: Mapping[str, Any]) -> NetworkOutput:
    """Inverse of what `_measure` says of them."""

    def empty(shape: Sequence[int]) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    aux = shapes["aux_logits"]
    early, late = map(empty, shapes["stages"])
    return NetworkOutput(
        empty(shapes["logits"]),
        None if aux is None else empty(aux),
        empty(shapes["feature"]),
        (early, late),
    )


def _without_maps(context: LossContext) -> list[str]:
    """Methods with a teacher whose losses find all maps that they compare."""
    found = []
    for name, method in METHODS.items():
        try:
            check_losses(method, context)
        except TeacherLacksError:
            continue
        except UserError:  # another fault, of the crop, say
            pass
        if method.needs_teacher:
            found.append(name)
    return found


# ---- train


def make_train_node(method: str) -> Callable[..., Any]:
    """Node function that trains what is planned of `method`, or hands on what was given.

    Its training states are handed on only where a node goes on from them: Kedro keeps what nobody
    takes until the run ends, and the queues of some methods are hundreds of megabytes. Where
    students share a teacher, the first node trains all; the others find theirs done.
    """

    def train_networks(
        images: Images,
        plan: Plan,
        trainer: TrainerParams,
        work_folder: Path,
        teacher_weights: Networks | None = None,
        initial_states: Mapping[str, TrainState] | None = None,
        given: Networks | None = None,
        run_methods: Sequence[str] = (),
    ) -> tuple[Any, ...]:
        teacher = None if teacher_weights is None else the_only(teacher_weights)
        results = {}
        for seed, job in plan.items():
            state = (initial_states or {}).get(seed)
            training = Training(prepare_job(job, trainer), images, teacher, state)
            told = seed if len(plan) > 1 else None
            training = training.stored_in(work_folder)
            if trainer.share_teacher:
                train_students(training, run_methods, trainer, seed=told)
            on_log = partial(tracking.log_metrics, seed=told, training=training.fingerprint)
            _tell_what_was_trained(training, on_log)
            results[seed] = train(training, trainer, on_log)
            if not results[seed].trained:
                _tell(results[seed].history, on_log)
            if trainer.profile and training.store is not None:
                for file in sorted(training.store.profile.glob("*")):
                    tracking.log_file(file, "profile", seed=told)
        weights = {seed: result.network for seed, result in results.items()} | dict(given or {})
        records = {
            seed: _record(plan[seed], results[seed], images.labels)
            if seed in results
            else TrainingRecord({}, [])
            for seed in weights
        }
        tables = [pd.DataFrame(r.history).assign(seed=int(s)) for s, r in results.items()]
        history = pd.concat(tables or [pd.DataFrame({"iteration": []})], ignore_index=True)
        if find_method(method).finishes:
            return weights, history, records
        return weights, history, records, {seed: result.state for seed, result in results.items()}

    train_networks.__name__ = f"train_{method}"
    return train_networks


def _tell_what_was_trained(training: Training, on_log: OnLog) -> None:
    """Start the curves of a training that goes on, or a stage, where the first one began.

    Finished work is read by `train`, and told then.
    """
    assert training.store is not None
    if not training.store.is_finished:
        state = training.store.latest() or training.initial_state
        _tell([] if state is None else state.history, on_log)


def _tell(history: Sequence[Mapping[str, float]], on_log: OnLog) -> None:
    for iteration, values in curve_points(history):
        on_log(iteration, values)


def _record(job: TrainingJob, result: TrainingResult, labels: LabelSet) -> TrainingRecord:
    cost, history = result.state.cost, result.history
    stopped = why_stopped(job, history)
    return TrainingRecord(
        {
            "images_per_second": cost.images / cost.seconds if cost.seconds else 0.0,
            "training_seconds": cost.seconds,
            "peak_memory_bytes": cost.peak_memory,
        },
        [
            *training_notes(history, method=job.definition, labels=labels),
            *([f"{stopped}."] if stopped else []),
        ],
        result.state.snapshots or (),
    )


# ---- evaluate


def make_evaluate_node(method: str) -> Callable[..., Any]:
    """Node function that scores the networks of `method`, one for each seed."""

    def evaluate_networks(
        images: Images,
        weights: Networks,
        training: Mapping[str, TrainingRecord],
        plan: Plan,
        evaluation: EvaluationParams,
        trainer: TrainerParams,
        work_folder: Path,
    ) -> tuple[dict[str, Metrics], Drawing]:
        metrics = {}
        for seed, network in weights.items():
            about = {"method": method, "title": find_method(method).title, "protocol_digest": ""}
            if method != "teacher":  # which is not compared by recipe
                job = prepare_job(plan[seed], trainer)
                about["title"] = method_title(method, job.rdd)
                about["protocol_digest"] = protocol_digest(job, images)
            notes = {"notes": training[seed].notes}
            scored = score_network(network, images, evaluation, trainer, work_folder, about | notes)
            scored["cost"] |= training[seed].cost
            metrics[seed] = scored
            _log_scores(scored)
        return metrics, confusion_of(metrics, images.labels)

    evaluate_networks.__name__ = f"evaluate_{method}"
    return evaluate_networks


def score_network(
    network: NetworkCheckpoint,
    images: Images,
    evaluation: EvaluationParams,
    trainer: TrainerParams,
    work_folder: Path,
    about: Mapping[str, Any],
) -> Metrics:
    """Scores and cost of one network; looked up when the same network was scored before.

    Args:
        network: What is scored.
        images: On what, as far as they are of `evaluation.splits`.
        evaluation: How.
        trainer: Where.
        work_folder: The folder with all work.
        about: What the metrics say of it besides what is known here.
    """
    weights, scored = network.digest(), data_digest(images, evaluation)
    key = json_digest([weights, scored, evaluation.splits, SCORES_FORMAT])
    trained = network.header.provenance
    store = store_of(network, work_folder)
    scores = store.recall(f"scores-{key}")
    if scores is None:
        scores = score_splits(network, images, evaluation, device=resolve_device(trainer.device))
        store.remember(f"scores-{key}", scores)
    return {
        "about": {
            "network": network.header.network.name,
            "seed": trained.get("seed", ""),
            "iteration": trained.get("iteration", ""),
            "fingerprint": store.fingerprint,
            "data_digest": scored,
            "session": session_text(),
            **about,
        },
        "cost": _cost(network, images, store),
        "splits": scores,
    }


def store_of(network: NetworkCheckpoint, work_folder: Path) -> RunStore:
    """Where results about a network are remembered: at its training, or by its weights."""
    named = network.header.provenance.get("fingerprint", "")
    if not is_fingerprint(named):
        named = f"imported-{network.digest()[:8]}"
    return RunStore(work_folder, named)


def _cost(network: NetworkCheckpoint, images: Images, store: RunStore) -> dict[str, Any]:
    """Its parameters and MACs; looked up where the same code has counted them."""
    header = network.header
    size = header.preprocessing.size(images.input_size)
    if header.module is not None:  # the code of others may have changed
        return measure_cost(network.build(), size)
    key = f"cost-{json_digest([header.architecture(), size, code_digest()])}"
    cost = store.recall(key)
    if cost is None:
        cost = dict(measure_cost(network.build(), size))
        store.remember(key, cost)
    return cost


def data_digest(images: Images, evaluation: EvaluationParams) -> str:
    """Digest of what networks are scored on: images, meaning of the masks, size, protocol."""
    labels = images.labels.meaning()
    return json_digest([images.index_digest, labels, images.image_size, evaluation.protocol()])


def protocol_digest(job: TrainingJob, images: Images) -> str:
    """Digest of what must be equal for two students to be compared.

    That is: what they are scored on, the network, the recipe, the precision of the training and
    what `methods` says of all methods alike. Left out is what makes one method: RDD's settings,
    weights and options of single methods; those are what a comparison is about.
    """
    network = job.network.model_dump(mode="json", context=FORMER_NAMES)
    if isinstance(job.network.pretrained, Path):
        network["pretrained"] = file_digest(job.network.pretrained)
    apart = {"weights", "options"}
    return json_digest(
        [
            data_digest(images, job.evaluation),
            network,
            job.recipe.model_dump(mode="json", context=FORMER_NAMES),
            images.labels.class_weights if job.recipe.class_weights else None,
            job.methods.model_dump(mode="json", exclude=apart, context=FORMER_NAMES),
            job.precision,
        ]
    )


def _log_scores(metrics: Metrics) -> None:
    """One line, for runs that end before any table."""
    about = metrics["about"]
    scores = (f"{split} {100 * found['miou']:.1f}" for split, found in metrics["splits"].items())
    logger.info("%s, seed %s: mIoU in %%: %s", about["title"], about["seed"], ", ".join(scores))


# ---- draw


def confusion_of(metrics: Mapping[str, Metrics], labels: LabelSet) -> Drawing:
    """Confusion matrix of the first seed on the last split (the test split where there is one)."""
    first = next(iter(metrics.values()))
    about, (*_, (split, scores)) = first["about"], first["splits"].items()
    matrix, names = scores["confusion"], labels.names
    line = provenance(
        data=labels.name,
        network=about["network"],
        method=about["title"],
        seed=about["seed"],
        split=split,
        iteration=about["iteration"],
    )
    return Drawing(
        lambda: captioned(
            _reporting.figures.confusion_figure(torch.tensor(matrix, dtype=torch.int64), names),
            line,
        ),
        shows=["confusion", matrix, names, line],
    )


def make_draw_node(method: str) -> Callable[..., list[Drawing]]:
    """Node function that draws how the training of `method` went.

    That is its curves, a few images over the run and, of a method with RDD, the difficulty of every
    class over the run.
    """

    def draw_training(
        history: pd.DataFrame, plan: Plan, images: Images, training: Mapping[str, TrainingRecord]
    ) -> list[Drawing]:
        """Figures of the first seed."""
        rows = _first_seed(history)
        job = next(iter(plan.values()), None)
        line = _provenance(method, job, images, iteration=rows[-1]["iteration"] if rows else "")
        handovers = [] if job is None else _handovers(job)
        names = images.labels.names
        drawings = [
            Drawing(
                lambda: captioned(_reporting.curves.training_curves(rows, handovers), line),
                shows=["history", rows, handovers, line],
            ),
            _draw_progress(images, next(iter(training.values())).snapshots, handovers, line),
        ]
        if find_method(method).uses_rdd:
            drawings.append(
                Drawing(
                    lambda: captioned(
                        _reporting.difficulty.difficulty_figure(rows, names, handovers), line
                    ),
                    shows=["difficulty", rows, names, handovers, line],
                )
            )
        return drawings

    draw_training.__name__ = f"draw_{method}_history"
    return draw_training


def _draw_progress(
    images: Images,
    snapshots: Sequence[Snapshot],
    handovers: Sequence[tuple[int, str, str]],
    line: str,
) -> Drawing:
    """The images that predictions were kept of, with these."""
    titles = [_titled(snapshot["iteration"], handovers) for snapshot in snapshots]

    def draw() -> Figure:
        kept = [snapshot["maps"] for snapshot in snapshots]
        names = {name for maps in kept[:1] for name in maps}
        rows = [
            _reporting.progress.ProgressRow(
                sample.name, *images.read(sample), [maps[sample.name] for maps in kept]
            )
            for sample in images.split("val").samples
            if sample.name in names
        ]
        return captioned(_reporting.progress.progress_figure(rows, titles, images.labels), line)

    labels = images.labels.model_dump(mode="json")
    shows = [digest(list(snapshots)), titles, images.digest, labels, line]
    return Drawing(draw, shows=["progress", *shows])


def _titled(iteration: int, handovers: Sequence[tuple[int, str, str]]) -> str:
    """The iteration, and the stage that it lies in."""
    stage = ""
    for last, before, after in handovers:
        stage = after if iteration > last else stage or before
    return f"iteration {iteration}" + (f" ({stage})" if stage else "")


def _first_seed(history: pd.DataFrame) -> list[dict[str, float]]:
    if "seed" in history and len(history):
        history = history[history["seed"] == history["seed"].iloc[0]].drop(columns="seed")
    return cast(list[dict[str, float]], history.to_dict("records"))


def _provenance(method: str, job: TrainingJob | None, images: Images, *, iteration: object) -> str:
    """The line below figures of one training; `job` is None where the weights were given."""
    data = images.labels.name
    if job is None:
        return provenance(data=data, method=find_method(method).title)
    return provenance(
        data=data,
        network=job.network.name,
        method=method_title(method, job.rdd),
        seed=job.seed,
        iteration=iteration,
    )


def _handovers(job: TrainingJob) -> list[tuple[int, str, str]]:
    """Where one stage ends and the next begins, of those that this training has been through."""
    stages, rdd, iterations = job.definition.stages, job.rdd_settings, job.recipe.iterations
    ends = [stage_span(stages, stage.name, rdd, iterations)[1] for stage in stages]
    return [
        (end, before.name.upper(), after.name.upper())
        for end, (before, after) in zip(ends, pairwise(stages), strict=False)
        if 0 < end < job.last_iteration
    ]


def the_only(networks: Networks) -> NetworkCheckpoint:
    """The one network of an entry with one."""
    (network,) = networks.values()
    return network
