from __future__ import annotations

import html
import io
import re

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from rdd_pipeline.data.labels import LabelSet, make_lookup
from rdd_pipeline.data.layouts.scenes import SCENES
from rdd_pipeline.reporting.curves import training_curves
from rdd_pipeline.reporting.figures import colorize, confusion_figure
from rdd_pipeline.reporting.pixels import rdd_figure
from rdd_pipeline.reporting.preview import dataset_preview
from tests.reporting.drawn import draw, texts


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
    draw(figure)
    assert reason in texts(figure)


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
    draw(figure)
    assert "first" in texts(figure)
    assert "10.0 % ignored" in texts(figure)


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
    draw(figure)
    names = texts(figure).split()
    assert {"class7", "class99"} <= set(names)
    assert "class8" not in names


def test_confusion_rows_are_shares_of_the_label() -> None:
    matrix = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    figure = confusion_figure(matrix, ("road", "sky", "pole"))
    draw(figure)
    shares = np.asarray(figure.axes[0].images[0].get_array().filled(0.0))  # type: ignore[union-attr]
    np.testing.assert_allclose(shares[:2], [[75, 25, 0], [0, 100, 0]])
    text = texts(figure)
    assert "75.0" in text
    assert "absent" in text
    assert "mean 77.50" in text


def test_confusion_of_many_classes_is_drawn() -> None:
    figure = confusion_figure(torch.eye(171).long(), [str(number) for number in range(171)])
    draw(figure)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(shown[:, :171], 100 * np.eye(171))


def test_confusion_wants_a_name_for_each_class() -> None:
    with pytest.raises(ValueError, match="needs 2 class names, found 3"):
        confusion_figure(torch.zeros(2, 2), ("a", "b", "c"))


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
    for figure in (preview, confusion_figure(torch.eye(2), labels.names)):
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            figure.savefig(buffer, format="svg")
        shown = html.unescape("".join(re.findall(r"<text[^>]*>([^<]*)</text>", buffer.getvalue())))
        assert name.lstrip("_") in shown
