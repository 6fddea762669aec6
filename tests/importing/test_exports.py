"""One export of every tool in its own layout: what is written is what was labeled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.data.layouts.base import list_pairs
from rdd_pipeline.data.layouts.folders import folders_layout
from rdd_pipeline.importing.folder import Folder
from rdd_pipeline.importing.splits import Shares
from rdd_pipeline.importing.tools import read_export
from rdd_pipeline.importing.write import Choices, Written, write_data
from tests.importing.exports import EXPORTS, NAMES, counts, scenes

SHARES = Shares(0.15, 0.15, 0, True)


def imported(source: Path, place: Path, **choices: Any) -> Written:
    place.mkdir()
    folder = Folder(source)
    given: dict[str, Any] = {
        "name": "x", "link": False, "ignore_background": False, "skip": False, "names": (),
        "shares": SHARES,
    }  # fmt: skip
    return write_data(read_export(folder), folder, place, Choices(**(given | choices)))


def pixels_by_class(place: Path) -> dict[str, int]:
    """Of all masks, by the names of labels.yaml; read with Pillow alone."""
    labels = folders_layout(place).labels
    found: Counter[str] = Counter()
    for file in (place / "masks").iterdir():
        with Image.open(file) as picture:
            values = np.asarray(picture)
        for value, count in zip(*np.unique(values, return_counts=True), strict=True):
            train_id = labels.lookup[value]
            assert isinstance(train_id, int)
            found["ignored" if train_id == 255 else labels.names[train_id]] += int(count)
    return dict(found)


@pytest.mark.parametrize("tool", EXPORTS)
def test_pixels_are_those_that_were_labeled(tool, tmp_path):
    make, name = EXPORTS[tool]
    make(tmp_path / "source")
    written = imported(tmp_path / "source", tmp_path / "data")
    assert written.tool == name
    assert pixels_by_class(tmp_path / "data") == counts(scenes())
    assert set(written.classes) == set(NAMES)
    assert written.ignored == 0
    assert sum(written.splits.values()) == len(scenes())
    layout = folders_layout(tmp_path / "data")
    listing = list_pairs(tmp_path / "data", layout)
    assert not listing.problems
    assert len(listing.pairs) == len(scenes())
    total = sum(counts(scenes()).values())
    for kind, share in written.classes.items():
        assert share == pytest.approx(counts(scenes())[kind] / total)


@pytest.mark.parametrize("tool", EXPORTS)
def test_each_image_keeps_its_own_mask(tool, tmp_path):
    EXPORTS[tool][0](tmp_path / "source")
    imported(tmp_path / "source", tmp_path / "data")
    truths = {scene.pixels.tobytes(): scene.truth for scene in scenes()}
    labels = folders_layout(tmp_path / "data").labels
    for file in (tmp_path / "data" / "images").iterdir():
        with Image.open(file) as picture:
            truth = truths[np.asarray(picture.convert("RGB")).tobytes()]
        with Image.open(tmp_path / "data" / "masks" / f"{file.stem}.png") as picture:
            names = np.array([*labels.names, "?"])[np.take(labels.lookup, np.asarray(picture))]
        assert (names == np.array(NAMES)[truth]).all(), file.name


@pytest.mark.parametrize(
    ("tool", "splits"),
    [
        ("roboflow", {"train": 3, "val": 2, "test": 1}),
        ("coco", {"train": 4, "val": 2}),
        ("supervisely", {"train": 4, "val": 2}),
        ("hugging_face", {"train": 4, "val": 2}),
        ("hugging_face_folder", {"train": 4, "val": 2}),
    ],
)
def test_splits_of_the_tool_are_kept(tool, splits, tmp_path):
    EXPORTS[tool][0](tmp_path / "source")
    written = imported(tmp_path / "source", tmp_path / "data")
    assert written.splits == splits
    assert written.how_split == "as they came"


def test_links_lead_to_the_source(tmp_path):
    EXPORTS["plain"][0](tmp_path / "source")
    imported(tmp_path / "source", tmp_path / "data", link=True)
    for file in (tmp_path / "data" / "images").iterdir():
        assert file.is_symlink()
        assert file.resolve().is_relative_to(tmp_path / "source")


def test_unlabeled_pixels_can_be_ignored_and_classes_named(tmp_path):
    EXPORTS["labelme"][0](tmp_path / "source")
    written = imported(
        tmp_path / "source", tmp_path / "data", ignore_background=True, names=("Apfel", "Kiste")
    )
    there = counts(scenes())
    found = pixels_by_class(tmp_path / "data")
    assert found == {
        "ignored": there["background"], "Apfel": there["apple"], "Kiste": there["box"]
    }  # fmt: skip
    assert written.ignored == pytest.approx(there["background"] / sum(there.values()))
