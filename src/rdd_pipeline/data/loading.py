"""Batches of training crops and of whole images for evaluation.

Every random number is a function of (seed, iteration, slot): which image, scale, crop and flip slot
0..B-1 of an iteration gets. Nothing random is drawn from a stream, so the pixels do not depend on
the number of loader processes or ranks, and training can go on from any iteration without saved
random states. Iterations count from 1.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rdd_pipeline.config import AugmentParams
from rdd_pipeline.data.delivery import (
    LOOK_EVERY,
    PREFETCHED,
    check_shared_memory,
    deliver,
    share,
    started_here,
)
from rdd_pipeline.data.index import Sample
from rdd_pipeline.data.labels import Lookup
from rdd_pipeline.data.packed import PackedSource
from rdd_pipeline.data.processes import end_with_parent, hidden_main
from rdd_pipeline.data.reading import resize_image
from rdd_pipeline.data.sources import FileSource, ImageSource
from rdd_pipeline.data.transforms import (
    ColorPlan,
    CropPlan,
    apply_crop,
    draw_colors,
    draw_plan,
)
from rdd_pipeline.errors import UserError

IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""RGB mean of ImageNet in 0..255, the default padding."""

PATIENCE = 600.0
"""Seconds to wait for a batch from a loader process, unless told otherwise."""

CACHE_BYTES = 1 << 30
"""Decoded images kept in memory, over all loader processes of a rank together."""

# First word after the seed: keeps the random streams of order, crops and colors apart.
_ORDER, _AUGMENT, _COLORS = 1, 2, 3

AnyBatch = TypeVar("AnyBatch", "Batch", "EvaluationBatch")


class Batch(NamedTuple):
    """Training crops of one iteration (one rank's share of it)."""

    iteration: int
    images: Tensor
    """uint8 (B, 3, h, w), RGB."""
    labels: Tensor
    """uint8 (B, h, w), train ids."""


class EvaluationBatch(NamedTuple):
    """Whole images of equal size."""

    indices: tuple[int, ...]
    """Their positions in the samples given."""
    images: Tensor
    """uint8 (B, 3, h, w), RGB; resized to `image_size` if one was given."""
    labels: Tensor
    """uint8 (B, H, W), train ids at the mask's own size."""


class _Failed(NamedTuple):
    """A UserError on its way out of a loader process, without the process's traceback."""

    kind: type[UserError]
    message: str


def epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """The order of `size` images in an epoch (counted from 0)."""
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(size)


_cached_epoch_order = lru_cache(maxsize=4)(epoch_order)


def sample_order(seed: int, iteration: int, slot: int, size: int, batch_size: int) -> int:
    """Which of `size` images slot `slot` of the iteration's `batch_size` gets.

    Each epoch shows each image once, in an order of its own; batches run on across epochs.
    """
    epoch, place = divmod((iteration - 1) * batch_size + slot, size)
    return int(_cached_epoch_order(seed, epoch, size)[place])


def sample_plan(
    seed: int, iteration: int, slot: int, height: int, width: int, augment: AugmentParams
) -> CropPlan:
    """Scale, crop and flip of a slot, for an image of `height` x `width`."""
    rng = np.random.default_rng((seed, _AUGMENT, iteration, slot))
    return draw_plan(rng, height, width, augment)


def sample_colors(seed: int, iteration: int, slot: int, augment: AugmentParams) -> ColorPlan | None:
    """Changes of a slot's colors; None: they stay."""
    if not augment.photometric:
        return None
    rng = np.random.default_rng((seed, _COLORS, iteration, slot))
    return draw_colors(rng, augment.photometric)


def rank_slots(batch_size: int, rank: int, world_size: int) -> range:
    """The slots of an iteration that a rank loads; the ranks' shares are consecutive.

    Raises:
        UserError: There are more ranks than slots.
    """
    if batch_size < world_size:
        raise UserError(
            f"batch_size ({batch_size}) is smaller than the number of processes ({world_size}). "
            "Raise batch_size or use fewer processes."
        )
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


class TrainingSet(Dataset[tuple[Tensor, Tensor]]):
    """Training crops by (iteration, slot).

    Args:
        source: Decoded training images.
        augment: Crop size, scales and flip probability.
        seed: With iteration and slot it decides everything random.
        batch_size: Slots of an iteration, over all ranks together.
        ignore_index: Label of padding.
        pad_color: RGB of padding, 0..255.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        augment: AugmentParams,
        seed: int,
        batch_size: int,
        ignore_index: int = 255,
        pad_color: tuple[float, float, float] = IMAGENET_MEAN,
    ) -> None:
        if len(source) == 0:
            raise UserError("There are no training images. Check the split and `data.path`.")
        self.source = source
        self.augment = augment
        self.seed = seed
        self.batch_size = batch_size
        self.ignore_index = ignore_index
        self.pad_color = pad_color

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Image, uint8 (3, h, w), and labels, uint8 (h, w), of (iteration, slot)."""
        iteration, slot = key
        position = sample_order(self.seed, iteration, slot, len(self.source), self.batch_size)
        image, mask = self.source[position]
        height, width = mask.shape
        plan = sample_plan(self.seed, iteration, slot, height, width, self.augment)
        return apply_crop(
            image,
            mask,
            plan,
            pad_color=self.pad_color,
            ignore_index=self.ignore_index,
            colors=sample_colors(self.seed, iteration, slot, self.augment),
        )

    def batch(self, iteration: int, slots: Sequence[int]) -> Batch:
        """The given slots of an iteration."""
        images, labels = zip(*(self[iteration, slot] for slot in slots), strict=True)
        return Batch(iteration, torch.stack(images), torch.stack(labels))


def training_batches(
    samples: Sequence[Sample],
    root: Path,
    *,
    augment: AugmentParams,
    seed: int,
    batch_size: int,
    first_iteration: int,
    last_iteration: int,
    lookup: Lookup,
    ignore_index: int = 255,
    image_size: tuple[int, int] | None = None,
    pad_color: tuple[float, float, float] = IMAGENET_MEAN,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    cache_bytes: int = CACHE_BYTES,
    pack: Path | None = None,
    pin_memory: bool = False,
    patience: float = PATIENCE,
) -> Iterator[Batch]:
    """The training batches of iterations `first_iteration` to `last_iteration`, both included.

    Args:
        samples: The training images.
        root: The data set's folder.
        augment: Crop size, scales and flip probability.
        seed: With iteration and slot it decides everything random.
        batch_size: Images an iteration, over all ranks together.
        first_iteration: Iterations count from 1; any one may be the first.
        last_iteration: Less than `first_iteration`: no batches.
        lookup: What mask values or colors mean, see `LabelSet.lookup`.
        ignore_index: Label of padding.
        image_size: (height, width) images and masks are resized to before the crop.
        pad_color: RGB of padding, 0..255.
        workers: Loader processes; 0: load in this one. The pixels are the same.
        rank: This process among the training processes.
        world_size: Number of training processes; rank r loads slots r*B//W to (r+1)*B//W.
        cache_bytes: Memory for decoded images, over all loader processes of this rank; without
            a pack only.
        pack: Pack of these samples, from `cache.write_pack`; None: read the files.
        pin_memory: Put batches in page-locked memory, for a GPU.
        patience: Seconds to wait for a batch from a loader process.

    Yields:
        One batch an iteration.

    Raises:
        DataProblem: A file cannot be read (the message names it).
        UserError: No samples, more ranks than slots, too little shared memory for the loader
            processes, or one of them died or delivers nothing.
    """
    files = FileSource(
        samples,
        root,
        lookup=lookup,
        image_size=image_size,
        cache_bytes=0 if pack else cache_bytes // max(workers, 1),
    )
    source = PackedSource(pack, files) if pack else files
    dataset = TrainingSet(
        source,
        augment=augment,
        seed=seed,
        batch_size=batch_size,
        ignore_index=ignore_index,
        pad_color=pad_color,
    )
    slots = rank_slots(batch_size, rank, world_size)
    keys = [(iteration, slots) for iteration in range(first_iteration, last_iteration + 1)]
    check_shared_memory(workers, crop_bytes(augment, len(slots)), local_trainings())
    return _load(
        _LoadTraining(dataset), keys, workers=workers, pin_memory=pin_memory, patience=patience
    )


def crop_bytes(augment: AugmentParams, count: int) -> int:
    """Size of `count` training crops with their labels."""
    height, width = augment.crop
    return count * height * width * 4


def local_trainings() -> int:
    """Training processes on this machine, of which this is one; torch's launcher says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def evaluation_batches(
    samples: Sequence[Sample],
    root: Path,
    *,
    batch_size: int,
    lookup: Lookup,
    image_size: tuple[int, int] | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pack: Path | None = None,
    pin_memory: bool = False,
    patience: float = PATIENCE,
) -> Iterator[EvaluationBatch]:
    """Whole images, each once over all ranks: rank r gets r, r + world_size, ...

    Args:
        samples: The images.
        root: The data set's folder.
        batch_size: At most so many images at once; only images of equal size share a batch.
        lookup: What mask values or colors mean, see `LabelSet.lookup`.
        image_size: (height, width) images are resized to; the labels keep their own size.
        workers: Loader processes; 0: load in this one.
        rank: This process among the evaluating processes.
        world_size: Number of evaluating processes.
        pack: Pack of these samples at their own size; None: read the files.
        pin_memory: Put batches in page-locked memory, for a GPU.
        patience: Seconds to wait for a batch from a loader process.

    Yields:
        Batches ordered by image size, then by position.

    Raises:
        DataProblem: A file cannot be read (the message names it).
        UserError: As for `training_batches`.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for position in range(rank, len(samples), world_size):
        groups.setdefault((samples[position].height, samples[position].width), []).append(position)
    keys = [
        tuple(positions[start : start + batch_size])
        for _, positions in sorted(groups.items())
        for start in range(0, len(positions), batch_size)
    ]
    files = FileSource(samples, root, lookup=lookup)
    load = _LoadWhole(PackedSource(pack, files) if pack else files, image_size)
    if workers > 0:
        largest = max((_whole_bytes(samples, key, image_size) for key in keys), default=0)
        check_shared_memory(workers, largest, local_trainings())
    return _load(load, keys, workers=workers, pin_memory=pin_memory, patience=patience)


def _whole_bytes(
    samples: Sequence[Sample], positions: Sequence[int], image_size: tuple[int, int] | None
) -> int:
    """Size of whole images with their labels."""
    own = samples[positions[0]].height * samples[positions[0]].width
    height, width = image_size or (own, 1)
    return len(positions) * (3 * height * width + own)


@dataclass(frozen=True)
class _LoadTraining:
    dataset: TrainingSet

    def __call__(self, key: tuple[int, range]) -> Batch:
        return self.dataset.batch(*key)


@dataclass(frozen=True)
class _LoadWhole:
    source: ImageSource
    image_size: tuple[int, int] | None

    def __call__(self, positions: tuple[int, ...]) -> EvaluationBatch:
        images, labels = zip(*(self.source[position] for position in positions), strict=True)
        resized = torch.stack([resize_image(image, self.image_size) for image in images])
        return EvaluationBatch(positions, resized, torch.stack(labels))


class _Keyed(Dataset[Any]):
    """`load(key)` as a dataset whose items are whole batches, for DataLoader's processes."""

    def __init__(self, load: Callable[[Any], Any], keys: Sequence[Any]) -> None:
        self.load = load
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Any:
        try:
            return share(self.load(self.keys[number]))
        except UserError as problem:
            return _Failed(type(problem), str(problem))


def _load(
    load: Callable[[Any], AnyBatch],
    keys: Sequence[Any],
    *,
    workers: int,
    pin_memory: bool,
    patience: float,
) -> Iterator[AnyBatch]:
    """`load(key)` for each key in order, in `workers` processes or in this one."""
    if workers == 0:
        for key in keys:
            batch = load(key)
            yield _pinned(batch) if pin_memory else batch
        return
    if not keys:
        return
    # Forked children of a process with threads or CUDA can hang; forkserver's cannot.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])
    loader = DataLoader(
        _Keyed(load, keys),
        batch_size=None,
        collate_fn=_unchanged_batch,
        num_workers=workers,
        prefetch_factor=PREFETCHED,
        timeout=min(LOOK_EVERY, patience),
        multiprocessing_context=context,
        pin_memory=pin_memory,
        worker_init_fn=end_with_parent,
        # Otherwise a number is drawn from the global generator, which training uses.
        generator=torch.Generator().manual_seed(0),
    )
    with hidden_main(), started_here() as started:
        batches = iter(loader)
    try:
        for batch in deliver(batches, started, patience):
            if isinstance(batch, _Failed):
                raise batch.kind(batch.message)
            yield batch
    finally:
        # A traceback keeps this frame: end the processes now, not when it is collected.
        del batches


def _unchanged_batch(batch: AnyBatch) -> AnyBatch:
    """In place of DataLoader's conversion, which turns tuples into lists."""
    return batch


def _pinned(batch: AnyBatch) -> AnyBatch:
    return batch._replace(images=batch.images.pin_memory(), labels=batch.labels.pin_memory())
