"""Classes that do not occur, and splits without labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rdd_pipeline.data.coverage import with_coverage
from rdd_pipeline.data.index import Index, check_images
from rdd_pipeline.data.layouts import get_layout

from .files import noise, save


def seen(root: Path, table: str, **masks: np.ndarray) -> Index:
    """What ingestion says of one image a split with these masks."""
    for number, (split, mask) in enumerate(masks.items()):
        save(root / "images" / split / "0.png", noise(number, *mask.shape, 3))
        save(root / "masks" / split / "0.png", mask)
    (root / "labels.yaml").write_text(table)
    layout = get_layout("folders", root)
    return with_coverage(check_images(root, layout, workers=1), layout)


BINARY = np.zeros((10, 10), np.uint8)
BINARY[:2] = 255
FULL = np.arange(100, dtype=np.uint8).reshape(10, 10) % 3


def test_masks_of_0_and_255_by_names_only_are_refused_with_what_to_write(tmp_path: Path):
    index = seen(tmp_path, "classes: [background, lesion]", train=BINARY, val=BINARY)
    (problem,) = index.problems
    assert problem.blocks
    assert "one class only, 'background'; class 'lesion' never occurs" in problem.text
    assert "20.0 % of its pixels hold 255" in problem.text
    assert "write `value: 255` for 'lesion' and `ignore: []`" in problem.text


@pytest.mark.parametrize("ignore", ["", "ignore: []\n"])
def test_what_the_message_says_helps(tmp_path: Path, ignore: str):
    table = f"{ignore}classes: [background, {{name: lesion, value: 255}}]"
    index = seen(tmp_path, table, train=BINARY, val=BINARY)
    assert index.problems == index.warnings == ()
    assert index.counts["train"].pixels == (80, 20, 0)


def test_more_classes_are_a_warning_with_the_same_advice(tmp_path: Path):
    mask = np.where(BINARY == 255, 255, FULL % 2).astype(np.uint8)
    index = seen(tmp_path, "classes: [a, b, c]", train=mask, val=mask)
    assert index.problems == ()
    (warning,) = index.warnings
    assert "class 'c' never occurs in split 'train'" in warning
    assert "20.0 % of its pixels hold 255" in warning


def test_who_says_that_255_is_ignored_gets_no_advice_on_it(tmp_path: Path):
    index = seen(tmp_path, "ignore: 255\nclasses: [a, b]", train=BINARY, val=BINARY)
    (problem,) = index.problems
    assert "20.0 % of its pixels are ignored" in problem.text
    assert "`value: 255`" not in problem.text


def test_a_class_that_only_evaluation_lacks_is_a_warning_of_that_split(tmp_path: Path):
    index = seen(tmp_path, "classes: [a, b, c]", train=FULL, val=FULL % 2, test=FULL)
    assert index.problems == ()
    (warning,) = index.warnings
    assert "class 'c' never occurs in split 'val': its mean IoU is that of the other" in warning


def test_many_classes_are_counted(tmp_path: Path):
    names = ", ".join(f"c{number}" for number in range(20))
    index = seen(tmp_path, f"classes: [{names}]", train=FULL, val=FULL)
    (warning,) = index.warnings
    assert "the 17 classes 'c3', 'c4'" in warning
    assert "and 9 more never occur in split 'train'" in warning


def test_training_images_without_labels_are_a_problem(tmp_path: Path):
    index = seen(tmp_path, "classes: [a, b, c]", train=np.full_like(FULL, 255), val=FULL)
    (problem,) = [p for p in index.problems if p.file == "train"]
    assert problem.blocks
    assert "split 'train' has no labeled pixel: all 100 pixels" in problem.text


@pytest.mark.parametrize("split", ["val", "test", "more"])
def test_another_split_without_labels_is_a_warning(tmp_path: Path, split: str):
    masks = dict.fromkeys(("train", "val", "test"), FULL) | {split: np.full_like(FULL, 255)}
    index = seen(tmp_path, "classes: [a, b, c]", **masks)
    assert index.problems == ()
    (warning,) = [text for text in index.warnings if "no labeled pixel" in text]
    assert f"split '{split}' has no labeled pixel: all 100 pixels" in warning
    assert "Nothing can be scored on it." in warning
    assert ("hand on their last weights" in warning) == (split == "val")


def test_nothing_is_said_of_a_complete_data_set(tmp_path: Path):
    index = seen(tmp_path, "classes: [a, b, c]", train=FULL, val=FULL)
    assert index.problems == index.warnings == ()
