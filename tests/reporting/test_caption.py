from __future__ import annotations

import io

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from rdd_pipeline.commands import Session, remember_session
from rdd_pipeline.reporting.caption import captioned, provenance


@pytest.fixture
def session():
    remember_session(Session(), "scenes")
    yield
    remember_session(Session())


def test_a_line_says_what_is_known_in_one_order(session):
    line = provenance(iteration=480, method="RDD", data="scenes", seed=0, network="fcn")
    assert line == (
        "data: scenes · network: fcn · method: RDD · seed: 0 · iteration: 480 · environment: scenes"
    )


def test_the_given_environment_wins_over_the_default(session):
    remember_session(Session("camvid/small"))
    assert provenance(data="camvid") == "data: camvid · environment: camvid/small"


def test_without_a_session_nothing_is_made_up():
    remember_session(Session())
    assert provenance() == ""


@pytest.mark.parametrize("layout", [None, "constrained"])
@pytest.mark.parametrize("width", [2.0, 9.0])
def test_the_line_lies_below_everything_and_within_the_width(layout, width):
    figure = Figure(figsize=(width, 2.0), layout=layout)
    axes = figure.subplots()
    axes.set_xlabel("iteration")
    line = provenance(data="a$b$c", network="deeplabv3_resnet101", method="RDD with KD", split="v")
    assert captioned(figure, line) is figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (text,) = (t for t in figure.findobj(Text) if t.get_text().startswith("data: "))
    box, label = text.get_window_extent(), axes.xaxis.label.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= min(label.y0, 0)
    assert text.get_text().replace("\n", " ").replace("\\", "") == line
    figure.savefig(io.BytesIO(), bbox_inches="tight")


def test_no_line_adds_nothing():
    figure = Figure()
    captioned(figure, "")
    assert not [text for text in figure.findobj(Text) if text.get_text()]
