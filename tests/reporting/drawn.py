"""What tests ask of a figure."""

from __future__ import annotations

import io
import warnings

from matplotlib.figure import Figure


def draw(figure: Figure) -> tuple[int, int]:
    """Render as the catalog does; a warning (of a layout that does not fit, say) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=40, bbox_inches="tight", format="rgba")
    return len(buffer.getvalue()) // 4, len(figure.axes)


def texts(figure: Figure) -> str:
    found = []
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_title(loc="left"), axes.get_xlabel()]
        found += [axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        found += [label.get_text() for label in axes.get_yticklabels()]
        legend = axes.get_legend()
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    return "\n".join(found)
