from __future__ import annotations

from pathlib import Path

import pytest

from rdd_pipeline.errors import UserError
from rdd_pipeline.inference.sources import find_sources, unique_names


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(given: Path, *leave_out: Path) -> list[tuple[str, str]]:
    return [(source.shown, source.name) for source in find_sources(given, leave_out)]


def test_a_folder_gives_images_and_videos_below_it_in_order(tmp_path):
    touch(tmp_path, "b.png", "a/c.JPG", "a/d.mp4", "notes.txt", ".hidden.png", ".git/x.png")
    touch(tmp_path, "out/masks/b.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = names(tmp_path, tmp_path / "out" / "masks")
    assert found == [("a/c.JPG", "a/c"), ("a/d.mp4", "a/d"), ("b.png", "b")]


def test_masks_of_another_output_folder_are_no_images(tmp_path):
    touch(tmp_path, "a.png", "masks/b.png", "out/manifest.jsonl", "out/classes.json")
    touch(tmp_path, "out/masks/a.png", "out/overlays/a.jpg", "out/c.png")
    found = [("a.png", "a"), ("masks/b.png", "masks/b"), ("out/c.png", "out/c")]
    assert names(tmp_path) == names(tmp_path / "**" / "*.png") == found
    assert names(tmp_path / "out" / "masks" / "*.png") == [("a.png", "a")]  # they are meant


def test_a_glob_a_list_and_a_file(tmp_path):
    root = touch(tmp_path / "x [1]", "day/1.png", "day/2.png", "night/1.png")
    assert names(tmp_path / "x*" / "*" / "1.png") == [
        ("x [1]/day/1.png", "x [1]/day/1"),
        ("x [1]/night/1.png", "x [1]/night/1"),
    ]
    assert names(root / "day" / "2.png") == [("2.png", "2")]
    assert len(names(root)) == 3  # a folder, though its name looks like a glob
    listed = root / "list.txt"
    listed.write_text(f"# mine\nnight/1.png\n\n{root / 'day' / '2.png'}\nnight/../day/1.png\n")
    assert names(listed) == [
        ("night/1.png", "night/1"),
        ("day/2.png", "day/2"),
        ("day/1.png", "day/1"),
    ]


def test_results_of_a_list_stay_below_the_output_folder(tmp_path):
    inner = tmp_path / "a" / "b"
    touch(tmp_path, "a/b/x.png", "y.png")
    (inner / "list.txt").write_text("x.png\n../../y.png\n")
    assert names(inner / "list.txt") == [("a/b/x.png", "a/b/x"), ("y.png", "y")]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.jpg", "b.jpg"], ["a", "b"]),
        (["a.jpg", "a.png", "b.jpg"], ["a.jpg", "a.png", "b"]),
        (["x/a.jpg", "a.png"], ["x/a", "a"]),
        # The mask of a.jpg would be a.jpg.png, and so would that of a.jpg.png.
        (["a.jpg", "a.jpg.png", "a.png"], ["a.jpg", "a.jpg.png", "a.png"]),
        ([], []),
    ],
)
def test_names_lose_their_suffix_where_that_leaves_them_apart(paths, expected):
    assert unique_names(paths) == expected


def test_names_that_some_disks_take_for_one_are_told_apart():
    found = unique_names(["A.png", "a.png", "b.png"])
    assert found[2] == "b"
    assert len({name.casefold() for name in found}) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none", "none does not exist. Give a folder"),
        ("empty", "holds no images. Expected files ending in .png"),
        ("*.bmp", "No file matches"),
        ("nothing.txt", "names no file"),
        ("binary.txt", "cannot be read"),
        ("twice.txt", "twice. Remove one"),
        ("home.txt", "what is no path"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_what_gives_no_images_is_refused(tmp_path, given, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").write_text("# only this\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "twice.txt").write_text("a.png\n./a.png\n")
    (tmp_path / "home.txt").write_text("~nobody of that name/a.png\n")
    with pytest.raises(UserError, match=message) as error:
        find_sources(tmp_path / given)
    assert "\n" not in str(error.value)
