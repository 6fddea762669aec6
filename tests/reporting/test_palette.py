from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from rdd_pipeline.data.labels import LabelSet, make_lookup
from rdd_pipeline.reporting.palette import _VISION, _lab, confusable, name_classes

NORMAL = _VISION[0]


def _labels(*colors: tuple[int, int, int]) -> LabelSet:
    return LabelSet(
        name="two",
        names=tuple(f"class{n}" for n in range(len(colors))),
        colors=colors,
        lookup=make_lookup({n: n for n in range(len(colors))}),
    )


@pytest.mark.parametrize(
    ("color", "lab"),  # Lindbloom's calculator, D65
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((128, 128, 0), (51.87, -12.93, 56.68)),
    ],
)
def test_lab_is_that_of_the_tables(color, lab):
    found = _lab(np.array([color]) / 255, NORMAL)[0]
    np.testing.assert_allclose(found, lab, atol=0.05)


def test_colors_are_close_by_any_kind_of_vision():
    assert confusable([(0, 0, 0), (255, 255, 255)]) == set()
    assert confusable([(200, 0, 0), (0, 0, 255), (210, 10, 5)]) == {0, 2}
    # Red and a green of its lightness: for people without one kind of cones only.
    pair = [(220, 60, 40), (120, 130, 0)]
    assert np.linalg.norm(np.diff(_lab(np.array(pair) / 255, NORMAL), axis=0)) > 50
    assert confusable(pair) == {0, 1}


def test_only_confusable_classes_are_named_and_only_where_there_is_room():
    near = _labels((200, 0, 0), (210, 10, 5), (0, 0, 255))
    classes = np.full((40, 60), 2, np.uint8)
    classes[5:25, 10:40] = 0
    classes[38, 50] = 1  # a single pixel
    axes = Figure().subplots()
    name_classes(axes, classes, near)
    (text,) = axes.texts
    assert text.get_text() == "class0"
    x, y = text.get_position()
    assert classes[int((1 - y) * 40), int(x * 60)] == 0
