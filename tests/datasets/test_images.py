from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rdd_pipeline.config import DataParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.datasets import ImagesDataset
from rdd_pipeline.errors import UserError

SAMPLES = (
    Sample("train", "01", "train/01.png", "trainannot/01.png", 4, 6, "a", "b"),
    Sample("val", "1", "val/1.png", "valannot/1.png", 4, 6, "c", "d", 12),
)
IMAGES = Images(Path("/data"), SAMPLES, CAMVID, (2, 3), Path("/packs"))


def session(folder: Path, **data: object) -> ImagesDataset:
    """The entry as a session with these parameters has it."""
    entry = ImagesDataset(filepath=str(folder))
    entry.expect(DataParams(layout="camvid", **data))  # type: ignore[arg-type]
    return entry


@pytest.mark.parametrize("images", [IMAGES, replace(IMAGES, image_size=None, packs=None)])
def test_what_is_saved_is_loaded(tmp_path: Path, images: Images):
    entry = session(tmp_path)
    assert not entry.exists()
    entry.save(images)
    assert entry.exists()
    assert entry.load() == images
    assert session(tmp_path).load() == images


def test_a_session_loads_what_it_has_saved_whatever_others_save(tmp_path: Path):
    one, other = session(tmp_path), session(tmp_path)
    one.save(IMAGES)
    other.save(replace(IMAGES, samples=SAMPLES[:1]))
    assert one.load() == IMAGES
    assert other.load().samples == SAMPLES[:1]


def test_a_session_that_saved_nothing_gets_the_images_of_its_parameters(tmp_path: Path):
    small = replace(IMAGES, image_size=(1, 2))
    session(tmp_path, image_size=(1, 2)).save(small)
    session(tmp_path, image_size=(2, 3)).save(IMAGES)
    assert session(tmp_path, image_size=(1, 2)).load() == small
    assert session(tmp_path, image_size=(1, 2), workers=3, cache=False).load() == small
    assert ImagesDataset(filepath=str(tmp_path)).load() in (small, IMAGES)  # a notebook


def test_images_of_other_parameters_are_refused_in_one_line(tmp_path: Path):
    session(tmp_path, val_fraction=0.2).save(IMAGES)
    with pytest.raises(UserError, match=r"\(data.val_fraction is 0.3, was 0.2\). Run the data_ing"):
        session(tmp_path, val_fraction=0.3).find()


def test_nothing_ingested_is_said_with_what_to_do(tmp_path: Path):
    with pytest.raises(UserError, match=r"No images have been ingested yet .* data_ingestion"):
        session(tmp_path).find()


@pytest.mark.parametrize("damage", ["change", "cut", "remove"])
def test_a_file_that_was_changed_is_not_believed(tmp_path: Path, damage: str):
    entry = session(tmp_path)
    entry.save(IMAGES)
    (path,) = tmp_path.glob("images-*.json")
    text = path.read_text()
    if damage == "remove":
        path.unlink()
    else:
        path.write_text(text.replace("val/1", "val/2") if damage == "change" else text[:-9])
    with pytest.raises(UserError, match=r"is missing or damaged\. Run the data_ingestion"):
        ImagesDataset.load.__wrapped__(entry)  # type: ignore[attr-defined]


def test_a_damaged_file_is_written_again(tmp_path: Path):
    session(tmp_path).save(IMAGES)
    (path,) = tmp_path.glob("images-*.json")
    path.write_text("{")
    entry = session(tmp_path)
    entry.save(IMAGES)
    assert entry.load() == IMAGES


def test_the_digest_is_of_what_can_be_learned():
    same = replace(IMAGES, root=Path("/elsewhere"), packs=None, samples=SAMPLES[::-1])
    painted = replace(IMAGES, labels=CAMVID.model_copy(update={"name": "other"}))
    assert same.digest == painted.digest == IMAGES.digest
    for other in (
        replace(IMAGES, image_size=None),
        IMAGES.split("train"),
        replace(IMAGES, labels=CAMVID.model_copy(update={"names": CAMVID.names[::-1]})),
    ):
        assert other.digest != IMAGES.digest


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"[" * 200_000, b'{"digest": "../../x", "data": {}}', b'{"digest": 1}'],
)
def test_a_damaged_pointer_is_not_believed_and_ingestion_mends_it(tmp_path: Path, content: bytes):
    session(tmp_path).save(IMAGES)
    (pointer,) = tmp_path.glob("data-*.json")
    pointer.write_bytes(content)
    with pytest.raises(UserError, match="Run the data_ingestion pipeline"):
        session(tmp_path).find()
    session(tmp_path, val_fraction=0.5).save(IMAGES)
    with pytest.raises(UserError, match=r"data.val_fraction is .*Run the data_ingestion pipeline"):
        session(tmp_path).find()
    session(tmp_path).save(IMAGES)
    assert session(tmp_path).load() == IMAGES


def test_an_optional_entry_gives_nothing_where_nothing_is(tmp_path: Path):
    entry = ImagesDataset(filepath=str(tmp_path), optional=True)
    entry.expect(DataParams(layout="camvid"))
    assert entry.load() is None
    session(tmp_path).save(IMAGES)
    assert entry.load() == IMAGES
    entry.expect(DataParams(layout="camvid", val_fraction=0.5))
    assert entry.load() is None
