"""Images and masks in layouts of people's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.config import ImportParams
from rdd_pipeline.errors import DataProblem
from tests.importing.exports import colored, counts, save, scenes
from tests.importing.test_exports import imported, pixels_by_class

LAYOUTS = {
    "side by side": ("{n}.jpg", "{n}.png"),
    "suffix": ("all/{n}.png", "all/{n}_mask.png"),
    "prefix": ("img_{n}.png", "gt_{n}.png"),
    "split outside": ("train/images/{n}.png", "train/masks/{n}.png"),
    "split inside": ("images/train/{n}.png", "masks/train/{n}.png"),
    "split in names": ("images_train/{n}.png", "labels_train/{n}.png"),
    "camvid": ("train/{n}.png", "trainannot/{n}.png"),
    "cityscapes": ("leftImg8bit/a_{n}_leftImg8bit.png", "gtFine/a_{n}_gtFine_labelIds.png"),
    "odd words": ("x{n}_view.png", "x{n}_done.png"),
    "a folder each": ("{n}/img.png", "{n}/label.png"),
    "padded": ("Frames/frame{n}.png", "Truth/truth_0{n}.png"),
    "nested": ("A/day1/{n}.png", "B/day1/{n}_seg.png"),
    "VOC": ("JPEGImages/{n}.png", "SegmentationClass/{n}.png"),
    "upper case": ("JPG/IMG_{n}.PNG", "PNG/img_{n}.png"),
}


def write(root: Path, layout: str, paint: Any = lambda truth: truth) -> None:
    image, mask = LAYOUTS[layout]
    for number, scene in enumerate(scenes()):
        save(root / image.format(n=f"{number + 5:03d}"), scene.pixels)
        save(root / mask.format(n=f"{number + 5:03d}"), paint(scene.truth))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_found_whatever_they_are_called(layout, tmp_path):
    write(tmp_path / "s", layout)
    written = imported(tmp_path / "s", tmp_path / "d")
    truth = counts(scenes())
    assert pixels_by_class(tmp_path / "d") == {
        "background": truth["background"], "class_1": truth["apple"], "class_2": truth["box"]
    }  # fmt: skip
    assert sum(written.splits.values()) == 6
    truths = {scene.pixels.tobytes(): scene.truth for scene in scenes()}
    for file in (tmp_path / "d" / "images").iterdir():
        with (
            Image.open(file) as picture,
            Image.open(tmp_path / "d" / "masks" / f"{file.stem}.png") as mask,
        ):
            assert (truths[np.asarray(picture).tobytes()] == np.asarray(mask)).all()


@pytest.mark.parametrize(
    ("paint", "names"),
    [
        (lambda t: np.where(t > 0, 255, 0).astype(np.uint8), {"background", "object"}),
        (lambda t: (t > 0).astype(np.uint8), {"background", "object"}),
        (lambda t: np.repeat((t > 0)[..., None], 3, -1).astype(np.uint8) * 255,
         {"background", "object"}),
        (lambda t: np.repeat(t[..., None], 3, -1), {"background", "class_1", "class_2"}),
        (lambda t: np.array([[0, 0, 0], [255, 0, 0], [1, 2, 3]], np.uint8)[t],
         {"background", "red", "#010203"}),
        (lambda t: np.array([[0, 0, 0, 0], [255, 0, 0, 255], [0, 0, 255, 9]], np.uint8)[t],
         {"background", "red", "blue"}),
        (lambda t: np.array([0, 255, 7], np.uint8)[t], {"background", "object", "ignored"}),
    ],
)  # fmt: skip
def test_classes_are_what_the_masks_hold(paint, names, tmp_path):
    write(tmp_path / "s", "suffix", paint)
    imported(tmp_path / "s", tmp_path / "d")
    found = pixels_by_class(tmp_path / "d")
    assert set(found) == names
    assert found["background"] == counts(scenes())["background"]


def test_soft_edges_are_ignored_and_said(tmp_path):
    def soft(truth: Any) -> Any:
        pixels = colored(truth)
        edges = np.zeros_like(truth, bool)
        edges[:, 1:] = truth[:, 1:] != truth[:, :-1]
        rng = np.random.default_rng(int(truth.sum()))
        pixels[edges] = rng.integers(0, 250, (int(edges.sum()), 3))
        return pixels

    write(tmp_path / "s", "suffix", soft)
    written = imported(tmp_path / "s", tmp_path / "d")
    assert len(written.classes) == 3
    assert 0 < written.ignored < 0.05
    assert any("soft edges" in remark for remark in written.remarks)


def test_names_come_from_a_table(tmp_path):
    for text, file in (
        ("sky\napple\nbox\n", "classes.txt"),
        ('{"0": "sky", "1": "apple", "2": "box"}', "id2label.json"),
        ("id,name\n0,sky\n1,apple\n2,box\n", "labels.csv"),
        ('[{"png_index": 1, "class_name": "apple"}, {"png_index": 2, "class_name": "box"},'
         ' {"png_index": 0, "class_name": "sky"}]', "label_classes.json"),
    ):  # fmt: skip
        root = tmp_path / file
        write(root / "s", "nested")
        (root / "s" / file).write_text(text)
        written = imported(root / "s", root / "d")
        assert list(written.classes) == ["sky", "apple", "box"], file
        assert any(file in remark for remark in written.remarks)


def test_an_image_that_was_turned_gets_a_mask_that_was_not(tmp_path):
    """Cameras store a portrait on its side; some tools paint what is stored, some what is seen."""
    for orientation in (6, 8):
        for painted in ("stored", "seen"):
            root = tmp_path / f"{orientation}{painted}"
            for number, scene in enumerate(scenes()):
                image = Image.fromarray(scene.pixels)
                exif = image.getexif()
                exif[0x0112] = orientation
                (root / "s").mkdir(parents=True, exist_ok=True)
                image.save(root / "s" / f"{number}.jpg", exif=exif)
                turns = 0 if painted == "stored" else -1 if orientation == 6 else 1
                save(root / "s" / f"{number}_mask.png", np.rot90(scene.truth, turns).copy())
            imported(root / "s", root / "d")
            with Image.open(root / "d" / "masks" / "0.png") as mask:
                wanted = np.rot90(scenes()[0].truth, -1 if orientation == 6 else 1)
                assert (np.asarray(mask) == wanted).all()


def test_names_may_be_given_in_one_word():
    assert ImportParams(classes="sky/red apple/box").classes == ("sky", "red apple", "box")
    assert ImportParams(classes=["sky", "box"]).classes == ("sky", "box")


def test_what_cannot_be_paired_is_said_in_one_line(tmp_path):
    write(tmp_path / "s", "suffix")
    (tmp_path / "s" / "all" / "007_mask.png").unlink()
    written = imported(tmp_path / "s", tmp_path / "d")
    assert "1 images have no mask (all/007.png)." in written.remarks
    assert sum(written.splits.values()) == 5


def only_images(root: Path) -> None:
    for scene in scenes():
        save(root / f"{scene.name}.png", scene.pixels)


def only_masks(root: Path) -> None:
    for scene in scenes():
        save(root / f"{scene.name}.png", scene.truth)


def no_match(root: Path) -> None:
    for number, scene in enumerate(scenes()):
        save(root / "a" / f"{'abcdef'[number]}.png", scene.pixels)
        save(root / "b" / f"{'uvwxyz'[number]}.png", scene.truth)


def one_class(root: Path) -> None:
    write(root, "suffix", np.zeros_like)


def two_masks_each(root: Path) -> None:
    write(root, "split outside")
    for number, scene in enumerate(scenes()):
        save(root / "train" / "annotations" / f"{number + 5:03d}.png", scene.truth)


def other_size(root: Path) -> None:
    write(root, "suffix")
    save(root / "all" / "005_mask.png", scenes()[0].truth[:40])


def own_layout(root: Path) -> None:
    write(root, "suffix")
    (root / "labels.yaml").write_text("classes: [a, b]")


def zipped(root: Path) -> None:
    root.mkdir()
    (root / "export.zip").write_bytes(b"PK")


def lossy(root: Path) -> None:
    write(root, "suffix")
    for path in (root / "all").glob("*_mask.png"):
        with Image.open(path) as picture:
            picture.convert("RGB").save(path.with_suffix(".jpg"), "JPEG")
        path.unlink()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (only_images, "images only, no masks"),
        (only_masks, "masks only, no images"),
        (no_match, "no names fit together"),
        (one_class, r"All masks hold one class only \(background\)"),
        (two_masks_each, "has 2 masks"),
        (other_size, "has 64 x 40 pixels, its image all/005.png has 64 x 48"),
        (own_layout, "needs no import"),
        (zipped, r"Unpack export\.zip first"),
        (lossy, "looks like a mask, but is a JPEG file"),
    ],
)
def test_what_is_no_data_set_ends_in_one_line(make, message, tmp_path):
    make(tmp_path / "s")
    with pytest.raises(DataProblem, match=message) as info:
        imported(tmp_path / "s", tmp_path / "d")
    assert len(str(info.value)) < 400


def test_names_are_safe_and_unique(tmp_path):
    names = ("a b", "a_b", "A_B", "photo.jpg", "..x", "é", "frame.v2.001")
    for number, name in enumerate(names):
        scene = scenes(len(names))[number]
        save(tmp_path / "s" / "images" / f"{name}.png", scene.pixels)
        save(tmp_path / "s" / "masks" / f"{name}.png", scene.truth)
    written = imported(tmp_path / "s", tmp_path / "d")
    files = [path.name for path in (tmp_path / "d" / "images").iterdir()]
    assert len({file.lower() for file in files}) == sum(written.splits.values()) >= 5
    assert all(" " not in file for file in files)
