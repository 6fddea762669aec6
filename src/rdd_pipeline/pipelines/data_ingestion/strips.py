"""A few images of every split with their masks, small, for the ingestion report."""

from __future__ import annotations

import logging
from pathlib import Path

from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample, evenly, pixels_of
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import (
    from_checked_json,
    json_digest,
    read_regular,
    to_checked_json,
    write_atomically,
)
from rdd_pipeline.reporting.thumbnails import BOX, class_map, photograph

logger = logging.getLogger(__name__)

EACH = 5
"""Images of a split."""

Strips = dict[str, list[dict[str, str]]]
"""By split: ``name``, and ``image`` and ``mask`` as data URIs."""


def contact_strips(images: Images, cache: Path) -> Strips:
    """Evenly spaced images of every split: neighbors are often alike.

    Args:
        images: Without a problem.
        cache: File with those of the last time: what has not changed is not read again. May be
            removed at any time.

    Raises:
        DataProblem: A file cannot be read any more.
    """
    splits = dict.fromkeys(sample.split for sample in images.samples)
    chosen = {split: evenly(images.split(split).samples, EACH) for split in splits}
    key = json_digest(
        [
            [[(s.name, *pixels_of(s)) for s in samples] for samples in chosen.values()],
            [images.labels.meaning(), images.labels.colors, BOX],
        ]
    )
    known = _known(cache, key)
    if known is None:
        known = {
            split: [_small(images, sample) for sample in samples]
            for split, samples in chosen.items()
        }
        try:
            write_atomically(cache, to_checked_json({"key": key, "strips": known}), durable=False)
        except (OSError, UserError) as error:
            logger.debug("%s cannot be written: %s", cache, error)
    return known


def _small(images: Images, sample: Sample) -> dict[str, str]:
    image, mask = images.read(sample)
    return {
        "name": sample.name,
        "image": photograph(image),
        "mask": class_map(mask, images.labels),
    }


def _known(cache: Path, key: str) -> Strips | None:
    try:
        content = from_checked_json(read_regular(cache), str(cache))
    except (OSError, UserError):
        return None
    return content["strips"] if content.get("key") == key else None
