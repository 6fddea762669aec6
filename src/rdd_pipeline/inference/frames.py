"""Files with several images: pages and frames by Pillow, videos by ffmpeg."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from rdd_pipeline.data.formats import MAX_PIXELS, open_picture, pages, stored_bits
from rdd_pipeline.data.reading import picture_pixels
from rdd_pipeline.errors import DataProblem, UserError, printable


def read_pages(data: bytes, path: Path, *, every: int, bits: int) -> Iterator[tuple[int, Tensor]]:
    """Pages of a TIFF file or frames of an animation: number from 1 on, image (3, H, W) uint8.

    Args:
        data: Content of the file.
        path: Where it came from, for messages.
        every: Each page of so many.
        bits: Bits of the values of 16-bit gray pages.

    Raises:
        DataProblem: A page cannot be decoded.
    """
    with open_picture(data, path, "", several=True) as picture:
        for page in pages(picture)[::every]:
            picture.seek(page)
            pixels, *_ = picture_pixels(picture, path, depth=stored_bits(picture, data), bits=bits)
            yield page + 1, torch.from_numpy(pixels).permute(2, 0, 1)


def require_ffmpeg(path: Path) -> None:
    """Make sure that videos can be read.

    Raises:
        UserError: There is no ffmpeg.
    """
    if shutil.which("ffmpeg") is None:
        raise UserError(
            f"{path} is a video, and the program ffmpeg, which reads videos, is not there. Install "
            "it (apt-get install ffmpeg, brew install ffmpeg), or save the frames as images."
        )


def read_video(path: Path, *, every: int) -> Iterator[tuple[int, Tensor]]:
    """Frames of a video, upright: number from 1 on, image (3, H, W) uint8.

    ffmpeg decodes beside this process and hands one frame after the other through a pipe.

    Args:
        path: A video that ffmpeg knows.
        every: Each frame of so many.

    Raises:
        DataProblem: It cannot be decoded, or only up to a frame.
        UserError: There is no ffmpeg.
    """
    require_ffmpeg(path)
    # `file:`, and nothing else: a playlist in a file's place fetches nothing.
    words = ["-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe"]
    words += ["-i", f"file:{path.absolute()}", "-map", "0:v:0", "-fps_mode", "passthrough"]
    # PPM: raw RGB behind its size.
    words += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    count = 0
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            ["ffmpeg", *words], stdout=subprocess.PIPE, stderr=complaints, stdin=subprocess.DEVNULL
        )
        try:
            assert process.stdout is not None
            while (frame := _next_frame(process.stdout, path, keep=count % every == 0)) is not None:
                count += 1
                if frame.numel():
                    yield count, frame
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        complaints.seek(0)
        lines = complaints.read(10_000).decode(errors="replace").strip().splitlines()
    if status or not count:
        # The first complaint is the cause: "[mov,mp4 @ 0x5] moov atom not found".
        first = lines[0] if lines else "it holds no frame"
        reason = printable(re.sub(r"^\[[^]]*\] ", "", first).rstrip("."))[:200]
        after = f" after frame {count}" if count else ""
        raise DataProblem(
            f"{path} cannot be decoded{after} (ffmpeg: {reason}). Copy it again, or convert it."
        )


def _next_frame(pipe: IO[bytes], path: Path, *, keep: bool) -> Tensor | None:
    """A frame, an empty tensor for one that is not kept, None at the end."""
    if not (magic := pipe.readline(16)):
        return None
    sizes = pipe.readline(64).split()
    if magic != b"P6\n" or len(sizes) != 2 or pipe.readline(16) != b"255\n":
        raise DataProblem(f"{path}: ffmpeg delivers no frames of 8-bit RGB. Convert the video.")
    width, height = map(int, sizes)
    if not 0 < width * height <= MAX_PIXELS:
        raise DataProblem(
            f"{path} has frames of {width} x {height} pixels, expected at most "
            f"{MAX_PIXELS // 1_000_000} million. Scale the video down."
        )
    data = bytearray(3 * width * height)
    view, filled = memoryview(data), 0
    while filled < len(data):
        read = pipe.readinto(view[filled:])  # type: ignore[attr-defined]
        if not read:
            return None  # ffmpeg's status says why
        filled += read
    if not keep:
        return torch.empty(0)
    pixels = np.frombuffer(data, np.uint8).reshape(height, width, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)
