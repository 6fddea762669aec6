from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.reporting.comparison import spread
from rdd_pipeline.reporting.examples import (
    Example,
    Region,
    regions_figure,
    side_by_side_figure,
    worst_figure,
)


def _example(height: int, width: int, networks: int, *, ignored: bool = False) -> Example:
    generator = torch.Generator().manual_seed(height)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    label = torch.randint(0, 11, (2 * height, 2 * width), generator=generator).to(torch.uint8)
    label[:3] = 255
    if ignored:
        label[:] = 255
    prediction = torch.where(label == 255, 0, label.long())
    prediction[: 2 + height, :width] = 3
    return Example("a$b$c", image, label, (prediction,) * networks)


def _texts(figure: Figure) -> str:
    return "\n".join(
        text
        for axes in figure.axes
        for text in (
            axes.get_title(),
            axes.get_title(loc="left"),
            *(t.get_text() for t in axes.texts),
        )
    )


def test_images_are_chosen_at_evenly_spaced_quantiles() -> None:
    scores = [5.0, math.nan, 1.0, 3.0, 2.0, 4.0, 0.0]
    assert [scores[i] for i in spread(scores, 3)] == [1.0, 3.0, 5.0]
    assert [scores[i] for i in spread(scores, 1)] == [3.0]
    assert sorted(scores[i] for i in spread(scores, 99)) == [0, 1, 2, 3, 4, 5]
    assert spread([math.nan], 2) == spread([], 2) == []


def test_many_networks_are_put_below_and_images_keep_their_shape() -> None:
    titles = [f"network {n}" for n in range(6)]
    examples = [_example(10, 14, 6), _example(16, 8, 6, ignored=True)]
    figure = side_by_side_figure(examples, titles, CAMVID, "some rule")
    figure.draw_without_rendering()
    text = _texts(figure)
    assert all(text.count(title) == 2 for title in titles)
    assert "nothing labeled" in text
    assert r"a\$b\$c" in text
    shown = [axes for axes in figure.axes if axes.images]
    assert all(axes.get_aspect() == 1 for axes in shown)
    assert len(shown) == 2 * (2 + 2 * 6)


def test_wrong_pixels_are_counted_below_each_prediction() -> None:
    example = _example(10, 14, 1)
    valid = example.label != 255
    wrong = (example.predictions[0] != example.label) & valid
    share = 100 * float(wrong.sum() / valid.sum())
    assert f"{share:.1f} % wrong" in _texts(worst_figure([example], CAMVID, "rule"))


def test_regions_are_cut_out_with_their_surroundings() -> None:
    example = _example(20, 30, 1)
    mask = np.ones((4, 6), bool)
    region = Region(example, (10, 54, 4, 6), mask, "1. Road? (12)")
    figure = regions_figure([("Car", [region, region]), ("Sky", [])], CAMVID, "rule")
    figure.draw_without_rendering()
    axes = next(axes for axes in figure.axes if axes.images)
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    assert (right - left, bottom - top) == (24, 24)
    assert left <= 54 <= 60 <= right <= 60
    assert top <= 10 <= 14 <= bottom
    assert "1. Road? (12)" in _texts(figure)


@pytest.mark.parametrize(
    "figure",
    [
        side_by_side_figure([], ["a"], CAMVID, ""),
        worst_figure([], CAMVID, ""),
        regions_figure([("Car", [])], CAMVID, ""),
    ],
)
def test_nothing_to_show_is_said(figure: Figure) -> None:
    assert figure.axes[0].texts
