"""The labeled images of a data set as one value: what training, scoring and figures ask about."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from torch import Tensor

from rdd_pipeline.config import AugmentParams, Size
from rdd_pipeline.data.index import Sample, index_digest, of_split
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.data.loading import (
    IMAGENET_MEAN,
    Batch,
    EvaluationBatch,
    Loader,
    TrainingSet,
    load_training,
    load_whole,
)
from rdd_pipeline.data.packed import PackedSource, usable_pack
from rdd_pipeline.data.reading import read_image, read_mask, resize_image
from rdd_pipeline.data.sources import FileSource, ImageSource
from rdd_pipeline.files import json_digest


@dataclasses.dataclass(frozen=True)
class Images:
    """Checked images with their masks, and how they are read.

    Attributes:
        root: Folder that the paths of the samples start at.
        samples: Rows of the index, of one split or of all.
        labels: What the masks mean.
        image_size: (height, width) images are resized to; None: their own. Evaluation resizes
            the images only and compares at the masks' own size.
        packs: Folder with packs, which give the same pixels faster; None: the files are read.
    """

    root: Path
    samples: tuple[Sample, ...]
    labels: LabelSet
    image_size: Size | None = None
    packs: Path | None = None

    def split(self, name: str) -> Images:
        """Those of one split, in their order."""
        return dataclasses.replace(self, samples=of_split(self.samples, name))

    @cached_property
    def index_digest(self) -> str:
        """Digest of splits, names and contents; see `index.index_digest`."""
        return index_digest(self.samples)

    @cached_property
    def digest(self) -> str:
        """Digest of what can be learned here: contents, meaning of the masks, size.

        Where the images lie, packed or not, is not part of it.
        """
        return json_digest([self.index_digest, self.labels.meaning(), self.image_size])

    @property
    def input_size(self) -> Size:
        """(height, width) of the first image as networks see it."""
        return self.image_size or (self.samples[0].height, self.samples[0].width)

    def read(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) and train ids (H, W) of one sample, uint8 and of the same size."""
        return (
            read_image(self.root / sample.image, image_size=self.image_size, bits=sample.bits),
            read_mask(self.root / sample.mask, self.labels.lookup, image_size=self.image_size),
        )

    def files(self, size: Size | None) -> FileSource:
        """Decoded images and masks by position, at this size; None: their own."""
        return FileSource(self.samples, self.root, lookup=self.labels.lookup, image_size=size)

    def training_batches(
        self,
        augment: AugmentParams,
        *,
        seed: int,
        batch_size: int,
        iterations: range,
        pad_color: tuple[float, float, float] = IMAGENET_MEAN,
        loader: Loader = Loader(),  # noqa: B008 - immutable
    ) -> Iterator[Batch]:
        """Random crops of these images, one batch for each iteration.

        Args:
            augment: Crop size, scales and flip probability.
            seed: With iteration and slot it decides everything random.
            batch_size: Images an iteration, over all ranks together.
            iterations: They count from 1; any one may be the first.
            pad_color: RGB of padding, 0..255.
            loader: Processes that load, and this rank's share; the pixels are the same.

        Raises:
            DataProblem: A file cannot be read (the message names it).
            UserError: No samples, more ranks than slots, too little shared memory for the loader
                processes, or one of them died or delivers nothing.
        """
        dataset = TrainingSet(
            self._source(self.image_size, loader.cache_bytes // max(loader.workers, 1)),
            augment=augment,
            seed=seed,
            batch_size=batch_size,
            ignore_index=self.labels.ignore_index,
            pad_color=pad_color,
        )
        return load_training(dataset, iterations, loader)

    def evaluation_batches(
        self,
        batch_size: int,
        loader: Loader = Loader(),  # noqa: B008 - immutable
    ) -> Iterator[EvaluationBatch]:
        """Whole images, each once over all ranks: rank r gets r, r + world_size, ...

        Args:
            batch_size: At most so many images at once; only images of equal size share a batch.
            loader: Processes that load, and this rank's share.

        Yields:
            Batches ordered by image size, then by position.

        Raises:
            DataProblem: A file cannot be read (the message names it).
            UserError: As for `training_batches`.
        """
        sizes = [(sample.height, sample.width) for sample in self.samples]
        return load_whole(self._source(None), sizes, self.image_size, batch_size, loader)

    def evaluation_images(self, samples: Iterable[Sample]) -> Iterator[Tensor]:
        """Some of these images, (3, H, W) uint8, as `evaluation_batches` has them."""
        places = {sample: place for place, sample in enumerate(self.samples)}
        source = self._source(None)
        for sample in samples:
            yield resize_image(source[places[sample]][0], self.image_size)

    def _source(self, size: Size | None, cache_bytes: int = 0) -> ImageSource:
        """Decoded images at this size, from their pack or from their files."""
        files = self.files(size)
        pack = usable_pack(files, self.packs)
        if pack is not None:
            return PackedSource(pack, files)
        files.cache_bytes = cache_bytes
        return files
