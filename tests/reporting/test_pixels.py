from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rdd_pipeline.data.layouts.scenes import SCENES
from rdd_pipeline.reporting.pixels import RddRow, rdd_figure
from tests.reporting.drawn import draw, texts


def _row(
    name: str = "val_1", *, confidence: bool = True, size: tuple[int, int] = (8, 12)
) -> RddRow:
    label = torch.zeros(size, dtype=torch.uint8)
    label[:2] = 255
    half = torch.zeros(size, dtype=torch.bool)
    half[:, :6] = True
    prediction = label.clone().long()
    prediction[:2] = 3
    return RddRow(
        name=name,
        image=torch.full((3, 16, 24), 120, dtype=torch.uint8),
        label=label,
        student=prediction,
        teacher=label.long() % 255,
        confidence=torch.full(size, 0.5) if confidence else None,
        hard_student=half,
        hard_teacher=torch.zeros(size, dtype=torch.bool),
        chosen=half & (label != 255),
    )


def _column(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title() == title)


def test_rdd_figure_has_eight_pictures_for_each_image() -> None:
    figure = rdd_figure([_row("val_1"), _row("val_2")], SCENES)
    draw(figure)
    assert len([axes for axes in figure.axes if axes.images]) == 16
    text = texts(figure)
    for expected in ("val_1", "val_2", "TFE weight", "wrong or hard: both", "right or easy: both"):
        assert expected in text
    for expected in ("Pedestrian", "(ignored)", "teacher's prediction", "25.0 % ignored"):
        assert expected in text


def test_scores_of_an_image_are_of_its_valid_pixels() -> None:
    row = _row()
    student = row.label.clone().long()
    student[2:4] = 3  # a third of the 6 valid rows
    student[:2] = 5  # ignored ones
    text = texts(rdd_figure([replace(row, student=student)], SCENES))
    # Class 0: 4 of 6 rows; class 3 is predicted and nowhere right.
    assert f"mIoU {100 * (4 / 6 + 0) / 2:.1f} %, 66.7 % right" in text
    assert "mIoU 100.0 %, 100.0 % right" in text


def test_an_image_without_a_label_has_no_score() -> None:
    row = _row()
    text = texts(rdd_figure([replace(row, label=torch.full_like(row.label, 255))], SCENES))
    assert text.count("no labeled pixel") == 2


def test_errors_and_hard_pixels_are_painted_by_whose_they_are() -> None:
    row = _row()
    wrong = row.label.clone().long()
    wrong[2] = 7
    wrong[:2] = 7
    both = row.label.clone().long()
    both[:4] = 1
    figure = rdd_figure([replace(row, student=wrong, teacher=both)], SCENES)
    _, *masks = _column(figure, "errors").images
    # Student, teacher, both, ignored: a row has 12 pixels.
    assert [int(np.asarray(m.get_array())[..., 3].sum()) for m in masks] == [0, 12, 12, 24]
    _, *masks = _column(figure, "hard pixels").images
    assert [int(np.asarray(m.get_array())[..., 3].sum()) for m in masks] == [36, 0, 0, 24]


def test_pictures_keep_their_proportions() -> None:
    wide, tall = _row(), replace(_row(), image=torch.zeros(3, 24, 12, dtype=torch.uint8))
    figure = rdd_figure([wide, tall], SCENES)
    draw(figure)
    for axes, ratio in zip(figure.axes[:16:8], (16 / 24, 2.0), strict=True):
        box = axes.get_window_extent()
        assert abs(box.height / box.width - ratio) < 0.02


def test_rdd_figure_does_without_an_auxiliary_head() -> None:
    figure = rdd_figure([_row(confidence=False)], SCENES)
    draw(figure)
    assert "no\nauxiliary head" in texts(figure)


def test_figures_open_no_pyplot_window() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    rdd_figure([_row()], SCENES)
    assert plt.get_fignums() == before
