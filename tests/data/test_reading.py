from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.data.labels import make_lookup
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.data.reading import read_image, read_mask
from rdd_pipeline.errors import DataProblem

from .files import noise, save

RGB = noise(0, 6, 8, 3)
IDS = make_lookup({value: value for value in range(12)}, ignored=(255,))


def smooth(height: int, width: int) -> np.ndarray:
    """An image that JPEG keeps almost as it is, with no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 200 // width, y * 200 // height, 50 + 0 * x], -1).astype(np.uint8)


def test_png_is_read_as_stored_channels_first(tmp_path: Path):
    image = read_image(save(tmp_path / "a.png", RGB))
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), RGB)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_formats_agree(tmp_path: Path, suffix: str):
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(tmp_path / f"a.{suffix}", RGB, **options))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_exif_orientation_turns_the_image_upright(tmp_path: Path, orientation: int, suffix: str):
    upright = smooth(16, 32)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), quality=98, exif=exif)
    image = read_image(path).permute(1, 2, 0).numpy().astype(int)
    assert image.shape == upright.shape
    assert np.abs(image - upright).mean() < 4


def test_gray_and_palette_images_become_rgb(tmp_path: Path):
    gray = RGB[..., 0]
    for name, image in (
        ("gray.png", Image.fromarray(gray)),
        ("palette.png", Image.fromarray(np.stack([gray] * 3, -1)).convert("P")),
        ("alpha.png", Image.fromarray(np.dstack([gray] * 3 + [RGB[..., 1]]))),
        ("gray_alpha.png", Image.fromarray(np.dstack([gray, RGB[..., 1]]))),
    ):
        image.save(tmp_path / name)
        want = np.stack([np.asarray(image.convert("L"))] * 3) if "palette" in name else gray
        got = read_image(tmp_path / name)
        assert got.shape == (3, 6, 8)
        assert np.array_equal(got.numpy(), np.broadcast_to(want, (3, 6, 8))), name


def test_a_gray_jpeg_becomes_rgb(tmp_path: Path):
    image = read_image(save(tmp_path / "a.jpg", smooth(16, 16)[..., 0]))
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[0], image[2])


def test_sixteen_bit_gray_keeps_its_high_byte(tmp_path: Path):
    gray = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    image = read_image(save(tmp_path / "a.png", gray))
    assert image[1].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_floating_point_images_are_refused(tmp_path: Path):
    path = save(tmp_path / "a.tiff", np.ones((2, 2), np.float32))
    with pytest.raises(DataProblem, match=r"a\.tiff holds floating-point .*8-bit RGB"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, lambda path: read_mask(path, IDS)])
class TestBrokenFiles:
    def test_missing(self, tmp_path: Path, read):
        with pytest.raises(DataProblem, match=r"gone\.png cannot be read .*No such file"):
            read(tmp_path / "gone.png")

    def test_a_folder(self, tmp_path: Path, read):
        with pytest.raises(DataProblem, match="cannot be read"):
            read(tmp_path)

    def test_empty(self, tmp_path: Path, read):
        path = tmp_path / "a.png"
        path.touch()
        with pytest.raises(DataProblem, match=r"a\.png is empty .*download it again"):
            read(path)

    def test_text(self, tmp_path: Path, read):
        path = tmp_path / "a.png"
        path.write_text("<html>404</html>")
        with pytest.raises(DataProblem, match=r"a\.png cannot be decoded \(not a PNG"):
            read(path)

    @pytest.mark.parametrize("kept", [20, 0.3, 0.9])
    def test_truncated_png(self, tmp_path: Path, read, kept: float):
        path = save(tmp_path / "a.png", noise(1, 40, 40, high=12))
        data = path.read_bytes()
        path.write_bytes(data[: kept if kept > 1 else int(len(data) * kept)])
        with pytest.raises(DataProblem, match=r"a\.png cannot be decoded .*download it again"):
            read(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_truncated_color_images_are_refused(tmp_path: Path, name: str, kept: float):
    path = save(tmp_path / name, noise(1, 40, 40, 3))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(DataProblem, match=r"cannot be decoded"):
        read_image(path)


def test_a_flipped_bit_in_a_png_is_noticed(tmp_path: Path):
    path = save(tmp_path / "a.png", noise(1, 40, 40, 3))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataProblem, match="cannot be decoded"):
        read_image(path)


def test_mask_values_become_train_ids(tmp_path: Path):
    raw = noise(2, 6, 8, high=12)
    mask = read_mask(save(tmp_path / "a.png", raw), CAMVID.lookup)
    assert mask.dtype == torch.uint8
    assert np.array_equal(mask.numpy(), np.where(raw == 11, 255, raw))


def test_palette_masks_are_read_as_indices(tmp_path: Path):
    raw = noise(3, 6, 8, high=12)
    image = Image.fromarray(raw)
    image.putpalette([255 - value // 3 for value in range(768)])
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png", IDS).numpy(), raw)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palette_masks_of_few_bits_are_read_as_indices(tmp_path: Path, bits: int):
    raw = noise(3, 6, 8, high=min(2**bits, 12))
    image = Image.fromarray(raw)
    image.putpalette([255 - value // 3 for value in range(768)])
    image.save(tmp_path / "a.png", bits=bits)
    assert (tmp_path / "a.png").read_bytes()[24] == bits
    assert np.array_equal(read_mask(tmp_path / "a.png", IDS).numpy(), raw)


def _gray_png(raw: np.ndarray, bits: int) -> bytes:
    """A gray PNG of fewer than 8 bits, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = raw.shape
    rows = b""
    for row in raw:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_masks_of_few_bits_are_not_stretched(tmp_path: Path, bits: int):
    raw = noise(4, 5, 7, high=min(2**bits, 12))
    (tmp_path / "a.png").write_bytes(_gray_png(raw, bits))
    assert np.array_equal(read_mask(tmp_path / "a.png", IDS).numpy(), raw)


def test_sixteen_bit_masks_with_small_values_are_taken(tmp_path: Path):
    raw = noise(5, 6, 8, high=12).astype(np.uint16)
    assert np.array_equal(read_mask(save(tmp_path / "a.png", raw), IDS).numpy(), raw)


def test_sixteen_bit_masks_with_large_values_are_refused(tmp_path: Path):
    path = save(tmp_path / "a.png", np.array([[0, 26001]], np.uint16))
    with pytest.raises(DataProblem, match=r"a\.png holds values 0\.\.26001.*instance masks"):
        read_mask(path, IDS)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_color_masks_are_refused(tmp_path: Path, channels: int):
    path = save(tmp_path / "a.png", noise(6, 4, 4, channels))
    with pytest.raises(DataProblem, match=r"a\.png is a color image .*class number"):
        read_mask(path, IDS)


def test_values_out_of_range_are_listed_with_the_allowed_ones(tmp_path: Path):
    raw = np.array([[0, 12, 13], [14, 200, 11]], np.uint8)
    with pytest.raises(
        DataProblem, match=r"a\.png holds mask values 12-14, 200, allowed are 0-11\."
    ):
        read_mask(save(tmp_path / "a.png", raw), CAMVID.lookup)


def test_resizing_an_image_averages_and_a_mask_picks(tmp_path: Path):
    board = np.indices((8, 8)).sum(0) % 2
    image = read_image(
        save(tmp_path / "a.png", np.stack([board * 200] * 3, -1).astype(np.uint8)),
        image_size=(4, 4),
    )
    assert image.shape == (3, 4, 4)
    assert 90 <= int(image.min()) <= int(image.max()) <= 110
    mask = read_mask(
        save(tmp_path / "m.png", (board * 5).astype(np.uint8)), IDS, image_size=(4, 12)
    )
    assert mask.shape == (4, 12)
    assert set(mask.unique().tolist()) <= {0, 5}


def test_the_own_size_is_not_resized(tmp_path: Path):
    path = save(tmp_path / "a.png", RGB)
    assert torch.equal(read_image(path, image_size=(6, 8)), read_image(path))


COLORS = ((10, 20, 30, 0), (1, 2, 3, 1), (0, 0, 0, 255), (250, 2, 3, 2))


def colored(raw: np.ndarray) -> np.ndarray:
    return np.array([row[:3] for row in COLORS], np.uint8)[raw]


class TestColorMasks:
    def test_colors_become_train_ids(self, tmp_path: Path):
        raw = noise(2, 6, 8, high=4)
        path = save(tmp_path / "a.png", colored(raw))
        want = [[COLORS[value][3] for value in row] for row in raw]
        assert read_mask(path, COLORS).tolist() == want

    def test_transparency_is_dropped_and_palettes_are_looked_up(self, tmp_path: Path):
        raw = noise(3, 6, 8, high=4)
        rgba = np.dstack([colored(raw), noise(4, 6, 8)])
        palette = Image.fromarray(raw)
        palette.putpalette([value for row in COLORS for value in row[:3]])
        palette.save(tmp_path / "p.png")
        assert torch.equal(
            read_mask(save(tmp_path / "a.png", rgba), COLORS),
            read_mask(tmp_path / "p.png", COLORS),
        )

    def test_gray_masks_are_gray_colors(self, tmp_path: Path):
        path = save(tmp_path / "a.png", np.array([[0, 0], [7, 0]], np.uint8))
        assert read_mask(path, ((0, 0, 0, 0), (7, 7, 7, 1))).tolist() == [[0, 0], [1, 0]]

    def test_colors_that_the_table_lacks_are_listed_the_most_frequent_first(self, tmp_path: Path):
        pixels = colored(np.zeros((4, 4), np.uint8))
        pixels[0], pixels[1, 0] = (9, 8, 7), (255, 0, 1)
        path = save(tmp_path / "a.png", pixels)
        with pytest.raises(
            DataProblem, match=r"a\.png holds 2 colors .*\(\(9, 8, 7\), \(255, 0, 1\)\)"
        ):
            read_mask(path, COLORS)

    def test_sixteen_bit_masks_have_no_colors(self, tmp_path: Path):
        path = save(tmp_path / "a.png", np.array([[0, 26001]], np.uint16))
        with pytest.raises(DataProblem, match=r"a\.png is a gray image of more than 8 bits"):
            read_mask(path, COLORS)


@pytest.mark.parametrize("lookup", [IDS, COLORS], ids=["index", "color"])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_masks_with_lossy_compression_are_refused(tmp_path: Path, lookup, kind: str):
    pixels = colored(noise(2, 16, 16, high=4)) if lookup is COLORS else noise(2, 16, 16, high=12)
    path = save(tmp_path / "a.png", pixels, format=kind)
    with pytest.raises(DataProblem, match=rf"a\.png is a {kind} file.*Save the mask as PNG"):
        read_mask(path, lookup)
