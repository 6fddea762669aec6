from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from rdd_pipeline.reporting.difficulty import BINS, MOST, _bins, difficulty_figure
from rdd_pipeline.reporting.figures import BOTH, CHOSEN, NEITHER, STUDENT_ONLY, TEACHER_ONLY
from tests.reporting.drawn import draw, texts


def _row(iteration: int, name: str, **shares: float) -> dict[str, float]:
    return {"iteration": iteration} | {f"{what}.{name}": value for what, value in shares.items()}


TSE = {"hard_student": 0.6, "hard_teacher": 0.3, "hard_both": 0.2, "chosen": 0.5}


def _history(*names: str) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for name in names:
        rows += [_row(5, name, weight_low=0.1, weight_middle=0.3), _row(10, name, **TSE)]
    return rows


def _areas(axes: Axes) -> dict[str, tuple[float, float]]:
    """Lowest and highest value by color."""
    found: dict[str, Any] = {}
    for area in axes.collections:
        heights = area.get_paths()[0].vertices[:, 1]  # type: ignore[index]
        found[to_hex(area.get_facecolor()[0])] = heights.min(), heights.max()
    return found


def test_a_class_is_divided_by_weight_and_then_by_whom_it_is_hard_for():
    figure = difficulty_figure(_history("road"), ["road", "never seen"], [(7, "TFE", "TSE")])
    draw(figure)
    (axes,) = (a for a in figure.axes if a.get_visible())
    areas = _areas(axes)
    low, middle, high = list(areas)[:3]
    expected = {low: (0, 10), middle: (10, 40), high: (40, 100)}
    expected |= {STUDENT_ONLY.lower(): (0, 40), TEACHER_ONLY.lower(): (40, 50)}
    expected |= {BOTH.lower(): (50, 70), NEITHER.lower(): (70, 100)}
    assert areas.keys() == expected.keys()
    for color, span in expected.items():
        assert areas[color] == pytest.approx(span), color
    (chosen,) = (line for line in axes.lines if line.get_color() == CHOSEN)
    assert list(np.asarray(chosen.get_ydata())) == [50.0, 50.0]
    assert list(np.asarray(chosen.get_xdata())) == [5.0, 10.0]
    assert axes.get_title(loc="left") == "road"
    assert axes.get_title(loc="right") == "50 % chosen"
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [7.5]  # type: ignore[index]


def test_a_history_that_did_not_count_what_is_hard_for_both_has_lines():
    old = [_row(step, "road", hard_student=0.6, hard_teacher=0.3, chosen=0.5) for step in (5, 10)]
    figure = difficulty_figure(old, ["road"])
    draw(figure)
    (axes,) = figure.axes
    assert not axes.collections
    colors = {line.get_color() for line in axes.lines}
    assert colors == {STUDENT_ONLY, TEACHER_ONLY, CHOSEN, "white"}


def test_of_many_classes_those_that_are_hard_and_left_out_have_a_panel():
    names = [f"c{number}" for number in range(40)]
    rows = [
        _row(5, name, **{**TSE, "hard_student": 0.6 + number / 100, "chosen": 0.1})
        for number, name in enumerate(names)
    ]
    figure = difficulty_figure(rows, names)
    draw(figure)
    assert [a.get_title(loc="left") for a in figure.axes] == names[-MOST:]
    assert figure.get_suptitle().startswith(f"{MOST} of 40 classes")


def test_tfe_alone_has_no_legend_of_tse():
    figure = difficulty_figure([_row(5, "road", weight_low=0.1, weight_middle=0.3)], ["road"])
    draw(figure)
    (legend,) = figure.legends
    assert all(text.get_text().startswith("TFE") for text in legend.get_texts())


@pytest.mark.parametrize("history", [[], [{"iteration": 1, "loss": 1.0, "hard_student": 0.5}]])
def test_without_counts_the_figure_says_so(history):
    figure = difficulty_figure(history, ["road"])
    draw(figure)
    assert "No pixel was counted" in texts(figure)


@pytest.mark.parametrize("count", [1, 2, BINS, BINS + 1, 1000])
def test_bins_take_every_point_once(count):
    bins = _bins(count)
    assert bins[0] == 0
    assert len(bins) == min(count, BINS)
    sizes = np.diff([*bins, count])
    assert sizes.min() >= count // BINS
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("name", [r"$\frac$", "_x", "a.b"])
def test_names_are_shown_as_they_stand(name):
    figure = difficulty_figure(_history(name), [name])
    draw(figure)
    assert name.lstrip("_") in figure.axes[0].get_title(loc="left").replace("\\$", "$")
