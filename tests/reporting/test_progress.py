from __future__ import annotations

import numpy as np
import torch

from rdd_pipeline.data.layouts.scenes import SCENES
from rdd_pipeline.reporting.figures import colorize
from rdd_pipeline.reporting.progress import ProgressRow, progress_figure
from tests.reporting.drawn import draw, texts

LABEL = torch.zeros(8, 12, dtype=torch.uint8)
LABEL[:4] = 255
LABEL[:, 6:] = 3


def _row(*predictions: torch.Tensor) -> ProgressRow:
    return ProgressRow("val_1", torch.zeros(3, 8, 12, dtype=torch.uint8), LABEL, predictions)


def test_a_row_shows_image_label_and_predictions_in_their_order() -> None:
    first, last = torch.zeros(4, 6, dtype=torch.uint8), LABEL[::2, ::2].clone() % 255
    figure = progress_figure([_row(first, last)] * 2, ["iteration 4", "iteration 8 (TSE)"], SCENES)
    draw(figure)
    pictures = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    assert len(pictures) == 8
    np.testing.assert_array_equal(pictures[3], colorize(last, SCENES))
    shown = texts(figure)
    # Labeled are the lower left quarter of class 0 and the right half of class 3.
    assert "33 % right" in shown
    assert "100 % right" in shown
    assert "iteration 8 (TSE)" in shown


def test_an_image_without_labels_has_no_share() -> None:
    row = ProgressRow("a", torch.zeros(3, 8, 12), torch.full((8, 12), 255), [torch.zeros(4, 6)])
    assert "no labeled pixel" in texts(progress_figure([row], ["iteration 4"], SCENES))


def test_without_predictions_the_figure_says_so() -> None:
    figure = progress_figure([], [], SCENES)
    draw(figure)
    assert "No predictions were kept" in texts(figure)
