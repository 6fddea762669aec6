"""The points of a training's curves: history, `on_log`, progress bar, and warnings about them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.distillation.stages import stage_shares
from rdd_pipeline.evaluation.confusion import Scores
from rdd_pipeline.training.difficulty import Difficulty, training_notes
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.progress import TrainingProgress
from rdd_pipeline.training.state import TrainState

logger = logging.getLogger(__name__)

OnLog = Callable[[int, Mapping[str, float]], None]
"""Called with (iteration, values) for every point of the curves."""


class RunningMeans:
    """Sums between two points of the curves; its clock runs only while the network trains."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._images = 0
        self._seconds = self._waited = 0.0
        self._mark = time.monotonic()

    def add(self, values: Mapping[str, float], images: int) -> float:
        """Count one step that ends now; returns the seconds it took."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._images += images
        now = time.monotonic()
        seconds = now - self._mark
        self._seconds += seconds
        self._mark = now
        return seconds

    def waited(self, seconds: float) -> None:
        """Count a wait for the images of a step."""
        self._waited += seconds

    def resume_clock(self, seconds: float = 0.0) -> None:
        """Leave out what was done since the last step (validation, checkpoints), but `seconds`."""
        self._mark = time.monotonic() - seconds

    def close(self) -> tuple[dict[str, float], int, float, float]:
        """Means, images, seconds, and seconds of waiting for images since the last call.

        A value that only some of the steps have, as where TSE takes over from TFE, is the mean of
        those.
        """
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        images, seconds, waited = self._images, self._seconds, self._waited
        self._sums, self._counts, self._images = {}, {}, 0
        self._seconds = self._waited = 0.0
        return means, images, seconds, waited


TOLD_AGAIN = 100
"""Points of a curve at most, evenly spaced, that are told again of what was trained before."""


def curve_points(
    history: Sequence[Mapping[str, float]],
) -> Iterator[tuple[int, dict[str, float]]]:
    """Points of a history as they were told: validations all, the others `TOLD_AGAIN` at most.

    The classes' shares were not: 450 curves of ADE20K.
    """
    every = -(-sum("loss" in row for row in history) // TOLD_AGAIN)
    seen = 0
    for row in history:
        seen += "loss" in row
        if "loss" not in row or seen % every == 0:
            point = {
                name: value
                for name, value in row.items()
                if name != "iteration" and (name.startswith("val.") or "." not in name)
            }
            yield int(row["iteration"]), point


class Curves:
    """Adds up what the steps say and turns it into points.

    Args:
        job: What is trained.
        labels: Its classes.
        state: Gets the points, in its history.
        progress: Shows them.
        on_log: Is told them; None: this rank tells nobody, and warns of nothing.
    """

    def __init__(
        self,
        job: TrainingJob,
        labels: LabelSet,
        state: TrainState,
        progress: TrainingProgress,
        on_log: OnLog | None,
    ) -> None:
        self.job, self.labels, self.state = job, labels, state
        self._progress, self._on_log = progress, on_log
        self._means, self._difficulty = RunningMeans(), Difficulty(labels.names)
        self._judged_from = 0.0

    def add(self, values: Mapping[str, float], pixels_of_class: Tensor | None) -> None:
        """Count one step that ends now."""
        size = self.job.recipe.batch_size
        if pixels_of_class is not None:
            self._difficulty.add(pixels_of_class)
        self.state.cost.images += size
        self.state.cost.seconds += self._means.add(values, size)

    def waited(self, seconds: float) -> None:
        """Count a wait for the images of a step."""
        self._means.waited(seconds)

    def resume_clock(self, seconds: float = 0.0) -> None:
        """Leave out what was done since the last step (validation, checkpoints), but `seconds`."""
        self._means.resume_clock(seconds)

    def log(self, lr: float) -> None:
        """A point with the means since the last one."""
        means, images, seconds, waited = self._means.close()
        row = {"lr": lr, **means}
        stages = self.job.definition.stages
        shares = stage_shares(
            stages, self.job.rdd_settings, self.state.iteration, self.job.recipe.iterations
        )
        row |= {f"{stage.name}_share": shares[stage.name] for stage in stages[:-1]}
        # The classes' shares stay out of what is told: 450 curves of ADE20K.
        self._append(row | self._difficulty.close())
        rate, waiting = (images / seconds, waited / seconds) if seconds > 0 else (0.0, 0.0)
        self._tell(row | {"images_per_second": rate, "waiting_for_images": waiting})
        self._progress.show(
            self.state.iteration, loss=means["loss"], lr=lr, rate=rate, waiting=waiting
        )
        self._warn_of_difficulty()

    def validated(self, scores: Scores) -> None:
        """A point with the scores of a validation."""
        row = {"val.miou": scores.miou, "val.pixel_accuracy": scores.pixel_accuracy}
        self._append(row)
        self._tell(row)
        best = math.nan if self.state.best is None else self.state.best.miou
        self._progress.validated(scores.miou, best=best)
        over = self.state.iteration == self.job.recipe.iterations
        if over and self.job.recipe.keep == "best" and self.state.best is None:
            self._warn(
                "every validation score is NaN, as no pixel of split 'val' is labeled. The last "
                "weights are kept, whether good or not."
            )

    def stopped_early(self, why: str) -> None:
        """No further point comes."""
        self._progress.stopped_early()
        if self._on_log is not None:
            logger.info("%s %s.", self.job.title, why)

    def _append(self, row: Mapping[str, float]) -> None:
        self.state.history.append({"iteration": self.state.iteration, **row})

    def _tell(self, row: Mapping[str, float]) -> None:
        if self._on_log is not None:
            self._on_log(self.state.iteration, row)

    def _warn(self, text: str) -> None:
        if self._on_log is not None:
            logger.warning("%s: %s", self.job.title, text)

    def _warn_of_difficulty(self) -> None:
        """Say once, early in TSE, what would else be found out at the end of the run.

        Looked at in tenths of TSE: reading the whole history at each point of the curves would
        take longer the longer the run is.
        """
        tse = self.job.recipe.iterations - self.job.warmup
        here = self.state.iteration - self.job.warmup
        if not max(self._judged_from, min(tse / 5, 500)) <= here <= tse / 2 or not self._on_log:
            return
        notes = training_notes(self.state.history, method=self.job.definition, labels=self.labels)
        for note in notes:
            self._warn(note)
        self._judged_from = math.inf if notes else here + tse / 10
