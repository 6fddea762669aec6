"""Writes TIFF files of kinds that Pillow does not write: tiles, pages, bit depths, BigTIFF."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def tiff(*pages: dict[str, Any] | np.ndarray, order: str = "<", big: bool = False) -> bytes:
    """A TIFF file; a page is an array or `page(...)`."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(
        f"{order}HHHQ" if big else f"{order}HI", *((43, 8, 0, 16) if big else (42, 8))
    )
    body = bytearray(head)
    link = 8 if big else 4
    for number, given in enumerate(pages):
        tags, blocks = given if isinstance(given, tuple) else page(given, order=order)
        tags = dict(tags)
        kind = "Q" if big else "I"
        start = len(body)
        entries = len(tags) + 2
        length = 8 + 20 * entries + 8 if big else 2 + 12 * entries + 4
        extra = bytearray()
        at = start + length

        def place(data: bytes, extra: bytearray = extra, at: int = at) -> int:
            position = at + len(extra)
            extra.extend(data)
            return position

        offsets = [place(block) for block in blocks]
        tiled = 322 in tags
        tags[324 if tiled else 273] = ("I", offsets)
        tags[325 if tiled else 279] = ("I", [len(block) for block in blocks])
        rows = b""
        for tag, (code, values) in sorted(tags.items()):
            data = struct.pack(f"{order}{len(values)}{code}", *values)
            field = {"H": 3, "I": 4}[code]
            if len(data) <= link:
                inline = data.ljust(link, b"\0")
            else:
                inline = struct.pack(f"{order}{kind}", place(data))
            rows += struct.pack(f"{order}HH{kind}", tag, field, len(values)) + inline
        last = number == len(pages) - 1
        following = 0 if last else at + len(extra)
        count = struct.pack(f"{order}{'Q' if big else 'H'}", entries)
        body += count + rows + struct.pack(f"{order}{kind}", following) + extra
    return bytes(body)


def page(
    pixels: np.ndarray,
    *,
    bits: int | None = None,
    photometric: int | None = None,
    tile: int = 0,
    planar: bool = False,
    sample_format: int = 1,
    palette: np.ndarray | None = None,
    order: str = "<",
    **tags: int | list[int],
) -> tuple[dict[int, tuple[str, list[int]]], list[bytes]]:
    """Tags and data of a page; further ones as `t254=1`."""
    height, width = pixels.shape[:2]
    bands = pixels.shape[2] if pixels.ndim == 3 else 1
    bits = bits or 8 * pixels.itemsize
    if photometric is None:
        photometric = 3 if palette is not None else 2 if bands >= 3 else 1
    found = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [bits] * bands), 259: ("H", [1]),
        262: ("H", [photometric]), 277: ("H", [bands]), 284: ("H", [2 if planar else 1]),
        339: ("H", [sample_format] * bands),
    }  # fmt: skip
    if palette is not None:
        found[320] = ("H", (palette.astype(int) * 257).T.flatten().tolist())
    colors = 3 if photometric == 2 else 1
    if bands > colors and photometric == 2:
        found[338] = ("H", [0] * (bands - colors))
    for name, value in tags.items():
        found[int(name[1:])] = ("H", value if isinstance(value, list) else [value])
    planes = [pixels[..., band] for band in range(bands)] if planar else [pixels]
    if not tile:
        found[278] = ("I", [height])
        return found, [_packed(plane, bits, order) for plane in planes]
    found[322] = found[323] = ("I", [tile])
    blocks = []
    for plane in planes:
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                part = plane[top : top + tile, left : left + tile]
                beyond = [(0, tile - part.shape[0]), (0, tile - part.shape[1])]
                part = np.pad(part, beyond + [(0, 0)] * (part.ndim - 2), constant_values=9)
                blocks.append(_packed(part, bits, order))
    return found, blocks


def _packed(pixels: np.ndarray, bits: int, order: str) -> bytes:
    if bits == 8 * pixels.itemsize:
        return pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    rows = b""
    for row in pixels:
        text = "".join(f"{value:0{bits}b}" for value in row.flatten())
        text += "0" * (-len(text) % 8)
        rows += bytes(int(text[n : n + 8], 2) for n in range(0, len(text), 8))
    return rows
