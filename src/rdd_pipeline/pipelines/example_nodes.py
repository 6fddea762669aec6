"""Nodes that look at single images: networks side by side, the worst images, likely label errors.

Scores of images come from the metrics; only the few that are shown are predicted again.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from rdd_pipeline.config import EvaluationParams, TrainerParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample
from rdd_pipeline.drawing import Drawing
from rdd_pipeline.evaluation.predict import Band, evaluation_mode, predict_labels, score_bands
from rdd_pipeline.evaluation.suspects import find_suspects, opinion
from rdd_pipeline.files import json_digest
from rdd_pipeline.lazy import Lazy
from rdd_pipeline.networks import NetworkCheckpoint
from rdd_pipeline.pipelines.method_nodes import Networks, store_of, the_only
from rdd_pipeline.reporting.caption import captioned, provenance
from rdd_pipeline.reporting.comparison import Metrics, spread
from rdd_pipeline.training.device import resolve_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rdd_pipeline.reporting.examples import Example

logger = logging.getLogger(__name__)

_pictures = Lazy("rdd_pipeline.reporting.examples")

WORST = 8
"""Images of the figure; the table has all."""
SUSPECTS = 500
"""Regions of the table."""
IN_FIGURE = 12, 3
"""Classes, and regions of each."""

By = Mapping[str, Metrics]
"""Metrics of a method by seed."""


def draw_side_by_side(
    images: Images,
    teacher_weights: Networks,
    baseline_weights: Networks,
    student_weights: Networks,
    metrics_baseline: By,
    metrics_student: By,
    evaluation: EvaluationParams,
    trainer: TrainerParams,
) -> Drawing:
    """Teacher, student alone and RDD with their wrong pixels, first seed, last evaluated split.

    The images are those at evenly spaced quantiles of the difference in mIoU between RDD and the
    student alone: the flattering ones and the others.
    """
    alone, ours = (next(iter(m.values())) for m in (metrics_baseline, metrics_student))
    split, samples = _chosen(images, alone, ours, evaluation.figure_images)
    named = {
        "teacher": the_only(teacher_weights),
        "student alone": next(iter(baseline_weights.values())),
        str(ours["about"]["title"]): next(iter(student_weights.values())),
    }
    rule = (
        f"{split} images at evenly spaced quantiles of mIoU({ours['about']['title']}) - "
        "mIoU(student alone), lowest first"
    )
    line = _line(images, ours, split, method=", ".join(named), networks=list(named.values()))
    return Drawing(
        partial(_side_by_side, images, samples, named, evaluation, trainer, rule, line),
        shows=["side by side", rule, line, _shows(images, samples, named, evaluation)],
    )


def rank_images(
    images: Images,
    student_weights: Networks,
    metrics_teacher: By,
    metrics_baseline: By,
    metrics_student: By,
    evaluation: EvaluationParams,
    trainer: TrainerParams,
) -> tuple[pd.DataFrame, Drawing]:
    """All evaluated images by the mIoU of the first seed's student, the worst first.

    Returns:
        The table: ``split``, ``name``, ``image`` and ``mask`` (paths below the data set's folder),
        ``student``, ``student_alone`` and ``teacher`` (mIoU in %, over the classes that occur in
        the image) and ``gain``; and the worst ones of the last split as a figure.
    """
    ours, alone, teacher = (
        next(iter(metrics.values()))
        for metrics in (metrics_student, metrics_baseline, metrics_teacher)
    )
    rows = []
    for split in ours["splits"]:
        scores = [image_scores(result, split) for result in (ours, alone, teacher)]
        for sample in images.split(split).samples:
            student, other, big = (found.get(sample.name, math.nan) for found in scores)
            rows.append(
                {
                    "split": split,
                    "name": sample.name,
                    "image": sample.image,
                    "mask": sample.mask,
                    "student": student,
                    "student_alone": other,
                    "teacher": big,
                    "gain": round(student - other, 4),
                }
            )
    table = pd.DataFrame(rows).sort_values(["student", "split", "name"], ignore_index=True)
    split = list(ours["splits"])[-1]
    names = table[table["split"] == split]["name"].head(WORST).tolist()
    by_name = {sample.name: sample for sample in images.split(split).samples}
    samples = [by_name[name] for name in names]
    title = str(ours["about"]["title"])
    networks = {title: next(iter(student_weights.values()))}
    rule = f"The {len(samples)} {split} images with the lowest mIoU of {title}, the worst first"
    line = _line(images, ours, split)

    def draw() -> Figure:
        examples = predicted_examples(images, samples, list(networks.values()), evaluation, trainer)
        return captioned(_pictures.worst_figure(examples, images.labels, rule), line)

    shows = ["worst", rule, line, _shows(images, samples, networks, evaluation)]
    return table, Drawing(draw, shows=shows)


def find_label_errors(
    images: Images,
    teacher_weights: Networks,
    student_weights: Networks,
    evaluation: EvaluationParams,
    trainer: TrainerParams,
    work_folder: Path,
) -> tuple[pd.DataFrame, Drawing]:
    """Regions of the training images whose label teacher and student contradict alike.

    What was found for the same networks and images is looked up.

    Returns:
        The table, the `SUSPECTS` highest scores: ``rank``, ``rank_in_class``, ``name``, ``image``,
        ``mask``, ``label``, ``suggested``, ``score``, ``pixels`` and the box (``top``, ``left``,
        ``height``, ``width``) in pixels of the mask; and the first ones by class as a figure.
    """
    pair = the_only(teacher_weights), next(iter(student_weights.values()))
    train = images.split("train")
    digests = [network.digest() for network in pair]
    key = json_digest([digests, train.digest, evaluation.protocol(), 1])
    store = store_of(pair[1], work_folder)
    known = store.recall(f"suspects-{key}")
    if known is None:
        known = {"regions": _search(train, pair, evaluation, trainer)}
        store.remember(f"suspects-{key}", known)
    regions = [{**region, "rank": rank} for rank, region in enumerate(known["regions"], 1)]
    names = images.labels.names
    counts: dict[int, int] = {}
    rows = []
    for region in regions:
        counts[region["label"]] = counts.get(region["label"], 0) + 1
        sample = train.samples[region["position"]]
        rows.append(
            {
                "rank": region["rank"],
                "rank_in_class": counts[region["label"]],
                "name": sample.name,
                "image": sample.image,
                "mask": sample.mask,
                "label": names[region["label"]],
                "suggested": names[region["suggested"]],
                **{k: region[k] for k in ("score", "pixels", "top", "left", "height", "width")},
            }
        )
    columns = (
        "rank rank_in_class name image mask label suggested score pixels top left height width"
    )
    logger.info(
        "%d regions of %d training images contradict both networks%s.",
        *(len(regions), len({region["position"] for region in regions})),
        f" (the first {SUSPECTS})" * (len(regions) == SUSPECTS),
    )
    line = provenance(
        data=images.labels.name,
        network=", ".join(network.header.network.name for network in pair),
        split="train",
        iteration=pair[1].header.provenance.get("iteration", ""),
    )
    shows = ["label errors", line, json_digest(regions), images.digest, images.labels.colors]
    return (
        pd.DataFrame(rows, columns=columns.split()),
        Drawing(partial(_regions, train, regions, pair[0], evaluation, trainer, line), shows=shows),
    )


# ---- parts


def image_scores(result: Metrics, split: str) -> dict[str, float]:
    """MIoU in % by name; NaN: no labeled pixel. Empty for results of before there were any."""
    found = result["splits"].get(split, {}).get("images") or ()
    return {name: math.nan if miou is None else round(100 * miou, 4) for name, miou in found}


def _chosen(images: Images, alone: Metrics, ours: Metrics, count: int) -> tuple[str, list[Sample]]:
    """The last evaluated split, and those of its images that are shown."""
    split = list(ours["splits"])[-1]
    before, after = (image_scores(result, split) for result in (alone, ours))
    samples = images.split(split).samples
    gains = [after.get(s.name, math.nan) - before.get(s.name, math.nan) for s in samples]
    return split, [samples[place] for place in spread(gains, count)]


def _side_by_side(
    images: Images,
    samples: Sequence[Sample],
    named: Mapping[str, NetworkCheckpoint],
    evaluation: EvaluationParams,
    trainer: TrainerParams,
    rule: str,
    line: str,
) -> Figure:
    examples = predicted_examples(images, samples, list(named.values()), evaluation, trainer)
    figure = _pictures.side_by_side_figure(examples, list(named), images.labels, rule)
    return captioned(figure, line)


def predicted_examples(
    images: Images,
    samples: Sequence[Sample],
    networks: Sequence[NetworkCheckpoint],
    evaluation: EvaluationParams,
    trainer: TrainerParams,
) -> list[Example]:
    """The images at their mask's own size, with the prediction of each network."""
    device = resolve_device(trainer.device)
    shown = dataclasses.replace(images, samples=tuple(samples))
    batches = {batch.indices[0]: batch for batch in shown.evaluation_batches(1)}
    predictions: dict[int, list[torch.Tensor]] = {place: [] for place in batches}
    for network in networks:
        model = network.build().to(device)
        with evaluation_mode(model):
            for place, batch in batches.items():
                (found,) = predict_labels(
                    model,
                    network.header.preprocessing,
                    batch.images.to(device),
                    sizes=[(batch.labels.shape[1], batch.labels.shape[2])],
                    **evaluation.prediction(),
                )
                predictions[place].append(found.cpu())
    return [
        _pictures.Example(
            sample.name, batches[n].images[0], batches[n].labels[0], tuple(predictions[n])
        )
        for n, sample in enumerate(samples)
    ]


def _search(
    images: Images,
    pair: Sequence[NetworkCheckpoint],
    evaluation: EvaluationParams,
    trainer: TrainerParams,
) -> list[dict[str, Any]]:
    """The regions with the highest scores, as plain values."""
    device, ignored = resolve_device(trainer.device), images.labels.ignore_index
    models = [network.build().to(device) for network in pair]
    found: list[dict[str, Any]] = []
    with evaluation_mode(models[0]), evaluation_mode(models[1]):
        for batch in images.evaluation_batches(1):
            label = batch.labels[0].to(device)

            def bands(model: Any, network: NetworkCheckpoint, batch: Any = batch) -> Iterator[Band]:
                return next(
                    score_bands(
                        model,
                        network.header.preprocessing,
                        batch.images.to(device),
                        sizes=[(batch.labels.shape[1], batch.labels.shape[2])],
                        **evaluation.prediction(),
                    )
                )

            first, second = (
                opinion(bands(model, network), label, ignored)
                for model, network in zip(models, pair, strict=True)
            )
            for suspect in find_suspects(label, first, second):
                height, width = suspect.mask.shape
                found.append(
                    {
                        "position": batch.indices[0],
                        "label": suspect.label,
                        "suggested": suspect.suggested,
                        "score": round(suspect.score, 3),
                        "pixels": int(suspect.mask.sum()),
                        "top": suspect.top,
                        "left": suspect.left,
                        "height": height,
                        "width": width,
                        "mask": _packed(suspect.mask),
                    }
                )
            found = sorted(found, key=lambda r: (-r["score"], r["position"]))[:SUSPECTS]
    return found


def _regions(
    images: Images,
    regions: Sequence[Mapping[str, Any]],
    teacher: NetworkCheckpoint,
    evaluation: EvaluationParams,
    trainer: TrainerParams,
    line: str,
) -> Figure:
    """The first regions of each class, the classes in the order of their first region."""
    names = images.labels.names
    by_class: dict[int, list[Mapping[str, Any]]] = {}
    for region in regions:
        by_class.setdefault(region["label"], []).append(region)
    classes, each = IN_FIGURE
    shown = {label: found[:each] for label, found in list(by_class.items())[:classes]}
    places = sorted({region["position"] for found in shown.values() for region in found})
    samples = [images.samples[place] for place in places]
    examples = dict(
        zip(
            places, predicted_examples(images, samples, [teacher], evaluation, trainer), strict=True
        )
    )
    groups = [
        (
            names[label],
            [
                _pictures.Region(
                    examples[region["position"]],
                    (region["top"], region["left"], region["height"], region["width"]),
                    _unpacked(region["mask"], (region["height"], region["width"])),
                    f"{region['rank']}. {names[region['suggested']]}? ({region['score']:.0f})\n"
                    f"{examples[region['position']].name[-30:]}",
                )
                for region in found
            ],
        )
        for label, found in shown.items()
    ]
    rule = (
        "Training regions whose label teacher and student contradict alike, by class of the label; "
        "rank, class they see instead, sum of margins in pixels"
    )
    return captioned(_pictures.regions_figure(groups, images.labels, rule), line)


def _packed(mask: NDArray[np.bool_]) -> str:
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes())).decode()


def _unpacked(text: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(bits, count=size[0] * size[1]).reshape(size).astype(bool)


def _line(
    images: Images,
    result: Metrics,
    split: str,
    method: str = "",
    networks: Sequence[NetworkCheckpoint] = (),
) -> str:
    """Provenance of a figure about the networks of one seed."""
    about = result["about"]
    names = [network.header.network.name for network in networks] or [str(about["network"])]
    return provenance(
        data=images.labels.name,
        network=", ".join(dict.fromkeys(names)),
        method=method or str(about["title"]),
        seed=about["seed"],
        split=split,
        iteration=about.get("iteration", ""),
    )


def _shows(
    images: Images,
    samples: Sequence[Sample],
    networks: Mapping[str, NetworkCheckpoint],
    evaluation: EvaluationParams,
) -> list[Any]:
    """What decides the pictures."""
    return [
        [[sample.image_digest, sample.mask_digest] for sample in samples],
        images.labels.model_dump(mode="json"),
        images.image_size,
        {name: network.digest() for name, network in networks.items()},
        evaluation.protocol(),
    ]
