"""`recipe.early_stopping`: where a training ends, and that nothing else of it changes."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from random import Random

import pytest
import torch
from pydantic import ValidationError

from rdd_pipeline.config import EarlyStoppingParams, EvaluationParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.confusion import Scores
from rdd_pipeline.training.early_stopping import has_plateaued, why_never, why_stopped
from rdd_pipeline.training.job import check_early_stopping
from rdd_pipeline.training.loop import Trainer, train
from rdd_pipeline.training.shared import Student, train_together
from rdd_pipeline.training.training import Training
from tests.equal import same_training

from .conftest import CPU

EVERY = CPU.model_copy(update={"log_every": 1})
TOGETHER = EVERY.model_copy(update={"share_teacher": True})
PATIENT = {"early_stopping": {"patience": 2}, "validate_every": 1}
SCORES = {"tse": (0.9, 0.1, 0.2, 0.15, 0.2), "kd": (0.1, 0.2, 0.3, 0.4, 0.5)}
"""By method; TSE begins at iteration 2, has its best at 3, and ends at 5, no sooner."""


class Stop(Exception):  # noqa: N818
    pass


@pytest.fixture
def make(blocks, teacher, make_job, tmp_path):
    def call(method="tse", folder="", *, recipe=PATIENT, state=None, **fields):
        job = make_job(method, recipe={"iterations": 6, **recipe}, rdd={"tfe_length": 2}, **fields)
        training = Training(job, blocks.images, teacher, state)
        return training.stored_in(tmp_path / folder) if folder else training

    return call


@pytest.fixture
def scored(monkeypatch):
    """Validations have the mIoU of `SCORES`, in place of some of an untrained network."""

    def scores(self: Trainer):
        given = SCORES[self.job.method.replace("tfe", "tse")]
        place = self.state.iteration - 1
        miou = given[place] if place < len(given) else 0.6
        return replace(Scores.from_matrix(matrix), miou=miou)

    matrix = torch.eye(3, dtype=torch.int64)
    monkeypatch.setattr(Trainer, "_scores", scores)


def history(scores, every=1):
    rows = []
    for place, score in enumerate(scores, start=1):
        rows += [{"iteration": place * every, "loss": 1.0}]
        rows += [{"iteration": place * every, "val.miou": score}]
    return rows


def loop_over(scores, patience, delta):
    """Where a training with these scores ends; None: nowhere. Written as people say it."""
    best, best_place = scores[0], 0
    for place, score in enumerate(scores):
        if score > best + delta:
            best, best_place = score, place
        if place - best_place == patience:
            return place
    return None


@pytest.mark.parametrize("delta", [0, 5])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_it_is_over_where_a_loop_says(patience, delta):
    params, ends = EarlyStoppingParams(patience=patience, min_delta=delta), set()
    for seed in range(50):
        random = Random(seed)
        scores = [random.random() for _ in range(8)]
        found = (n for n in range(8) if has_plateaued(scores[: n + 1], params))
        ends.add(end := next(found, None))
        assert end == loop_over(scores, patience, delta / 100)
    assert len(ends) > 2


def test_small_steps_add_up_and_nothing_is_no_plateau():
    params = EarlyStoppingParams(patience=2, min_delta=1.5)
    assert not has_plateaued([], params)
    assert not has_plateaued([0.10, 0.11, 0.12, 0.13, 0.14], params)
    assert has_plateaued([0.10, 0.11, 0.115], params)


@pytest.mark.parametrize(
    ("method", "fields", "end"),
    [
        ("kd", {}, 3),
        ("kd", {"recipe": {"min_iterations": 3}}, 5),
        ("tse", {}, 7),  # TSE begins at 5
        ("tse", {"stage": "tse"}, 7),
        ("tse", {"stage": "tfe"}, None),
        ("tfe", {"stage": "tfe"}, None),
    ],
)
def test_validations_that_count(make_job, method, fields, end):
    early = {"patience": 2, **fields.pop("recipe", {})}
    job = make_job(method, recipe={"early_stopping": early}, **fields)
    rows = history([0.5] * 8)
    found = (n for n in range(1, 9) if why_stopped(job, rows[: 2 * n]))
    assert next(found, None) == end


def test_the_end_of_the_run_and_scores_of_nothing_stop_nothing(make_job):
    job = make_job("kd", recipe={"early_stopping": {"patience": 2}})
    assert why_stopped(job, history([0.5] * 3, every=4)[:4]) is None  # 8 is the last one anyway
    assert why_stopped(job, history([math.nan] * 7)) is None
    assert why_stopped(make_job("kd"), history([0.5] * 7)) is None


@pytest.mark.parametrize("method", ["kd", "tse"])
@pytest.mark.parametrize("patience", range(1, 9))
@pytest.mark.parametrize("every", [1, 2, 3, 8])
def test_a_patience_that_never_stops_anything_is_told(make_job, method, patience, every):
    early = {"early_stopping": {"patience": patience}, "validate_every": every}
    job = make_job(method, recipe=early)
    rows = [r for r in history([0.5] * 8) if "loss" in r or r["iteration"] % every == 0]
    stops = any(why_stopped(job, rows[:n]) for n in range(len(rows)))
    words = why_never(job)
    assert (words is None) == stops
    assert words is None or f"early_stopping.patience={patience} never stops" in words
    assert why_never(make_job(method)) is None
    assert why_never(make_job("tfe", recipe=early, stage="tfe")) is None


def test_words(make_job):
    job = make_job("kd", recipe={"early_stopping": {"patience": 1, "min_delta": 0.5}})
    assert why_stopped(job, history([0.421, 0.424])) == (
        "stopped at iteration 2 of 8: val mIoU has not risen by more than 0.5 points for "
        "1 validation, best 42.4 % at iteration 2"
    )


@pytest.mark.parametrize(
    "block", [{}, {"patience": 0}, {"patience": 1, "min_delta": -1}, {"patience": 1, "wait": 1}]
)
def test_what_makes_no_sense_is_refused(block):
    with pytest.raises(ValidationError):
        EarlyStoppingParams(**block)


def test_without_validation_it_is_refused(make, blocks):
    samples = tuple(sample for sample in blocks.samples if sample.split != "val")
    training = replace(make(), images=replace(blocks.images, samples=samples))
    with pytest.raises(UserError, match=r"^recipe\.early_stopping stops by .* has no images"):
        training.check()
    with pytest.raises(UserError, match=r"^teacher_recipe\.early_stopping .* leave teacher_recipe"):
        check_early_stopping(training.job.recipe, training.images, "teacher_recipe")


def test_only_what_it_decides_has_another_fingerprint(make_job, make):
    def digest(**fields):
        return make(**fields).fingerprint

    plain = {"validate_every": 1}
    assert "early_stopping" not in make_job().model_dump(mode="json")["recipe"]
    assert digest() != digest(recipe=plain)
    assert digest(stage="tfe") == digest(stage="tfe", recipe=plain)
    flip, last = EvaluationParams(flip=True), {**PATIENT, "keep": "last"}
    assert digest(recipe=last, evaluation=flip) != digest(recipe=last)
    assert digest(stage="tfe", recipe=last, evaluation=flip) == digest(stage="tfe", recipe=last)


def test_a_run_interrupted_after_every_iteration_stops_where_one_never_was(make, scored):

    def stop_at(number):
        def on_log(iteration, values):
            if iteration >= number and "loss" in values:
                raise Stop

        return on_log

    whole = train(make(), EVERY)
    assert (whole.trained, whole.state.best.iteration) == (5, 1)
    for number in range(2, 6):
        with pytest.raises(Stop):
            train(make(folder="work"), EVERY, on_log=stop_at(number))
    pieces = train(make(folder="work"), EVERY)
    assert pieces.trained == 1
    assert same_training(pieces, whole)
    assert pieces.network.header.provenance["iteration"] == "1"  # recipe.keep: best
    again = train(make(folder="work"), EVERY)
    assert again.trained == 0
    assert same_training(again, whole)
    # Killed between its last checkpoint and the mark that it is done.
    (make(folder="work").store.path / "done.json").unlink()
    marked = train(make(folder="work"), EVERY)
    assert marked.trained == 0
    assert same_training(marked, whole)


def test_up_to_its_end_it_is_the_training_without(make, scored, caplog):
    """Of which the last point of the curves is told, though it is between two."""
    caplog.set_level(logging.INFO)
    rarely = CPU.model_copy(update={"log_every": 4})
    told = []
    stopped = train(make(), rarely, on_log=lambda n, values: told.append((n, "loss" in values)))
    assert told[-2:] == [(5, False), (5, True)]
    assert stopped.state.cost.images == 10
    assert stopped.state.snapshots[-1]["iteration"] == 5
    assert (
        "tse stopped at iteration 5 of 6: val mIoU has not risen for 2 validations" in caplog.text
    )
    assert "5/6  loss" in caplog.text
    assert "stopped early" in caplog.text
    whole = train(make(recipe={"validate_every": 1}), rarely)
    assert whole.trained == 6
    for row in stopped.history[:-1]:
        assert row in whole.history


def test_who_stops_leaves_the_others_and_all_end_as_by_themselves(make, scored):
    def students():
        def then(state):
            return Student(make("tse", "together", stage="tse", state=state))

        return [
            Student(make("kd", "together")),
            Student(make("tfe", "together", stage="tfe"), then=then),
        ]

    train_together(students(), TOGETHER)
    tfe = train(make("tfe", "together", stage="tfe"), CPU)
    found = {
        "kd": train(make("kd", "together"), CPU),
        "tse": train(make("tse", "together", stage="tse", state=tfe.state), CPU),
    }
    assert {name: result.state.iteration for name, result in found.items()} == {"kd": 6, "tse": 5}
    assert not any(result.trained for result in (tfe, *found.values()))
    assert same_training(found["kd"], train(make("kd"), CPU))
    assert same_training(found["tse"], train(make("tse"), CPU))
