"""Node that shows what RDD looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rdd_pipeline.config import EvaluationParams, RddParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample, evenly
from rdd_pipeline.distillation.methods import method_title
from rdd_pipeline.drawing import Drawing
from rdd_pipeline.evaluation.predict import predict_labels
from rdd_pipeline.losses.rdd import entropy_confidence, selected_pixels, teacher_confidence
from rdd_pipeline.networks import Network, Preprocessing
from rdd_pipeline.pipelines.method_nodes import Networks, the_only
from rdd_pipeline.reporting.caption import captioned, provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rdd_pipeline.reporting.pixels import RddRow


def draw_pixels(
    images: Images,
    teacher_weights: Networks,
    student_weights: Networks,
    rdd: RddParams,
    evaluation: EvaluationParams,
) -> Drawing:
    """Show for a few images what both networks find hard and which pixels RDD chooses.

    The student is that of the first seed. Images come from the first split of `evaluation.splits`
    that has any, evenly spaced.
    """
    trained = the_only(teacher_weights), next(iter(student_weights.values()))
    there = [name for name in evaluation.splits if images.split(name).samples]
    split = (*there, "train")[0]
    header = trained[1].header
    line = provenance(
        data=images.labels.name,
        network=f"{header.network.name}, teacher {trained[0].header.network.name}",
        method=method_title("tse", rdd),
        seed=header.provenance.get("seed", ""),
        split=split,
        iteration=header.provenance.get("iteration", ""),
    )
    shows = {
        "images": images.digest,
        "labels": images.labels.model_dump(mode="json"),
        "networks": [network.digest() for network in trained],
        "preprocessing": [
            network.header.preprocessing.model_dump(mode="json") for network in trained
        ],
        "rdd": rdd.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
        "line": line,
    }

    def draw() -> Figure:
        from rdd_pipeline.reporting.pixels import rdd_figure  # and matplotlib, if it is to be drawn

        candidates = images.split(split).samples
        networks = [(network.build(), network.header.preprocessing) for network in trained]
        rows = [
            _look(images, sample, networks, rdd, evaluation)
            for sample in evenly(candidates, evaluation.figure_images)
        ]
        return captioned(rdd_figure(rows, images.labels), line)

    return Drawing(draw, shows=["pixels", shows])


def _look(
    images: Images,
    sample: Sample,
    networks: Sequence[tuple[Network, Preprocessing]],
    rdd: RddParams,
    evaluation: EvaluationParams,
) -> RddRow:
    """An image as both see it: predicted as it is scored, weighed and chosen as in training."""
    from rdd_pipeline.reporting.pixels import RddRow

    image, label = images.read(sample)
    inputs, label_maps = image.unsqueeze(0), label.unsqueeze(0)
    size = (label.shape[0], label.shape[1])
    (teacher, teacher_input), (student, student_input) = networks
    with torch.inference_mode():
        seen = teacher(teacher_input.normalize(inputs))
        given = student(student_input.normalize(inputs))
        confidence = None
        if rdd.confidence == "entropy":
            confidence = entropy_confidence(seen.logits, size=size)[0]
        second = seen.aux_logits
        if rdd.confidence == "flip":
            second = teacher(teacher_input.normalize(inputs.flip(-1))).logits.flip(-1)
        if confidence is None and second is not None:
            confidence = teacher_confidence(seen.logits, second, size=size)[0]
        pixels = selected_pixels(
            given.logits,
            seen.logits,
            label_maps,
            mode=rdd.mode,
            threshold=rdd.threshold,
            # A count is meant for a training batch, not for one image of the figure.
            min_kept=rdd.min_kept if isinstance(rdd.min_kept, float) else 0,
            ignore_index=images.labels.ignore_index,
        )
        predictions = [
            predict_labels(
                network,
                preprocessing,
                inputs,
                sizes=[size],
                **evaluation.prediction(),
            )[0]
            for network, preprocessing in networks
        ]
    return RddRow(
        name=sample.name,
        image=image,
        label=label,
        student=predictions[1],
        teacher=predictions[0],
        confidence=confidence,
        hard_student=pixels.hard_student[0],
        hard_teacher=pixels.hard_teacher[0],
        chosen=pixels.selected[0],
    )
