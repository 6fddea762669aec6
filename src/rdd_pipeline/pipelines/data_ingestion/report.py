"""The ingestion report: one HTML page without scripts or links to other files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined

from rdd_pipeline.data.index import Index, index_digest
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.data.statistics import IGNORED

SIZES_SHOWN = 8
"""Image sizes listed for each split, the most frequent first."""
LISTED = 5000
"""Rows of the lists of problems and of warnings; a browser does not like many more."""

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Images of {{ title }}</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem;
         padding: 0 1rem; color: #222; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
  table { border-collapse: collapse; margin: .5rem 0; }
  th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left;
           vertical-align: top; }
  td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  .bar { display: inline-block; height: .7em; background: #4a7ebb; }
  .swatch { display: inline-block; width: 1em; height: 1em; border: 1px solid #888;
            vertical-align: -.15em; }
  .good { color: #1a7f37; } .bad { color: #b3261e; } .warn { color: #8a5a00; }
  code { font-size: .92em; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Images of {{ title }}</h1>
<p>Layout <code>{{ layout }}</code> in <code>{{ root }}</code>, {{ images }} labeled images
without a problem. Digest of splits, names and contents: <code>{{ digest }}</code>.</p>

<h2>Problems</h2>
{% if not problems %}
<p class="good">None. Every image and mask was decoded and fits its partner.</p>
{% else %}
<p class="bad">{{ problem_count }} found.
{% if quarantine %}The pairs they are about were left out.
{% elif blocked %}The run stopped.
{% else %}The run stopped. To go on without these pairs: <code>data.on_problem=quarantine</code>.
{% endif %}</p>
<table>
<tr><th class="n">#</th><th>File</th><th>What is wrong, and what to do</th></tr>
{% for problem in problems %}
<tr><td class="n">{{ loop.index }}</td><td><code>{{ problem.file }}</code></td>
<td>{{ problem.text }}</td></tr>
{% endfor %}
</table>
{% if problem_count > problems|length %}<p>... and {{ problem_count - problems|length }} more, in
the catalog entry <code>image_problems</code>.</p>{% endif %}
{% endif %}

<h2>Warnings</h2>
{% if not warnings %}
<p class="good">None.</p>
{% else %}
<p class="warn">{{ warning_count }}: allowed, and perhaps a mistake.</p>
<ul>
{% for warning in warnings %}<li>{{ warning }}</li>
{% endfor %}
</ul>
{% if warning_count > warnings|length %}<p>... and {{ warning_count - warnings|length }} more.</p>
{% endif %}
{% endif %}

<h2>Splits and sizes</h2>
{% if divided %}<p>{{ divided }}</p>
{% endif %}
<table>
<tr><th>Split</th><th class="n">Images</th><th class="n">Megapixels</th>
<th class="n">Ignored pixels</th><th>Width x height (images)</th></tr>
{% for split in splits %}
<tr><td>{{ split.name }}</td><td class="n">{{ split.images }}</td>
<td class="n">{{ "%.1f"|format(split.megapixels) }}</td>
<td class="n">{{ "%.2f"|format(100 * split.ignored) }} %</td>
<td>{{ split.sizes }}</td></tr>
{% endfor %}
</table>

<h2>Classes</h2>
<p>Share of the labeled pixels (their number is shown under the pointer), and how many images hold
the class.</p>
<table>
<tr><th class="n">Id</th><th>Class</th>
{% for split in splits %}<th class="n">{{ split.name }}</th><th></th><th class="n">images</th>
{% endfor %}</tr>
{% for row in classes %}
<tr><td class="n">{{ loop.index0 }}</td>
<td><span class="swatch" style="background: {{ row.color }}"></span> {{ row.name }}</td>
{% for cell in row.cells %}
<td class="n{{ '' if cell.pixels else ' warn' }}" title="{{ cell.pixels }} pixels">
{{ "%.3f"|format(100 * cell.share) }} %</td>
<td><span class="bar" style="width: {{ "%.2f"|format(7 * cell.bar) }}em"></span></td>
<td class="n">{{ cell.images }}</td>
{% endfor %}</tr>
{% endfor %}
</table>
</body>
</html>
"""


def ingestion_report(
    index: Index,
    labels: LabelSet,
    statistics: Sequence[Mapping[str, Any]],
    *,
    layout: str,
    root: str,
    quarantine: bool,
    divided: str = "",
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

    Returns:
        HTML; names from the data set are escaped.
    """
    by_class = {(row["split"], row["class"]): row for row in statistics}
    splits = list(index.counts)
    blocked = any(problem.blocks for problem in index.problems)
    largest = max((row["share"] for row in statistics if row["class"] != IGNORED), default=0) or 1
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return page.from_string(_TEMPLATE).render(
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
        warnings=index.warnings[:LISTED],
        warning_count=len(index.warnings),
        splits=[
            {"name": split, "ignored": by_class[split, IGNORED]["share"], **_sizes(index, split)}
            for split in splits
        ],
        classes=[
            {
                "name": name,
                "color": "#{:02x}{:02x}{:02x}".format(*color),
                "cells": [
                    {**row, "bar": row["share"] / largest}
                    for row in (by_class[split, name] for split in splits)
                ],
            }
            for name, color in zip(labels.names, labels.colors, strict=True)
        ],
    )


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
