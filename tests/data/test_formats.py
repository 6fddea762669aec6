"""Image and mask files of all formats, against the arrays that were written.

`tiff` writes what Pillow does not; lossless files have to give back every value.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.data import formats
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import check_images
from rdd_pipeline.data.labels import make_lookup
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.data.packed import PackedSource, write_pack
from rdd_pipeline.data.reading import read_image, read_mask
from rdd_pipeline.data.sources import FileSource
from rdd_pipeline.errors import DataProblem

from .files import noise, save
from .tiff import page, tiff

RGB = noise(0, 20, 37, 3)
GRAY = noise(1, 20, 37)
RAW = noise(2, 20, 37, high=4)
WIDE = np.random.default_rng(3).integers(0, 65536, (20, 37), dtype=np.uint16)
WIDE_RGB = np.random.default_rng(4).integers(0, 65536, (20, 37, 3), dtype=np.uint16)
IDS = make_lookup({value: value for value in range(16)}, ignored=(255,))
COLORS = ((10, 20, 30, 0), (1, 2, 3, 1), (0, 0, 0, 255), (250, 2, 3, 2))
TABLE = np.array([row[:3] for row in COLORS], np.uint8)


def gray(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, -1).astype(np.uint8)


TIFF_IMAGES: dict[str, tuple[bytes, np.ndarray]] = {
    "rgb": (tiff(RGB), RGB),
    "big-endian": (tiff(RGB, order=">"), RGB),
    "BigTIFF": (tiff(RGB, big=True), RGB),
    "tiles": (tiff(page(RGB, tile=16)), RGB),
    "tiles of gray": (tiff(page(GRAY, tile=16)), gray(GRAY)),
    "planes": (tiff(page(RGB, planar=True)), RGB),
    "four bands": (tiff(page(np.dstack([RGB, GRAY]))), RGB),
    "six bands": (tiff(page(np.dstack([RGB, RGB]))), RGB),
    "gray of 4 bits": (tiff(page(RAW, bits=4)), gray(RAW * 17)),
    "gray whose 0 is white": (tiff(page(GRAY, photometric=0)), gray(255 - GRAY)),
    "16 bits": (tiff(WIDE), gray(WIDE >> 8)),
    "16 bits, big-endian": (tiff(WIDE, order=">"), gray(WIDE >> 8)),
    "16-bit tiles": (tiff(page(WIDE, tile=16)), gray(WIDE >> 8)),
    "16-bit color": (tiff(WIDE_RGB), (WIDE_RGB >> 8).astype(np.uint8)),
    "12 bits": (tiff(page(WIDE >> 4, bits=12)), gray(WIDE >> 8)),
    "32 bits": (tiff(WIDE.astype(np.uint32)), gray(WIDE >> 8)),
    "palette": (tiff(page(GRAY, palette=noise(5, 256, 3))), noise(5, 256, 3)[GRAY]),
    "CMYK without black": (
        tiff(page(np.dstack([255 - RGB, 0 * GRAY]), photometric=5)), RGB,
    ),
    "smaller versions behind": (
        tiff(RGB, page(RGB[::2, ::2], t254=1), page(RGB[::4, ::4], t255=2)), RGB,
    ),
    "mask of validity behind": (tiff(RGB, page(GRAY > 9, photometric=4, t254=4)), RGB),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIFF_IMAGES)
def test_tiff_images_give_what_was_written(tmp_path: Path, kind: str):
    data, want = TIFF_IMAGES[kind]
    (tmp_path / "a.tif").write_bytes(data)
    assert np.array_equal(read_image(tmp_path / "a.tif").permute(1, 2, 0).numpy(), want)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd"])
def test_compressed_tiff_is_the_same(tmp_path: Path, compression: str):
    image = read_image(save(tmp_path / "a.tif", RGB, compression=compression))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), RGB)
    mask = read_mask(save(tmp_path / "m.tif", RAW, compression=compression), IDS)
    assert np.array_equal(mask.numpy(), RAW)


TIFF_FAULTS: dict[str, tuple[bytes, str]] = {
    "pages": (tiff(RGB, RGB, RGB), "holds 3 pages or frames, expected one image"),
    "float": (
        tiff(page(RGB[..., 0].astype(np.float32), sample_format=3)), "holds floating-point gray",
    ),
    "float color": (tiff(page(RGB.astype(np.float32), sample_format=3)), "TIFF file, but"),
    "nine bands": (tiff(page(np.dstack([RGB] * 3))), "TIFF file, but its bands or bits are none"),
    "gray of three bands": (tiff(page(RGB, photometric=1)), "TIFF file, but"),
    "Lab": (tiff(page(RGB, photometric=8)), "holds LAB colors, expected RGB or gray"),
    "32 bits of more than 65535": (
        tiff(WIDE.astype(np.uint32) << 4), r"holds gray values .* expected 16-bit values",
    ),
    "negative": (tiff(page(-WIDE.astype(np.int32), sample_format=2)), r"gray values -65.* 16-bit"),
    "16 bits whose 0 is white": (tiff(page(WIDE, photometric=0)), "whose 0 means white"),
    "cut off": (tiff(RGB)[:-400], r"cannot be decoded .*save it as PNG; else copy or download"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIFF_FAULTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_tiff_images_are_refused_in_one_line(tmp_path: Path, kind: str):
    data, message = TIFF_FAULTS[kind]
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(DataProblem, match=message) as caught:
        read_image(tmp_path / "a.tif")
    assert str(caught.value).startswith(str(tmp_path / "a.tif"))
    assert "\n" not in str(caught.value)


def _palette_image(raw: np.ndarray, colors: np.ndarray) -> Image.Image:
    image = Image.fromarray(raw)
    image.putpalette(colors.flatten().tolist())
    return image


MASKS: dict[str, bytes | tuple[str, Image.Image]] = {
    "gray TIFF": tiff(RAW),
    "BigTIFF": tiff(RAW, big=True),
    "tiled TIFF": tiff(page(RAW, tile=16)),
    "16-bit TIFF": tiff(RAW.astype(np.uint16), order=">"),
    "32-bit TIFF": tiff(RAW.astype(np.uint32)),
    "signed TIFF": tiff(page(RAW.astype(np.int16), sample_format=2)),
    "2-bit TIFF": tiff(page(RAW, bits=2)),
    "4-bit TIFF": tiff(page(RAW, bits=4)),
    "12-bit TIFF": tiff(page(RAW, bits=12)),
    "palette TIFF": tiff(page(RAW, palette=noise(5, 256, 3))),
    "4-bit palette TIFF": tiff(page(RAW, bits=4, palette=noise(5, 16, 3))),
    "2-bit palette TIFF": tiff(page(RAW, bits=2, palette=noise(5, 4, 3))),
    "TIFF with overviews": tiff(RAW, page(RAW[::2, ::2], t254=1)),
    "gray BMP": ("a.bmp", Image.fromarray(RAW)),
    "palette BMP": ("a.bmp", _palette_image(RAW, noise(5, 256, 3))),
    "lossless WebP": ("a.webp", Image.fromarray(RAW)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_all_formats_give_the_numbers_that_were_written(tmp_path: Path, kind: str):
    given = MASKS[kind]
    if isinstance(given, bytes):
        path = tmp_path / "a.tif"
        path.write_bytes(given)
    else:
        path = tmp_path / given[0]
        given[1].save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    assert np.array_equal(read_mask(path, IDS).numpy(), RAW)


@pytest.mark.parametrize("white", [0, 1])
def test_one_bit_bmp_masks_are_indices(tmp_path: Path, white: int):
    """Written by hand: the palette may have white first."""
    raw = noise(6, 5, 32, high=2)
    rows = b"".join(np.packbits(row).tobytes() for row in raw[::-1])
    colors = [b"\0\0\0\0", b"\xff\xff\xff\0"]
    palette = colors[white ^ 1] + colors[white]
    head = struct.pack("<2sIHHI", b"BM", 62 + len(rows), 0, 0, 62)
    info = struct.pack("<IiiHHIIiiII", 40, 32, 5, 1, 1, 0, len(rows), 0, 0, 2, 2)
    (tmp_path / "a.bmp").write_bytes(head + info + palette + rows)
    assert np.array_equal(read_mask(tmp_path / "a.bmp", IDS).numpy(), raw)


@pytest.mark.parametrize("suffix", ["tif", "bmp", "webp"])
def test_color_masks_of_all_formats(tmp_path: Path, suffix: str):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", TABLE[RAW], **options)
    want = np.array([row[3] for row in COLORS], np.uint8)[RAW]
    assert np.array_equal(read_mask(path, COLORS).numpy(), want)


def _exif(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


MASK_FAULTS = {
    "lossy WebP": ("a.webp", {"quality": 100}, "is a WEBP file, whatever .*Save the mask as PNG"),
    "JPEG in TIFF": ("a.tif", {"compression": "jpeg"}, "is a TIFF file with JPEG inside, whatever"),
    "EXIF in PNG": ("a.png", {"exif": _exif(3)}, "carries an EXIF rotation.*Save the mask without"),
    "EXIF in TIFF": ("a.tif", {"exif": _exif(6)}, "carries an EXIF rotation"),
    "EXIF in WebP": ("a.webp", {"exif": _exif(2), "lossless": True}, "carries an EXIF rotation"),
}


@pytest.mark.parametrize("lookup", [IDS, COLORS], ids=["index", "color"])
@pytest.mark.parametrize("kind", MASK_FAULTS)
def test_masks_whose_numbers_may_have_changed_are_refused(tmp_path: Path, kind: str, lookup):
    name, options, message = MASK_FAULTS[kind]
    path = save(tmp_path / name, TABLE[RAW], **options)
    with pytest.raises(DataProblem, match=message):
        read_mask(path, lookup)


def test_masks_with_upright_exif_data_are_taken(tmp_path: Path):
    path = save(tmp_path / "a.png", RAW, exif=_exif(1))
    assert np.array_equal(read_mask(path, IDS).numpy(), RAW)


def test_a_mask_whose_zero_is_white_is_refused(tmp_path: Path):
    (tmp_path / "a.tif").write_bytes(tiff(page(RAW, photometric=0)))
    with pytest.raises(DataProblem, match=r"0 means white.*Save the mask as PNG"):
        read_mask(tmp_path / "a.tif", IDS)


def test_transparent_pixels_of_webp_are_refused_in_masks(tmp_path: Path):
    alpha = np.where(RAW == 0, 0, 255).astype(np.uint8)
    path = save(tmp_path / "a.webp", np.dstack([gray(RAW), alpha]), lossless=True)
    with pytest.raises(DataProblem, match="transparent pixels, below which WebP"):
        read_mask(path, IDS)


def test_colored_webp_masks_are_refused_where_numbers_are_expected(tmp_path: Path):
    path = save(tmp_path / "a.webp", TABLE[RAW], lossless=True)
    with pytest.raises(DataProblem, match="is a color image"):
        read_mask(path, IDS)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_animations_are_refused(tmp_path: Path, suffix: str):
    frames = [Image.fromarray(noise(n, 8, 8, 3)) for n in range(3)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(DataProblem, match="holds 3 pages or frames, expected one"):
        read_image(tmp_path / f"a.{suffix}")


def test_the_pack_holds_what_the_files_give(tmp_path: Path):
    """One pair of each format, over index, files and pack."""
    root = tmp_path / "images"
    for split in ("train", "val"):
        for name, suffix in (("a", "tif"), ("b", "bmp"), ("c", "webp"), ("d", "png")):
            options = {"lossless": True} if suffix == "webp" else {}
            save(root / "images" / split / f"{name}.{suffix}", noise(ord(name), 9, 7, 3), **options)
            save(root / "masks" / split / f"{name}.{suffix}", noise(3, 9, 7, high=3), **options)
    (root / "images" / "train" / "e.tiff").write_bytes(tiff(page(WIDE >> 4, tile=16)))
    (root / "masks" / "train" / "e.tiff").write_bytes(tiff(page(RAW % 3, tile=16, bits=8)))
    (root / "labels.yaml").write_text("classes: [{name: a}, {name: b}, {name: c}]")
    layout = get_layout("folders", root)
    index = check_images(root, layout, bits=12)
    assert index.problems == ()
    assert len(index.samples) == 9
    files = FileSource(index.samples, root, lookup=layout.labels.lookup)
    pack = write_pack(Images(root, index.samples, layout.labels).files(None), tmp_path / "packs")
    packed = PackedSource(pack, files)
    for position, sample in enumerate(index.samples):
        want = noise(ord(sample.name), 9, 7, 3), noise(3, 9, 7, high=3)
        if sample.name == "e":
            want = gray(WIDE >> 8), RAW % 3
        for source in (files, packed):
            image, mask = source[position]
            assert np.array_equal(image.permute(1, 2, 0).numpy(), want[0]), sample.name
            assert np.array_equal(mask.numpy(), want[1]), sample.name
        picture = read_image(root / sample.image, bits=sample.bits)
        assert torch.equal(picture, packed[position][0])


def _blank_png(height: int, width: int) -> bytes:
    """One-bit gray, written in rows without the whole of it in memory."""
    squeeze = zlib.compressobj(1)
    row = bytes(1 + -(-width // 8))
    data = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("read", [read_image, lambda path: read_mask(path, IDS)])
def test_an_image_that_is_too_large_is_to_be_cut(tmp_path: Path, read):
    (tmp_path / "a.png").write_bytes(_blank_png(13000, 14000))
    with pytest.raises(DataProblem, match=r"14000 x 13000 pixels are 182 million.*tiles") as caught:
        read(tmp_path / "a.png")
    assert "download" not in str(caught.value)
    assert "bomb" not in str(caught.value)


def test_large_images_below_the_limit_are_read_without_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_PIXELS", 100)
    with pytest.raises(DataProblem, match="cannot be decoded as one image"):
        read_image(save(tmp_path / "a.png", noise(0, 10, 11)))
    assert read_image(save(tmp_path / "b.png", noise(0, 10, 10))).shape == (3, 10, 10)
    (tmp_path / "c.png").write_bytes(_blank_png(9500, 9500))  # Pillow would warn
    monkeypatch.setattr(formats, "MAX_PIXELS", 178_956_970)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_mask(tmp_path / "c.png", IDS).shape == (9500, 9500)


class TestBits:
    def test_the_upper_eight_of_the_bits_are_kept(self, tmp_path: Path):
        values = np.array([[0, 15, 16], [2048, 4080, 4095]], np.uint16)
        path = save(tmp_path / "a.png", values)
        assert read_image(path, bits=12)[0].tolist() == [[0, 0, 1], [128, 255, 255]]
        assert read_image(path)[0].tolist() == [[0, 0, 0], [8, 15, 15]]

    def test_eight_bit_images_do_not_change(self, tmp_path: Path):
        path = save(tmp_path / "a.png", RGB)
        assert torch.equal(read_image(path, bits=12), read_image(path))

    def test_a_value_beyond_them_is_a_problem(self, tmp_path: Path):
        path = save(tmp_path / "a.png", np.array([[0, 4096]], np.uint16))
        with pytest.raises(
            DataProblem, match=r"0\.\.4096, expected 12-bit values 0\.\.4095.*Raise"
        ):
            read_image(path, bits=12)
