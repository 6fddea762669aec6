"""Node that shows what RDD looked at."""

from __future__ import annotations

from functools import partial

import torch
from matplotlib.figure import Figure

from rdd_pipeline.config import EvaluationParams, RddParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.drawing import Drawing
from rdd_pipeline.losses.rdd import entropy_confidence, selected_pixels, teacher_confidence
from rdd_pipeline.networks import NetworkCheckpoint
from rdd_pipeline.networks.resizing import bilinear
from rdd_pipeline.pipelines.method_nodes import Networks, the_only
from rdd_pipeline.reporting.figures import RddRow, rdd_figure


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
    shows = {
        "images": images.digest,
        "labels": images.labels.model_dump(mode="json"),
        "networks": [network.digest() for network in trained],
        "preprocessing": [
            network.header.preprocessing.model_dump(mode="json") for network in trained
        ],
        "rdd": rdd.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
    }
    return Drawing(partial(_draw, images, trained, rdd, evaluation), shows=["pixels", shows])


def _draw(
    images: Images,
    trained: tuple[NetworkCheckpoint, NetworkCheckpoint],
    rdd: RddParams,
    evaluation: EvaluationParams,
) -> Figure:
    labels = images.labels
    there = [name for name in evaluation.splits if images.split(name).samples]
    candidates = images.split((*there, "train")[0]).samples
    count = min(evaluation.figure_images, len(candidates))
    teacher, student = (network.build() for network in trained)
    teacher_input, student_input = (network.header.preprocessing for network in trained)
    rows = []
    for number in range(count):
        sample = candidates[(2 * number + 1) * len(candidates) // (2 * count)]
        image, label = images.read(sample)
        inputs, label_maps = image.unsqueeze(0), label.unsqueeze(0)
        size = (label.shape[0], label.shape[1])
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
                ignore_index=labels.ignore_index,
            )
            logits = bilinear(given.logits, size)
        rows.append(
            RddRow(
                name=sample.name,
                image=image,
                label=label,
                prediction=logits[0].argmax(0),
                confidence=confidence,
                hard_student=pixels.hard_student[0],
                hard_teacher=pixels.hard_teacher[0],
                chosen=pixels.selected[0],
            )
        )
    return rdd_figure(rows, labels)
