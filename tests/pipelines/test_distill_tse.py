"""The figure of what RDD looked at."""

from __future__ import annotations

from matplotlib.figure import Figure

from rdd_pipeline.config import (
    EvaluationParams,
    RddParams,
)
from rdd_pipeline.pipelines.distill_tse.nodes import draw_pixels
from tests.pipelines.examples import (
    NO_AUXILIARY,
    STUDENT,
    checkpoint,
)


def test_pixels_are_drawn_for_any_teacher_and_number_of_images(ingested, teacher):
    student, blind = checkpoint(STUDENT, seed=1), checkpoint(NO_AUXILIARY.network)
    for one, count, splits in (
        (teacher, 1, ("val",)),
        (teacher, 5, ("train",)),
        (blind, 1, ("val",)),
        (teacher, 0, ("val",)),
        (teacher, 1, ("later",)),
    ):
        drawing = draw_pixels(
            ingested,
            {"0": one},
            {"0": student, "1": None},
            RddParams(min_kept=100),
            EvaluationParams(figure_images=count, splits=splits),
        )
        assert isinstance(drawing.draw(), Figure)
