"""Warnings about files that were read without a problem and may still mean something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.data import scan_cache as memory
from rdd_pipeline.data.index import Index, check_images, index_digest
from rdd_pipeline.data.layouts import get_layout

from .files import noise, save
from .tiff import page, tiff

SIZE = (12, 16)
MASK = noise(1, *SIZE, high=3)
COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
PLAIN = "classes: [{name: bg}, {name: a}, {name: b}]"
COLORED = (
    "classes: [{name: bg, color: [0, 0, 0]}, {name: a, color: [255, 0, 0]}, "
    "{name: b, color: [0, 255, 0]}]"
)


def make(root: Path, table: str = PLAIN, size: tuple[int, int] = SIZE) -> Path:
    """Two good pairs a split, `0` and `1`."""
    for split in ("train", "val"):
        for name in "01":
            save(
                root / "images" / split / f"{name}.png", noise(ord(name) + 9 * len(split), *size, 3)
            )
            save(root / "masks" / split / f"{name}.png", noise(1, *size, high=3))
    (root / "labels.yaml").write_text(table)
    return root


def checked(root: Path, **options: object) -> Index:
    return check_images(root, get_layout("folders", root), workers=1, **options)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def palette_mask(path: Path, colors: np.ndarray, raw: np.ndarray = MASK) -> None:
    image = Image.fromarray(raw)
    image.putpalette(colors.flatten().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


class TestRotation:
    @pytest.mark.parametrize("orientation", [2, 3, 4])
    def test_is_a_warning_where_height_and_width_stay(self, tmp_path: Path, orientation: int):
        make(tmp_path)
        for name in "01":
            path = tmp_path / "images" / "train" / f"{name}.png"
            save(path, noise(2, *SIZE, 3), exif=exif(orientation))
        index = checked(tmp_path)
        (warning,) = index.warnings
        assert warning.startswith("2 images with an EXIF rotation that the sizes cannot check")
        assert "(images/train/0.png, images/train/1.png)" in warning
        assert len(index.samples) == 4

    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    def test_is_a_warning_on_squares_and_checked_by_the_size_else(
        self, tmp_path: Path, orientation: int
    ):
        make(tmp_path / "square", size=(12, 12))
        path = tmp_path / "square" / "images" / "train" / "0.png"
        save(path, noise(2, 12, 12, 3), exif=exif(orientation))
        (warning,) = checked(tmp_path / "square").warnings
        assert "1 image with an EXIF rotation" in warning
        make(tmp_path / "long")
        path = tmp_path / "long" / "images" / "train" / "0.png"
        save(path, noise(2, *SIZE[::-1], 3), exif=exif(orientation))
        index = checked(tmp_path / "long")
        assert (index.warnings, index.problems) == ((), ())

    @pytest.mark.parametrize("orientation", [0, 1, 9])
    def test_upright_images_are_none(self, tmp_path: Path, orientation: int):
        make(tmp_path)
        path = tmp_path / "images" / "train" / "0.png"
        save(path, noise(2, *SIZE, 3), exif=exif(orientation))
        assert checked(tmp_path).warnings == ()

    def test_of_tiff_images_counts_as_well(self, tmp_path: Path):
        make(tmp_path)
        stored = noise(2, *SIZE, 3)
        (tmp_path / "images" / "train" / "0.png").write_bytes(tiff(page(stored, t274=3)))
        (warning,) = checked(tmp_path).warnings
        assert "EXIF" in warning


class TestPalettes:
    def fill(self, root: Path, *, odd: np.ndarray = COLORS, table: str = PLAIN) -> Index:
        make(root, table)
        for split in ("train", "val"):
            for name in "01":
                colors = odd if (split, name) == ("train", "1") else COLORS
                palette_mask(root / "masks" / split / f"{name}.png", colors)
        return checked(root)

    def test_equal_ones_are_none(self, tmp_path: Path):
        assert self.fill(tmp_path).warnings == ()

    @pytest.mark.parametrize(
        ("table", "whose"), [(PLAIN, "most of these masks"), (COLORED, "the table of labels")]
    )
    def test_another_order_in_one_mask(self, tmp_path: Path, table: str, whose: str):
        (warning,) = self.fill(tmp_path, odd=COLORS[[2, 0, 1]], table=table).warnings
        assert warning.startswith(
            f"1 of 4 palette masks show a value in another color than {whose}"
        )
        assert (
            "(masks/train/1.png; in masks/train/1.png 0 is (0, 255, 0), expected (0, 0, 0))"
            in warning
        )

    def test_colors_that_do_not_occur_do_not_count(self, tmp_path: Path):
        make(tmp_path)
        palette_mask(tmp_path / "masks" / "train" / "0.png", COLORS[[0, 1, 1]], MASK % 2)
        palette_mask(tmp_path / "masks" / "train" / "1.png", COLORS, MASK % 2)
        assert checked(tmp_path).warnings == ()

    def test_all_masks_beside_the_table(self, tmp_path: Path):
        make(tmp_path, COLORED)
        for split in ("train", "val"):
            for name in "01":
                palette_mask(tmp_path / "masks" / split / f"{name}.png", COLORS[::-1])
        (warning,) = checked(tmp_path).warnings
        assert warning.startswith("4 of 4 palette masks")
        assert "the table of labels" in warning

    def test_masks_read_by_color_and_gray_masks_have_none(self, tmp_path: Path):
        table = COLORED + "\nencoding: color"
        assert self.fill(tmp_path / "a", odd=COLORS[[2, 0, 1]], table=table).problems == ()
        assert checked(tmp_path / "a").warnings == ()
        assert checked(make(tmp_path / "b", COLORED)).warnings == ()

    def test_are_remembered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(memory, "SETTLED", -1)
        first = self.fill(tmp_path / "data", odd=COLORS[[2, 0, 1]])
        stored = tmp_path / "checked.json"
        save(tmp_path / "data/images/val/0.png", noise(8, *SIZE, 3), exif=exif(3))
        again = [checked(tmp_path / "data", cache=stored) for _ in range(2)]
        assert again[1].read == 0
        assert again[0].warnings == again[1].warnings
        assert first.warnings[0] in again[1].warnings
        assert "EXIF" in again[1].warnings[0]


class TestBits:
    def fill(self, root: Path, shift: int = 4, **options: int) -> Index:
        make(root)
        for split in ("train", "val"):
            for name in "01":
                gray = noise(ord(name) + 9 * len(split), *SIZE).astype(np.uint16) << shift
                gray[0, 0] = 255 << shift
                save(root / "images" / split / f"{name}.png", gray)
        return checked(root, **options)

    def test_twelve_of_sixteen_are_a_warning_that_names_the_parameter(self, tmp_path: Path):
        (warning,) = self.fill(tmp_path).warnings
        assert warning.startswith("4 16-bit gray images (images/train/0.png, ")
        assert "no value above 4080" in warning
        assert "keep at most 16 of their 4096 levels" in warning
        assert "set data.bits=12" in warning

    def test_values_of_eight_bits_are_to_be_read_as_such(self, tmp_path: Path):
        (warning,) = self.fill(tmp_path, shift=0).warnings
        assert "keep at most 1 of their 256 levels" in warning
        assert "set data.bits=8" in warning

    def test_all_sixteen_and_the_right_number_are_none(self, tmp_path: Path):
        assert self.fill(tmp_path / "a", shift=8).warnings == ()
        index = self.fill(tmp_path / "b", bits=12)
        assert index.warnings == ()
        assert {sample.bits for sample in index.samples} == {12}

    def test_the_digest_tells_the_bits(self, tmp_path: Path):
        twelve = self.fill(tmp_path, bits=12)
        sixteen = self.fill(tmp_path)
        assert index_digest(twelve.samples) != index_digest(sixteen.samples)

    def test_images_of_eight_bits_do_not_depend_on_them(self, tmp_path: Path):
        make(tmp_path)
        few, many = checked(tmp_path, bits=12), checked(tmp_path)
        assert few == many
        assert index_digest(few.samples) == index_digest(many.samples)

    def test_a_larger_value_is_a_problem_also_when_the_file_is_known(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(memory, "SETTLED", -1)
        self.fill(tmp_path / "data")
        stored = tmp_path / "checked.json"
        assert checked(tmp_path / "data", cache=stored).problems == ()
        index = checked(tmp_path / "data", cache=stored, bits=10)
        assert index.read == 0
        assert len(index.problems) == 4
        assert index.problems[0].text == (
            "images/train/0.png holds gray values up to 4080, but data.bits is 10: expected "
            "0..1023. Raise data.bits to 12."
        )
        assert index.samples == ()

    def test_dark_color_is_to_be_converted(self, tmp_path: Path):
        make(tmp_path)
        dark = noise(3, *SIZE, 3).astype(np.uint16) << 4
        (tmp_path / "images" / "train" / "0.png").write_bytes(tiff(dark))
        (warning,) = checked(tmp_path).warnings
        assert "1 16-bit color image (images/train/0.png)" in warning
        assert "Convert" in warning
        (problem,) = checked(tmp_path, bits=12).problems
        assert "data.bits (12) cannot be applied" in problem.text
