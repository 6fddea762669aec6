from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from kedro.io import DataCatalog, DatasetError, Version

from rdd_pipeline.datasets import NetworkDataset
from rdd_pipeline.networks import NetworkCheckpoint
from tests.datasets.conftest import make_checkpoint

FIRST, SECOND = "2026-01-01T00.00.00.000Z", "2026-01-02T00.00.00.000Z"


def _versioned(folder: Path, save: str) -> NetworkDataset:
    return NetworkDataset(
        filepath=(folder / "net.safetensors").as_posix(), version=Version(None, save)
    )


def _file(folder: Path, version: str) -> Path:
    return folder / "net.safetensors" / version / "net.safetensors"


def test_gives_back_tensors_and_header(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    dataset = NetworkDataset(filepath=f"{tmp_path}/net.safetensors")
    assert not dataset.exists()
    dataset.save(checkpoint)
    loaded = dataset.load()
    assert dataset.exists()
    assert loaded.header == checkpoint.header
    assert loaded.digest() == checkpoint.digest()


@pytest.mark.parametrize("version", [None, Version(None, FIRST)])
def test_works_on_any_file_system(
    checkpoint: NetworkCheckpoint, version: Version | None, tmp_path: Path
) -> None:
    # tmp_path only as a name of its own: the memory file system is one for the whole process.
    dataset = NetworkDataset(filepath=f"memory://{tmp_path}/net.safetensors", version=version)
    assert not dataset.exists()
    dataset.save(checkpoint)
    assert dataset.exists()
    assert dataset.load().digest() == checkpoint.digest()
    assert dataset.preview()["data"][0][1] == "3 tensors"
    assert not list(tmp_path.iterdir())


def test_is_made_from_a_catalog_entry(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    catalog = DataCatalog.from_config(
        {
            "student_{method}": {
                "type": "rdd_pipeline.datasets.NetworkDataset",
                "filepath": f"{tmp_path}/{{method}}.safetensors",
                "versioned": True,
                "metadata": {"mlflow": {"metrics": True}},
            }
        }
    )
    catalog.save("student_kd", checkpoint)
    assert catalog.load("student_kd").digest() == checkpoint.digest()
    assert catalog.get("student_kd").metadata == {"mlflow": {"metrics": True}}


def test_loads_the_newest_version_or_the_one_asked_for(tmp_path: Path) -> None:
    old, new = make_checkpoint(0), make_checkpoint(1)
    _versioned(tmp_path, FIRST).save(old)
    _versioned(tmp_path, SECOND).save(new)
    assert _versioned(tmp_path, "later").load().digest() == new.digest()
    pinned = NetworkDataset(filepath=f"{tmp_path}/net.safetensors", version=Version(FIRST, SECOND))
    assert pinned.load().digest() == old.digest()


def test_equal_weights_become_a_hard_link(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    _versioned(tmp_path, FIRST).save(checkpoint)
    # Provenance does not decide what a network computes.
    _versioned(tmp_path, SECOND).save(make_checkpoint(source="looked up"))
    assert _file(tmp_path, FIRST).samefile(_file(tmp_path, SECOND))


def test_other_weights_become_a_file_of_their_own(tmp_path: Path) -> None:
    _versioned(tmp_path, FIRST).save(make_checkpoint(0))
    _versioned(tmp_path, SECOND).save(make_checkpoint(1))
    assert not _file(tmp_path, FIRST).samefile(_file(tmp_path, SECOND))


def test_a_damaged_old_version_does_not_stop_a_save(
    tmp_path: Path, checkpoint: NetworkCheckpoint
) -> None:
    _file(tmp_path, FIRST).parent.mkdir(parents=True)
    _file(tmp_path, FIRST).write_bytes(b"torn")
    dataset = _versioned(tmp_path, SECOND)
    dataset.save(checkpoint)
    assert dataset.load().digest() == checkpoint.digest()


def test_where_links_are_impossible_a_copy_is_written(
    tmp_path: Path, checkpoint: NetworkCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    _versioned(tmp_path, FIRST).save(checkpoint)
    _versioned(tmp_path, SECOND).save(checkpoint)
    assert not _file(tmp_path, FIRST).samefile(_file(tmp_path, SECOND))
    assert _file(tmp_path, FIRST).read_bytes() == _file(tmp_path, SECOND).read_bytes()


def test_an_interrupted_save_leaves_no_version(
    tmp_path: Path, checkpoint: NetworkCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _versioned(tmp_path, FIRST).save(checkpoint)
    assert not _versioned(tmp_path, SECOND).exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_version_is_never_overwritten(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    _versioned(tmp_path, FIRST).save(checkpoint)
    with pytest.raises(DatasetError, match="must not exist if versioning is enabled"):
        _versioned(tmp_path, FIRST).save(checkpoint)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"\x00" * 50)
    with pytest.raises(DatasetError, match=r"net\.safetensors is not a readable"):
        NetworkDataset(filepath=path.as_posix()).load()


def test_previews_the_header_without_reading_tensors(
    tmp_path: Path, checkpoint: NetworkCheckpoint
) -> None:
    dataset = NetworkDataset(filepath=f"{tmp_path}/net.safetensors")
    dataset.save(checkpoint)
    path = tmp_path / "net.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:header])
    table = dataset.preview()
    assert table["data"][0] == ["(all)", "3 tensors", "", 9]
    assert ["classifier.weight", "2 x 3 x 1 x 1", "F32", 6] in table["data"]
    assert {len(row) for row in table["data"]} == {len(table["columns"])}
    # Kedro-Viz decides by the annotation how to show it.
    assert inspect.signature(dataset.preview).return_annotation == "TablePreview"


def test_dtypes_survive(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    dataset = NetworkDataset(filepath=f"{tmp_path}/net.safetensors")
    dataset.save(checkpoint)
    assert dataset.load().tensors["norm.num_batches_tracked"].dtype == torch.int64
