from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rdd_pipeline.distillation.methods import METHODS, RDD_PLUS
from rdd_pipeline.reporting.curves import is_loss, training_curves
from tests.reporting.drawn import draw, texts

NAN = math.nan


def _history(*, rdd: bool) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for iteration in range(10, 101, 10):
        row = {"iteration": iteration, "loss": 2.0 / iteration, "lr": 0.01, "task": 1.0 / iteration}
        if rdd:
            row |= {"tfe_share": float(iteration < 50), "chosen": 0.1, "hard_student": 0.2}
        rows.append(row)
        rows.append({"iteration": iteration, "val.miou": iteration / 200, "loss": NAN})
    return rows


def test_curves_mark_where_tse_takes_over() -> None:
    figure = training_curves(_history(rdd=True), [(41, "TFE", "TSE")])
    draw(figure)
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [41.5]  # type: ignore[index]
    assert "best 50.00" in texts(figure)
    assert "chosen" in texts(figure)
    assert "TFE" in texts(figure)


LOSSES = {"loss", "task", "kd", "cwd_logits", "student_ce", "aux_student_ce", "aux_teacher_ce"}
SHARES = {"hard_student", "aux_hard_student", "hard_teacher", "chosen", "chosen_none"}
AUXILIARY = {"aux_hard_student", "aux_chosen", "aux_chosen_none"}
AUXILIARY_PANEL = "auxiliary heads,\n% of the pixels"
SHARES |= {"aux_chosen", "aux_chosen_none", "teacher_confidence", "a_share_of_tomorrow"}
BY_CLASS = {"aux_hard_student.pole", "chosen.road", "hard_both.sky"}


def _panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_ylabel(): axes for axes in figure.axes}


def _curves(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.lines if line.get_linestyle() != "None"}


def test_losses_and_shares_have_panels_of_their_own() -> None:
    names = LOSSES | SHARES | BY_CLASS
    rows = [
        {"iteration": step, "lr": 0.1, "gradient_norm": 0.5, "tfe_share": 0.0, "val.miou": 0.1}
        | dict.fromkeys(names, 0.5 / step)
        for step in (1.0, 2.0, 3.0)
    ]
    figure = training_curves(rows)
    draw(figure)
    panels = _panels(figure)
    assert {name: len(panels[name].lines) for name in panels} == {
        "loss": len(LOSSES),
        "val mIoU in %": 2,
        "% of the pixels": len(SHARES) - len(AUXILIARY),
        AUXILIARY_PANEL: len(AUXILIARY),
        "learning rate": 1,
    }
    for name in ("loss", "% of the pixels", AUXILIARY_PANEL):
        colors = {str(line.get_color()) for line in panels[name].lines}
        assert len(colors) == len(panels[name].lines), name
        labels = [str(line.get_label()) for line in panels[name].lines]
        assert len(set(labels)) == len(labels)
        assert not [label for label in labels if "_" in label]
    assert "hard for the student" in _curves(panels[AUXILIARY_PANEL])


def test_no_color_is_there_twice_however_many_losses() -> None:
    row = {f"{name}": 1.0 for method in METHODS.values() for name in method.weights}
    (axes,) = training_curves([row | {"iteration": step, "loss": 2.0} for step in (1.0, 2.0)]).axes
    assert len({str(line.get_color()) for line in axes.lines}) == len(row) + 1


def test_tfe_and_tse_have_one_curve_of_the_auxiliary_cross_entropy() -> None:
    rows = [{"iteration": 1, "student_aux_ce": 2.0}, {"iteration": 2, "aux_student_ce": 1.0}]
    (axes,) = training_curves(rows).axes
    (line,) = axes.lines
    assert list(np.asarray(line.get_ydata())) == [2.0, 1.0]


@pytest.mark.parametrize("kd", [True, False])
def test_what_learns_without_a_teacher_is_not_called_the_student(kd: bool) -> None:
    row = {"iteration": 1, "loss": 2.0, "task": 1.0, "student_ce": 1.0} | (
        {"kd": 1.0} if kd else {}
    )
    words = texts(training_curves([row])).splitlines()
    assert ("student's cross-entropy" in words) is kd
    assert ("cross-entropy" in words) is not kd


def test_every_loss_of_every_method_is_a_loss() -> None:
    for method in (*METHODS.values(), *RDD_PLUS.values()):
        assert all(map(is_loss, method.weights)), method.title


def test_fading_from_tfe_to_tse_is_a_curve_and_a_switch_is_none() -> None:
    fade = [{"iteration": s, "loss": 1.0, "tfe_share": 1.0 - s / 10} for s in (1.0, 5.0, 10.0)]
    assert "% of the pixels" in _panels(training_curves(fade))
    switch = [{"iteration": s, "loss": 1.0, "tfe_share": float(s < 5)} for s in (1.0, 5.0, 10.0)]
    assert "% of the pixels" not in _panels(training_curves(switch))


def test_one_point_is_a_mark_and_no_panel_is_empty() -> None:
    row = {"iteration": 10, "loss": 1.0, "task": 0.5, "lr": 0.1, "tfe_share": 1.0}
    figure = training_curves([row | {"teacher_confidence": 0.8}])
    draw(figure)
    assert set(_panels(figure)) == {"loss", "% of the pixels", "learning rate"}
    for axes in figure.axes:
        assert axes.lines
        assert all(line.get_marker() == "o" for line in axes.lines)


def test_legends_and_the_best_mark_lie_beside_the_curves() -> None:
    figure = training_curves(_history(rdd=True))
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        area = axes.get_window_extent()
        for thing in (axes.get_legend(), *(t for t in axes.texts if "best" in t.get_text())):
            if thing is not None:
                box = thing.get_window_extent()
                assert box.x0 >= area.x1 or box.y0 >= area.y1


def test_a_flat_miou_looks_flat_and_its_axis_is_plain() -> None:
    rows = [{"iteration": s, "val.miou": 0.054239 + s * 1e-8} for s in (1.0, 2.0)]
    figure = training_curves(rows)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert high - low >= 1
    assert not axes.yaxis.get_offset_text().get_text()


def test_curves_without_rdd_have_no_boundary() -> None:
    figure = training_curves(_history(rdd=False))
    draw(figure)
    assert len(figure.axes) == 3
    assert not [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]


def test_gaps_of_the_history_are_left_out() -> None:
    figure = training_curves(_history(rdd=False))
    losses = figure.axes[0].lines[0]
    assert len(np.asarray(losses.get_xdata())) == 10
    assert np.isfinite(np.asarray(losses.get_ydata())).all()


def test_one_point_is_enough_for_curves() -> None:
    draw(training_curves([{"iteration": 1, "loss": 1.0, "lr": 0.1, "tfe_share": 1.0}]))
