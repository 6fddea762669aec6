"""Nodes that show what RDD looked at and how it ended."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import rich
import torch
from matplotlib.figure import Figure
from rich.table import Table

from rdd_pipeline.commands import kedro_command
from rdd_pipeline.config import DataParams, EvaluationParams, RddParams
from rdd_pipeline.evaluation.comparison import comparable, flatten, latest_by_seed, splits_of
from rdd_pipeline.evaluation.figures import RddRow, rdd_figure
from rdd_pipeline.losses.rdd import chosen_pixels, teacher_confidence
from rdd_pipeline.networks import NetworkCheckpoint
from rdd_pipeline.pipelines._shared import images_root, label_set_of, read_sample, samples_of
from rdd_pipeline.segmentation.index import of_split


def draw_pixels(
    raw_images: Path,
    raw_index: pd.DataFrame,
    label_set: dict[str, Any],
    teacher_weights: NetworkCheckpoint,
    student_weights: NetworkCheckpoint,
    data: DataParams,
    rdd: RddParams,
    evaluation: EvaluationParams,
) -> Figure:
    """Show for a few images what both networks find hard and which pixels RDD chooses.

    Images come from the first split of `evaluation.splits` that has any, evenly spaced.
    """
    labels = label_set_of(label_set)
    samples = samples_of(raw_index)
    split = next((name for name in evaluation.splits if of_split(samples, name)), "train")
    candidates = of_split(samples, split)
    count = min(evaluation.figure_images, len(candidates))
    root = images_root(raw_images, data)
    teacher, student = teacher_weights.build(), student_weights.build()
    rows = []
    for number in range(count):
        sample = candidates[(2 * number + 1) * len(candidates) // (2 * count)]
        image, label = read_sample(root, sample, labels, data.image_size)
        images, label_maps = image.unsqueeze(0), label.unsqueeze(0)
        size = (label.shape[0], label.shape[1])
        with torch.inference_mode():
            seen = teacher(teacher_weights.header.preprocessing.normalize(images))
            given = student(student_weights.header.preprocessing.normalize(images))
            confidence = None
            if seen.aux_logits is not None:
                confidence = teacher_confidence(seen.logits, seen.aux_logits, size=size)[0]
            pixels = chosen_pixels(
                given.logits,
                seen.logits,
                label_maps,
                mode=rdd.mode,
                threshold=rdd.threshold,
                # A count is meant for a training batch, not for one image of the figure.
                min_kept=rdd.min_kept if isinstance(rdd.min_kept, float) else 0,
                ignore_index=labels.ignore_index,
            )
            logits = torch.nn.functional.interpolate(
                given.logits, size=size, mode="bilinear", align_corners=True
            )
        rows.append(
            RddRow(
                name=sample.name,
                image=image,
                label=label,
                prediction=logits[0].argmax(0),
                confidence=confidence,
                hard_student=pixels.hard_student[0],
                hard_teacher=pixels.hard_teacher[0],
                chosen=pixels.chosen[0],
            )
        )
    return rdd_figure(rows, labels)


def summarize(
    metrics_teacher: dict[str, Any],
    metrics_tse: dict[str, Any],
    trained_metrics: list[dict[str, Any]],
    reporting_folder: Path,
) -> str:
    """Print the teacher, the student alone (if it was trained likewise) and the RDD student.

    Returns:
        The same as a Markdown table.
    """
    about = metrics_tse["about"]
    students = sorted(flatten([metrics_tse]), key=lambda result: int(result["about"]["seed"]))
    seeds = [result["about"]["seed"] for result in students]
    peers = latest_by_seed(comparable(trained_metrics, about["comparison"]))
    alone = [peers[key] for seed in seeds if (key := ("baseline", seed)) in peers]
    splits = splits_of(metrics_tse)
    entries = [("teacher", [metrics_teacher])]
    if len(alone) == len(seeds):
        entries.append(("student alone", alone))
    entries.append(("student by RDD", students))

    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"students: mean of seeds {', '.join(seeds)}"
    table = Table(title=f"mIoU in % ({which})", title_justify="left")
    header = ["network", "", "parameters", *splits]
    for name in header:
        table.add_column(name, justify="left" if name in ("network", "") else "right")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for title, results in entries:
        first = results[0]
        cells = [
            title,
            first["about"]["network"],
            f"{first['cost']['parameters'] / 1e6:.2f} M",
            *(_mean_miou(results, split) for split in splits),
        ]
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    console = rich.get_console()
    console.print(table)
    if len(alone) < len(seeds):
        console.print(
            "To see what distillation gains, train the student alone: "
            + kedro_command("distill_baselines", to_outputs=["metrics_baseline"]),
            # It is to be pasted: no line breaks, and brackets are no markup.
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
    console.print(f"Figures and tables: {reporting_folder}", soft_wrap=True)
    console.print("All runs side by side: kedro mlflow ui")
    return "\n".join(lines) + "\n"


def _mean_miou(results: list[dict[str, Any]], split: str) -> str:
    """Mean over seeds in percent, with the standard deviation where there are several."""
    values = [100 * result[split]["miou"] for result in results if split in result]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.1f}"
    return mean + (f" ({statistics.stdev(values):.1f})" if len(values) > 1 else "")
