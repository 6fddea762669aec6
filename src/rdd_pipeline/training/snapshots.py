"""What a network predicts for the same few images over a run, kept small beside its curves."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rdd_pipeline.config import RecipeParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample, evenly
from rdd_pipeline.evaluation.predict import evaluation_mode, predict_labels
from rdd_pipeline.networks import Network, Preprocessing
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.state import Snapshot

IMAGES, MOMENTS, SIDE = 4, 5, 160
"""At most so many images, validations, and pixels of a side: 0.5 MB in all."""


def moments(recipe: RecipeParams) -> list[int]:
    """Iterations at whose validation predictions are kept: first, last, and evenly between."""
    validations = [*range(recipe.validate_every, recipe.iterations, recipe.validate_every)]
    validations.append(recipe.iterations)
    last = len(validations) - 1
    places = {round(n * last / (MOMENTS - 1)) for n in range(MOMENTS)}
    return [validations[place] for place in sorted(places)]


def shown_images(images: Images) -> list[Sample]:
    """Those of the split `val` that predictions are kept of."""
    return evenly(images.split("val").samples, IMAGES)


def take_snapshot(
    network: Network, job: TrainingJob, images: Images, iteration: int, device: torch.device
) -> Snapshot:
    """What the network predicts now, as validation has it do; it is left as it was.

    Neither draws random numbers nor waits for other ranks.
    """
    protocol = job.evaluation
    maps = {}
    with evaluation_mode(network):
        samples = shown_images(images)
        pictures = images.split("val").evaluation_images(samples)
        for sample, image in zip(samples, pictures, strict=True):
            (classes,) = predict_labels(
                network,
                Preprocessing.for_network(job.network),
                image.unsqueeze(0).to(device),
                sizes=[_small(sample.height, sample.width)],
                **protocol.prediction(),
            )
            maps[sample.name] = classes.to("cpu", torch.uint8)
    # Copies: those of inference mode refuse what ordinary tensors allow.
    return {"iteration": iteration, "maps": {name: found.clone() for name, found in maps.items()}}


def with_snapshot(before: Iterable[Snapshot] | None, taken: Snapshot) -> list[Snapshot]:
    """All up to this one, oldest first."""
    return [*(one for one in before or () if one["iteration"] < taken["iteration"]), taken]


def _small(height: int, width: int) -> tuple[int, int]:
    shrink = min(1.0, SIDE / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))
