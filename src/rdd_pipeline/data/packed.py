"""Packed cache: the decoded images of a split in one memory-mapped file.

Decoding PNG files is nearly all of the work of loading large images. A pack holds what decoding
gives, uint8 RGB and train ids, so that a crop reads just the rows it needs. Its name holds a digest
of all that decides its content: changed files, labels or sizes lead to another pack.

File: `_MAGIC`, length and CRC-32 of the header, the header (JSON: key and for each sample offset,
height, width, CRC-32), zeros up to the first sample; per sample the image (H, W, 3), then the mask
(H, W). It is written whole (`files`), so a pack is complete or not there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline.data.index import pixels_of, usable_cores
from rdd_pipeline.data.progress import tracked
from rdd_pipeline.data.sources import FileSource
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.files import NotWrittenError, remove_leftovers, written_whole

logger = logging.getLogger(__name__)

_MAGIC = b"RDDPACK1"
_START = struct.Struct("<8sQI")
_ALIGNMENT = 4096
_HEADER_BYTES_PER_SAMPLE = 80
_SPARE_BYTES = 1 << 30
"""Left free on the disk."""


class PackProblem(DataProblem):
    """A pack cannot be written; the images themselves are all right."""


class _Entry(NamedTuple):
    offset: int
    height: int
    width: int
    checksum: int

    @property
    def pixels(self) -> int:
        return self.height * self.width


def pack_path(files: FileSource, folder: Path) -> Path:
    """Where the pack of these files is kept: `SPLIT_KEY.pack` in `folder`."""
    content = [pixels_of(sample) for sample in files.samples]
    size = tuple(files.image_size) if files.image_size else None
    key = repr((_MAGIC, content, tuple(files.lookup), size))
    splits = "_".join(sorted({sample.split for sample in files.samples}))
    return folder / f"{splits}_{blake2b(key.encode(), digest_size=12).hexdigest()}.pack"


def packed_bytes(files: FileSource) -> int:
    """Size of the pack of these files, in bytes."""
    return int(_offsets(files)[-1])


def write_pack(files: FileSource, folder: Path, *, workers: int | None = None) -> Path:
    """Decode all files into their pack, unless it is there and nobody found it damaged.

    Args:
        files: What is packed, at the size it is read with.
        folder: Where packs are kept; made if missing.
        workers: Threads; None: one for each core this process may use.

    Returns:
        Path of the pack.

    Raises:
        PackProblem: The disk has too little space (1 GiB is left free), or the pack cannot be
            written.
        DataProblem: A file cannot be read.
    """
    path = pack_path(files, folder)
    damaged = _damaged(path)
    if not damaged.exists() and usable_pack(files, folder) is not None:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        _check_space(folder, packed_bytes(files))
        with written_whole(path) as file:
            os.truncate(file.fileno(), packed_bytes(files))
            entries = _write_samples(file.fileno(), files, workers, path.name.split("_")[0])
            header = json.dumps({"name": path.name, "samples": entries}).encode()
            start = _START.pack(_MAGIC, len(header), zlib.crc32(header))
            _write_at(file.fileno(), start + header, 0)
        damaged.unlink(missing_ok=True)
    except (OSError, NotWrittenError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = getattr(cause, "strerror", None) or cause
        raise PackProblem(
            f"The packed cache {path} cannot be written ({reason}). "
            "Free some space, correct the permissions or switch the cache off (data.cache=false)."
        ) from error
    return path


def _write_samples(
    descriptor: int, files: FileSource, workers: int | None, title: str
) -> list[_Entry]:
    offsets = _offsets(files)

    def write(position: int) -> _Entry:
        image, mask = files[position]
        height, width = mask.shape
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        data = pixels.tobytes() + mask.contiguous().numpy().tobytes()
        _write_at(descriptor, data, int(offsets[position]))
        return _Entry(int(offsets[position]), height, width, zlib.crc32(data))

    pool = ThreadPoolExecutor(workers or usable_cores())
    try:
        written = pool.map(write, range(len(files)))
        return list(tracked(written, f"packing {title}", len(files)))
    finally:
        pool.shutdown(cancel_futures=True)


def usable_pack(files: FileSource, folder: Path | None) -> Path | None:
    """The pack of these very files in `folder`, if it is there and complete.

    Without it images are read from their files, which gives the same pixels.
    """
    if folder is None:
        return None
    path = pack_path(files, folder)
    if not path.exists():
        return None
    try:
        _read_header(path)
    except DataProblem as problem:
        logger.warning("%s Until then the images are read from their files.", problem)
        return None
    return path


def fits_comfortably(folder: Path, needed: int) -> bool:
    """Whether `needed` bytes leave half of the disk's free space, and 1 GiB, to others."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    return needed <= free // 2 and needed + _SPARE_BYTES <= free


class PackedSource:
    """Images and masks of a pack, memory-mapped: only what is used of them is read.

    The checksum of a sample is verified at its first use in a process; a damaged one is read from
    its files instead.

    Args:
        path: From `write_pack` for these files.
        files: What it holds.

    Raises:
        DataProblem: The pack is missing, incomplete or of other samples.
    """

    def __init__(self, path: Path, files: FileSource) -> None:
        self.path = path
        self.files = files
        self._open()

    def _open(self) -> None:
        self._entries = _read_header(self.path)
        if len(self._entries) != len(self.files):
            raise DataProblem(
                f"{self.path} holds {len(self._entries)} images, expected {len(self.files)}. "
                "Remove it; it is made again."
            )
        # Copy on write: torch wants writable memory, and the file stays as it is.
        self._data: NDArray[np.uint8] = np.memmap(self.path, np.uint8, mode="c")
        self._verified = np.zeros(len(self._entries), bool)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        entry = self._entries[position]
        data = self._data[entry.offset : entry.offset + 4 * entry.pixels]
        if not self._verified[position]:
            if zlib.crc32(data.data) != entry.checksum:
                logger.warning(
                    "Image %d of the packed cache %s is damaged; its files are read instead. "
                    "The next ingestion makes the pack again.",
                    position,
                    self.path,
                )
                with contextlib.suppress(OSError):  # not removed: others may begin to read it
                    _damaged(self.path).touch()
                return self.files[position]
            self._verified[position] = True
        whole = torch.from_numpy(data)
        image = whole[: 3 * entry.pixels].view(entry.height, entry.width, 3).permute(2, 0, 1)
        return image, whole[3 * entry.pixels :].view(entry.height, entry.width)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _damaged(path: Path) -> Path:
    """A file that says that someone found a damaged image in the pack."""
    return path.with_name(f"{path.name}.damaged")


def _read_header(path: Path) -> list[_Entry]:
    """The samples of a pack.

    Raises:
        DataProblem: It is missing, incomplete or damaged.
    """
    try:
        with open(path, "rb") as file:
            magic, length, checksum = _START.unpack(file.read(_START.size))
            if magic != _MAGIC:
                raise ValueError("not a pack")
            header = file.read(min(length, os.path.getsize(path)))
        if zlib.crc32(header) != checksum:
            raise ValueError("damaged header")
        content = json.loads(header)
        if content["name"] != path.name:
            raise ValueError(f"renamed from {content['name']}")
        entries = [_Entry(*row) for row in content["samples"]]
        expected = entries[-1].offset + 4 * entries[-1].pixels if entries else 0
        if os.path.getsize(path) < expected:
            raise ValueError(f"{os.path.getsize(path)} bytes, expected {expected}")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise DataProblem(
            f"The packed cache {path} cannot be used ({error}). Remove it; it is made again."
        ) from error
    return entries


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise PackProblem(
            f"The packed cache needs {needed / 2**30:.1f} GiB in {folder} and 1 GiB has to stay "
            f"free, but only {free / 2**30:.1f} GiB are. Free some space or switch the cache off "
            "(data.cache=false)."
        )


def _offsets(files: FileSource) -> NDArray[np.int64]:
    """Where each sample begins in the pack, and its end."""
    header = _START.size + 200 + len(files) * _HEADER_BYTES_PER_SAMPLE
    start = -(-header // _ALIGNMENT) * _ALIGNMENT
    sizes = [files.image_size or (sample.height, sample.width) for sample in files.samples]
    return start + np.cumsum([0, *(4 * height * width for height, width in sizes)])


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    """`os.pwrite` may write less than asked for."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
