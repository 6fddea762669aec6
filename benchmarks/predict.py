"""Does prediction keep its memory flat, survive `kill -9`, and bear one very large image?

    python benchmarks/predict.py [--images 1000] [--side 6000] [--network deeplabv3_mobilenetv2_100]

Generated images of mixed sizes, two of them unreadable, are predicted by a process that gets
SIGKILL halfway; a second one goes on. Then one square image of `--side` pixels is predicted by
windows. The resident memory of each process is read twenty times a second. Exit status 1 if a file
that was finished is written again, an unreadable one is not reported, the memory grows, or the
large image takes 3 GB or more.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rdd_pipeline.config import NetworkParams, PredictParams
from rdd_pipeline.inference.folder import predict_files
from rdd_pipeline.inference.model import load
from rdd_pipeline.inference.results import MANIFEST, PROBLEMS
from rdd_pipeline.inference.sources import find_sources
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params, save_checkpoint

CLASSES = 11
SIDES = (64, 120, 200, 256, 333, 400)
GROWTH = 1.1
"""Of the memory from the second to the last quarter of the images."""
LIMIT = 3e9
WARM_UP = 10
"""Results before the memory counts."""


def main() -> int:
    """Run it, or be the process that predicts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=6000)
    parser.add_argument("--network", default="deeplabv3_mobilenetv2_100")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--predict", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.predict:
        predict(*arguments.predict, arguments.threads)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_checkpoint(random_network(arguments.network), root / "network.safetensors")
        faults = many(root, arguments.images, arguments.threads)
        faults += large(root, arguments.side, arguments.threads)
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


def predict(network: Path, images: Path, output: Path, threads: int) -> None:
    """What the measured process does."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    params = PredictParams(images=str(images), workers=2)
    begin = time.perf_counter()
    outcome = predict_files(load(network, device="cpu"), find_sources(images), params, output)
    seconds = time.perf_counter() - begin
    print(f"  {outcome.predicted} of {len(outcome.rows)} images predicted in {seconds:.0f} s")


def random_network(name: str) -> NetworkCheckpoint:
    """Of random weights: the work is the same."""
    torch.manual_seed(0)
    params = NetworkParams(name=name, width=64, output_stride=16)
    return NetworkCheckpoint.from_network(
        network_from_params(params, num_classes=CLASSES),
        params=params,
        label_names=tuple(f"class {number}" for number in range(CLASSES)),
    )


def many(root: Path, count: int, threads: int) -> list[str]:
    """The first half, a kill, the rest."""
    images, output = root / "images", root / "many"
    images.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        height, width = draw.choice(SIDES, 2)
        suffix = "jpg" if number % 2 else "png"
        picture(draw, int(height), int(width)).save(images / f"{number:05d}.{suffix}")
    (images / "cut.png").write_bytes((images / "00000.png").read_bytes()[:200])
    (images / "text.jpg").write_text("no image")
    print(f"{count} images of {len(SIDES) ** 2} sizes and 2 unreadable files")
    half = count // 2
    first = measured(root / "network.safetensors", images, output, threads, kill_at=half)
    before = {path: path.stat().st_mtime_ns for path in finished(output)}
    second = measured(root / "network.safetensors", images, output, threads)
    faults = []
    if again := [path for path, when in before.items() if path.stat().st_mtime_ns != when]:
        faults.append(f"{len(again)} finished files were written again, such as {again[0]}")
    print(f"  killed with {len(before) // 2} images finished; {len(again)} were done again")
    reported = [Path(p["image"]).name for p in json.loads((output / PROBLEMS).read_text())]
    print(f"  reported as unreadable: {', '.join(reported)}")
    if reported != ["cut.png", "text.jpg"]:
        faults.append("other files than the two unreadable ones are reported")
    if len(finished(output)) != 2 * count:
        faults.append(f"{len(finished(output))} masks and overlays, expected {2 * count}")
    for name, samples in (("first half", first), ("second half", second)):
        quarters = [
            statistics.median(part.tolist()) for part in np.array_split(np.array(samples), 4)
        ]
        print(
            f"  resident memory, {name}: median of each quarter of the time "
            f"{', '.join(f'{value / 1e6:.0f}' for value in quarters)} MB, peak "
            f"{max(samples) / 1e6:.0f} MB"
        )
        if count >= 200 and quarters[3] > GROWTH * quarters[1]:
            faults.append(f"the memory grew in the {name}")
    return faults


def large(root: Path, side: int, threads: int) -> list[str]:
    """One image by windows."""
    images = root / "large"
    images.mkdir()
    picture(np.random.default_rng(1), side, side).save(images / "large.png", compress_level=1)
    print(f"one image of {side} x {side}, {CLASSES} classes")
    peak = max(measured(root / "network.safetensors", images, root / "one", threads))
    print(f"  peak of the resident memory {peak / 1e9:.2f} GB")
    return [f"{peak / 1e9:.2f} GB for one image"] if peak >= LIMIT else []


def picture(draw: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth patches of color."""
    small = draw.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def finished(output: Path) -> list[Path]:
    """Masks and overlays that the manifest names."""
    lines = map(json.loads, (output / MANIFEST).read_text().splitlines())
    return [output / file for line in lines for file in line["files"]]


def measured(
    network: Path, images: Path, output: Path, threads: int, *, kill_at: int | None = None
) -> list[int]:
    """Predict in a process of its own.

    Returns:
        Its resident bytes over the time; of a folder with several images since the first results.
    """
    words = [str(network), str(images), str(output)]
    command = [sys.executable, __file__, "--threads", str(threads), "--predict", *words]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    manifest, samples = output / MANIFEST, []
    one = len(list(images.iterdir())) == 1
    at_start = manifest.read_bytes().count(b"\n") if manifest.exists() else 0
    while process.poll() is None:
        time.sleep(0.05)
        done = manifest.read_bytes().count(b"\n") if manifest.exists() else 0
        if one or done > at_start + WARM_UP:
            status = Path(f"/proc/{process.pid}/status").read_text()
            if found := re.search(r"VmRSS:\s+(\d+) kB", status):
                samples.append(1024 * int(found[1]))
        if kill_at is not None and done >= kill_at:
            process.kill()
            process.wait()
            return samples
    if process.returncode:
        raise SystemExit(f"The process that predicts ended with {process.returncode}.")
    return samples


if __name__ == "__main__":
    sys.exit(main())
