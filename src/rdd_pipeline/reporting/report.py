"""The comparison as one HTML file that needs nothing else: tables, figures, how to read them."""

from __future__ import annotations

import base64
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

import rdd_pipeline
from rdd_pipeline.commands import kedro_command
from rdd_pipeline.distillation.methods import ABLATIONS, METHODS, RDD_PLUS, RDD_STAGES, STAGES
from rdd_pipeline.evaluation.confusion import METRICS
from rdd_pipeline.reporting.comparison import (
    Metrics,
    counted,
    fewer_classes,
    finished,
    flat,
    holds_among_all,
    metric_title,
    mixed_settings,
    notes_on,
    place,
    seed_order,
    side_by_side,
    split_names,
    verdict,
)
from rdd_pipeline.reporting.gallery import Gallery
from rdd_pipeline.reporting.page import page_template

Rows = Sequence[Mapping[str, Any]]
Jobs = Mapping[str, Mapping[str, Any]]

MEANING = {
    "better": "better than the student alone",
    "worse": "worse than the student alone",
    "open": "not distinguishable from the student alone",
    "single": "one common seed: no interval",
    "": "",
}
SPLIT_ROLES = {
    "val": "it picks the checkpoint (unless recipe.keep is last)",
    "test": "it is what is reported",
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What is shown.
        value: What the column is sorted by; NaN goes last.
        kind: CSS class.
        title: Shown when the pointer is over it.
    """

    text: str
    value: float = math.nan
    kind: str = ""
    title: str = ""

    @property
    def order(self) -> str:
        """Sort key for the page's script."""
        return f"{self.value:.6g}" if math.isfinite(self.value) else ""


@dataclass(frozen=True)
class Block:
    """Results that belong side by side."""

    heading: str
    facts: list[tuple[str, str]]
    recipe: list[tuple[str, str]]
    warnings: list[str]
    notes: list[str]
    head: list[str]
    body: list[list[Cell]]
    training_head: list[str]
    training_body: list[list[Cell]]
    class_split: str
    class_head: list[str]
    class_body: list[list[Cell]]
    guess: str
    gallery: Gallery | None


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows; as `kind` says, an SVG or a PNG file."""

    title: str
    caption: str
    file: bytes
    kind: str = "svg+xml"

    @property
    def source(self) -> str:
        """The file as a data URI: as an image its ids cannot meet those of other figures."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.file).decode()}"


def render_report(
    rows: Rows,
    class_rows: Rows,
    *,
    results: Iterable[Metrics],
    jobs: Jobs,
    pictures: Sequence[Picture],
    speeds: Rows = (),
    galleries: Mapping[str, Gallery] = MappingProxyType({}),
) -> str:
    """Write the page.

    Args:
        rows: Of `comparison.compare`.
        class_rows: Of `comparison.compare_classes`.
        results: Content of the metrics files that the rows were made of, oldest first.
        jobs: Job (content of ``job.json``) by fingerprint, as far as they are there.
        pictures: Shown in this order.
        speeds: Of the pipeline `benchmark`, as far as it was run.
        galleries: Single images by ``protocol_digest``, as far as they are there.
    """
    results = counted(results)
    metric = next((str(row["metric"]) for row in rows), "miou")
    template = page_template("report.html.jinja")
    blocks = [
        _block(finished(group), class_rows, results, jobs, speeds, galleries)
        for group in side_by_side(rows)
    ]
    return template.render(
        blocks=blocks,
        pictures=pictures,
        several_seeds=any(row["seed_count"] > 1 for row in rows),
        most_seeds=max((int(row["seed_count"]) for row in rows), default=0),
        splits=[(name, SPLIT_ROLES.get(name, "")) for name in split_names(rows)],
        commands=_commands(results),
        singles=_singles(results, metric),
        metric=METRICS[metric],
        single_splits=list(dict.fromkeys(name for r in results for name in r["splits"])),
        versions=[
            ("rdd_pipeline", rdd_pipeline.__version__),
            ("torch", torch.__version__),
            ("Python", platform.python_version()),
        ],
    )


# ---- numbers as text


def number(value: Any, digits: int = 2) -> str:
    """A number with fixed digits; a dash where it is unknown."""
    value = _float(value)
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def mean_text(row: Mapping[str, Any], split: str, digits: int = 2) -> str:
    """Mean with its standard deviation in parentheses, where there is one.

    An asterisk marks a mean over fewer classes than there are, see `comparison.notes_on`.
    """
    spread = _float(row.get(f"{split}_sd"))
    text = number(row.get(f"{split}_score"), digits) + "*" * fewer_classes(row, split)
    return f"{text} ({spread:.{digits}f})" if math.isfinite(spread) else text


def gain_text(row: Mapping[str, Any], split: str, digits: int = 2) -> str:
    """Difference to the student alone with half the width of its interval, and the mark.

    ``n.s.``: the interval covers 0; ``(n.s.)``: not distinguishable with all methods counted.
    """
    gain, low, high = (_float(row.get(f"{split}_gain{end}")) for end in ("", "_low", "_high"))
    if not math.isfinite(gain):
        return "–"
    if not math.isfinite(low):
        return f"{gain:+.{digits}f}"
    mark = " n.s." if verdict(row, split) == "open" else " (n.s.)"
    if holds_among_all(row, split):
        mark = ""
    return f"{gain:+.{digits}f} ± {(high - low) / 2:.{digits}f}{mark}"


def size_text(count: Any, unit: str = "") -> str:
    """A count with the prefix that leaves one to three digits before the point."""
    value = _float(count)
    if not math.isfinite(value):
        return "–"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def millions(count: Any) -> str:
    """A number of parameters."""
    text = number(_float(count) / 1e6)
    return text if text == "–" else f"{text} M"


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


# ---- parts


def _block(
    rows: Rows,
    class_rows: Rows,
    results: Sequence[Metrics],
    jobs: Jobs,
    speeds: Rows,
    galleries: Mapping[str, Gallery],
) -> Block:
    students = [row for row in rows if row["method"] != "teacher"]
    first = (students or rows)[-1]
    keys = {_key(row) for row in rows}
    members = [result for result in results if _key_of(result) in keys]
    newest = [jobs.get(result["about"].get("fingerprint", "")) for result in members]
    own = [
        job
        for result, job in zip(members, newest, strict=True)
        if job is not None and (result["about"]["method"] != "teacher" or not students)
    ]
    job: Mapping[str, Any] = own[-1] if own else {}
    splits = split_names(rows)
    facts = [
        ("data set", str(job.get("labels", {}).get("name", "not recorded"))),
        ("digest of images, labels and evaluation", str(first["data_digest"])),
        ("network" if not students else "student network", str(first["network"])),
        ("teachers", ", ".join(str(r["network"]) for r in rows if r["method"] == "teacher")),
        ("methods", str(len(students))),
        ("seeds", _seeds(students or rows)),
        ("digest of what all share", str(first["protocol_digest"])),
    ]
    size = job.get("image_size")
    if job:
        facts.append(
            ("image size", "as in the files" if size is None else f"{size[0]} x {size[1]}")
        )
        facts.append(("precision", str(job.get("precision", "not recorded"))))
    recipe = {f"recipe.{k}": v for k, v in flat(job.get("recipe", {})).items()}
    recipe |= {f"network.{k}": v for k, v in flat(job.get("network", {})).items()}
    shown = [row for row in finished(class_rows) if _key(row) in keys]
    metric = metric_title(rows)
    class_head, class_body = _class_table(shown)
    return Block(
        heading=str(first["network"]),
        facts=[(name, value) for name, value in facts if value],
        recipe=[(name, _plain(value)) for name, value in recipe.items()],
        warnings=mixed_settings(members, jobs),
        notes=notes_on(members),
        head=[
            "method",
            "seeds",
            *(
                part
                for split in splits
                for part in (f"{split} {metric}", f"{split} − student alone")
            ),
            *(f"{split} {name}" for split in splits[-1:] for name in ("boundary mIoU", "ECE")),
            "parameters",
            "MACs",
            *(["latency"] if speeds else []),
        ],
        body=[_cells(row, splits, speeds) for row in rows],
        training_head=[
            *("method", "images/s", "seconds", "peak memory"),
            *("parameters as trained", "MACs as trained"),
        ],
        training_body=[_training_cells(row) for row in rows],
        class_split=str(shown[0]["split"]) if shown else "",
        class_head=class_head,
        class_body=class_body,
        guess=_chance(rows, splits[-1]) if splits else "",
        gallery=galleries.get(str(first["protocol_digest"])),
    )


def _cells(row: Mapping[str, Any], splits: Sequence[str], speeds: Rows) -> list[Cell]:
    cells = [
        _name_cell(row),
        Cell(str(row["seed_count"]), _float(row["seed_count"]), "number", f"seeds {row['seeds']}"),
    ]
    for split in splits:
        kind = verdict(row, split)
        low, high = (_float(row.get(f"{split}_gain_{end}")) for end in ("low", "high"))
        interval = f", from {low:+.2f} to {high:+.2f}" if math.isfinite(low) else ""
        p = _float(row.get(f"{split}_gain_p_holm"))
        if math.isfinite(p):
            interval += f"; p with all methods counted (Holm): {p:.2g}"
        cells.append(
            Cell(
                mean_text(row, split),
                _float(row.get(f"{split}_score")),
                "number",
                _values(row, split),
            )
        )
        cells.append(
            Cell(
                gain_text(row, split),
                _float(row.get(f"{split}_gain")),
                f"number {_color(row, split)}".rstrip(),
                f"{MEANING[kind]}{interval}" if kind else "",
            )
        )
    for split in splits[-1:]:
        for name, digits in (("boundary_miou", 2), ("calibration_error", 2)):
            value = _float(row.get(f"{split}_{name}"))
            cells.append(Cell(number(value, digits), value, "number"))
    parameters, macs = (_float(row.get(name)) for name in ("parameters", "macs"))
    cells.append(Cell(millions(parameters), parameters, "number"))
    cells.append(Cell(size_text(macs), macs, "number"))
    return [*cells, _latency_cell(row, speeds)] if speeds else cells


def _training_cells(row: Mapping[str, Any]) -> list[Cell]:
    values = {
        name: _float(row.get(name))
        for name in (
            *("images_per_second", "training_seconds", "peak_memory_bytes"),
            *("trained_parameters", "trained_macs"),
        )
    }
    speed, seconds, memory, parameters, macs = values.values()
    texts = (
        *(number(speed, 1), number(seconds, 0), size_text(memory, "B")),
        *(millions(parameters), size_text(macs)),
    )
    cells = zip(texts, values.values(), strict=True)
    return [_name_cell(row), *(Cell(text, value, "number") for text, value in cells)]


def _latency_cell(row: Mapping[str, Any], speeds: Rows) -> Cell:
    """The fastest way with the float weights; the others when the pointer is over it."""
    own = sorted(
        (
            (float(speed["latency"]), f"{speed['runtime']} on {place(speed)}", speed["runtime"])
            for speed in speeds
            if (speed["method"], speed["network"]) == (row["method"], row["network"])
        ),
    )
    exact = [found for found in own if found[2] != "int8"]
    if not exact:
        return Cell("–", kind="number")
    every = "; ".join(f"{way}: {latency:.1f} ms" for latency, way, _ in own)
    return Cell(f"{exact[0][0]:.1f} ms", exact[0][0], "number", every)


def _color(row: Mapping[str, Any], split: str) -> str:
    """CSS class: only what holds with all methods counted stands out."""
    kind = verdict(row, split)
    return kind if kind not in ("better", "worse") or holds_among_all(row, split) else "open"


def _name_cell(row: Mapping[str, Any]) -> Cell:
    text = str(row["title"])
    if row["method"] == "teacher":
        text += f" · {row['network']}"
    kind = {"teacher": "teacher", "baseline": "alone"}.get(str(row["method"]), "")
    title = "" if row["method"] not in STAGES else "weights on the way, not compared"
    return Cell(text, kind=f"name {kind}".rstrip(), title=title)


def _values(row: Mapping[str, Any], split: str) -> str:
    return f"every seed: {row.get(f'{split}_values', '')}"


def _class_table(rows: Rows) -> tuple[list[str], list[list[Cell]]]:
    columns = dict.fromkeys(name for row in rows for name in row if name.startswith("iou."))
    # The table of a file has the classes of every data set.
    names = [n for n in columns if any(math.isfinite(_float(row.get(n))) for row in rows)]
    names = [name.removeprefix("iou.") for name in names]
    body = []
    for row in rows:
        line = [_name_cell(row)]
        for name in names:
            score, gain = _float(row.get(f"iou.{name}")), _float(row.get(f"gain.{name}"))
            title = f"{gain:+.2f} to the student alone" if math.isfinite(gain) else ""
            line.append(Cell(number(score, 1), score, "number", title))
        body.append(line)
    return ["method", *names], body


def _seeds(rows: Rows) -> str:
    counts = sorted({int(row["seed_count"]) for row in rows})
    few = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    named = {seed for row in rows for seed in str(row["seeds"]).split(",")}
    return (
        f"{few} for each method ({', '.join(s or 'none' for s in sorted(named, key=seed_order))})"
    )


def _chance(rows: Rows, split: str) -> str:
    """How many intervals miss 0 by chance, in words."""
    tested = sum(verdict(row, split) not in ("", "single") for row in rows)
    if not tested:
        return ""
    count = f"{0.05 * tested:.2g}"
    plural = "intervals" if tested > 1 else "interval"
    clear = sum(verdict(row, split) in ("better", "worse") for row in rows)
    stay = sum(holds_among_all(row, split) for row in rows)
    return (
        f"{tested} {plural} of 95 %: were no method any different from the student alone, {count} "
        f"of them would be expected to miss 0 all the same. On {split} {clear} miss 0, {stay} with "
        f"all {tested} counted (Holm)."
    )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(row["data_digest"]), str(row["protocol_digest"]), str(row["method"])


def _key_of(result: Metrics) -> tuple[str, str, str]:
    about = result["about"]
    return about["data_digest"], about["protocol_digest"] or about["network"], about["method"]


def _commands(results: Iterable[Metrics]) -> list[str]:
    """What trains the seeds of the tables again, then makes this page."""
    found: dict[tuple[str, str], set[str]] = {}
    for result in results:
        about = result["about"]
        if about["method"] != "teacher":  # every pipeline trains or imports its own
            # Results of older versions do not say with which parameters they were trained.
            place = pipeline_of(about["method"]), str(about.get("session", "{}"))
            found.setdefault(place, set()).add(str(about["seed"]))
    lines = [
        kedro_command(pipeline, params=params, session=session)
        for (pipeline, session), seeds in sorted(found.items())
        for params in _seed_params(sorted(seeds, key=seed_order))
    ]
    return [*lines, kedro_command("evaluation")]


def pipeline_of(method: str) -> str:
    """The pipeline that trains a method."""
    if method in RDD_STAGES:
        return f"distill_{METHODS[method].stages[-1].name}"
    if method in RDD_PLUS:
        return "distill_rdd_plus"
    return "ablations" if method in ABLATIONS else "distill_baselines"


def _seed_params(seeds: Sequence[str]) -> list[dict[str, int]]:
    """Parameters of the commands: one run for seeds that follow one another."""
    numbers = [int(seed) for seed in seeds if seed.isdecimal()]
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(seeds))):
        return [{"seed": numbers[0], "seeds": len(numbers)}]
    return [{"seed": int(seed)} if seed.isdecimal() else {} for seed in seeds]


def _singles(results: Sequence[Metrics], metric: str) -> list[list[str]]:
    """One line for each result: what the tables are made of."""
    splits = list(dict.fromkeys(name for result in results for name in result["splits"]))
    lines = []
    for result in results:
        about = result["about"]
        lines.append(
            [
                str(about.get("title", about["method"])),
                str(about["network"]),
                str(about["seed"]),
                *(number(100 * _float(result["splits"].get(s, {}).get(metric))) for s in splits),
                str(about.get("iteration", "")),
                str(about.get("fingerprint", "")),
                str(result.get("version", "")),
            ]
        )
    return lines
