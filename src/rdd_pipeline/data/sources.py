"""Decoded images and masks by position, from the files of the index."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rdd_pipeline.data.index import Sample
from rdd_pipeline.data.labels import Lookup
from rdd_pipeline.data.reading import (
    decode_image_bytes,
    decode_mask,
    read_bytes,
    resize_image,
    resize_mask,
)
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.files import content_digest


class ImageSource(Protocol):
    """Decoded images and masks by position: uint8 (3, H, W) and uint8 train ids (H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]: ...


class FileSource:
    """Images and masks read from their files; those read last stay decoded in memory.

    Args:
        samples: Rows of the index.
        root: The data set's folder.
        lookup: What mask values or colors mean, see `LabelSet.lookup`.
        image_size: (height, width) images and masks are resized to; None: their own.
        cache_bytes: Memory for decoded images; 0: none are kept. A pickled copy (in a loader
            process) begins with an empty cache.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        root: Path,
        *,
        lookup: Lookup,
        image_size: tuple[int, int] | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.samples = tuple(samples)
        self.root = root
        self.lookup = lookup
        self.image_size = image_size
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        if position in self._cache:
            self._cache.move_to_end(position)
            return self._cache[position]
        image, mask = self._read(self.samples[position])
        self._remember(position, image, mask)
        return image, mask

    def _read(self, sample: Sample) -> tuple[Tensor, Tensor]:
        path = self.root / sample.image
        data = _unchanged(path, sample.image_digest)
        image = decode_image_bytes(data, path, bits=sample.bits)
        path = self.root / sample.mask
        mask = torch.from_numpy(
            decode_mask(_unchanged(path, sample.mask_digest), self.lookup, path)
        )
        return resize_image(image, self.image_size), resize_mask(mask, self.image_size)

    def _remember(self, position: int, image: Tensor, mask: Tensor) -> None:
        size = image.nbytes + mask.nbytes
        if size > self.cache_bytes:
            return
        self._cache[position] = image, mask
        self._cached_bytes += size
        while self._cached_bytes > self.cache_bytes:
            _, (old_image, old_mask) = self._cache.popitem(last=False)
            self._cached_bytes -= old_image.nbytes + old_mask.nbytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_cached_bytes": 0}


def _unchanged(path: Path, digest: str) -> bytes:
    """Content of a file of the index.

    Raises:
        DataProblem: It is not what it was when the index was made.
    """
    data = read_bytes(path)
    if content_digest(data) != digest:
        raise DataProblem(
            f"{path} has changed since the index was made. Run the data_ingestion pipeline again: "
            "results are stored under the digest of what they were computed from."
        )
    return data
