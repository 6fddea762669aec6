"""Batches of training crops and of whole images for evaluation.

Every random number is a function of (seed, iteration, slot): which image, scale, crop and flip slot
0..B-1 of an iteration gets. Nothing random is drawn from a stream, so the pixels do not depend on
the number of loader processes or ranks, and training can go on from any iteration without saved
random states. Iterations count from 1.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rdd_pipeline.config import AugmentParams, Size
from rdd_pipeline.data.delivery import (
    LOOK_EVERY,
    PREFETCHED,
    check_shared_memory,
    deliver,
    share,
    started_here,
)
from rdd_pipeline.data.processes import end_with_parent, hidden_main
from rdd_pipeline.data.reading import resize_image
from rdd_pipeline.data.sources import ImageSource
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


@dataclass(frozen=True)
class Loader:
    """How batches are loaded in this process, which changes no pixel.

    Attributes:
        workers: Loader processes; 0: load in this one.
        rank: This process among those that train or evaluate together.
        world_size: Their number; in training rank r loads slots r*B//W to (r+1)*B//W.
        cache_bytes: Memory for decoded training images, over all loader processes of this rank;
            without a pack only.
        pin_memory: Put batches in page-locked memory, for a GPU.
        timeout: Seconds to wait for a batch from a loader process.
        stop: Once it is set, loader processes are not waited for any more: batches end early.
    """

    workers: int = 0
    rank: int = 0
    world_size: int = 1
    cache_bytes: int = 1 << 30
    pin_memory: bool = False
    timeout: float = 600.0
    stop: threading.Event | None = None


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


def load_training(dataset: TrainingSet, iterations: range, loader: Loader) -> Iterator[Batch]:
    """One batch for each iteration, of the slots that are this rank's.

    Raises:
        DataProblem: A file cannot be read.
        UserError: See `Images.training_batches`.
    """
    slots = rank_slots(dataset.batch_size, loader.rank, loader.world_size)
    check_shared_memory(loader.workers, crop_bytes(dataset.augment, len(slots)), local_trainings())
    return _load(_LoadTraining(dataset), [(number, slots) for number in iterations], loader)


def crop_bytes(augment: AugmentParams, count: int) -> int:
    """Size of `count` training crops with their labels."""
    height, width = augment.crop
    return count * height * width * 4


def local_trainings() -> int:
    """Training processes on this machine, of which this is one; torch's launcher says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def load_whole(
    source: ImageSource,
    sizes: Sequence[Size],
    image_size: Size | None,
    batch_size: int,
    loader: Loader,
) -> Iterator[EvaluationBatch]:
    """Whole images in batches of equal size; see `Images.evaluation_batches`.

    Args:
        source: Decoded images at their own size.
        sizes: (height, width) of each of them.
        image_size: (height, width) images are resized to; the labels keep their own size.
        batch_size: At most so many at once.
        loader: How they are loaded.
    """
    groups: dict[Size, list[int]] = {}
    for position in range(loader.rank, len(sizes), loader.world_size):
        groups.setdefault(sizes[position], []).append(position)
    keys = [
        tuple(positions[start : start + batch_size])
        for _, positions in sorted(groups.items())
        for start in range(0, len(positions), batch_size)
    ]
    if loader.workers > 0:
        largest = max(
            (_whole_bytes(sizes[key[0]], len(key), image_size) for key in keys), default=0
        )
        check_shared_memory(loader.workers, largest, local_trainings())
    return _load(_LoadWhole(source, image_size), keys, loader)


def _whole_bytes(size: Size, count: int, image_size: Size | None) -> int:
    """Size of whole images with their labels."""
    own = size[0] * size[1]
    height, width = image_size or size
    return count * (3 * height * width + own)


@dataclass(frozen=True)
class _LoadTraining:
    dataset: TrainingSet

    def __call__(self, key: tuple[int, range]) -> Batch:
        return self.dataset.batch(*key)


@dataclass(frozen=True)
class _LoadWhole:
    source: ImageSource
    image_size: Size | None

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
    load: Callable[[Any], AnyBatch], keys: Sequence[Any], options: Loader
) -> Iterator[AnyBatch]:
    """`load(key)` for each key in order, in loader processes or in this one."""
    if options.workers == 0:
        for key in keys:
            batch = load(key)
            yield _pinned(batch) if options.pin_memory else batch
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
        num_workers=options.workers,
        prefetch_factor=PREFETCHED,
        timeout=min(LOOK_EVERY, options.timeout),
        multiprocessing_context=context,
        pin_memory=options.pin_memory,
        worker_init_fn=end_with_parent,
        # Otherwise a number is drawn from the global generator, which training uses.
        generator=torch.Generator().manual_seed(0),
    )
    with hidden_main(), started_here() as started:
        batches = iter(loader)
    try:
        for batch in deliver(batches, started, options.timeout, options.stop):
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
