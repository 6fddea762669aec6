"""Exports that were made to do harm, or are damaged: one line, and nothing outside is opened."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.folder import Folder
from tests.importing.exports import EXPORTS, HEIGHT, WIDTH, save, scenes, write_json
from tests.importing.test_exports import imported


def change_json(root: Path, pattern: str, change: Callable[[Any], Any]) -> None:
    path = sorted(root.rglob(pattern))[0]
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def set_in(content: Any, *place: Any, to: Any) -> Any:
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = to
    return content


BOMB = base64.b64encode(zlib.compress(b"\0" * 100_000_000)).decode()
DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE: dict[str, tuple[str, str, tuple[Any, ...], Any, str]] = {
    # tool, file, place in it, value, message
    "labelme leads out": (
        "labelme", "*.json", ("imagePath",), "../../../etc/passwd.png", "leads out of the folder",
    ),
    "coco leads out": (
        "coco", "instances_train2017.json", ("images", 0, "file_name"), "../../x.png",
        "leads out of the folder",
    ),
    "coco size": (
        "coco", "instances_train2017.json", ("images", 0, "height"), 10**9,
        "about an image of 64 x 1000000000 pixels",
    ),
    "coco category": (
        "coco", "instances_train2017.json", ("annotations", 0, "category_id"), 99, "category 99",
    ),
    "coco odd polygon": (
        "coco", "instances_val2017.json", ("annotations", 2, "segmentation"), [[1, 2, 3]],
        "odd count of numbers",
    ),
    "coco corner": (
        "coco", "instances_val2017.json", ("annotations", 2, "segmentation"),
        [[1, 2, 1e300, 3, 4, 5]], "polygon with the corner",
    ),
    "coco runs": (
        "coco", "instances_train2017.json", ("annotations", 0, "segmentation"),
        {"size": [HEIGHT, WIDTH], "counts": [10**18]}, "pixels for an image of 3,072",
    ),
    "coco row": (
        "coco", "instances_train2017.json", ("images", 0), 7, "an entry of images has no file_name",
    ),
    "coco form": (
        "coco", "instances_train2017.json", ("annotations", 0, "image_id"), {}, "another form",
    ),
    "labelme size": (
        "labelme", "*.json", ("imageWidth",), 2**40, "about an image of",
    ),
    "labelme points": (
        "labelme", "*.json", ("shapes", 0, "points"), [["x", 1]], "polygon that is no list",
    ),
    "supervisely bomb": (
        "supervisely", "photo 01.png.json", ("objects", 0, "bitmap", "data"), BOMB,
        "unpacks to over",
    ),
    "supervisely size": (
        "supervisely", "photo 00.png.json", ("size", "height"), 10**12, "about an image of",
    ),
    "supervisely objects": ("supervisely", "photo 00.png.json", ("objects",), 3, "no list"),
    "label studio brush": (
        "label_studio", "project*.json",
        (1, "annotations", 0, "result", 0, "value", "rle"), [255] * 50, "brush strokes",
    ),
    "label studio size": (
        "label_studio", "project*.json",
        (1, "annotations", 0, "result", 0, "original_height"), 10**9, "about an image of",
    ),
    "label studio turned": (
        "label_studio", "project*.json",
        (0, "annotations", 0, "result", 0, "image_rotation"), 90, "turned in Label Studio",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_an_export_claims_is_checked(case, tmp_path):
    tool, file, place, value, message = HOSTILE[case]
    EXPORTS[tool][0](tmp_path / "s")
    change_json(tmp_path / "s", file, lambda content: set_in(content, *place, to=value))
    with pytest.raises(DataProblem, match=message) as info:
        imported(tmp_path / "s", tmp_path / "d")
    assert len(str(info.value)) < 500


@pytest.mark.parametrize("tool", ["coco", "labelme", "supervisely", "label_studio"])
@pytest.mark.parametrize(
    ("text", "message"), [(DEEP, "nested too deeply"), ("{", "is no JSON"), ("", "is empty")]
)
def test_json_that_is_none_or_without_end_is_named(tool, text, message, tmp_path):
    EXPORTS[tool][0](tmp_path / "s")
    # Beside good ones, so that the tool is recognized.
    place = tmp_path / "s" / ("ds/ann" if tool == "supervisely" else "x")
    place.mkdir(parents=True)
    (place / "zzz.png.json").write_text(text)
    with pytest.raises(DataProblem, match=message):
        imported(tmp_path / "s", tmp_path / "d")


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    EXPORTS["plain"][0](tmp_path / "s")
    secret = tmp_path / "secret.png"
    save(secret, scenes()[0].pixels)
    link = tmp_path / "s" / "pics from phone" / "IMG_9999.png"
    link.symlink_to(secret)
    with pytest.raises(DataProblem, match=r"IMG_9999\.png is a link out of the folder"):
        Folder(tmp_path / "s")
    link.unlink()
    link.symlink_to(tmp_path)
    with pytest.raises(DataProblem, match="is a link out of the folder or to a folder"):
        Folder(tmp_path / "s")
    link.unlink()
    link.symlink_to("day 1/IMG_0000.png")  # inside
    assert "pics from phone/IMG_9999.png" in Folder(tmp_path / "s").files


def test_pipes_are_passed_over_and_litter_is_left_alone(tmp_path):
    EXPORTS["plain"][0](tmp_path / "s")
    os.mkfifo(tmp_path / "s" / "pipe.png")
    files = Folder(tmp_path / "s").files
    assert not any(
        word in file for file in files for word in ("MACOSX", "eaDir", "Thumbs", "DS_", "pipe")
    )


def test_a_name_that_is_no_text_is_named(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a\nb.png").write_bytes(b"x")
    with pytest.raises(DataProblem, match=r"a\\nb\.png is no plain text"):
        Folder(tmp_path / "s")


def test_a_source_that_is_none_is_named(tmp_path):
    for path, message in (
        (tmp_path / "none", "does not exist, expected a folder"),
        (tmp_path / "x.zip", "is a file, expected a folder. Unpack it first"),
        (tmp_path / "empty", "holds no file"),
    ):
        (tmp_path / "x.zip").touch()
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataProblem, match=message):
            Folder(path)


def test_absolute_paths_of_another_machine_are_found_by_their_name(tmp_path):
    EXPORTS["labelme"][0](tmp_path / "s")
    change_json(
        tmp_path / "s", "photo 00.json",
        lambda content: set_in(content, "imagePath", to="C:\\me\\images\\photo 00.png"),
    )  # fmt: skip
    written = imported(tmp_path / "s", tmp_path / "d")
    assert sum(written.splits.values()) == 6


def test_classes_beyond_what_a_mask_holds_are_refused(tmp_path):
    EXPORTS["labelme"][0](tmp_path / "s")
    shape = {"points": [[1, 1], [2, 1], [2, 2]], "shape_type": "polygon"}
    shapes = [{**shape, "label": f"c{n}"} for n in range(300)]
    change_json(tmp_path / "s", "*.json", lambda content: set_in(content, "shapes", to=shapes))
    with pytest.raises(DataProblem, match=r"303 classes, at most 255 fit a mask"):
        imported(tmp_path / "s", tmp_path / "d")


def test_names_of_classes_cannot_write_into_the_table(tmp_path):
    EXPORTS["labelme"][0](tmp_path / "s")
    name = "x', value: 7}\nignore: []\n\x1b[31m"
    for path in (tmp_path / "s").rglob("*.json"):
        content = json.loads(path.read_text())
        content["shapes"][0]["label"] = name
        write_json(path, content)
    written = imported(tmp_path / "s", tmp_path / "d")
    assert len(written.classes) == 3
    assert not any("\n" in key or "\x1b" in key for key in written.classes)


@pytest.mark.parametrize("tool", ["hugging_face"])
def test_a_damaged_table_is_named(tool, tmp_path):
    EXPORTS[tool][0](tmp_path / "s")
    path = next((tmp_path / "s").rglob("train*.parquet"))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataProblem, match=r"train-00000-of-00001\.parquet cannot be read"):
        imported(tmp_path / "s", tmp_path / "d")
