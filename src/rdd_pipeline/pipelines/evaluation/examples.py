"""The same few images as every method predicts them, small, for the report."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from rdd_pipeline.config import EvaluationParams, TrainerParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample, pixels_of
from rdd_pipeline.data.labels import hex_of
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.confusion import Scores, confusion_matrix
from rdd_pipeline.files import json_digest
from rdd_pipeline.networks import NetworkCheckpoint, load_checkpoint
from rdd_pipeline.pipelines.example_nodes import image_scores, predicted_examples
from rdd_pipeline.pipelines.method_nodes import data_digest, store_of
from rdd_pipeline.reporting.comparison import Metrics, counted, finished, side_by_side, spread
from rdd_pipeline.reporting.gallery import Card, Gallery, Shown
from rdd_pipeline.reporting.thumbnails import BOX, class_map, mistakes, photograph
from rdd_pipeline.training.store import RunStore, is_fingerprint

if TYPE_CHECKING:
    from rdd_pipeline.reporting.examples import Example

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Raised when what is remembered of a network changes."""


def show_examples(
    trained_metrics: list[dict[str, Any]],
    comparison_table: pd.DataFrame,
    ingested_images: Images | None,
    models_folder: Path,
    work_folder: Path,
    evaluation: EvaluationParams,
    trainer: TrainerParams,
) -> dict[str, Gallery]:
    """A few images with the prediction of every finished method, by ``protocol_digest``.

    One seed: the first that RDD and the student alone share. The images are those at evenly spaced
    quantiles of the difference in mIoU between the two. What was predicted before is looked up.

    Args:
        trained_metrics: Oldest first.
        comparison_table: Which methods belong side by side.
        ingested_images: What they were scored on, as far as that is here: the metrics alone may
            have been copied.
        models_folder: Holds the networks.
        work_folder: The folder with all work.
        evaluation: How many images; how they are predicted.
        trainer: Where.

    Returns:
        Empty where no comparison was scored on these images in this way, or none is asked for.
    """
    if ingested_images is None or not evaluation.figure_images:
        logger.info("The report goes without pictures of single images: there are none here.")
        return {}
    images, scored = ingested_images, data_digest(ingested_images, evaluation)
    found = {}
    table = cast(list[dict[str, Any]], comparison_table.to_dict("records"))
    for rows in side_by_side(table):
        members = [row for row in finished(rows) if str(row["data_digest"]) == scored]
        students = [row for row in members if row["method"] != "teacher"]
        if students:
            protocol = str(students[0]["protocol_digest"])
            results = _of_one_seed(counted(trained_metrics), members, scored, protocol)
            networks = _Networks(images, models_folder, work_folder, evaluation, trainer)
            try:
                found[protocol] = _gallery(results, networks)
            except UserError as error:  # of a file that was there when it was ingested
                logger.warning("The report goes without pictures of single images: %s", error)
    if not found:
        logger.info(
            "The report goes without pictures of single images: nothing was scored on those that "
            "are ingested now, with these settings of `evaluation`."
        )
    return found


# ---- parts


def _of_one_seed(
    results: Sequence[Metrics], rows: Sequence[Mapping[str, Any]], scored: str, protocol: str
) -> dict[str, Metrics]:
    """A result of each method in the order of the rows; of the seed of `show_examples`, if any."""
    by_method: dict[str, dict[str, Metrics]] = {}
    for result in results:
        about = result["about"]
        if about["data_digest"] == scored and about["protocol_digest"] in ("", protocol):
            by_method.setdefault(about["method"], {})[str(about["seed"])] = result
    pair = [by_method[name] for name in ("tse", "baseline") if name in by_method]
    common = [seed for seed in (pair[0] if pair else ()) if all(seed in other for other in pair)]
    methods = (str(row["method"]) for row in rows)
    return {
        method: next(
            (by_method[method][seed] for seed in common if seed in by_method[method]),
            next(iter(by_method[method].values())),
        )
        for method in methods
        if method in by_method
    }


def _gallery(results: Mapping[str, Metrics], networks: _Networks) -> Gallery:
    """The pictures of one comparison.

    Raises:
        UserError: An image cannot be read any more.
    """
    students = [method for method in results if method != "teacher"]  # the best first
    ours = "tse" if "tse" in students else students[0]
    split = list(results[ours]["splits"])[-1]
    samples = networks.images.split(split).samples
    gains = image_scores(results[ours], split)
    title = results[ours]["about"]["title"]
    rule = f"mIoU({title})"
    if "baseline" in results and ours != "baseline":
        alone = image_scores(results["baseline"], split)
        gains = {name: gain - alone.get(name, math.nan) for name, gain in gains.items()}
        rule += f" - mIoU({results['baseline']['about']['title']})"
    scores = [gains.get(sample.name, math.nan) for sample in samples]
    chosen = [samples[place] for place in spread(scores, networks.evaluation.figure_images)]
    cards = {method: networks.cards(result, chosen) for method, result in results.items()}
    labels, seed = networks.images.labels, results[ours]["about"]["seed"]
    shown = []
    for place, sample in enumerate(chosen):
        image, label = networks.images.read(sample)
        pictures = [found[place] for found in cards.values() if found]
        shown.append(Shown(sample.name, photograph(image), class_map(label, labels), pictures))
    return Gallery(
        rule=f"{split} images at evenly spaced quantiles of {rule}, lowest first; seed {seed}",
        colors=[
            (name, hex_of(color)) for name, color in zip(labels.names, labels.colors, strict=True)
        ],
        shown=shown,
        lacking=[results[m]["about"]["title"] for m, found in cards.items() if found is None],
    )


class _Networks:
    """What networks make of images, by the results that name them."""

    def __init__(
        self,
        images: Images,
        models: Path,
        work: Path,
        evaluation: EvaluationParams,
        trainer: TrainerParams,
    ) -> None:
        self.images, self.evaluation = images, evaluation
        self._models, self._work, self._trainer = models, work, trainer

    def cards(self, result: Metrics, samples: Sequence[Sample]) -> list[Card] | None:
        """One for each image; None: the network is not there."""
        about = result["about"]
        fingerprint = str(about.get("fingerprint", ""))
        if not is_fingerprint(fingerprint):
            return None
        labels = self.images.labels
        key = json_digest(
            [
                [pixels_of(sample) for sample in samples],
                [labels.meaning(), labels.colors, self.images.image_size, BOX, _FORMAT],
                self.evaluation.protocol(),
            ]
        )
        store = RunStore(self._work, fingerprint)
        known = store.recall(f"examples-{key}")
        if known is None:
            network = self._find(about)
            if network is None:
                return None
            examples = predicted_examples(
                self.images, samples, [network], self.evaluation, self._trainer
            )
            known = {"shown": [self._pictures(example) for example in examples]}
            store.remember(f"examples-{key}", known)
        return [Card(title=str(about["title"]), **shown) for shown in known["shown"]]

    def _pictures(self, example: Example) -> dict[str, str]:
        labels, (prediction,) = self.images.labels, example.predictions
        matrix = confusion_matrix(
            prediction, example.label, labels.num_classes, labels.ignore_index
        )
        valid = int((example.label != labels.ignore_index).sum())
        wrong = valid - int(matrix.diagonal().sum())
        text = "nothing labeled"
        if valid:
            miou = 100 * Scores.from_matrix(matrix).miou
            text = f"mIoU {miou:.1f}, {100 * wrong / valid:.1f} % wrong"
        return {
            "text": text,
            "prediction": class_map(prediction, labels),
            "mistakes": mistakes(prediction, example.label, labels.ignore_index),
        }

    def _find(self, about: Mapping[str, Any]) -> NetworkCheckpoint | None:
        """The very network that a result is of, in the newest version that has it."""
        method = about["method"]
        entry = self._models / ("teacher" if method == "teacher" else f"student_{method}")
        files = sorted(entry.glob(f"2*/{entry.name}/*.safetensors"), reverse=True)
        for file in files:
            if method != "teacher" and file.stem != str(about["seed"]):
                continue
            try:
                network = load_checkpoint(file)
            except UserError as error:
                logger.warning("%s", error)
                continue
            if store_of(network, self._work).fingerprint == about["fingerprint"]:
                return network
        return None
