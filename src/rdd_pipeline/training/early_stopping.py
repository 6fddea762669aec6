"""Early stopping, `recipe.early_stopping`: when a training is over before its last iteration.

A function of the history alone, which is part of every training state: work that goes on, each of
several processes and students that share a teacher decide alike, without a state of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rdd_pipeline.config import EarlyStoppingParams
from rdd_pipeline.training.job import TrainingJob


def has_plateaued(scores: Iterable[float], params: EarlyStoppingParams) -> bool:
    """Whether none of the last `patience` scores has risen by more than `min_delta`.

    Args:
        scores: mIoU in [0, 1] of the validations that count, oldest first, none of them NaN.
        params: How long to wait, for how much.
    """
    reference, waiting = -1.0, 0  # below every score, `min_delta` included
    for score in scores:
        # Many small steps add up: the reference stays until all of `min_delta` is reached.
        if reference < 0 or score > reference + params.min_delta / 100:
            reference, waiting = score, 0
        else:
            waiting += 1
    return waiting >= params.patience


def why_stopped(job: TrainingJob, history: Sequence[Mapping[str, float]]) -> str | None:
    """Why a training with this history is over early, as words for people; None: it is not.

    Validations count from the first iteration of the method's last stage on: scores of the stage
    before (TFE) measure another loss. One without a score (NaN: no pixel of `val` is labeled) says
    nothing, and the run's last one need not stop anything.
    """
    params, iterations = job.recipe.early_stopping, job.recipe.iterations
    if params is None or not job.ends_run:
        return None
    first = _first_that_counts(job, params)
    scores = {
        int(row["iteration"]): row["val.miou"]
        for row in history
        if "val.miou" in row and row["val.miou"] == row["val.miou"]
    }
    if not has_plateaued((s for i, s in scores.items() if first <= i < iterations), params):
        return None
    best = max(scores, key=lambda iteration: scores[iteration])
    by = f" by more than {params.min_delta:g} points" if params.min_delta else ""
    times = f"{params.patience} validation{'s' if params.patience > 1 else ''}"
    return (
        f"stopped at iteration {max(scores)} of {iterations}: val mIoU has not risen{by} for "
        f"{times}, best {100 * scores[best]:.1f} % at iteration {best}"
    )


def why_never(job: TrainingJob) -> str | None:
    """Why early stopping cannot end this training whatever its scores are; None: it can.

    The first validation that counts has nothing to be compared with, so one more than `patience`
    is needed before the last iteration.
    """
    params, recipe = job.recipe.early_stopping, job.recipe
    if params is None or not job.ends_run:
        return None
    every = range(recipe.validate_every, recipe.iterations, recipe.validate_every)
    count = sum(iteration >= _first_that_counts(job, params) for iteration in every)
    if count > params.patience:
        return None
    name = "teacher_recipe" if job.method == "teacher" else "recipe"
    return (
        f"{name}.early_stopping.patience={params.patience} never stops anything: before the last "
        f"of {recipe.iterations} iterations {count} validations count, and "
        f"{params.patience + 1} are needed. Lower it, or {name}.validate_every."
    )


def _first_that_counts(job: TrainingJob, params: EarlyStoppingParams) -> int:
    return max(job.first_of_last_stage, params.min_iterations)
