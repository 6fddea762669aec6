"""The small line below every figure: what it was made of."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from rdd_pipeline.commands import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FONT_SIZE, COLOR = 6.5, "#666666"
_WIDTH = 0.58
"""Of a character, on average, in font sizes."""


def provenance(
    *,
    data: str = "",
    network: str = "",
    method: str = "",
    seed: object = "",
    split: str = "",
    iteration: object = "",
    scores: str = "",
) -> str:
    """What a figure was made of, in one line; what is empty is left out.

    A `Drawing` has it among what it shows, so that a figure with another line is drawn anew.

    Args:
        data: Name of the data set (`LabelSet.name`).
        network: Name of the network or networks.
        method: Title of the method or methods.
        seed: Of the training.
        split: The images are from.
        iteration: The weights are of.
        scores: How it was scored, where that is not said elsewhere.
    """
    facts = {
        "data": data,
        "network": network,
        "method": method,
        "seed": seed,
        "split": split,
        "iteration": iteration,
        "scores": scores,
        "environment": environment(),
    }
    return " · ".join(
        f"{name}: {value}" for name, value in facts.items() if value not in ("", None)
    )


def captioned(figure: Figure, line: str) -> Figure:
    """The figure with the line below it, in several ones where it is too long.

    Args:
        figure: Of any layout; it is to be saved with ``bbox_inches="tight"``.
        line: From `provenance`; empty: nothing is added.

    Returns:
        The same figure.
    """
    if not line:
        return figure
    room = int(figure.get_figwidth() * 72 / (FONT_SIZE * _WIDTH))
    # A dollar sign begins a formula, which names of data sets and classes are not.
    text = textwrap.fill(line, max(room, 20), break_long_words=False).replace("$", r"\$")
    if figure.legends and figure.get_layout_engine():
        # By themselves they move to the edge of the file, over the line: the layout ends here.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for legend in figure.legends:
            legend.set_bbox_to_anchor((0, 0, 1, 1), figure.transFigure)
    # Outside, so that no layout or legend has to make room; files hold all that is drawn.
    lowest = 0.0 if figure.get_layout_engine() else min(0.0, figure.get_tightbbox().y0)
    place = (lowest - 0.06) / figure.get_figheight()
    figure.text(0.005, place, text, va="top", color=COLOR, size=FONT_SIZE)
    return figure
