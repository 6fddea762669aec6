from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.config import PredictParams
from rdd_pipeline.data.layouts.cityscapes import CITYSCAPES
from rdd_pipeline.errors import UserError
from rdd_pipeline.inference import folder
from rdd_pipeline.inference.folder import Encoding, check_sources, predict_files
from rdd_pipeline.inference.model import Model, load
from rdd_pipeline.inference.results import Results
from rdd_pipeline.inference.sources import Source, find_sources
from tests.inference.conftest import COLORS, LABELS, checkpoint
from tests.inference.test_frames import FIVE, fake_ffmpeg, pages_file


@pytest.fixture(scope="module")
def model(file) -> Model:
    return load(file, device="cpu")


def make(path: Path, size: tuple[int, int] = (40, 56), seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (5, 7, 3), np.uint8)
    picture = Image.fromarray(small).resize(size[::-1], Image.Resampling.BILINEAR)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return np.asarray(picture)


@pytest.fixture
def photos(tmp_path) -> Path:
    for number in range(5):
        size = (40, 56) if number % 2 else (33, 20)
        make(tmp_path / "photos" / f"{number}.png", size, number)
    return tmp_path / "photos"


def run(model: Model, images: Path, output: Path, **params):
    given = PredictParams(images=str(images), workers=2, **params)
    sources = check_sources(find_sources(images), given.format)
    return predict_files(model, sources, given, output)


def content(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in root.rglob("*.*")
        if path.parent.name in ("masks", "overlays")
    }


def test_masks_overlays_and_the_table_are_those_of_the_model(model, photos, tmp_path):
    outcome = run(model, photos, tmp_path / "out", threshold=0.6)
    assert (len(outcome.rows), outcome.predicted, outcome.problems) == (5, 5, [])
    table = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    for number, row in enumerate(table):
        expected = model.predict(photos / f"{number}.png")
        stored = Image.open(tmp_path / "out" / row["mask"])
        assert np.array_equal(np.asarray(stored), expected.mask)
        assert np.array_equal(np.asarray(stored.convert("RGB")), model.colored(expected.mask))
        over = Image.open(tmp_path / "out" / "overlays" / f"{number}.jpg")
        wanted = np.asarray(model.overlay(photos / f"{number}.png", expected.mask)).astype(int)
        assert np.abs(np.asarray(over).astype(int) - wanted).mean() < 6
        assert (int(row["height"]), int(row["width"])) == expected.mask.shape
        assert float(row["confidence"]) == pytest.approx(expected.confidence.mean(), abs=1e-5)
        below = (expected.confidence < 0.6).mean()
        assert float(row["below_threshold"]) == pytest.approx(below, abs=1e-5)
        for index, name in enumerate(LABELS):
            share = float(row[f"share_{name}"])
            assert share == pytest.approx((expected.mask == index).mean(), abs=1e-5)
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert classes["names"] == list(LABELS)
    assert classes["values"] == [0, 1, 2]


def test_images_of_equal_size_are_predicted_together(model, photos, tmp_path, monkeypatch):
    seen = []
    strips = Model.strips
    monkeypatch.setattr(
        Model, "strips", lambda self, x, **how: (seen.append(len(x)), strips(self, x, **how))[1]
    )
    run(model, photos, tmp_path / "out")
    assert sorted(seen) == [2, 3]
    seen.clear()
    run(model, photos, tmp_path / "small", batch_size=1)
    assert seen == [1] * 5
    seen.clear()
    monkeypatch.setattr(folder, "_BYTES_AHEAD", 1)
    run(model, photos, tmp_path / "tight", overlays=False)
    assert seen == [1] * 5
    assert {c for _, c in content(tmp_path / "tight").values()} == {
        c for name, (_, c) in content(tmp_path / "out").items() if name.startswith("masks")
    }


def test_windows_scales_and_flips_reach_the_network(model, photos, tmp_path):
    how = {"window": 16, "overlap": 0.5, "scales": (0.5, 1.0), "flip": True}
    run(model, photos, tmp_path / "out", **how)
    expected = model.predict(photos / "1.png", **how).mask
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/masks/1.png")), expected)
    assert not np.array_equal(expected, model(photos / "1.png"))


def test_the_size_of_training_is_the_networks_and_masks_have_the_images(file, photos, tmp_path):
    model = load(file, device="cpu")
    model.image_size = (20, 28)
    outcome = run(model, photos, tmp_path / "out")
    assert np.asarray(Image.open(tmp_path / "out/masks/1.png")).shape == (40, 56)
    assert outcome.rows[1]["height"] == 40


def test_finished_files_are_not_predicted_again(model, photos, tmp_path):
    out = tmp_path / "out"
    first = run(model, photos, out)
    before = content(out)
    again = run(model, photos, out)
    assert (again.predicted, again.rows) == (0, first.rows)
    assert content(out) == before
    # Other content, a lost file and a cut one are.
    make(photos / "0.png", seed=9)
    (out / "masks" / "1.png").unlink()
    (out / "overlays" / "2.jpg").write_bytes(b"")
    assert run(model, photos, out).predicted == 3
    after = content(out)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {f"masks/{n}.png" for n in range(3)} | {f"overlays/{n}.jpg" for n in range(3)}


@pytest.mark.parametrize(
    "change", [{"flip": True}, {"window": 16}, {"overlays": False}, {"threshold": 0.9}]
)
def test_other_settings_predict_again(model, photos, tmp_path, change):
    run(model, photos, tmp_path / "out")
    assert run(model, photos, tmp_path / "out", **change).predicted == 5
    assert run(model, photos, tmp_path / "out", batch_size=3, **change).predicted == 0


def test_other_weights_predict_again(model, photos, tmp_path):
    run(model, photos, tmp_path / "out")
    other = Model(checkpoint(seed=1), device="cpu")
    assert run(other, photos, tmp_path / "out").predicted == 5


def _predict(file: Path, photos: Path, out: Path) -> None:
    written = Results.record

    def slowly(self, *args) -> None:
        written(self, *args)
        time.sleep(0.3)

    Results.record = slowly  # type: ignore[method-assign]
    torch.set_num_threads(1)
    run(load(file, device="cpu"), photos, out, batch_size=1)


def test_a_killed_run_goes_on_where_it_was(file, model, photos, tmp_path):
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=_predict, args=(file, photos, out))
    process.start()
    manifest = out / "manifest.jsonl"
    for _ in range(600):
        if manifest.exists() and manifest.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = manifest.read_bytes().count(b"\n")
    manifest.open("ab").write(b'{"name": "torn')
    before = content(out)
    outcome = run(model, photos, out)
    assert 2 <= done < 5
    assert outcome.predicted == 5 - done
    assert len(outcome.rows) == 5
    after = content(out)
    kept = [name for name in before if before[name] == after[name]]
    assert len(kept) >= 2 * done
    assert not list(out.rglob("*.tmp"))


def test_unreadable_files_are_reported_at_the_end(model, photos, tmp_path, caplog):
    (photos / "cut.png").write_bytes((photos / "1.png").read_bytes()[:60])
    (photos / "text.jpg").write_text("no image")
    (photos / "away.png").symlink_to(tmp_path / "nowhere.png")
    with caplog.at_level(logging.WARNING):
        outcome = run(model, photos, tmp_path / "out")
    assert len(outcome.rows) == 5
    assert "3 of 8 files could not be read: " in caplog.text
    found = json.loads((tmp_path / "out" / "problems.json").read_text())
    assert [problem["image"] for problem in found] == ["away.png", "cut.png", "text.jpg"]
    assert "text.jpg cannot be decoded (not a PNG" in found[2]["problem"]
    assert "mask" not in found[2]["problem"]
    assert run(model, photos, tmp_path / "out").predicted == 0


def test_nothing_but_unreadable_files_is_an_error(model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("no image")
    with pytest.raises(UserError, match="1 of 1 files could not be read: "):
        run(model, tmp_path / "photos", tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "problems.json").read_text())) == 1


def test_images_above_the_limit_have_the_usual_message(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("rdd_pipeline.data.formats.MAX_PIXELS", 1500)
    outcome = run(model, photos, tmp_path / "out")
    assert [problem["image"] for problem in outcome.problems] == ["1.png", "3.png"]
    assert "56 x 40 pixels are 0 million, expected at most" in outcome.problems[0]["problem"]


def test_pages_and_frames_are_images_of_their_own(model, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    make(photos / "a.png")
    (photos / "a.gif").write_bytes(pages_file("GIF"))
    (photos / "b.tif").write_bytes(pages_file("TIFF"))
    (photos / "a.mp4").write_bytes(b"video")
    fake_ffmpeg(tmp_path, monkeypatch, FIVE)
    outcome = run(model, photos, tmp_path / "out", every=2)
    assert [row["image"] for row in outcome.rows] == [
        *("a.gif#1", "a.gif#3", "a.gif#5", "a.mp4#1", "a.mp4#3", "a.mp4#5"),
        *("a.png", "b.tif#1", "b.tif#3", "b.tif#5"),
    ]
    assert (tmp_path / "out" / "masks" / "b.tif" / "000003.png").exists()
    assert (tmp_path / "out" / "masks" / "a.mp4" / "000003.png").exists()
    assert run(model, photos, tmp_path / "out", every=2).predicted == 0
    fake_ffmpeg(tmp_path, monkeypatch, FIVE + "out.flush(); sys.exit('torn')")
    (photos / "a.mp4").write_bytes(b"other")
    outcome = run(model, photos, tmp_path / "out", every=2)
    assert (outcome.predicted, len(outcome.rows), len(outcome.problems)) == (3, 10, 1)


# ---- names, links and locks


def test_equal_names_get_masks_of_their_own(model, tmp_path):
    images = [
        make(tmp_path / "photos" / f"a.{kind}", seed=n) for n, kind in enumerate(("bmp", "png"))
    ]
    run(model, tmp_path / "photos", tmp_path / "out")
    for image, kind in zip(images, ("bmp", "png"), strict=True):
        stored = np.asarray(Image.open(tmp_path / "out" / "masks" / f"a.{kind}.png"))
        assert np.array_equal(stored, model(image))


def test_a_link_does_not_lead_out_of_the_output_folder(model, photos, tmp_path):
    make(photos / "sub" / "x.png")
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    elsewhere.mkdir()
    (out / "masks" / "sub").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"is a link to .*elsewhere, outside of"):
        run(model, photos, out)
    assert not list(elsewhere.iterdir())
    # A link in the place of a file is replaced, not followed.
    (out / "masks" / "sub").unlink()
    (tmp_path / "precious").write_text("mine")
    (out / "masks" / "1.png").unlink(missing_ok=True)
    (out / "masks" / "1.png").symlink_to(tmp_path / "precious")
    run(model, photos, out)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", "manifest.jsonl", "masks"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "circle"])
def test_what_stands_in_the_place_of_a_result_is_named(model, photos, tmp_path, name, kind):
    place = tmp_path / "out" / name
    place.parent.mkdir()
    if kind == "folder" and name != "masks":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(place.name)
    with pytest.raises(UserError, match=name):
        run(model, photos, tmp_path / "out")


@pytest.mark.parametrize("letter", ["x", "山"])
def test_the_longest_names_of_files_have_masks(model, tmp_path, letter):
    name = letter * (251 // len(letter.encode()))
    make(tmp_path / "photos" / f"{name}.png")
    assert run(model, tmp_path / "photos", tmp_path / "out").predicted == 1
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == [f"{name}.png"]


def test_results_in_the_folder_of_the_images_are_no_images(model, photos):
    params = PredictParams(images=str(photos))
    for expected in (5, 0):
        sources = find_sources(photos, [photos / "masks", photos / "overlays"])
        assert len(sources) == 5
        assert predict_files(model, sources, params, photos).predicted == expected


def test_two_commands_do_not_write_to_one_folder(model, photos, tmp_path):
    with Results(tmp_path / "out", "x"), pytest.raises(UserError, match="Another command"):
        run(model, photos, tmp_path / "out")
    assert run(model, photos, tmp_path / "out").predicted == 5


def test_a_manifest_with_anything_in_it_is_no_trouble(model, photos, tmp_path):
    out = tmp_path / "out"
    run(model, photos, out)
    lines = (out / "manifest.jsonl").read_text().splitlines()
    bad = [
        "",
        "7",
        "[]",
        "{}",
        "\xff",
        lines[0][:-9],
        lines[1].replace('"row": {', '"row": {"x": 1, '),
    ]
    (out / "manifest.jsonl").write_text("\n".join([*lines[1:], *bad, "[" * 9999]), "latin-1")
    assert run(model, photos, out).predicted == 2


def test_control_characters_of_names_reach_no_table(model, tmp_path):
    make(tmp_path / "photos" / "a\n\x1b[31m.png")
    row = run(model, tmp_path / "photos", tmp_path / "out").rows[0]
    assert row["image"] == "a\\n\\x1b[31m.png"


# ---- values of masks


def test_raw_masks_hold_the_values_of_the_data_set(model, photos, tmp_path):
    values = Model(checkpoint(mask_values=(7, 8, 200)), device="cpu")
    run(values, photos, tmp_path / "out", format="raw")
    stored = np.asarray(Image.open(tmp_path / "out/masks/1.png"))
    assert np.array_equal(stored, np.array([7, 8, 200], np.uint8)[model(photos / "1.png")])
    colored = Model(checkpoint(mask_values=COLORS), device="cpu")
    run(colored, photos, tmp_path / "out", format="raw")
    stored = np.asarray(Image.open(tmp_path / "out/masks/1.png"))
    assert np.array_equal(stored, np.array(COLORS, np.uint8)[model(photos / "1.png")])
    with pytest.raises(UserError, match="of an earlier version"):
        run(model, photos, tmp_path / "out", format="raw")


def test_cityscapes_gets_label_ids_under_the_servers_names(model, photos, tmp_path):
    header = model.header.model_copy(update={"label_names": CITYSCAPES.names, "colors": None})
    encoding = Encoding.of(header, "cityscapes")
    ids = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
    assert encoding.values == ids
    assert Encoding.of(header, "raw").values == encoding.values  # though its file does not say
    with pytest.raises(UserError, match=r"classes are road, car, sky, \.\.\., not Cityscapes' 19"):
        Encoding.of(model.header, "cityscapes")
    path = Path("x")
    source = Source(
        path, "berlin_000000_000019_leftImg8bit.png", "b/berlin_000000_000019_leftImg8bit"
    )
    assert check_sources([source], "cityscapes") == [
        Source(path, source.shown, "berlin_000000_000019")
    ]
    with pytest.raises(UserError, match="5 of 5 files are not named CITY_SEQUENCE_FRAME"):
        check_sources(find_sources(photos), "cityscapes")
    with pytest.raises(UserError, match="are the same image of Cityscapes"):
        check_sources([source, source], "cityscapes")
