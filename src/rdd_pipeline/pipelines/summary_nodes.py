"""Node with the table that every pipeline which trains ends with, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
from rich import box
from rich.table import Table

from rdd_pipeline.commands import kedro_command
from rdd_pipeline.distillation.methods import ABLATIONS, METHODS, RDD_PLUS, STAGES, find_method
from rdd_pipeline.reporting.comparison import (
    Metrics,
    Row,
    comparable,
    compare,
    has_gain,
    latest_by_seed,
    notes_on,
    seed_order,
    split_names,
)
from rdd_pipeline.reporting.report import gain_text, mean_text, millions

_ORDER = ["teacher", *METHODS, *RDD_PLUS, *ABLATIONS]


def make_summarize_node(pipeline: str) -> Callable[..., str]:
    """Node function that prints and returns the table of a pipeline."""

    def summarize(
        metrics_teacher: Mapping[str, Metrics],
        trained_metrics: Sequence[Metrics],
        reporting_folder: Path,
        *metrics: Mapping[str, Metrics],
    ) -> str:
        teacher = list(metrics_teacher.values())
        trained = [result for by_seed in metrics for result in by_seed.values()]
        seeds = _seeds_of(trained or teacher)
        results = [*teacher, *_side_by_side(trained_metrics, trained, seeds)]
        rows = sorted(compare(results), key=lambda row: _ORDER.index(row["method"]))
        head, body = _cells(rows)
        notes = notes_on(results)
        notes = [note for note in (_losses(rows), _caveat(rows, seeds)) if note] + notes
        _print(_title(seeds, teacher_only=not trained), head, body)
        console = rich.get_console()
        for note in notes:
            console.print(note, highlight=False, markup=False)
        steps = _next_steps(pipeline, {row["method"] for row in rows}, seeds)
        for text, command in [*_use(rows), *steps]:
            # It is to be pasted: no line breaks, and brackets are no markup.
            console.print(f"{text}: {command}", soft_wrap=True, markup=False, highlight=False)
        console.print(f"Figures and tables: {reporting_folder}", soft_wrap=True)
        console.print("All runs side by side: kedro mlflow ui")
        lines = [head, ["---"] * len(head), *body]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return text.replace(" --- ", "---") + "".join(f"\n{note}\n" for note in notes)

    summarize.__name__ = f"summarize_{pipeline}"
    return summarize


# ---- parts


def _side_by_side(
    everything: Sequence[Metrics], trained: Sequence[Metrics], seeds: Sequence[str]
) -> list[Metrics]:
    """What this run trained, and what was trained like it with all of its seeds."""
    if not trained:
        return []
    names = {result["about"]["method"] for result in trained}
    comparison = trained[0]["about"]["protocol_digest"]
    newest = latest_by_seed([*comparable(everything, comparison), *trained])
    methods = {method for method, _ in newest}
    whole = {m for m in methods if all((m, seed) in newest for seed in seeds)}
    shown = {method for method in whole if method in names or method not in STAGES}
    return [
        result for (method, seed), result in newest.items() if method in shown and seed in seeds
    ]


def _seeds_of(results: Sequence[Metrics]) -> list[str]:
    return sorted({result["about"]["seed"] for result in results}, key=seed_order)


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table, as text."""
    splits = split_names(rows)
    gains = bool(splits) and any(gain_text(row, splits[-1]) != "–" for row in rows)
    head = ["network", "", "parameters", *splits]
    if gains:
        head.append(f"vs. alone ({splits[-1]})")
    body = []
    for row in rows:
        cells = [
            _name(row),
            str(row["network"]),
            millions(row["parameters"]),
            *(mean_text(row, split, digits=1) for split in splits),
        ]
        body.append([*cells, gain_text(row, splits[-1], digits=1)] if gains else cells)
    return head, body


def _name(row: Mapping[str, Any]) -> str:
    title = str(row["title"])
    return title if row["method"] in ("teacher", "baseline") else f"student by {title}"


def _title(seeds: Sequence[str], *, teacher_only: bool) -> str:
    if not any(seeds):
        return "mIoU in %"
    if len(seeds) == 1:
        return f"mIoU in % (seed {seeds[0]})"
    return f"mIoU in % ({'' if teacher_only else 'students: '}mean of seeds {', '.join(seeds)})"


def _caveat(rows: Sequence[Row], seeds: Sequence[str]) -> str | None:
    """How far the differences can be relied on; None where there are none."""
    if not any(has_gain(row["method"]) for row in rows):
        return None
    if all(row["method"] != "baseline" for row in rows):
        return None
    if len(seeds) == 1:
        return "One seed: a difference may be chance, whichever way it points."
    return (
        "vs. alone: mean difference over the seeds ± half of its 95 % interval (paired t); n.s.: "
        "it covers 0; (n.s.): it does with all methods counted (Holm). No interval covers another "
        "teacher, or that settings were chosen on val."
    )


def _losses(rows: Sequence[Row]) -> str | None:
    """Which methods did not pay, in plain words; None where all did or nothing says so."""
    splits = split_names(rows)
    found = [
        f"{_name(row)} ({gain_text(row, splits[-1], digits=1)})"
        for row in rows
        if has_gain(row["method"]) and splits and row.get(f"{splits[-1]}_gain", math.nan) < 0
    ]
    return f"Worse than the student alone on {splits[-1]}: {', '.join(found)}." if found else None


def _use(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The command that predicts with the student that is best on val."""
    split = next((name for name in split_names(rows) if name == "val"), None)
    students = [
        row
        for row in rows
        if row["method"] != "teacher"
        and find_method(row["method"]).finishes
        and math.isfinite(row.get(f"{split}_score", math.nan))
    ]
    if not students:
        return []
    # Of equal ones the distilled one: rows of students alone come first.
    best = max(reversed(students), key=lambda row: row[f"{split}_score"])
    other = {} if best["method"] == "tse" else {"predict.method": best["method"]}
    command = kedro_command("predict", params={"predict.images": "FOLDER", **other})
    return [(f"To predict with the {_name(best)}, the best on val", command)]


def _print(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Print the table; in a narrow terminal without architecture, then without parameters."""
    console = rich.get_console()
    wide = console.options.update(width=1000)
    for hidden in ((), (1,), (1, 2)):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, name in enumerate(head):
            if place not in hidden:
                table.add_column(name, justify="left" if place < 2 else "right", overflow="fold")
        for line in body:
            table.add_row(*(cell for place, cell in enumerate(line) if place not in hidden))
        if console.measure(table, options=wide).maximum <= console.width:
            break
    console.print(table)


def _next_steps(pipeline: str, shown: set[str], seeds: Sequence[str]) -> list[tuple[str, str]]:
    """What to do next, and the command for it."""
    if pipeline == "train_teacher":
        return [("Next, distil it into a student", kedro_command("distill_tse"))]
    if pipeline == "distill_tfe":
        return [("Next, the second stage", kedro_command("distill_tse"))]
    steps = []
    if "baseline" not in shown:
        alone = kedro_command("distill_baselines", to_outputs=["metrics_baseline"])
        steps.append(("To see what distillation gains, train the student alone", alone))
    if "tse" not in shown:
        steps.append(("To have RDD beside them", kedro_command("distill_tse")))
    if pipeline == "distill_tse" and len(seeds) == 1:
        several = kedro_command("distill_tse", params={"seeds": 3})
        steps.append(("To tell a difference from chance, train with more seeds", several))
    if pipeline == "distill_tse":
        steps.append(("To have the other methods beside it", kedro_command("distill_baselines")))
    else:
        steps.append(("All of it in one page", kedro_command("evaluation")))
    return steps
