"""Training images per CPU second: packed cache and files against a plain loader.

    python benchmarks/input_pipeline.py [--height 1024 --width 2048] [--seconds 5] [--json OUT]

One thread, synthetic photographs (smooth shapes with sensor noise, PNG files of about Cityscapes'
size), crops of 512 x 1024 with scales 0.5 to 2. The plain loader, written here, does what the
field's published loaders do: decode all of image and mask, scale all of both, subtract the mean in
float, pad, crop, flip. Order of the loaders alternates; the median of the rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from rdd_pipeline.config import AugmentParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample, build_index, of_split
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.data.loading import Loader
from rdd_pipeline.data.packed import write_pack

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
LOOKUP = np.array(CAMVID.lookup)


def write_photographs(root: Path, count: int, height: int, width: int) -> None:
    """Pairs in CamVid's layout; noise sets the size of the files to that of real photographs."""
    for split in ("train", "val"):
        for number in range(count if split == "train" else 1):
            rng = np.random.default_rng((number, len(split)))
            small = rng.integers(0, 256, (9, 17, 3), dtype=np.uint8)
            size = (width, height)
            image = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
            noise = rng.normal(0, 1.6, image.shape)
            blocks = rng.integers(0, 12, (height // 32, width // 32), dtype=np.uint8)
            mask = np.kron(blocks, np.ones((32, 32), np.uint8))
            for folder, pixels in (
                (split, (image + noise).clip(0, 255).astype(np.uint8)),
                (f"{split}annot", mask),
            ):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / folder / f"{number}.png", compress_level=6)


def plain_loader(
    root: Path, samples: tuple[Sample, ...], augment: AugmentParams
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Whole image at every step."""
    rng = np.random.default_rng(0)
    height, width = augment.crop
    while True:
        for position in rng.permutation(len(samples)):
            sample = samples[position]
            image = np.asarray(Image.open(root / sample.image).convert("RGB"), np.float32)
            raw = np.asarray(Image.open(root / sample.mask))
            label = LOOKUP[raw].astype(np.float32)
            scale = 0.5 + rng.integers(0, 16) / 10
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            pixels = F.interpolate(
                pixels, scale_factor=scale, mode="bilinear", align_corners=False
            )[0].permute(1, 2, 0)
            label = F.interpolate(
                torch.from_numpy(label)[None, None], scale_factor=scale, mode="nearest"
            )[0, 0].numpy()
            image = pixels.numpy() - MEAN
            below, right = max(height - image.shape[0], 0), max(width - image.shape[1], 0)
            image = np.pad(image, ((0, below), (0, right), (0, 0)))
            label = np.pad(label, ((0, below), (0, right)), constant_values=255)
            top = rng.integers(image.shape[0] - height + 1)
            left = rng.integers(image.shape[1] - width + 1)
            image = image[top : top + height, left : left + width].transpose(2, 0, 1)
            label = label[top : top + height, left : left + width]
            if rng.random() < 0.5:
                image, label = image[:, :, ::-1], label[:, ::-1]
            yield torch.from_numpy(image.copy()), torch.from_numpy(label.astype(np.int64))


def images_per_second(step: Callable[[], int], seconds: float) -> float:
    """Rate of `step`, which returns how many images it made, over about `seconds`.

    In CPU seconds of this process, which has one thread: others on the machine matter less.
    """
    done, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        done += step()
    return done / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loader in each round")
    parser.add_argument("--json", type=Path, help="file the result is written to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    augment = AugmentParams(crop=(options.height // 2, options.width // 2))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root, options.images, options.height, options.width)
        samples = of_split(build_index(root, get_layout("camvid"), workers=1).samples, "train")
        pack = write_pack(Images(root, samples, CAMVID).files(None), root / "packs", workers=1)
        plain = plain_loader(root, samples, augment)

        def batches(pack: Path | None) -> Callable[[], int]:
            folder = None if pack is None else pack.parent
            stream = Images(root, samples, CAMVID, packs=folder).training_batches(
                augment,
                seed=0,
                batch_size=4,
                iterations=range(1, 1_000_001),
                loader=Loader(cache_bytes=0),
            )
            return lambda: len(next(stream).images)

        steps: dict[str, Callable[[], int]] = {
            "plain": lambda: len(next(plain)) // 2,
            "files": batches(None),
            "packed": batches(pack),
        }
        file_megabytes = (root / samples[0].image).stat().st_size / 1e6
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():  # Warm-up: every image once.
            for _ in range(options.images):
                step()
        for _ in range(options.rounds):
            for name, step in steps.items():
                rates[name].append(images_per_second(step, options.seconds))
    print(
        f"{options.width} x {options.height} PNG of {file_megabytes:.1f} MB, one core of "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    )
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in middle.items():
        print(
            f"{name:>7}: {rate:7.1f} images/s ({min(rates[name]):.1f} to {max(rates[name]):.1f}), "
            f"{rate / middle['plain']:.1f} x plain"
        )
    if options.json:
        options.json.write_text(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
