"""Label statistics of an index, one row for each split and class."""

from __future__ import annotations

from rdd_pipeline.data.index import Index
from rdd_pipeline.data.labels import LabelSet

IGNORED = "(ignored)"


def label_statistics(index: Index, labels: LabelSet) -> list[dict[str, object]]:
    """How often each class occurs.

    Returns:
        One row for each split and class, then one for the split's ignored pixels: `split`, `class`,
        `pixels`, `share` (of the split's labeled pixels; for the ignored ones, of all pixels) and
        `images` (how many contain it).
    """
    rows: list[dict[str, object]] = []
    for split, counts in index.counts.items():
        total = sum(counts.pixels)
        labeled = total - counts.pixels[-1]
        for number, name in enumerate((*labels.names, IGNORED)):
            whole = total if name == IGNORED else labeled
            rows.append(
                {
                    "split": split,
                    "class": name,
                    "pixels": counts.pixels[number],
                    "share": counts.pixels[number] / whole if whole else 0.0,
                    "images": counts.images[number],
                }
            )
    return rows
