"""Nodes that train one method with other settings and rank them by val."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
import rich
from pydantic import ValidationError
from rich import box
from rich.table import Table

from rdd_pipeline import tracking
from rdd_pipeline.commands import kedro_command
from rdd_pipeline.config import Parameters, Params, SweepParams, TrainerParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.distillation.methods import check_changes, find_method
from rdd_pipeline.drawing import Drawing
from rdd_pipeline.errors import NonFiniteLossError, UserError
from rdd_pipeline.launching.launch import train
from rdd_pipeline.networks import NetworkCheckpoint
from rdd_pipeline.pipelines.method_nodes import Networks, Plan, make_plan_node, the_only
from rdd_pipeline.pipelines.paths import local_network
from rdd_pipeline.reporting.caption import captioned, provenance
from rdd_pipeline.reporting.report import pipeline_of
from rdd_pipeline.reporting.sweep import METRICS, sweep_figure
from rdd_pipeline.training.preparation import check_names, prepare_job
from rdd_pipeline.training.shared import Student, train_together
from rdd_pipeline.training.state import TrainState
from rdd_pipeline.training.training import Training, TrainingResult
from rdd_pipeline.training.trials import Settings, settings_of, with_settings

logger = logging.getLogger(__name__)

SHOWN = 10
"""Rows of the printed table."""


@dataclass(frozen=True)
class Trial:
    """A setting to be tried.

    Attributes:
        number: From 1.
        settings: What it sets, by dotted name.
        stages: Jobs by seed of each stage, one after the other; mostly there is one.
    """

    number: int
    settings: Settings
    stages: tuple[Plan, ...]

    @property
    def name(self) -> str:
        """Of its MLflow run."""
        return f"trial {self.number}"

    def tell(self) -> None:
        """Say what it sets, before any of its numbers."""
        settings = {name: _shown(value) for name, value in self.settings.items()}
        tracking.log_params(settings, self.name)


def plan_trials(
    images: Images,
    network_plan: Mapping[str, Mapping[str, Any]],
    sweep: SweepParams,
    untuned: Plan,
) -> list[Trial]:
    """All trainings of the sweep, each known to fit both networks.

    Args:
        images: What is trained and validated on.
        network_plan: Both networks, see `check_networks`.
        sweep: What to try.
        untuned: What the run's own settings would train, by seed, of whatever method.

    Raises:
        UserError: There is nothing to try, one of the trainings is impossible, or no image to
            choose by.
    """
    if not images.split("val").samples:
        raise UserError(
            "A sweep chooses by split `val`, which has no images. Give it some (data.val_fraction)."
        )
    job = next(iter(untuned.values()))
    values = {
        "student": job.network,
        **{"recipe": job.recipe, "rdd": job.rdd, "methods": job.methods},
        **{"evaluation": job.evaluation, "seed": job.seed, "seeds": len(untuned)},
    }
    trials = []
    for number, settings in enumerate(settings_of(sweep), start=1):
        try:
            stages = _plan(images, network_plan, sweep, with_settings(values, settings))
        except UserError as error:
            raise UserError(f"Trial {number} of the sweep ({_text(settings)}): {error}") from error
        trials.append(Trial(number, settings, stages))
    logger.info("The sweep has %d trials of %s.", len(trials), find_method(sweep.method).title)
    return trials


def _plan(
    images: Images,
    network_plan: Mapping[str, Mapping[str, Any]],
    sweep: SweepParams,
    values: Mapping[str, Any],
) -> tuple[Plan, ...]:
    def section(name: str) -> Any:
        kind = Parameters.model_fields[name].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, Params)
        try:
            return kind.model_validate(values.get(name, {}))
        except ValidationError as error:
            faults = (fault["msg"].removeprefix("Value error, ") for fault in error.errors())
            raise UserError(f"{name}: {' '.join(faults)}") from error

    recipe, methods, student = section("recipe"), section("methods"), section("student")
    if sweep.budget is not None:
        recipe = recipe.model_copy(update={"iterations": sweep.budget})
    check_names([student])
    check_changes(methods)
    own = {**network_plan["student"], "network": local_network(student).model_dump(mode="json")}
    last = find_method(sweep.method)
    return tuple(
        make_plan_node(method)(
            images,
            {**network_plan, "student": own},
            recipe,
            section("rdd"),
            methods,
            section("evaluation"),
            values["seed"],
            values["seeds"],
        )
        for method in (*([last.stage_before] if last.stage_before else []), sweep.method)
    )


def train_trials(
    images: Images,
    trials: Sequence[Trial],
    teacher_weights: Networks,
    sweep: SweepParams,
    trainer: TrainerParams,
    work_folder: Path,
) -> pd.DataFrame:
    """Train all; what was trained before is loaded, and one that fails is a row that says why.

    Returns:
        One row a trial, the best first: ``trial``, its settings by dotted name, the metric (a mean
        over the seeds, in [0, 1]; NaN where it failed), ``deviation`` over several seeds,
        ``iteration`` of the weights that were kept, ``seconds`` of training, ``fingerprints``,
        ``failed``.

    Raises:
        UserError: All of them failed.
    """
    runner = _Runner(images, the_only(teacher_weights), trainer, work_folder)
    if trainer.share_teacher:
        for trial in trials:
            trial.tell()
        runner.train_together(trials)
    rows, best = [], -math.inf
    for trial in trials:
        trial.tell()
        row: dict[str, Any] = {"trial": trial.number}
        row |= {name: _shown(value) for name, value in trial.settings.items()}
        row |= {"failed": "", sweep.metric: math.nan}
        try:
            row |= runner.scored(trial, sweep.metric)
        except (UserError, NonFiniteLossError) as error:
            row["failed"] = str(error)
            tracking.log_failure(row["failed"], trial.name)
            logger.warning("Trial %d (%s): %s", trial.number, _text(trial.settings), error)
        rows.append(row)
        if row[sweep.metric] > best:
            best = row[sweep.metric]
        if not row["failed"]:
            tracking.log_metrics(
                int(row["iteration"]), {"score": row[sweep.metric]}, method=trial.name
            )
            tracking.log_metrics(trial.number, {"best_score": best})
            logger.info(
                "Trial %d of %d (%s): %s %.1f, best %.1f.",
                *(trial.number, len(trials), _text(trial.settings), METRICS[sweep.metric]),
                *(100 * row[sweep.metric], 100 * best),
            )
    if all(row["failed"] for row in rows):
        raise UserError(f"All {len(rows)} trials failed. The first: {rows[0]['failed']}")
    rows.sort(key=lambda row: (bool(row["failed"]), -row[sweep.metric], row["trial"]))
    return pd.DataFrame(rows).astype({"iteration": "Int64"})


class _Runner:
    """What trains the jobs of trials, as ordinary trainings in the work folder."""

    def __init__(
        self, images: Images, teacher: NetworkCheckpoint, trainer: TrainerParams, folder: Path
    ) -> None:
        self._images, self._teacher = images, teacher
        self._trainer, self._folder = trainer, folder

    def scored(self, trial: Trial, metric: str) -> dict[str, Any]:
        """Train what is not done yet; the trial's row."""
        results = [self._result(trial, seed) for seed in trial.stages[-1]]
        scores = [_score(result, metric) for result in results]
        if any(map(math.isnan, scores)):
            raise UserError(f"{metric} is NaN: no pixel of split `val` is labeled.")
        return {
            metric: fmean(scores),
            **({"deviation": stdev(scores)} if len(scores) > 1 else {}),
            "iteration": _kept(results[0]),
            "seconds": round(sum(result.state.cost.seconds for result in results), 1),
            "fingerprints": " ".join(result.fingerprint for result in results),
        }

    def train_together(self, trials: Sequence[Trial]) -> None:
        """Train all under one teacher at once (`trainer.share_teacher`): they are found done."""
        students = [
            self._student(trial, seed, 0, None) for trial in trials for seed in trial.stages[0]
        ]
        if len(students) > 1:
            train_together(students, self._trainer)

    def _result(self, trial: Trial, seed: str) -> TrainingResult:
        state: TrainState | None = None
        for stage in range(len(trial.stages)):
            training = self._training(trial, seed, stage, state)
            on_log = self._on_log(trial, seed, training.fingerprint)
            result = train(training, self._trainer, on_log)
            state = result.state
        return result

    def _student(self, trial: Trial, seed: str, stage: int, state: TrainState | None) -> Student:
        more = stage + 1 < len(trial.stages)
        training = self._training(trial, seed, stage, state)
        return Student(
            training,
            self._on_log(trial, seed, training.fingerprint),
            then=partial(self._student, trial, seed, stage + 1) if more else None,
        )

    def _training(self, trial: Trial, seed: str, stage: int, state: TrainState | None) -> Training:
        job = prepare_job(trial.stages[stage][seed], self._trainer)
        teacher = self._teacher if job.definition.needs_teacher else None
        return Training(job, self._images, teacher, state).stored_in(self._folder)

    def _on_log(self, trial: Trial, seed: str, fingerprint: str) -> Any:
        told = seed if len(trial.stages[0]) > 1 else None
        return partial(tracking.log_metrics, seed=told, method=trial.name, training=fingerprint)


def _kept(result: TrainingResult) -> int:
    """Iteration of the weights that are handed on."""
    return int(result.network.header.provenance["iteration"])


def _score(result: TrainingResult, metric: str) -> float:
    """Of the weights that are handed on, from the validation that has seen them."""
    at = [
        row[metric] for row in result.history if row["iteration"] == _kept(result) and metric in row
    ]
    return at[-1] if at else math.nan


# ---- what people see


def draw_sweep(images: Images, sweep_table: pd.DataFrame, sweep: SweepParams) -> Drawing:
    """The score over each parameter."""
    rows = [{str(name): v for name, v in row.items()} for row in sweep_table.to_dict("records")]
    names, title = list(sweep.parameters), find_method(sweep.method).title
    line = provenance(data=images.labels.name, method=title, split="val")
    return Drawing(
        lambda: captioned(sweep_figure(rows, names, sweep.metric), line),
        shows=["sweep", sweep_table.to_json(orient="records"), names, sweep.metric, line],
    )


def summarize_sweep(
    sweep_table: pd.DataFrame,
    trials: Sequence[Trial],
    sweep: SweepParams,
    reporting_folder: Path,
) -> str:
    """Print the table, and the command that trains with the best settings."""
    console, metric = rich.get_console(), METRICS[sweep.metric]
    title = f"{find_method(sweep.method).title}: {metric} in % of {len(trials)} trials"
    head = ["trial", *sweep.parameters, metric]
    body = [
        [
            str(row["trial"]),
            *(str(row[name]) for name in sweep.parameters),
            "failed" if row["failed"] else _percent(row, sweep.metric),
        ]
        for row in sweep_table.fillna({"failed": ""}).to_dict("records")
    ]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in head:
        table.add_column(name, justify="right", overflow="fold")
    for line in body[:SHOWN]:
        table.add_row(*line)
    console.print(table)
    if len(body) > SHOWN:
        console.print(f"... and {len(body) - SHOWN} more", highlight=False)
    notes = _notes(body, trials, sweep)
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"Table and figure: {reporting_folder}", soft_wrap=True)
    (best,) = (trial for trial in trials if str(trial.number) == body[0][0])
    own = [f"metrics_{sweep.method}"] if pipeline_of(sweep.method) != "distill_tse" else []
    command = kedro_command(pipeline_of(sweep.method), to_outputs=own, params=best.settings)
    last = f"With the best settings, and scored on test: {command}"
    console.print(last, soft_wrap=True, markup=False, highlight=False)
    lines = [head, ["---"] * len(head), *body]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n{note}\n" for note in (*notes, last))


def _percent(row: Mapping[Any, Any], metric: str) -> str:
    spread = row.get("deviation", math.nan)
    return f"{100 * row[metric]:.1f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")


def _notes(body: Sequence[Sequence[str]], trials: Sequence[Trial], sweep: SweepParams) -> list[str]:
    notes = []
    failed = sum(line[-1] == "failed" for line in body)
    if failed:
        notes.append(f"{failed} of {len(body)} failed; column `failed` of the table says why.")
    if len(trials[0].stages[-1]) == 1 and len(body) > 1:
        notes.append(
            "One seed: a difference may be chance, and the best of several is flattered by it. "
            "seeds=3 tells more."
        )
    if sweep.budget is not None:
        notes.append(
            f"Trials had {sweep.budget} iterations; the command below trains the recipe's."
        )
    return notes


def _shown(value: Any) -> str:
    """A setting as text, as it may stand in --params."""
    return value if isinstance(value, str) else json.dumps(value)


def _text(settings: Settings) -> str:
    return ", ".join(f"{name}={_shown(value)}" for name, value in settings.items())
