"""The ingestion report: one HTML page without scripts or links to other files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rdd_pipeline.data.index import Index, index_digest
from rdd_pipeline.data.labels import LabelSet, hex_of
from rdd_pipeline.data.statistics import IGNORED
from rdd_pipeline.reporting.page import page_template

SIZES_SHOWN = 8
"""Image sizes listed for each split, the most frequent first."""
LISTED = 5000
"""Rows of the lists of problems and of warnings; a browser does not like many more."""

LEGEND = 30
"""Classes named beside the pictures; of more the table of classes has the colors."""


def ingestion_report(
    index: Index,
    labels: LabelSet,
    statistics: Sequence[Mapping[str, Any]],
    *,
    layout: str,
    root: str,
    quarantine: bool,
    divided: str = "",
    strips: Mapping[str, Sequence[Mapping[str, str]]] = MappingProxyType({}),
) -> str:
    """The page.

    Args:
        index: What was found.
        labels: Class names and colors.
        statistics: Rows of `label_statistics`.
        layout: Name of the layout.
        root: Where the images are.
        quarantine: Whether bad images were left out; otherwise they stop the run.
        divided: Which splits were made of the training images, if any.
        strips: A few pictures by split, of `contact_strips`.

    Returns:
        HTML; names from the data set are escaped.
    """
    by_class = {(row["split"], row["class"]): row for row in statistics}
    splits = list(index.counts)
    blocked = any(problem.blocks for problem in index.problems)
    largest = max((row["share"] for row in statistics if row["class"] != IGNORED), default=0) or 1
    page = page_template("ingestion.html.jinja")
    white = (n for n, color in zip(labels.names, labels.colors, strict=True) if min(color) > 250)
    return page.render(
        title=labels.name,
        layout=layout,
        root=root,
        images=len(index.samples),
        digest=index_digest(index.samples),
        quarantine=quarantine and not blocked,
        blocked=blocked,
        problems=index.problems[:LISTED],
        problem_count=len(index.problems),
        divided=divided,
        strips={split: pictures for split, pictures in strips.items() if pictures},
        legend=LEGEND,
        white=list(white),
        ignored=any(by_class[split, IGNORED]["pixels"] for split in splits),
        warnings=index.warnings[:LISTED],
        warning_count=len(index.warnings),
        splits=[
            {"name": split, "ignored": by_class[split, IGNORED]["share"], **_sizes(index, split)}
            for split in splits
        ],
        classes=[
            {
                "name": name,
                "color": hex_of(color),
                "cells": [
                    {**row, "bar": row["share"] / largest, "text": _percent(row["share"])}
                    for row in (by_class[split, name] for split in splits)
                ],
            }
            for name, color in zip(labels.names, labels.colors, strict=True)
        ],
    )


def _percent(share: float) -> str:
    return "< 0.01 %" if 0 < share < 0.0001 else f"{100 * share:.2f} %"


def _sizes(index: Index, split: str) -> dict[str, Any]:
    counts = Counter((s.width, s.height) for s in index.samples if s.split == split)
    texts = [
        f"{width} x {height} ({count})"
        for (width, height), count in counts.most_common(SIZES_SHOWN)
    ]
    if len(counts) > SIZES_SHOWN:
        texts.append(f"{len(counts) - SIZES_SHOWN} other sizes")
    return {
        "images": counts.total(),
        "megapixels": sum(w * h * count for (w, h), count in counts.items()) / 1e6,
        "sizes": ", ".join(texts),
    }
