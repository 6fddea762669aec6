"""Nodes that turn a folder of labeled images into a checked index and a packed cache."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from rdd_pipeline.config import DataParams
from rdd_pipeline.data.coverage import with_coverage
from rdd_pipeline.data.division import Division
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Index, check_images, evenly, of_split, to_rows
from rdd_pipeline.data.layouts import Problem, get_layout, prepare, raise_problems
from rdd_pipeline.data.packed import (
    PackProblem,
    fits_comfortably,
    packed_bytes,
    usable_pack,
    write_pack,
)
from rdd_pipeline.data.statistics import label_statistics
from rdd_pipeline.drawing import Drawing
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.files import content_digest
from rdd_pipeline.pipelines.paths import images_root
from rdd_pipeline.reporting.caption import captioned, provenance

from .report import ingestion_report
from .strips import contact_strips

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

PREVIEWED = 4
LOGGED = 10
"""Warnings and left-out images in the log; the report has all of them."""

REPORT = "The report, catalog entry `ingestion_report` below data/08_reporting, has all of them."


class Inspection(NamedTuple):
    """What looking at a folder of images has found."""

    images: Images
    """Those without a problem."""
    problems: tuple[Problem, ...]


def inspect_images(
    raw_images: Path, image_cache: Path, data: DataParams
) -> tuple[Inspection, pd.DataFrame, list[dict[str, Any]], str]:
    """Look at every image and mask once; what has to be downloaded or generated comes first.

    What is wrong is collected, so that the report is there before the run stops for it.

    Args:
        raw_images: Folder of the images unless `data.path` names another.
        image_cache: Folder that remembers what was found: unchanged files are not read again.
        data: Layout and reading.

    Returns:
        What was found, statistics by split and class, all problems, and the report.

    Raises:
        DataProblem: The folder with the images, or the table of labels in it, is missing.
    """
    root = prepare(images_root(raw_images, data), data)
    layout = get_layout(data.layout, root)
    place = content_digest(str(root).encode())[:12]
    index = check_images(
        root,
        layout,
        workers=_workers(data),
        cache=image_cache / f"checked-{place}.json",
        division=Division(data.val_fraction, data.test_fraction, data.split_seed),
        bits=data.bits,
    )
    known = len(index.samples) - index.read
    logger.info(
        "%d labeled images checked%s.",
        len(index.samples),
        f", {known} of them unchanged since the last time" if known > 0 else "",
    )
    quarantine = data.on_problem == "quarantine"
    if quarantine:
        index = _with_empty_splits(index)
    if quarantine or not index.problems:
        index = with_coverage(index, layout)
    divided = _divided(index, data)
    if divided:
        logger.info(divided)
    _log(index.warnings)
    statistics = label_statistics(index, layout.labels)
    whole = Images(root, index.samples, layout.labels)
    report = ingestion_report(
        index,
        layout.labels,
        statistics,
        layout=data.layout,
        root=str(root),
        quarantine=quarantine,
        divided=divided,
        strips=contact_strips(whole, image_cache / f"thumbnails-{place}.json"),
    )
    return (
        Inspection(dataclasses.replace(whole, image_size=data.image_size), index.problems),
        pd.DataFrame(statistics, columns=["split", "class", "pixels", "share", "images"]),
        [problem._asdict() for problem in index.problems],
        report,
    )


def index_images(
    inspection: Inspection, data: DataParams
) -> tuple[Images, pd.DataFrame, dict[str, str]]:
    """Let the images through that nothing is wrong with, or stop for those that something is.

    Returns:
        The images, their table (one row for each) and tags that identify the data.

    Raises:
        DataProblem: There are problems and `data.on_problem` is `stop`, or leaving images out does
            not help; all problems in one message.
    """
    images, problems = inspection
    root = images.root
    left_out = len(problems)
    if data.on_problem == "stop":
        cure = " To go on without these images: data.on_problem=quarantine"
        if any(problem.blocks for problem in problems):
            cure = ""
        raise_problems(root, problems, advice=REPORT + cure)
    else:
        raise_problems(root, [p for p in problems if p.blocks], advice=REPORT)
        if problems:
            logger.warning(
                "%d problems: the images they are about are LEFT OUT, %d are used. %s",
                left_out,
                len(images.samples),
                REPORT,
            )
            _log([problem.text for problem in problems])
    if not images.split("train").samples:
        expected = get_layout(data.layout, root).expected
        raise DataProblem(f"{root} has no training image. Expected: {expected}")
    tags = {
        "data_digest": images.index_digest,
        "layout": data.layout,
        "images": str(len(images.samples)),
    }
    if left_out:
        tags["image_problems"] = str(left_out)
    if data.val_fraction or data.test_fraction:
        tags |= {
            key: str(getattr(data, key)) for key in ("val_fraction", "test_fraction", "split_seed")
        }
    return images, pd.DataFrame(to_rows(images.samples)), tags


def pack_images(
    indexed_images: Images, image_cache: Path, data: DataParams
) -> tuple[Images, dict[str, Any]]:
    """Keep the decoded images of each split in one file, unless it is there already.

    Training images are packed at their `image_size`, the others at their own size, as they are
    used.

    Returns:
        The images with their packs; and for people: ``folder`` of the packs (None: images are read
        from their files), the file and its size in MB by split, and a note why there is none.

    Raises:
        DataProblem: `data.cache` is true and the packs do not fit, or a file has changed.
    """
    if data.cache is False:
        return indexed_images, _unpacked("data.cache is false")
    splits = {
        split: indexed_images.split(split).files(
            indexed_images.image_size if split == "train" else None
        )
        for split in dict.fromkeys(sample.split for sample in indexed_images.samples)
    }
    missing = sum(
        packed_bytes(files) for files in splits.values() if usable_pack(files, image_cache) is None
    )
    if data.cache == "auto" and missing and not fits_comfortably(image_cache, missing):
        return indexed_images, _unpacked(
            f"{missing / 2**30:.1f} GiB would take more than half of the free disk; data.cache=true"
            " packs all the same"
        )
    packs: dict[str, dict[str, Any]] = {}
    try:
        for split, files in splits.items():
            path = write_pack(files, image_cache, workers=_workers(data))
            packs[split] = {"file": path.name, "megabytes": round(path.stat().st_size / 1e6, 1)}
    except PackProblem as problem:
        if data.cache is True:
            raise
        return indexed_images, _unpacked(str(problem))
    _mention_others(image_cache, {pack["file"] for pack in packs.values()})
    return (
        dataclasses.replace(indexed_images, packs=image_cache),
        {"folder": str(image_cache), "splits": packs, "note": ""},
    )


def _mention_others(folder: Path, ours: set[str]) -> None:
    others = [path.stat().st_size for path in folder.glob("*.pack") if path.name not in ours]
    if others:
        logger.info(
            "%d packs of other images or sizes take %.1f GB in %s; remove them if you do not go "
            "back to those.",
            len(others),
            sum(others) / 1e9,
            folder,
        )


def preview_images(images: Images) -> Drawing:
    """Show a few training images with their labels, evenly spaced: neighbors are often alike."""
    chosen = evenly(images.split("train").samples, PREVIEWED)
    line = provenance(data=images.labels.name, split="train")

    def draw() -> Figure:
        from rdd_pipeline.reporting.preview import dataset_preview  # and matplotlib, to draw

        pairs = [(sample.name, *images.read(sample)) for sample in chosen]
        return captioned(dataset_preview(pairs, images.labels), line)

    labels = images.labels.model_dump(mode="json")
    return Drawing(draw, shows=["preview", images.digest, labels, line])


def _workers(data: DataParams) -> int | None:
    return None if data.workers == "auto" else data.workers


def _divided(index: Index, data: DataParams) -> str:
    """What became of the training images, in one sentence; empty: they were left as they are."""
    made = {"val": data.val_fraction, "test": data.test_fraction}
    parts = [
        f"{len(of_split(index.samples, split))} to '{split}' (data.{split}_fraction={share:g})"
        for split, share in made.items()
        if share
    ]
    if not parts:
        return ""
    left = len(of_split(index.samples, "train"))
    return (
        f"Of the training images {' and '.join(parts)} went, {left} are left; which ones, their "
        f"contents and data.split_seed={data.split_seed} decide."
    )


def _with_empty_splits(index: Index) -> Index:
    """Leaving out every image of a split is no cure: a problem more for each such split."""
    empty = [split for split in index.splits if split not in index.counts]
    more = tuple(
        Problem(split, f"No image of split '{split}' is without a problem.", blocks=True)
        for split in empty
    )
    return index._replace(problems=more + index.problems)


def _unpacked(reason: str) -> dict[str, Any]:
    logger.info("No packed cache, images are read from their files: %s.", reason.rstrip("."))
    return {"folder": None, "splits": {}, "note": reason}


def _log(warnings: tuple[str, ...] | list[str]) -> None:
    for warning in warnings[:LOGGED]:
        logger.warning(warning)
    if len(warnings) > LOGGED:
        logger.warning("... and %d more. %s", len(warnings) - LOGGED, REPORT)
