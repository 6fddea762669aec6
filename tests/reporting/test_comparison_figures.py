from __future__ import annotations

import io
import math
import warnings
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rdd_pipeline.reporting.comparison_figures import (
    MOST_CLASSES,
    _apart,
    as_svg,
    class_figure,
    cost_figure,
    iou_bars,
    shorten,
)

NAN = math.nan


def _draw(figure: Figure) -> None:
    """Render as the catalog does; a warning (of a layout that does not fit, say) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), dpi=40, bbox_inches="tight", format="rgba")


def _texts(figure: Figure) -> str:
    found = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    found += [legend.get_title().get_text() for legend in figure.legends]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in axes.texts]
        found += [label.get_text() for label in [*axes.get_yticklabels(), *axes.get_xticklabels()]]
    return "\n".join(found)


def _method(method: str, miou: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "title": method.upper(),
        "network": "net",
        "seeds": "0",
        "seed_count": 1,
        "protocol_digest": "c",
        "data_digest": "d",
        "val_score": miou,
        "val_sd": NAN,
        "val_values": f"{miou}",
        "val_gain": NAN,
        "images_per_second": NAN,
        **more,
    }


@pytest.mark.parametrize(
    ("figure", "reason"),
    [
        (iou_bars([]), "Nothing has been trained"),
        (iou_bars([_method("kd", NAN)]), "Nothing was evaluated"),
        (cost_figure([_method("kd", NAN, images_per_second=3.0)]), "No student's speed"),
        (class_figure([]), "No method was evaluated by class"),
        (cost_figure([]), "No student's speed"),
        (cost_figure([_method("teacher", 50.0, images_per_second=3.0)]), "No student's speed"),
        (cost_figure([_method("kd", 50.0, images_per_second=NAN)]), "No student's speed"),
    ],
)
def test_nothing_to_show_is_said_in_the_figure(figure: Figure, reason: str) -> None:
    _draw(figure)
    assert reason in _texts(figure)


# ---- mIoU


def test_methods_are_compared_with_spread_and_gain() -> None:
    table = [
        _method("teacher", 78.0, protocol_digest="net"),
        _method("tse", 75.5, val_sd=0.3, val_gain=1.5),
        _method("baseline", 74.0),
    ]
    figure = iou_bars(table)
    _draw(figure)
    text = _texts(figure)
    assert "75.50  (+1.50)" in text
    assert "TEACHER · net" in text
    assert len(figure.axes) == 1


def test_a_gain_whose_interval_covers_0_is_marked() -> None:
    table = [
        _method("tse", 75.5, seed_count=3, val_gain=1.5, val_gain_low=-0.1, val_gain_high=3.1),
        _method("kd", 75.0, seed_count=3, val_gain=1.0, val_gain_low=0.1, val_gain_high=1.9),
        _method("baseline", 74.0),
    ]
    text = _texts(iou_bars(table))
    assert "75.50  (+1.50, n.s.)" in text
    assert "75.00  (+1.00)" in text
    assert "n.s.: its 95 % interval covers 0" in text
    assert "one seed has no interval" in _texts(iou_bars([_method("kd", 75.0, val_gain=1.0)]))


def test_every_seed_is_a_point_of_its_own() -> None:
    several = _method("tse", 45.0, seeds="0,1,2", seed_count=3, val_values="44 nan 46")
    figure = iou_bars([several])
    _draw(figure)
    drawn = [list(np.asarray(line.get_xdata(), float)) for line in figure.axes[0].lines]
    assert [44.0, 46.0] in drawn
    assert "standard deviation" in _texts(figure)
    assert "standard deviation" not in _texts(iou_bars([_method("tse", 45.0)]))


def test_each_comparison_and_split_has_a_panel() -> None:
    table = [
        _method("tse", 75.0, test_score=70.0, test_sd=NAN, test_gain=NAN),
        _method("tse", 65.0, protocol_digest="other", test_score=NAN, test_sd=NAN, test_gain=NAN),
    ]
    figure = iou_bars(table)
    _draw(figure)
    assert len(figure.axes) == 4
    assert "not evaluated" in _texts(figure)


def test_a_teacher_alone_is_shown() -> None:
    figure = iou_bars([_method("teacher", 50.0)])
    _draw(figure)
    assert "50.00" in _texts(figure)


def test_weights_on_the_way_are_shown_only_when_there_is_nothing_else() -> None:
    assert "TFE" not in _texts(iou_bars([_method("tse", 75.0), _method("tfe", 25.0)]))
    assert "TFE" in _texts(iou_bars([_method("tfe", 25.0)]))


@pytest.mark.parametrize("count", [1, 2, 18])
def test_any_number_of_methods_can_be_drawn_from_a_table_of_a_file(count: int) -> None:
    table = [
        _method(f"m{i}", 70.0 + i, protocol_digest="c", images_per_second=float(i + 1))
        for i in range(count)
    ]
    text = pd.DataFrame(table).to_csv(index=False)
    rows: Any = pd.read_csv(io.StringIO(text)).to_dict("records")
    for figure in (iou_bars(rows), cost_figure(rows)):
        _draw(figure)
        assert all(f"M{i}" in _texts(figure).split() for i in range(count))


def test_long_names_of_networks_keep_both_ends() -> None:
    assert shorten("deeplabv3_resnet101") == "deeplabv3_resnet101"
    short = shorten("deeplabv3_mobilenetv3_large_100_minimal")
    assert len(short) == 24
    assert short.startswith("deeplabv3_m")
    assert short.endswith("00_minimal")


# ---- classes


def _classes(method: str, **iou: float) -> dict[str, Any]:
    row = _method(method, 50.0, split="test")
    for name, value in iou.items():
        row[f"iou.{name}"] = value
        row[f"gain.{name}"] = NAN if method in ("teacher", "baseline") else value - 50.0
    return row


def test_cells_hold_scores_and_are_colored_by_the_gain() -> None:
    rows = [
        _classes("teacher", Car=90.0, Pole=60.0, Bus=NAN),
        _classes("tse", Car=53.0, Pole=47.0, Bus=NAN),
        _classes("kd", Car=NAN, Pole=50.0, Bus=NAN),
    ]
    figure = class_figure(rows)
    _draw(figure)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["90.0", "60.0", "53.0", "47.0", "–", "50.0"]
    faces = [patch.get_facecolor() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert faces[0] == faces[1] == faces[4] == (0.93, 0.93, 0.93, 1.0)  # compared with nothing
    better, worse, same = (np.array(faces[i][:3]) for i in (2, 3, 5))
    assert better[2] > better[0]  # blue
    assert worse[0] > worse[2]  # red
    assert np.ptp(same) < 0.02  # the colors are centered on 0
    assert "Bus" not in _texts(figure)  # occurs nowhere


def test_classes_without_the_student_alone_are_neutral_and_have_no_scale() -> None:
    figure = class_figure([_classes("baseline", Car=50.0)])
    _draw(figure)
    assert len(figure.axes) == 1


def test_of_very_many_classes_those_that_differ_most_are_shown() -> None:
    scores = {f"c{number}": 50.0 + number for number in range(150)}
    figure = class_figure([_classes("tse", **scores)])
    _draw(figure)
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown == [f"c{number}" for number in range(150 - MOST_CLASSES, 150)]
    assert f"the {MOST_CLASSES} classes that differ most" in _texts(figure)


# ---- cost


def test_accuracy_over_speed_shows_students_with_a_known_speed() -> None:
    rows = [
        _method("teacher", 80.0, images_per_second=1.0),
        _method("tse", 75.0, images_per_second=30.0, val_sd=0.4),
        _method("kd", 74.0, images_per_second=300.0),
        _method("baseline", 73.0),
    ]
    figure = cost_figure(rows)
    _draw(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["TSE", "KD"]
    assert figure.axes[0].get_xscale() == "log"


def test_a_comparison_that_lacks_the_last_split_is_shown_on_its_own_last_one() -> None:
    both = _method("tse", 75.0, images_per_second=30.0, test_score=70.0)
    only_val = _method("kd", 74.0, images_per_second=9.0, protocol_digest="x", test_score=NAN)
    figure = cost_figure([both, only_val])  # as after a file, where every row has every column
    assert [axes.get_ylabel() for axes in figure.axes] == ["test mIoU in %", "val mIoU in %"]


@pytest.mark.parametrize("count", [1, 2, 9, 20])
def test_names_beside_the_cost_figure_do_not_cover_each_other(count: int) -> None:
    for wanted in ([0.5] * count, [0.02] * count, list(np.linspace(0.99, 0.9, count))):
        places = _apart(wanted)
        gap = min(0.09, 1.0 / max(count - 1, 1))
        assert all(a - b >= gap - 1e-9 for a, b in pairwise(places))
        assert places[-1] >= -1e-9
        assert places[0] <= 1 + 1e-9


def test_names_that_have_room_stay_where_their_points_are() -> None:
    assert _apart([0.9, 0.5, 0.1]) == [0.9, 0.5, 0.1]


# ---- SVG


def test_svg_needs_nothing_from_elsewhere_and_is_repeatable() -> None:
    first, second = (as_svg(iou_bars([_method("tse", 45.0)])) for _ in range(2))
    assert first == second
    root = ET.fromstring(first)
    assert root.tag.endswith("svg")
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert all(link.startswith("#") for link in links)
    assert b"<text" not in first  # letters are drawn, no font is needed
