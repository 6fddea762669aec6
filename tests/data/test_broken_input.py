"""Broken and odd input, one kind after the other, through the whole check of a data set.

Each kind either gives the right pixels, or a problem that names the file and says what to do.
Every case changes a small good data set in CamVid's layout (or another one, where it says so).
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.data import reading
from rdd_pipeline.data.index import Index, check_images, of_split
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.data.sources import FileSource
from rdd_pipeline.errors import DataProblem

from .files import encoded, make_camvid, noise, save

SIZE = (24, 32)
IMAGE = noise(1000, *SIZE, 3)
MASK = noise(1001, *SIZE, high=12)
GRAY = IMAGE[..., 0]


def make(root: Path) -> Path:
    """Three good pairs a split; `x` is the one that the cases are about."""
    make_camvid(root, count=2, size=SIZE, splits=("train", "val"))
    save(root / "train" / "x.png", IMAGE)
    save(root / "trainannot" / "x.png", MASK)
    return root


def image(data: bytes, name: str = "x.png") -> Callable[[Path], None]:
    """Case: the image's file holds `data`, perhaps under another name."""

    def change(root: Path) -> None:
        (root / "train" / "x.png").unlink()
        (root / "train" / name).write_bytes(data)

    return change


def mask(data: bytes, name: str = "x.png") -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / "trainannot" / "x.png").unlink()
        (root / "trainannot" / name).write_bytes(data)

    return change


def palette(values: np.ndarray, colors: list[int]) -> Image.Image:
    picture = Image.fromarray(values)
    picture.putpalette(colors)
    return picture


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = np.ascontiguousarray(np.rot90(IMAGE, 1))
    return encoded(turned, "WEBP", lossless=True, exif=exif)


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0x10
    return bytes(changed)


def huge_png() -> bytes:
    """A header that promises 60000 x 60000 pixels, and nothing behind it."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


RGB = IMAGE.transpose(2, 0, 1)
SIXTEEN = GRAY.astype(np.uint16) * 257
RGBA = np.dstack([IMAGE, noise(3, *SIZE)])

# Kind -> (change, the image's pixels (3, H, W) that are right in spite of it).
RIGHT_IMAGES: dict[str, tuple[Callable[[Path], None], np.ndarray]] = {
    "gray image": (image(encoded(GRAY)), np.stack([GRAY] * 3)),
    "gray image with transparency": (
        image(encoded(np.dstack([GRAY, GRAY]))), np.stack([GRAY] * 3),
    ),
    "black and white image": (
        image(encoded(Image.fromarray(GRAY > 99))), np.stack([(GRAY > 99) * np.uint8(255)] * 3),
    ),
    "palette image": (
        image(encoded(palette(MASK, list(range(36))))),
        np.arange(36, dtype=np.uint8).reshape(12, 3)[MASK].transpose(2, 0, 1),
    ),
    "image with transparency": (image(encoded(RGBA)), RGB),
    "16-bit gray image": (image(encoded(SIXTEEN)), np.stack([GRAY] * 3)),
    "image turned by EXIF": (image(rotated(6), "x.jpg"), RGB),
    "PNG under the name of a JPEG": (image(encoded(IMAGE), "x.jpg"), RGB),
    "BMP under the name of a PNG": (image(encoded(IMAGE, "BMP")), RGB),
    "suffix in capitals": (image(encoded(IMAGE), "x.PNG"), RGB),
    "interlaced PNG with a comment": (
        image(encoded(IMAGE, pnginfo=None, optimize=True)), RGB,
    ),
    "bytes after the end of the PNG": (image(encoded(IMAGE) + b"trailing"), RGB),
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT_IMAGES)
def test_odd_images_give_the_right_pixels(tmp_path: Path, kind: str):
    change, want = RIGHT_IMAGES[kind]
    change(make(tmp_path))
    got, _ = pixels_of_x(tmp_path)
    assert np.array_equal(got, want)


RIGHT_MASKS: dict[str, Callable[[Path], None]] = {
    "palette mask": mask(encoded(palette(MASK, [255 - v for v in range(36)]))),
    "16-bit mask with class numbers": mask(encoded(MASK.astype(np.uint16))),
    "BMP under the name of a PNG": mask(encoded(MASK, "BMP")),
    "TIFF under the name of a PNG": mask(encoded(MASK, "TIFF")),
    "suffix in capitals": mask(encoded(MASK), "x.PNG"),
    "a list of other programs beside it": lambda root: (
        (root / "trainannot" / "x.json").touch() or None
    ),
    "hidden copy of macOS beside it": lambda root: (root / "train" / "._x.png").touch() or None,
}


@pytest.mark.parametrize("kind", RIGHT_MASKS)
def test_odd_masks_give_the_right_labels(tmp_path: Path, kind: str):
    RIGHT_MASKS[kind](make(tmp_path))
    _, got = pixels_of_x(tmp_path)
    assert np.array_equal(got, np.where(MASK == 11, 255, MASK))


@pytest.mark.parametrize(
    "name",
    [
        "with two  spaces",
        "ünïcödé 日本語 🚗",
        "dots.in.a.name",
        "comma, \"quote\" 'n' #%&",
        "-dash",
    ],
)
def test_odd_names_are_names(tmp_path: Path, name: str):
    make(tmp_path)
    for folder in ("train", "trainannot"):
        (tmp_path / folder / "x.png").rename(tmp_path / folder / f"{name}.png")
    index = checked(tmp_path)
    assert index.problems == ()
    assert name in [sample.name for sample in index.samples]
    got, _ = pixels_of_x(tmp_path, name)
    assert np.array_equal(got, RGB)


def link_to_nothing(folder: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / folder / "x.png"
        path.unlink()
        path.symlink_to("gone.png")

    return change


def unpaired(folder: str) -> Callable[[Path], None]:
    return lambda root: (root / folder / "x.png").unlink()


def second(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.copy(root / "train" / "x.png", root / name) and None


def image_turned_mask_not(root: Path) -> None:
    image(rotated(6), "x.jpg")(root)
    save(root / "trainannot" / "x.png", np.rot90(MASK).copy())


def folder_instead(root: Path) -> None:
    (root / "train" / "x.png").unlink()
    (root / "train" / "x.png").mkdir()


PNG, JPEG = encoded(IMAGE), encoded(IMAGE, "JPEG")
SMALL = np.ascontiguousarray(MASK[:12, :16])
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated PNG": (image(PNG[:500]), r"train/x\.png cannot be decoded .*again"),
    "truncated JPEG": (image(JPEG[: len(JPEG) // 2], "x.jpg"), r"train/x\.jpg cannot be decoded"),
    "PNG without its end": (image(PNG[:30]), r"train/x\.png cannot be decoded"),
    "flipped bit in a PNG": (image(flipped(PNG, 300)), r"train/x\.png cannot be decoded"),
    "truncated mask": (mask(encoded(MASK)[:150]), r"trainannot/x\.png cannot be decoded"),
    "flipped bit in a mask": (mask(flipped(encoded(MASK), 99)), r"trainannot/x\.png cannot be dec"),
    "empty image": (image(b""), r"train/x\.png is empty \(0 bytes\)"),
    "empty mask": (mask(b""), r"trainannot/x\.png is empty \(0 bytes\)"),
    "page of an error in place of an image": (image(b"<html>404"), r"train/x\.png .*not a PNG, JP"),
    "zeros in place of an image": (image(bytes(4096)), r"train/x\.png .*not a PNG"),
    "ZIP under the name of a PNG": (image(b"PK\x03\x04" + bytes(99)), r"train/x\.png .*not a PNG"),
    "Git LFS pointer": (image(b"version https://git-lfs.github.com/spec/v1"), r"x\.png .*not a P"),
    "GIF under the name of a PNG": (image(encoded(GRAY, "GIF")), r"train/x\.png .*not a PNG"),
    "floating-point image": (
        image(encoded(GRAY.astype(np.float32), "TIFF")), r"x\.png holds floating-point .*Convert",
    ),
    "32-bit image": (
        image(encoded(Image.fromarray(SIXTEEN.astype(np.int32) * 9), "TIFF")),
        r"x\.png holds gray values .* expected 16-bit .*Convert",
    ),
    "image of absurd size": (image(huge_png()), r"train/x\.png cannot be decoded .*pixels"),
    "image turned by EXIF, mask not": (
        image_turned_mask_not, r"trainannot/x\.png is 24 x 32 .*EXIF rotation .*save it upright",
    ),
    "image with a suffix that is not read": (
        image(encoded(IMAGE, "GIF"), "x.gif"), r"x\.png has no image: train/x\.gif is n.*Convert",
    ),
    "mask with the suffix of a JPEG": (
        mask(encoded(MASK, "JPEG"), "x.jpg"), r"train/x\.png has no mask: trainannot/x\.jpg is",
    ),
    "JPEG under the name of a PNG mask": (
        mask(encoded(MASK, "JPEG")), r"trainannot/x\.png is a JPEG file, whatever .*as PNG",
    ),
    "colored mask where numbers are expected": (
        mask(encoded(IMAGE)), r"trainannot/x\.png is a color image .*Convert the colors",
    ),
    "mask with transparency": (mask(encoded(RGBA)), r"trainannot/x\.png is a color image"),
    "instance mask of 16 bits": (
        mask(encoded(SIXTEEN)), r"trainannot/x\.png holds values .*instance masks",
    ),
    "floating-point mask": (
        mask(encoded(MASK.astype(np.float32), "TIFF")), r"x\.png holds floating-point values.*8",
    ),
    "values out of range": (
        mask(encoded(MASK + np.uint8(3))), r"x\.png holds mask values 12-14, allowed are 0-11",
    ),
    "mask of the wrong size": (
        mask(encoded(SMALL)), r"trainannot/x\.png is 16 x 12 pixels .*32 x 24\. Resize",
    ),
    "image without mask": (unpaired("trainannot"), r"train/x\.png has no mask\. Add it or remove"),
    "mask without image": (unpaired("train"), r"trainannot/x\.png has no image\. Add it or remove"),
    "link to nothing in place of an image": (
        link_to_nothing("train"), r"train/x\.png is a link to gone\.png, which does not exist",
    ),
    "link to nothing in place of a mask": (
        link_to_nothing("trainannot"), r"trainannot/x\.png is a link to gone\.png",
    ),
    "folder in place of an image": (folder_instead, r"trainannot/x\.png has no image"),
    "two images of one name": (second("train/x.jpeg"), r"train/x\.png and train/x\.jpeg have the"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_one_problem_that_names_the_file(tmp_path: Path, kind: str):
    change, message = FAULTS[kind]
    change(make(tmp_path))
    index = checked(tmp_path)
    assert len(index.problems) == 1, index.problems
    (problem,) = index.problems
    with pytest.raises(DataProblem, match=message):
        raise DataProblem(problem.text)
    assert not problem.blocks
    assert problem.file.rpartition(".")[0] in ("train/x", "trainannot/x")
    assert "x" not in [sample.name for sample in index.samples]
    assert len(index.samples) == 4


def test_there_are_at_least_forty_kinds():
    assert len(RIGHT_IMAGES) + len(RIGHT_MASKS) + len(FAULTS) >= 40


@pytest.mark.parametrize("folder", ["train", "trainannot"])
def test_a_file_without_permission_is_named(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
):
    """Simulated: whoever runs the tests as root may read everything."""
    make(tmp_path)
    real = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self == tmp_path / folder / "x.png":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (problem,) = checked(tmp_path).problems
    assert problem.file == f"{folder}/x.png"
    assert "x.png cannot be read (Permission denied). Check" in problem.text


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path)
    real = os.scandir

    def refuse(path: str) -> object:
        if Path(path) == tmp_path / "train":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    problems = checked(tmp_path).problems
    assert "the folder train cannot be read (Permission denied). Correct" in problems[0].text
    assert problems[0].blocks


def test_a_disk_that_gives_an_error_while_reading_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(tmp_path)

    def fail(self: Path) -> bytes:
        raise OSError(5, "Input/output error", str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    problems = checked(tmp_path).problems
    assert len(problems) == 2 * 5
    assert all("Input/output error" in problem.text for problem in problems)


def test_an_image_that_no_memory_is_left_for_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reading, "picture_pixels", fail)
    assert "cannot be decoded (MemoryError)" in checked(tmp_path).problems[0].text


class TestLists:
    """Lists of names, as VOC has them."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for name in "abc":
            save(tmp_path / "JPEGImages" / f"{name}.jpg", IMAGE)
            save(tmp_path / "SegmentationClassAug" / f"{name}.png", MASK)
        save(tmp_path / "SegmentationClass" / "c.png", MASK)
        (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
        self.write(tmp_path, "val", b"c\n")
        return tmp_path

    def write(self, root: Path, name: str, data: bytes) -> None:
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_bytes(data)

    def names(self, root: Path) -> list[str]:
        index = check_images(root, get_layout("voc"), workers=1)
        assert index.problems == ()
        return [sample.name for sample in index.samples]

    def problem(self, root: Path) -> str:
        (problem,) = check_images(root, get_layout("voc"), workers=1).problems
        return problem.text

    @pytest.mark.parametrize(
        "data",
        [b"\xef\xbb\xbfc\n", b"c\r\n", b"\n\nc", b"c\nc\n", b"  c  \n", b"c.jpg\n", b"c 1\n"],
        ids=["byte order mark", "Windows", "blank", "twice", "spaces", "suffix", "columns"],
    )
    def test_odd_lists_are_read(self, root: Path, data: bytes):
        self.write(root, "val", data)
        assert self.names(root) == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "split 'val' is empty"),
            (b"\xff\xfe\x00c\x80", r"val.txt cannot be read (not UTF-8 text). Copy or download"),
            (b"c\n/\n", " of split 'val' has neither"),
            (b"c\nz\n", "z of split 'val' has neither JPEGImages/z.jpg nor"),
            (b"c\nb\n", "JPEGImages/b.jpg has no mask"),
        ],
        ids=["empty", "binary", "a slash", "neither", "half"],
    )
    def test_faults_of_lists_are_named(self, root: Path, data: bytes, message: str):
        self.write(root, "val", data)
        assert message in self.problem(root)

    def test_a_list_with_missing_lines_uses_what_it_names(self, root: Path):
        self.write(root, "trainaug", b"a\n")
        assert self.names(root) == ["a", "c"]

    def test_an_image_on_both_lists_is_a_warning(self, root: Path):
        self.write(root, "trainaug", b"a\nc\n")
        (warning,) = check_images(root, get_layout("voc"), workers=1).warnings
        assert "are the same image in two splits" in warning


def checked(root: Path) -> Index:
    return check_images(root, get_layout("camvid"), workers=2)


def pixels_of_x(root: Path, name: str = "x") -> tuple[np.ndarray, np.ndarray]:
    """Image (3, H, W) and train ids of `x`, read as training reads them."""
    index = checked(root)
    assert index.problems == ()
    samples = [sample for sample in of_split(index.samples, "train") if sample.name == name]
    source = FileSource(samples, root, lookup=get_layout("camvid").labels.lookup)
    picture, labels = source[0]
    return picture.numpy(), labels.numpy()
