"""Splits made of the training images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from rdd_pipeline.data.division import Division, divide
from rdd_pipeline.data.index import Index, check_images, index_digest
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.errors import UserError

from .files import make_camvid, noise, save

DIGESTS = [f"{number:032x}" for number in range(100)]
THIRDS = Division(0.15, 0.15)


def by_digest(digests: list[str], division: Division) -> dict[str, str]:
    return dict(zip(digests, divide(digests, division), strict=True))


@pytest.mark.parametrize(
    ("count", "val", "test", "wanted"),
    [(100, 0.15, 0.15, (15, 15)), (60, 0.2, 0, (12, 0)), (3, 0.1, 0.1, (1, 1)), (7, 0, 0, (0, 0))],
)
def test_shares_are_exact_and_at_least_one_image(
    count: int, val: float, test: float, wanted: tuple[int, int]
):
    splits = divide(DIGESTS[:count], Division(val, test))
    assert (splits.count("val"), splits.count("test")) == wanted
    assert splits.count("train") == count - sum(wanted)


def test_the_order_of_the_files_does_not_matter():
    assert by_digest(DIGESTS, THIRDS) == by_digest(DIGESTS[::-1], THIRDS)


def test_seeds_give_other_splits():
    splits = {tuple(divide(DIGESTS, Division(0.2, 0.1, seed))) for seed in range(5)}
    assert len(splits) == 5


@pytest.mark.parametrize("number", range(100, 120))
def test_a_further_image_leaves_the_others_where_they_are(number: int):
    before, after = (
        by_digest(digests, THIRDS) for digests in (DIGESTS, [*DIGESTS, f"{number:032x}"])
    )
    moved = {(before[key], after[key]) for key in DIGESTS if before[key] != after[key]}
    assert sum(before[key] != after[key] for key in DIGESTS) <= 2
    assert not moved & {("val", "test"), ("test", "val")}


def test_equal_images_are_never_on_two_sides():
    digests = [digest for digest in DIGESTS[:40] for _ in range(1 + int(digest, 16) % 3)]
    splits = divide(digests, Division(0.3, 0.3))
    assert len(set(zip(digests, splits, strict=True))) == 40
    assert abs(splits.count("val") - 0.3 * len(digests)) <= 2


def checked(root: Path, division: Division) -> Index:
    return check_images(root, get_layout("folders", root), workers=1, division=division)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twenty pairs without splits, numbers 7 and 8 alike."""
    for number in range(20):
        save(tmp_path / "photos" / f"{number}.png", noise(min(number, 7 + number % 2), 6, 8, 3))
        save(tmp_path / "ann" / f"{number}.png", noise(number, 6, 8, high=2))
    for number in range(9, 20):
        save(tmp_path / "photos" / f"{number}.png", noise(number, 6, 8, 3))
    shutil.copy(tmp_path / "photos" / "7.png", tmp_path / "photos" / "8.png")
    (tmp_path / "labels.yaml").write_text("classes: [a, b]\nimages: photos\nmasks: ann\n")
    return tmp_path


def test_a_folder_without_splits_is_divided(root: Path):
    index = checked(root, Division(0.2, 0.1))
    assert index.problems == index.warnings == ()
    assert {split: sum(s.split == split for s in index.samples) for split in index.splits} == {
        "train": 14, "val": 4, "test": 2,
    }  # fmt: skip
    assert list(index.counts) == ["train", "val", "test"]
    assert sum(sum(counts.pixels) for counts in index.counts.values()) == 20 * 48
    sides = {sample.name: sample.split for sample in index.samples}
    assert sides["7"] == sides["8"]
    masks = [noise(int(s.name), 6, 8, high=2) for s in index.samples if s.split == "val"]
    assert index.counts["val"].pixels[:2] == tuple(
        int((np.stack(masks) == c).sum()) for c in (0, 1)
    )


def test_other_names_and_folders_give_the_same_sides(root: Path, tmp_path: Path):
    here = {s.image_digest: s.split for s in checked(root, THIRDS).samples}
    for folder in ("photos", "ann"):
        for path in list((root / folder).iterdir()):
            path.rename(path.with_name(f"z{99 - int(path.stem)}.png"))
    again = checked(root, THIRDS)
    assert {s.image_digest: s.split for s in again.samples} == here
    assert index_digest(again.samples) != index_digest(checked(root, Division(0.15)).samples)


def test_a_split_that_is_there_is_not_made(root: Path, tmp_path: Path):
    make_camvid(tmp_path / "camvid", count=2)
    with pytest.raises(UserError, match=r"data\.val_fraction is 0\.5, but .* 'val'.*fraction=0"):
        check_images(tmp_path / "camvid", get_layout("camvid"), division=Division(0.5))


def test_a_fixed_layout_without_val_gets_one(tmp_path: Path):
    make_camvid(tmp_path, count=4, splits=("train",))
    layout = get_layout("camvid")
    (problem,) = check_images(tmp_path, layout).problems
    assert "val and valannot missing" in problem.text
    assert "data.val_fraction=0.2 makes it of the training images" in problem.text
    index = check_images(tmp_path, layout, division=Division(0.25))
    assert index.problems == ()
    assert [sample.split for sample in index.samples] == ["train"] * 3 + ["val"]


def test_too_few_images_are_a_problem(tmp_path: Path):
    make_camvid(tmp_path, count=1, splits=("train",))
    (problem,) = check_images(tmp_path, get_layout("camvid"), division=Division(0.5)).problems
    assert problem.blocks
    assert "1 images, 1 of them different, are too few" in problem.text
    assert "none is left for train" in problem.text
