from __future__ import annotations

import html
import io
import math
import re
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rdd_pipeline.data.labels import LabelSet, make_lookup
from rdd_pipeline.data.layouts.scenes import SCENES
from rdd_pipeline.distillation.methods import METHODS, RDD_PLUS
from rdd_pipeline.reporting.figures import (
    RddRow,
    colorize,
    confusion_figure,
    dataset_preview,
    is_loss,
    rdd_figure,
    training_curves,
)

NAN = math.nan


def _draw(figure: Figure) -> tuple[int, int]:
    """Render as the catalog does; a warning (of a layout that does not fit, say) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=40, bbox_inches="tight", format="rgba")
    return len(buffer.getvalue()) // 4, len(figure.axes)


def _texts(figure: Figure) -> str:
    found = []
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_title(loc="left"), axes.get_xlabel()]
        found += [axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        found += [label.get_text() for label in axes.get_yticklabels()]
        legend = axes.get_legend()
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    return "\n".join(found)


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
        prediction=prediction,
        confidence=torch.full(size, 0.5) if confidence else None,
        hard_student=half,
        hard_teacher=torch.zeros(size, dtype=torch.bool),
        chosen=half & (label != 255),
    )


def _column(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title() == title)


def test_rdd_figure_has_a_row_of_six_pictures_for_each_image() -> None:
    figure = rdd_figure([_row("val_1"), _row("val_2")], SCENES)
    _draw(figure)
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == 12
    text = _texts(figure)
    for expected in ("val_1", "val_2", "TFE weight", "hard for both", "Pedestrian", "(ignored)"):
        assert expected in text


def test_rdd_figure_counts_valid_pixels_only() -> None:
    figure = rdd_figure([_row()], SCENES)
    text = _texts(figure)
    assert "100.0 % of the pixels right" in text
    assert "50.0 % of the pixels" in text


def test_rdd_figure_paints_hard_pixels_by_who_finds_them_hard() -> None:
    figure = rdd_figure([_row()], SCENES)
    _, student, teacher, both = _column(figure, "hard pixels").images
    assert np.asarray(student.get_array())[..., 3].sum() == 48
    assert np.asarray(teacher.get_array())[..., 3].sum() == 0
    assert np.asarray(both.get_array())[..., 3].sum() == 0


def test_rdd_figure_does_without_an_auxiliary_head() -> None:
    figure = rdd_figure([_row(confidence=False)], SCENES)
    _draw(figure)
    assert "no\nauxiliary head" in _texts(figure)


def test_figures_open_no_pyplot_window() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    rdd_figure([_row()], SCENES)
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("figure", "reason"),
    [
        (rdd_figure([], SCENES), "No image"),
        (dataset_preview([], SCENES), "no training images"),
        (confusion_figure(torch.zeros(2, 2).long(), ("a", "b")), "No labeled pixel"),
        (training_curves([]), "No training history"),
    ],
)
def test_nothing_to_show_is_said_in_the_figure(figure: Figure, reason: str) -> None:
    _draw(figure)
    assert reason in _texts(figure)


def test_colors_are_those_of_the_label_set_and_ignored_is_white() -> None:
    picture = colorize(torch.tensor([[0, 10], [255, 3]]), SCENES)
    assert tuple(picture[0, 0]) == SCENES.colors[0]
    assert tuple(picture[0, 1]) == SCENES.colors[10]
    assert tuple(picture[1, 0]) == (255, 255, 255)


def test_preview_names_images_and_their_ignored_share() -> None:
    label = torch.zeros(10, 10, dtype=torch.uint8)
    label[0] = 255
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    figure = dataset_preview([("first", image, label), ("second", image, label)], SCENES)
    _draw(figure)
    assert "first" in _texts(figure)
    assert "10.0 % ignored" in _texts(figure)


def test_a_large_label_set_names_the_classes_that_are_seen() -> None:
    many = LabelSet(
        name="many",
        names=tuple(f"class{number}" for number in range(150)),
        colors=tuple((number, number, number) for number in range(150)),
        lookup=make_lookup({number: number for number in range(150)}),
    )
    label = torch.full((10, 10), 99, dtype=torch.uint8)
    label[0] = 7
    figure = dataset_preview([("a", torch.zeros(3, 10, 10, dtype=torch.uint8), label)], many)
    _draw(figure)
    names = _texts(figure).split()
    assert {"class7", "class99"} <= set(names)
    assert "class8" not in names


def test_confusion_rows_are_shares_of_the_label() -> None:
    matrix = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    figure = confusion_figure(matrix, ("road", "sky", "pole"))
    _draw(figure)
    shares = np.asarray(figure.axes[0].images[0].get_array().filled(0.0))  # type: ignore[union-attr]
    np.testing.assert_allclose(shares[:2], [[0.75, 0.25, 0], [0, 1, 0]])
    text = _texts(figure)
    assert "75.0" in text
    assert "absent" in text
    assert "mean 77.50" in text


def test_confusion_of_many_classes_is_drawn() -> None:
    figure = confusion_figure(torch.eye(171).long(), [str(number) for number in range(171)])
    _draw(figure)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(shown[:, :171], np.eye(171))


def test_confusion_wants_a_name_for_each_class() -> None:
    with pytest.raises(ValueError, match="needs 2 class names, found 3"):
        confusion_figure(torch.zeros(2, 2), ("a", "b", "c"))


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
    figure = training_curves(_history(rdd=True))
    _draw(figure)
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [45.0]  # type: ignore[index]
    assert "best 50.00" in _texts(figure)
    assert "chosen" in _texts(figure)


LOSSES = {"loss", "task", "kd", "cwd_logits", "student_ce", "aux_student_ce", "aux_teacher_ce"}
SHARES = {"hard_student", "aux_hard_student", "hard_teacher", "chosen", "chosen_none"}
SHARES |= {"aux_chosen", "aux_chosen_none", "teacher_confidence", "a_share_of_tomorrow"}
CHOSEN = ("road", "sky")
BY_CLASS = {"aux_hard_student.pole", *(f"chosen.{name}" for name in CHOSEN)}


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
    _draw(figure)
    panels = _panels(figure)
    assert {name: len(panels[name].lines) for name in panels} == {
        "loss": len(LOSSES),
        "val mIoU in %": 2,
        "% of the pixels": len(SHARES),
        "chosen by TSE,\n% of the class": 0,
        "hard for the student (auxiliary heads),\n% of the class": 0,
        "learning rate": 1,
    }
    for name in ("loss", "% of the pixels"):
        styles = {(str(line.get_color()), str(line.get_linestyle())) for line in panels[name].lines}
        assert len(styles) == len(panels[name].lines), name
        labels = [str(line.get_label()) for line in panels[name].lines]
        assert len(set(labels)) == len(labels)
        assert not [label for label in labels if "_" in label]
    assert "hard for the student (auxiliary heads)" in _curves(panels["% of the pixels"])
    chosen = panels["chosen by TSE,\n% of the class"]
    assert {text.get_text() for text in chosen.get_yticklabels()} == set(CHOSEN)


def test_every_loss_of_every_method_is_a_loss() -> None:
    for method in (*METHODS.values(), *RDD_PLUS.values()):
        assert all(map(is_loss, method.weights)), method.title


def test_the_shares_of_classes_are_a_map_with_gaps() -> None:
    rows: list[dict[str, float]] = [
        {"iteration": 10, "chosen.road": 0.25, "chosen.pole": 0.0},
        {"iteration": 20, "chosen.road": 0.5},
        {"iteration": 30, "chosen.road": 0.75, "chosen.pole": 1.0},
    ]
    (axes,) = training_curves(rows).axes
    (mesh,) = axes.collections
    shares = np.ma.filled(np.ma.asarray(mesh.get_array()), np.nan)
    np.testing.assert_allclose(shares, [[25, 50, 75], [0, np.nan, 100]])


def test_of_many_classes_those_that_tell_most_are_shown() -> None:
    row = {f"chosen.c{n}": n / 150 for n in range(150)}
    row |= {f"hard_teacher.c{n}": n / 150 for n in range(150)}
    chosen, hard = training_curves([{"iteration": s} | row for s in (1.0, 2.0)]).axes
    shown = [{text.get_text() for text in axes.get_yticklabels()} for axes in (chosen, hard)]
    assert shown == [{f"c{n}" for n in range(20)}, {f"c{n}" for n in range(130, 150)}]


def test_fading_from_tfe_to_tse_is_a_curve_and_a_switch_is_none() -> None:
    fade = [{"iteration": s, "loss": 1.0, "tfe_share": 1.0 - s / 10} for s in (1.0, 5.0, 10.0)]
    assert "% of the pixels" in _panels(training_curves(fade))
    switch = [{"iteration": s, "loss": 1.0, "tfe_share": float(s < 5)} for s in (1.0, 5.0, 10.0)]
    assert "% of the pixels" not in _panels(training_curves(switch))


def test_one_point_is_a_mark_and_no_panel_is_empty() -> None:
    row = {"iteration": 10, "loss": 1.0, "task": 0.5, "lr": 0.1, "tfe_share": 1.0}
    figure = training_curves([row | {"teacher_confidence": 0.8}])
    _draw(figure)
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
    _draw(figure)
    assert len(figure.axes) == 3
    assert not [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]


def test_gaps_of_the_history_are_left_out() -> None:
    figure = training_curves(_history(rdd=False))
    losses = figure.axes[0].lines[0]
    assert len(np.asarray(losses.get_xdata())) == 10
    assert np.isfinite(np.asarray(losses.get_ydata())).all()


def test_one_point_is_enough_for_curves() -> None:
    _draw(training_curves([{"iteration": 1, "loss": 1.0, "lr": 0.1, "tfe_share": 1.0}]))


@pytest.mark.parametrize("name", [r"$\frac$", "a$b$c", "$", "_x", "a_b", "<b>", "{{x}}", r"\$"])
def test_names_are_shown_as_they_stand(name):
    """Between two dollar signs matplotlib reads a formula, and not every one can be read."""
    labels = LabelSet(
        name=name,
        names=(name, "other"),
        colors=((1, 2, 3), (4, 5, 6)),
        lookup=make_lookup({0: 0, 1: 1}),
    )
    image, label = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)
    preview = dataset_preview([(name, image, label)], labels)
    curves = training_curves([{"iteration": 1, f"chosen_{name}": 0.5, "loss": 1.0}] * 2)
    for figure in (preview, confusion_figure(torch.eye(2), labels.names), curves):
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            figure.savefig(buffer, format="svg")
        shown = html.unescape("".join(re.findall(r"<text[^>]*>([^<]*)</text>", buffer.getvalue())))
        assert name.lstrip("_") in shown
