"""Masks of many files: read in threads, predicted in batches, written in threads, once each."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rdd_pipeline.config import PredictParams
from rdd_pipeline.data.formats import open_picture, pages
from rdd_pipeline.data.layouts import LAYOUTS, Layout
from rdd_pipeline.data.layouts.cityscapes import CITYSCAPES
from rdd_pipeline.data.progress import LINE_EVERY, work_bar
from rdd_pipeline.data.reading import read_bytes
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import content_digest, file_digest, json_digest
from rdd_pipeline.inference.frames import read_pages, read_video, require_ffmpeg
from rdd_pipeline.inference.inputs import decode
from rdd_pipeline.inference.model import WHOLE_UP_TO, Mask, Model, Window
from rdd_pipeline.inference.results import (
    CLASSES,
    MASKS,
    OVERLAYS,
    PROBLEMS,
    Results,
    Row,
    color_png,
    encoded_overlay,
    index_png,
    overlay_suffix,
    shown_path,
)
from rdd_pipeline.inference.sources import Source
from rdd_pipeline.networks import NetworkHeader
from rdd_pipeline.training.device import ran_out_of_memory

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the results: other ones are predicted again."""
_BYTES_AHEAD = 2**28
"""Decoded images that wait for the network, and results that wait to be written, each."""
_ITEMS_AHEAD = 256
_MOST_WORKERS = 16
_TRIM_EVERY = 2.0
"""Seconds between two returns of freed memory to the system."""
_SHOWN = 5
"""Unreadable files in the log."""
_CITYSCAPES = re.compile(r"([^_/]+_\d{6}_\d{6})(_[^/]*)?")
"""City, sequence, frame: what the server finds a prediction by."""


class Item(NamedTuple):
    """One image on its way."""

    name: str
    shown: str
    digest: str
    image: Tensor
    """(3, H, W) uint8."""


class Finished(NamedTuple):
    """An image whose result is there."""

    row: Row


class Unreadable(NamedTuple):
    """A file that gives no image."""

    shown: str
    problem: str


class Outcome(NamedTuple):
    """What a run over many files came to."""

    rows: list[Row]
    """One for each image: its path, its mask's, size, confidence, share of each class."""
    problems: list[dict[str, str]]
    """`image` and `problem` of the files that could not be read."""
    predicted: int
    """Images that were not finished before."""


@dataclass(frozen=True)
class Encoding:
    """How classes are written into masks.

    Attributes:
        format: See `PredictParams.format`.
        values: What a mask holds for each class.
    """

    format: str
    values: tuple[Any, ...]

    @classmethod
    def of(cls, header: NetworkHeader, chosen: str) -> Encoding:
        """The values of a format for a network.

        Raises:
            UserError: The network's file does not say them, or its classes are not Cityscapes'.
        """
        if chosen == "index":
            return cls(chosen, tuple(range(header.num_classes)))
        if chosen == "cityscapes":
            if header.label_names != CITYSCAPES.names:
                raise UserError(
                    f"predict.format is cityscapes, but the network's classes are "
                    f"{', '.join(header.label_names[:5])}, ..., not Cityscapes' 19. Set it to "
                    "index or raw."
                )
            return cls(chosen, CITYSCAPES.mask_values)
        values = header.mask_values
        if values is None:
            known = (layout.labels for layout in LAYOUTS.values() if isinstance(layout, Layout))
            same = [labels.mask_values for labels in known if labels.names == header.label_names]
            if len(set(same)) != 1:
                raise UserError(
                    "predict.format is raw, but the network's file is of an earlier version and "
                    "does not say which values the masks of its data set hold. Set it to index."
                )
            values = same[0]
        return cls(chosen, values)

    def png(self, mask: Mask, model: Model) -> bytes:
        """A mask's file."""
        if self.format == "index":
            return index_png(mask, model.colors)
        if isinstance(self.values[0], tuple):
            return color_png(mask, self.values)
        return index_png(np.array(self.values, np.uint8)[mask], None)


def check_sources(sources: Sequence[Source], chosen: str) -> list[Source]:
    """The sources under the names that the format wants, before anything is read.

    Raises:
        UserError: A name is none of Cityscapes', or there is a video and no ffmpeg.
    """
    video = next((source for source in sources if source.is_video), None)
    if video is not None:
        require_ffmpeg(video.path)
    if chosen != "cityscapes":
        return list(sources)
    found = [_CITYSCAPES.fullmatch(Path(source.name).name) for source in sources]
    wrong = [source.shown for source, match in zip(sources, found, strict=True) if match is None]
    if wrong:
        raise UserError(
            f"predict.format is cityscapes, but {len(wrong)} of {len(sources)} files are not named "
            f"CITY_SEQUENCE_FRAME_leftImg8bit, such as {wrong[0]}. Set predict.images to images of "
            "Cityscapes, or predict.format to raw or index."
        )
    named = [
        Source(source.path, source.shown, match[1])
        for source, match in zip(sources, found, strict=True)
        if match
    ]
    first: dict[str, str] = {}
    for source in named:
        if source.name in first:
            raise UserError(
                f"{source.shown} and {first[source.name]} are the same image of Cityscapes. Set "
                "predict.images to a folder with one of them."
            )
        first[source.name] = source.shown
    return named


def predict_files(
    model: Model, sources: Sequence[Source], params: PredictParams, output: Path
) -> Outcome:
    """Write a mask (and overlay) of each image that has none of this network and these settings.

    Args:
        model: Its `image_size` and `bits` count.
        sources: See `find_sources` and `check_sources`.
        params: How.
        output: Folder of the results.

    Raises:
        UserError: None of the files can be read, another command writes to the folder, the memory
            or the disk is full. What is finished stays.
    """
    encoding = Encoding.of(model.header, params.format)
    with Results(output, _settings(model, params, encoding)) as results:
        results.write_json(
            CLASSES,
            {
                "names": model.label_names,
                "colors": model.colors,
                "values": encoding.values,
                "network": {"digest": model.digest, **model.provenance},
            },
        )
        outcome = _Run(model, params, results, encoding).over(sources)
        results.write_table(outcome.rows)
        results.write_json(PROBLEMS, outcome.problems)
    if outcome.problems:
        listed = [problem["problem"] for problem in outcome.problems[:_SHOWN]]
        text = f"{len(outcome.problems)} of {len(sources)} files could not be read: " + " ".join(
            (*listed, "...") if len(outcome.problems) > _SHOWN else listed
        )
        if not outcome.rows:
            raise UserError(text)
        logger.warning("%s All of them: %s", text, output / PROBLEMS)
    return outcome


def _settings(model: Model, params: PredictParams, encoding: Encoding) -> str:
    """Digest of what decides the results of an image."""
    chosen = params.model_dump(
        mode="json",
        include={"window", "overlap", "scales", "flip", "format", "overlays", "threshold"},
    )
    network = [model.digest, model.image_size, model.bits, str(model.precision)]
    shown = [model.label_names, model.colors, encoding.values]
    return json_digest([FORMAT, network, shown, chosen])


class _Run:
    """State of one run over many files."""

    def __init__(
        self, model: Model, params: PredictParams, results: Results, encoding: Encoding
    ) -> None:
        self._model, self._params, self._results = model, params, results
        self._encoding = encoding
        cores = os.cpu_count() or 1
        self._workers = min(cores, _MOST_WORKERS) if params.workers == "auto" else params.workers
        self._columns = ("image", "mask", "height", "width", "confidence", "below_threshold")
        self._shares = tuple(f"share_{name}" for name in model.label_names)
        self._writes: deque[tuple[Future[tuple[Item, dict[str, int], Row]], int]] = deque()
        self._bytes_to_write = 0

    def over(self, sources: Sequence[Source]) -> Outcome:
        """See `predict_files`."""
        rows: dict[int, Row] = {}
        problems: list[dict[str, str]] = []
        predicted = 0
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="predict")
        try:
            with _Progress(len(sources)) as progress:
                trimmed = time.monotonic()
                for batch in self._batches(self._entries(sources, pool), rows, problems, progress):
                    for number, item, mask, row in self._predicted(batch):
                        rows[number] = row
                        self._write(pool, item, mask, row)
                        predicted += 1
                        progress.advance()
                    if time.monotonic() - trimmed > _TRIM_EVERY:
                        _trim_memory()
                        trimmed = time.monotonic()
                self._await_writes(0)
        finally:
            pool.shutdown(cancel_futures=True)
        return Outcome([rows[number] for number in sorted(rows)], problems, predicted)

    # ---- reading

    def _entries(
        self, sources: Sequence[Source], pool: ThreadPoolExecutor
    ) -> Iterator[Item | Finished | Unreadable]:
        """Images in the order of their files, read ahead as far as the memory allows."""
        ahead: deque[tuple[Source, Future[Any] | None, int]] = deque()
        waiting = iter(sources)
        held = 0
        following = next(waiting, None)
        while ahead or following is not None:
            while following is not None and len(ahead) < 2 * self._workers:
                size = 0 if following.is_video else _decoded_bytes(following.path)
                if ahead and held + size > _BYTES_AHEAD:
                    break
                task = None if following.is_video else pool.submit(self._read, following)
                ahead.append((following, task, size))
                held += size
                following = next(waiting, None)
            source, task, size = ahead.popleft()
            try:
                found = self._frames(source) if task is None else task.result()
                yield from [found] if isinstance(found, Item | Finished) else found
            except UserError as error:  # a file that cannot be read is no reason to stop
                yield Unreadable(source.shown, str(error))
            held -= size

    def _read(self, source: Source) -> Item | Finished | Iterator[Item | Finished]:
        """One image, or what gives the pages of its file one by one; runs in a thread."""
        data = read_bytes(source.path)
        digest = content_digest(data)
        if (row := self._finished(source.name, digest)) is not None:
            return Finished(row)
        with open_picture(data, source.path, "", several=True) as picture:
            several = len(pages(picture)) > 1 or picture.format == "GIF"
        if several:
            return self._pages(source, data, digest)
        image = decode(data, source.path, bits=self._model.bits)
        return Item(source.name, source.shown, digest, image)

    def _pages(self, source: Source, data: bytes, digest: str) -> Iterator[Item | Finished]:
        every = self._params.every
        found = read_pages(data, source.path, every=every, bits=self._model.bits)
        return self._numbered(source, digest, found)

    def _frames(self, source: Source) -> Iterator[Item | Finished]:
        found = read_video(source.path, every=self._params.every)
        return self._numbered(source, file_digest(source.path), found)

    def _numbered(
        self, source: Source, digest: str, images: Iterator[tuple[int, Tensor]]
    ) -> Iterator[Item | Finished]:
        # With its suffix: no image of the same folder can have a name below it.
        place = Path(source.name).with_name(source.path.name).as_posix()
        for number, image in images:
            name = f"{place}/{number:06d}"
            if (row := self._finished(name, f"{digest}-{number}")) is not None:
                yield Finished(row)
            else:
                yield Item(name, f"{source.shown}#{number}", f"{digest}-{number}", image)

    def _finished(self, name: str, digest: str) -> Row | None:
        for suffix in (".jpg", ".png") if self._params.overlays else ("",):
            files = [f"{MASKS}/{name}.png"] + ([f"{OVERLAYS}/{name}{suffix}"] if suffix else [])
            row = self._results.finished(name, digest, files)
            if row is not None and tuple(row) == (*self._columns, *self._shares):
                return row
        return None

    # ---- predicting

    def _batches(
        self,
        entries: Iterator[Item | Finished | Unreadable],
        rows: dict[int, Row],
        problems: list[dict[str, str]],
        progress: _Progress,
    ) -> Iterator[list[tuple[int, Item]]]:
        """Images of equal size together, with their position among all; notes the rest."""
        groups: dict[tuple[int, int], list[tuple[int, Item]]] = {}
        held = count = 0
        for number, entry in enumerate(entries):
            if isinstance(entry, Item):
                size = (entry.image.shape[-2], entry.image.shape[-1])
                group = groups.setdefault(size, [])
                group.append((number, entry))
                held, count = held + entry.image.nbytes, count + 1
                most = min(self._params.batch_size, WHOLE_UP_TO // (size[0] * size[1]))
                full = size if len(group) >= max(1, most) else None
                if held > _BYTES_AHEAD or count > _ITEMS_AHEAD:
                    full = next(iter(groups))  # the one that waits longest
                if full is not None:
                    batch = groups.pop(full)
                    held -= sum(item.image.nbytes for _, item in batch)
                    count -= len(batch)
                    yield batch
                continue
            progress.advance(worked=False)
            if isinstance(entry, Finished):
                rows[number] = entry.row
            else:
                problems.append({"image": shown_path(entry.shown), "problem": entry.problem})
        yield from groups.values()

    def _predicted(
        self, batch: Sequence[tuple[int, Item]]
    ) -> Iterator[tuple[int, Item, Mask, Row]]:
        images = torch.stack([item.image for _, item in batch])
        height, width = images.shape[-2:]
        params = self._params
        window: Window = params.window
        try:
            masks = [np.empty((height, width), np.uint8) for _ in batch]
            sums, below, tops = ([0.0] * len(batch), [0] * len(batch), [0] * len(batch))
            for strip in self._model.strips(
                images,
                window=window,
                overlap=params.overlap,
                scales=params.scales,
                flip=params.flip,
            ):
                at, top = strip.image, tops[strip.image]
                tops[at] = top + len(strip.mask)
                masks[at][top : tops[at]] = strip.mask.cpu().numpy()
                sums[at] += float(strip.confidence.sum(dtype=torch.float64))
                below[at] += int((strip.confidence < params.threshold).sum())
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            raise UserError(
                f"Predicting {len(batch)} images of {height} x {width} pixels took more memory "
                "than there is. Lower predict.batch_size, or set predict.window to 512 or less."
            ) from error
        for at, (number, item) in enumerate(batch):
            counts = np.bincount(masks[at].ravel(), minlength=len(self._shares))
            pixels = height * width
            values: tuple[str | int | float, ...] = (
                *(shown_path(item.shown), shown_path(f"{MASKS}/{item.name}.png"), height, width),
                *(round(sums[at] / pixels, 6), round(below[at] / pixels, 6)),
                *(round(int(count) / pixels, 6) for count in counts),
            )
            row: Row = dict(zip((*self._columns, *self._shares), values, strict=True))
            yield number, item, masks[at], row

    # ---- writing

    def _write(self, pool: ThreadPoolExecutor, item: Item, mask: Mask, row: Row) -> None:
        size = item.image.nbytes + mask.nbytes
        self._await_writes(max(0, _BYTES_AHEAD - size))
        self._writes.append((pool.submit(self._written, item, mask, row), size))
        self._bytes_to_write += size

    def _written(self, item: Item, mask: Mask, row: Row) -> tuple[Item, dict[str, int], Row]:
        """Encode and write the files of one image; runs in a thread."""
        name = f"{MASKS}/{item.name}.png"
        files = {name: self._results.write(name, self._encoding.png(mask, self._model))}
        if self._params.overlays:
            pixels = Image.fromarray(item.image.permute(1, 2, 0).numpy())
            overlay = Image.blend(pixels, self._model.colored(mask), 0.5)
            name = f"{OVERLAYS}/{item.name}{overlay_suffix(*mask.shape)}"
            files[name] = self._results.write(name, encoded_overlay(overlay))
        return item._replace(image=torch.empty(0)), files, row

    def _await_writes(self, most: int) -> None:
        """Wait until no more than so many bytes wait to be written, and note what is finished."""
        while self._writes and (
            self._bytes_to_write > most
            or len(self._writes) > 4 * self._workers
            or self._writes[0][0].done()
        ):
            task, size = self._writes.popleft()
            item, files, row = task.result()
            self._bytes_to_write -= size
            self._results.record(item.name, item.digest, files, row)


class _Progress:
    """A bar over the files in a terminal, a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self._bar = work_bar()
        self._task = self._bar.add_task("predict", total=total)
        self._total, self._done, self._worked = total, 0, 0
        self._begin = self._last = time.monotonic()

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, *, worked: bool = True) -> None:
        """One image more, which was predicted; of videos there may be more than files."""
        self._done += 1
        self._worked += worked
        self._total = max(self._total, self._done)
        self._bar.update(self._task, completed=self._done, total=self._total)
        now = time.monotonic()
        if not self._bar.console.is_terminal and now - self._last > LINE_EVERY:
            self._last = now
            left = (now - self._begin) / max(self._worked, 1) * (self._total - self._done)
            logger.info("predict %d/%d  %.0f s left", self._done, self._total, left)


def _trim_memory() -> None:
    """Let glibc return what is free: images of many sizes leave holes that it would keep."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries do so themselves
        ctypes.CDLL(None).malloc_trim(0)


def _decoded_bytes(path: Path) -> int:
    """Of an image, from its first bytes; 0 where that cannot be told without more."""
    try:
        if not path.is_file():
            return 0
        with Image.open(path) as picture:
            return 3 * picture.width * picture.height
    except Exception:  # Decoders raise many types; reading the file says what is wrong.
        return 0
