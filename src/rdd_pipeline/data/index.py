"""The index: one row for each labeled image, made by looking at every file once.

Training and evaluation read images through the index only, so a bad file is found here, before
anything is trained, and a changed file changes the digest that results are stored under.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdd_pipeline.data.division import Division, divide
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.data.layouts import Layout, Pair, Problem, list_pairs, raise_problems
from rdd_pipeline.data.progress import tracked
from rdd_pipeline.data.reading import (
    FULL_BITS,
    ImageFacts,
    inspect_image,
    inspect_mask,
    read_bytes,
)
from rdd_pipeline.data.remarks import remarks
from rdd_pipeline.data.scan_cache import Facts, ScanCache, Stamp
from rdd_pipeline.errors import DataProblem, UserError, printable
from rdd_pipeline.files import content_digest


class Sample(NamedTuple):
    """One labeled image. Paths are relative to the data set's folder, with `/`."""

    split: str
    name: str
    image: str
    mask: str
    height: int
    width: int
    image_digest: str
    mask_digest: str
    bits: int = FULL_BITS
    """Of a 16-bit gray image: how many bits its values have; see `decode_image_bytes`."""


class ClassCounts(NamedTuple):
    """How often each class occurs in a split; the last entry is the ignored pixels'."""

    pixels: tuple[int, ...]
    images: tuple[int, ...]


class Index(NamedTuple):
    """Every labeled image of a data set, checked."""

    samples: tuple[Sample, ...]
    """Those that nothing is wrong with."""
    counts: Mapping[str, ClassCounts]
    """By split, in the order of the samples."""
    warnings: tuple[str, ...]
    """What is allowed and may still be a mistake, one line each: of the data set as a whole first,
    then each image that is in two splits."""
    problems: tuple[Problem, ...] = ()
    """What is wrong with the others, or with the folder as a whole."""
    read: int = 0
    """Pairs that were read; the others were known from the time before."""
    splits: tuple[str, ...] = ()
    """All that were listed, those included that have no good pair."""


class _Checked(NamedTuple):
    pair: Pair
    stamp: Stamp | None
    facts: Facts | None
    problems: tuple[Problem, ...] = ()
    known: bool = False


def build_index(root: Path, layout: Layout, *, workers: int | None = None) -> Index:
    """Decode and check every image and mask below `root` once.

    Args:
        root: The data set's folder.
        layout: How it is organized.
        workers: Threads; None: one for each core this process may use.

    Returns:
        Samples in the order of the layout's listing, class counts, and warnings.

    Raises:
        DataProblem: Anything is wrong; the message lists all of it (at most 20 lines).
    """
    index = check_images(root, layout, workers=workers)
    raise_problems(root, index.problems)
    return index


def check_images(
    root: Path,
    layout: Layout,
    *,
    workers: int | None = None,
    cache: Path | None = None,
    division: Division = Division(),  # noqa: B008 - immutable
    bits: int = FULL_BITS,
) -> Index:
    """Look at every image and mask below `root` once and collect what is wrong.

    Args:
        root: The data set's folder.
        layout: How it is organized.
        workers: Threads; None: one for each core this process may use.
        cache: File that remembers what was found, so that after an interruption, or the next
            time, only changed files are read; see `scan_cache.ScanCache`. None: all are read.
        division: Splits to make of the training images.
        bits: How many bits the values of 16-bit gray images have, see `decode_image_bytes`.

    Returns:
        Samples in the order of the layout's listing, their class counts, and all problems. A pair
        that any problem is about is not among the samples.

    Raises:
        DataProblem: `root` is not a folder.
        UserError: A split that should be made is there.
    """
    listing = list_pairs(root, layout, made=division.made)
    listed = dict.fromkeys(pair.split for pair in listing.pairs)
    _refuse_to_make(listed, division)
    labels = layout.labels
    looked_at = _check_all(root, listing.pairs, labels, cache, workers)
    checked = [item for item in looked_at if item.facts is not None]
    problems = list(listing.problems)
    for item in looked_at:
        problems += item.problems
        if item.facts is not None:
            problems += _depth_problems(item.pair, item.facts.image, bits)
    faulty = {problem.file for problem in problems}
    good = [item for item in checked if not faulty & {item.pair.image, item.pair.mask}]
    if division.made:
        good = _divided(good, division)
        lacking = {"train", *division.made} - {item.pair.split for item in good}
        if listed and lacking and not problems:
            problems.append(Problem("train", _too_few(lacking, good), blocks=True))
    samples = tuple(_sample(item, bits) for item in good)
    warnings = (
        *listing.warnings,
        *remarks([(i.pair, i.facts) for i in good if i.facts], bits, layout.palette),
        *_duplicates(samples),
    )
    return Index(
        samples,
        _counts(good, labels.num_classes),
        tuple(map(printable, warnings)),
        # Lines of lists and links may hold anything.
        tuple(p._replace(file=printable(p.file), text=printable(p.text)) for p in problems),
        len(listing.pairs) - sum(item.known for item in checked),
        (*listed, *division.made),
    )


def _refuse_to_make(listed: Iterable[str], division: Division) -> None:
    for split in division.made:
        if split in listed:
            share = getattr(division, split)
            raise UserError(
                f"data.{split}_fraction is {share}, but the data set has a split '{split}'. Set "
                f"data.{split}_fraction=0 to use it, or take it out of the data set to make one."
            )


def _divided(checked: Sequence[_Checked], division: Division) -> list[_Checked]:
    """Some of the training images in other splits; splits in their usual order."""
    train = [item for item in checked if item.pair.split == "train"]
    digests = [item.facts.image_digest for item in train if item.facts is not None]
    moved = [
        item._replace(pair=item.pair._replace(split=split))
        for item, split in zip(train, divide(digests, division), strict=True)
    ]
    others = [item for item in checked if item.pair.split != "train"]
    order = ("train", "val", "test")
    return sorted(
        moved + others,
        key=lambda item: order.index(item.pair.split) if item.pair.split in order else len(order),
    )


def _too_few(lacking: Iterable[str], checked: Sequence[_Checked]) -> str:
    others = [item for item in checked if item.pair.split in ("train", "val", "test")]
    distinct = len({item.facts.image_digest for item in others if item.facts is not None})
    return (
        f"{len(others)} images, {distinct} of them different, are too few or too much alike to "
        f"make the splits asked for: none is left for {' and '.join(sorted(lacking))}. Add images "
        "or change data.val_fraction and data.test_fraction."
    )


def index_digest(samples: Iterable[Sample]) -> str:
    """Digest of splits, names and contents; the folder, file suffixes and order do not matter."""
    rows = sorted((s.split, s.name, *pixels_of(s)) for s in samples)
    return content_digest(repr(rows).encode())


def pixels_of(sample: Sample) -> tuple[str, str, *tuple[int, ...]]:
    """What decides a sample's pixels: digests of its files, and bits that `data.bits` changed."""
    bits = () if sample.bits == FULL_BITS else (sample.bits,)
    return sample.image_digest, sample.mask_digest, *bits


def of_split(samples: Iterable[Sample], split: str) -> tuple[Sample, ...]:
    """The samples of one split, in their order."""
    return tuple(sample for sample in samples if sample.split == split)


def evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` of them, evenly spaced: neighbors are often alike."""
    count = min(count, len(samples))
    return [samples[(2 * n + 1) * len(samples) // (2 * count)] for n in range(count)]


def to_rows(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """One dictionary for each sample, for tables."""
    return [sample._asdict() for sample in samples]


def from_rows(rows: Iterable[Mapping[Any, Any]]) -> tuple[Sample, ...]:
    """Inverse of `to_rows`; further columns are ignored.

    Raises:
        DataProblem: A column is missing, or a height, width or number of bits is none.
    """
    samples: list[Sample] = []
    for row in rows:
        missing = [f for f in Sample._fields if f not in row and f not in Sample._field_defaults]
        if missing:
            raise DataProblem(
                f"The index has no column {', '.join(missing)}; it has {', '.join(map(str, row))}. "
                "Run the data_ingestion pipeline again."
            )
        numbers = {"height", "width", "bits"}
        try:
            values: dict[str, Any] = {
                field: int(row[field]) if field in numbers else str(row[field])
                for field in Sample._fields
                if field in row
            }
            if min(values["height"], values["width"]) < 1:
                raise ValueError("an image without pixels")
        except (TypeError, ValueError) as error:
            raise DataProblem(
                f"Row {len(samples) + 1} of the index cannot be read ({str(error)[:200]}). Run the "
                "data_ingestion pipeline again."
            ) from error
        samples.append(Sample(**values))
    return tuple(samples)


def usable_cores() -> int:
    """Cores this process may use (fewer than the machine's in a container or a batch job)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_all(
    root: Path, pairs: Sequence[Pair], labels: LabelSet, cache: Path | None, workers: int | None
) -> list[_Checked]:
    key = (labels.lookup, labels.num_classes, labels.ignore_index, str(root.resolve()))
    known = ScanCache(cache, repr(key))
    checked: list[_Checked] = []
    pool = ThreadPoolExecutor(workers or usable_cores())
    try:
        results = pool.map(lambda pair: _check(root, pair, labels, known), pairs)
        for result in tracked(results, "checking images", len(pairs)):
            checked.append(result)
            if result.facts is not None:
                known.keep(result.pair, result.stamp, result.facts, new=not result.known)
    finally:
        pool.shutdown(cancel_futures=True)
        known.save(complete=len(checked) == len(pairs))
    return checked


def _check(root: Path, pair: Pair, labels: LabelSet, known: ScanCache) -> _Checked:
    """What the pair holds, or what is wrong with it."""
    stamp, facts = known.recall(root, pair)
    if facts is not None:
        return _Checked(pair, stamp, facts, known=True)
    problems: list[Problem] = []
    size: tuple[int, int] | None = None
    image_digest = mask_digest = ""
    image_facts = ImageFacts()
    palette: dict[int, int] = {}
    ids: NDArray[np.uint8] | None = None
    try:
        data = read_bytes(root / pair.image)
        image_digest = content_digest(data)
        # The most bits: `data.bits` may change without the files being read again.
        image, image_facts = inspect_image(data, Path(pair.image))
        size = (int(image.shape[-2]), int(image.shape[-1]))
    except DataProblem as problem:
        problems.append(Problem(pair.image, str(problem)))
    try:
        data = read_bytes(root / pair.mask)
        mask_digest = content_digest(data)
        ids, palette = inspect_mask(data, labels.lookup, Path(pair.mask))
    except DataProblem as problem:
        problems.append(Problem(pair.mask, str(problem)))
    if size is not None and ids is not None and ids.shape != size:
        problems.append(Problem(pair.mask, _size_problem(pair, size, ids.shape)))
    if problems or size is None or ids is None:
        return _Checked(pair, stamp, None, tuple(problems))
    histogram = Image.fromarray(ids).histogram()  # several times faster than numpy's bincount
    pixels = [*histogram[: labels.num_classes], histogram[labels.ignore_index]]
    counts = {number: count for number, count in enumerate(pixels) if count}
    facts = Facts(*size, image_digest, mask_digest, counts, image_facts, palette)
    return _Checked(pair, stamp, facts)


def _depth_problems(pair: Pair, facts: ImageFacts, bits: int) -> list[Problem]:
    """What is wrong with the image only because `data.bits` says so."""
    if facts.gray_top >= 1 << bits:
        text = (
            f"{pair.image} holds gray values up to {facts.gray_top}, but data.bits is {bits}: "
            f"expected 0..{(1 << bits) - 1}. Raise data.bits to {facts.gray_top.bit_length()}."
        )
    elif bits < FULL_BITS and facts.color_top >= 0:
        text = (
            f"{pair.image} is a 16-bit color image, which data.bits ({bits}) cannot be applied to: "
            "only the upper bytes of such images are read. Convert it to 8 bits a channel."
        )
    else:
        return []
    return [Problem(pair.image, text)]


def _size_problem(pair: Pair, image: tuple[int, int], mask: tuple[int, ...]) -> str:
    what_to_do = "Resize the mask (nearest pixel) or replace it."
    if mask == image[::-1]:
        what_to_do = (
            "The image may carry an EXIF rotation that the mask was made without: save it upright."
        )
    return (
        f"{pair.mask} is {mask[1]} x {mask[0]} pixels (width x height), its image {pair.image} "
        f"{image[1]} x {image[0]}. {what_to_do}"
    )


def _sample(item: _Checked, bits: int) -> Sample:
    assert item.facts is not None
    # Images that `bits` says nothing about stay what they are when it is changed.
    used = bits if item.facts.image.gray_top >= 0 else FULL_BITS
    return Sample(*item.pair, *item.facts[:4], bits=used)


def _counts(checked: Sequence[_Checked], num_classes: int) -> dict[str, ClassCounts]:
    pixels: dict[str, NDArray[np.int64]] = {}
    images: dict[str, NDArray[np.int64]] = {}
    for item in checked:
        assert item.facts is not None
        split = item.pair.split
        for table in (pixels, images):
            table.setdefault(split, np.zeros(num_classes + 1, np.int64))
        for number, count in item.facts.pixels.items():
            pixels[split][number] += count
            images[split][number] += 1
    return {
        split: ClassCounts(tuple(pixels[split].tolist()), tuple(images[split].tolist()))
        for split in pixels
    }


def _duplicates(samples: Iterable[Sample]) -> list[str]:
    """One warning for each image that occurs in two splits: the evaluation would be too good."""
    first: dict[str, Sample] = {}
    warnings = []
    for sample in samples:
        other = first.setdefault(sample.image_digest, sample)
        if other.split != sample.split:
            warnings.append(
                f"{sample.image} and {other.image} are the same image in two splits "
                f"('{sample.split}' and '{other.split}'): results on one of them are too good."
            )
    return warnings
