from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rdd_pipeline.config import SceneParams
from rdd_pipeline.data.index import build_index
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.scenes import write as scenes
from rdd_pipeline.scenes.write import MARKER, SPLITS, render_scene, write_scenes
from tests.data.files import noise, save

SMALL = SceneParams(train=3, val=1, test=2, height=48, width=64)


def contents(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The scenes that are really rendered, as they are."""
    calls: list[tuple[str, int]] = []

    def spy(seed: int, split: str, number: int, *rest: float) -> scenes.Scene:
        calls.append((split, number))
        return render_scene(seed, split, number, *rest)

    monkeypatch.setattr(scenes, "render_scene", spy)
    return calls


def test_scenes_are_a_valid_data_set_in_camvids_layout(tmp_path: Path):
    assert write_scenes(tmp_path, SMALL) == 6
    index = build_index(tmp_path, get_layout("scenes"))
    assert [s.split for s in index.samples] == ["train"] * 3 + ["val"] + ["test"] * 2
    assert {(s.height, s.width) for s in index.samples} == {(48, 64)}
    assert index.warnings == ()


def test_the_same_parameters_give_the_same_bytes(tmp_path: Path):
    write_scenes(tmp_path / "a", SMALL)
    write_scenes(tmp_path / "b", SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_complete_work_is_not_repeated(tmp_path: Path, rendered: list[tuple[str, int]]):
    write_scenes(tmp_path, SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    rendered.clear()
    assert write_scenes(tmp_path, SMALL) == 0
    assert rendered == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_more_scenes_keep_those_there_are(tmp_path: Path, rendered: list[tuple[str, int]]):
    write_scenes(tmp_path, SMALL)
    few = contents(tmp_path)
    rendered.clear()
    assert write_scenes(tmp_path, SMALL.model_copy(update={"train": 5})) == 2
    assert rendered == [("train", 3), ("train", 4)]
    many = contents(tmp_path)
    assert all(many[name] == data for name, data in few.items() if name != MARKER)


def test_fewer_scenes_remove_the_rest(tmp_path: Path):
    write_scenes(tmp_path / "a", SMALL)
    fewer = SMALL.model_copy(update={"train": 1})
    assert write_scenes(tmp_path / "a", fewer) == 0
    write_scenes(tmp_path / "b", fewer)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_seed_or_size_is_another_set(tmp_path: Path):
    write_scenes(tmp_path, SMALL)
    first = contents(tmp_path)
    assert write_scenes(tmp_path, SMALL.model_copy(update={"seed": 1})) == 6
    second = contents(tmp_path)
    assert all(first[name] != second[name] for name in first)
    assert write_scenes(tmp_path, SMALL.model_copy(update={"width": 80})) == 6


def test_damaged_and_missing_scenes_are_made_again(tmp_path: Path, rendered: list[tuple[str, int]]):
    write_scenes(tmp_path, SMALL)
    before = contents(tmp_path)
    rendered.clear()
    path = tmp_path / "train" / "train_00001.png"
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "testannot" / "test_00000.png").unlink()
    assert write_scenes(tmp_path, SMALL) == 2
    assert rendered == [("train", 1), ("test", 0)]
    assert contents(tmp_path) == before


def test_interrupted_work_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_scenes(tmp_path / "whole", SMALL)
    with monkeypatch.context() as patch:

        def stop(*arguments: object) -> scenes.Scene:
            if arguments[1] == "val":
                raise KeyboardInterrupt
            return render_scene(*arguments)  # type: ignore[arg-type]

        patch.setattr(scenes, "render_scene", stop)
        with pytest.raises(KeyboardInterrupt):
            write_scenes(tmp_path / "part", SMALL)
    (tmp_path / "part" / "train" / "train_00000.png.abc.tmp").write_bytes(b"half")
    write_scenes(tmp_path / "part", SMALL)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"version": 1}'])
def test_a_damaged_marker_means_everything_anew(tmp_path: Path, text: str):
    write_scenes(tmp_path, SMALL)
    before = contents(tmp_path)
    (tmp_path / MARKER).write_text(text)
    assert write_scenes(tmp_path, SMALL) == 6
    assert contents(tmp_path) == before


def test_the_marker_holds_parameters_and_digests(tmp_path: Path):
    write_scenes(tmp_path, SMALL)
    marker = json.loads((tmp_path / MARKER).read_text())
    assert marker["counts"] == {"train": 3, "val": 1, "test": 2}
    assert marker["size"] == [48, 64]
    assert len(marker["files"]) == 12


def test_someones_own_images_are_not_overwritten(tmp_path: Path):
    for name in ("0001TP_006690.png", "train_00001.png"):
        root = tmp_path / name
        save(root / "train" / name, noise(0, 4, 4, 3))
        with pytest.raises(DataProblem, match=f"{name} is not a generated scene"):
            write_scenes(root, SMALL)
        assert list(contents(root)) == [f"train/{name}"]


def test_someones_own_image_among_the_scenes_is_not_removed(tmp_path: Path):
    write_scenes(tmp_path, SMALL)
    save(tmp_path / "val" / "val_of_mine.png", noise(0, 4, 4, 3))
    with pytest.raises(DataProblem, match=r"val_of_mine\.png is not a generated scene"):
        write_scenes(tmp_path, SMALL)
    assert (tmp_path / "val" / "val_of_mine.png").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataProblem, match=r"cannot be written to .*file.*data\.path"):
        write_scenes(tmp_path / "file", SMALL)


def test_a_scene_is_a_function_of_seed_split_and_number():
    one = render_scene(4, "val", 7, 48, 64)
    for _ in range(2):
        again = render_scene(4, "val", 7, 48, 64)
        assert np.array_equal(one.image, again.image)
        assert np.array_equal(one.mask, again.mask)
    others = [render_scene(*key, 48, 64) for key in ((4, "val", 8), (4, "test", 7), (5, "val", 7))]
    assert all((other.mask != one.mask).mean() > 0.05 for other in others)


@pytest.mark.parametrize("size", [(48, 64), (96, 128), (75, 200), (180, 240)])
def test_scenes_have_the_size_and_the_values_asked_for(size: tuple[int, int]):
    scene = render_scene(0, "train", 3, *size)
    assert scene.image.shape == (*size, 3)
    assert scene.mask.shape == size
    assert scene.image.dtype == scene.mask.dtype == np.uint8
    assert scene.mask.max() <= 11


@pytest.fixture(scope="module")
def thirty() -> list[scenes.Scene]:
    return [render_scene(0, "train", number, 96, 128) for number in range(30)]


def test_all_classes_occur_and_few_pixels_are_unlabeled(thirty: list[scenes.Scene]):
    masks = np.stack([scene.mask for scene in thirty])
    share = np.bincount(masks.ravel(), minlength=12) / masks.size
    present = np.array([[np.any(mask == value) for value in range(12)] for mask in masks]).mean(0)
    assert share.min() > 0.002
    assert 0.01 < share[11] < 0.06
    assert present.min() > 0.2


def test_color_alone_does_not_tell_the_confusable_classes_apart(thirty: list[scenes.Scene]):
    pixels = np.concatenate([scene.image.reshape(-1, 3) for scene in thirty]).astype(float)
    labels = np.concatenate([scene.mask.ravel() for scene in thirty])
    for one, other in ((3, 4), (1, 7), (9, 10)):
        first, second = pixels[labels == one], pixels[labels == other]
        spread = (first.std(0) + second.std(0)) / 2
        assert np.all(np.abs(first.mean(0) - second.mean(0)) < spread), (one, other)


def test_every_split_has_a_stream_of_its_own():
    assert len({render_scene(0, split, 0, 48, 64).image.tobytes() for split in SPLITS}) == 3


# --- label noise ----------------------------------------------------------------------------------


def _pair(number: int, noise: float) -> tuple[scenes.Scene, scenes.Scene]:
    return (
        render_scene(0, "train", number, 96, 128),
        render_scene(0, "train", number, 96, 128, noise),
    )


@pytest.mark.parametrize("noise", [0.05, 0.16, 0.3])
def test_the_share_of_wrong_labels_is_the_one_asked_for(noise: float):
    shares = []
    for number in range(8):
        right, wrong = _pair(number, noise)
        assert (right.image == wrong.image).all()
        known = (right.mask != 11) & (wrong.mask != 11)
        shares.append((right.mask != wrong.mask)[known].mean())
        assert set(np.unique(wrong.mask)) <= set(range(12))
    assert np.mean(shares) == pytest.approx(noise, rel=0.1)
    assert min(shares) > 0.6 * noise


def test_wrong_labels_come_as_objects_and_outlines_not_as_single_pixels():
    right, wrong = _pair(1, 0.16)
    bad = right.mask != wrong.mask
    neighbors = np.zeros(bad.shape, int)
    for axis in (0, 1):
        for step in (-1, 1):
            neighbors += np.roll(bad, step, axis)
    assert (neighbors[bad] == 0).mean() < 0.02


def test_label_noise_is_in_the_training_labels_alone(tmp_path: Path):
    write_scenes(tmp_path / "right", SMALL)
    noisy = SMALL.model_copy(update={"label_noise": 0.2})
    write_scenes(tmp_path / "noisy", noisy)
    right, wrong = contents(tmp_path / "right"), contents(tmp_path / "noisy")
    differ = {name for name in right if right[name] != wrong[name]} - {MARKER}
    assert differ == {f"trainannot/train_{number:05d}.png" for number in range(3)}


def test_other_label_noise_renders_anew_and_back_again(tmp_path: Path):
    write_scenes(tmp_path, SMALL)
    before = contents(tmp_path)
    assert write_scenes(tmp_path, SMALL.model_copy(update={"label_noise": 0.2})) == 6
    assert write_scenes(tmp_path, SMALL) == 6
    assert contents(tmp_path) == before


def test_a_marker_from_before_there_was_noise_still_counts(tmp_path: Path):
    write_scenes(tmp_path, SMALL)
    marker = json.loads((tmp_path / MARKER).read_text())
    del marker["label_noise"]
    (tmp_path / MARKER).write_text(json.dumps(marker))
    assert write_scenes(tmp_path, SMALL) == 0
