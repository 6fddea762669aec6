from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from kedro.io import DataCatalog, DatasetError, Version

from rdd_pipeline.datasets import MetricsDataset, NetworksDataset
from rdd_pipeline.networks import NetworkCheckpoint
from tests.datasets.conftest import make_checkpoint

FIRST, SECOND = "2026-01-01T00.00.00.000Z", "2026-01-02T00.00.00.000Z"


def _versioned(folder: Path, save: str) -> NetworksDataset:
    return NetworksDataset(filepath=(folder / "net").as_posix(), version=Version(None, save))


def _file(folder: Path, version: str) -> Path:
    return folder / "net" / version / "net" / "0.safetensors"


def test_gives_back_tensors_and_header(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    dataset = NetworksDataset(filepath=f"{tmp_path}/net")
    assert not dataset.exists()
    dataset.save({"0": checkpoint})
    loaded = dataset.load()["0"]
    assert dataset.exists()
    assert loaded.header == checkpoint.header
    assert loaded.digest() == checkpoint.digest()


@pytest.mark.parametrize("version", [None, Version(None, FIRST)])
def test_works_on_any_file_system(
    checkpoint: NetworkCheckpoint, version: Version | None, tmp_path: Path
) -> None:
    # tmp_path only as a name of its own: the memory file system is one for the whole process.
    dataset = NetworksDataset(filepath=f"memory://{tmp_path}/net", version=version)
    assert not dataset.exists()
    dataset.save({"0": checkpoint})
    assert dataset.exists()
    assert dataset.load()["0"].digest() == checkpoint.digest()
    assert dataset.preview()["data"][0] == ["network", "fcn_resnet18"]
    assert not list(tmp_path.iterdir())


def test_is_made_from_a_catalog_entry(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    catalog = DataCatalog.from_config(
        {
            "student_{method}": {
                "type": "rdd_pipeline.datasets.NetworksDataset",
                "filepath": f"{tmp_path}/{{method}}",
                "versioned": True,
                "metadata": {"mlflow": {"metrics": True}},
            }
        }
    )
    catalog.save("student_kd", {"0": checkpoint})
    assert catalog.load("student_kd")["0"].digest() == checkpoint.digest()
    assert catalog.get("student_kd").metadata == {"mlflow": {"metrics": True}}


def test_loads_the_newest_version_or_the_one_asked_for(tmp_path: Path) -> None:
    old, new = make_checkpoint(0), make_checkpoint(1)
    _versioned(tmp_path, FIRST).save({"0": old})
    _versioned(tmp_path, SECOND).save({"0": new})
    assert _versioned(tmp_path, "later").load()["0"].digest() == new.digest()
    pinned = NetworksDataset(filepath=f"{tmp_path}/net", version=Version(FIRST, SECOND))
    assert pinned.load()["0"].digest() == old.digest()


def test_equal_weights_are_no_new_version(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    _versioned(tmp_path, FIRST).save({"0": checkpoint})
    # Provenance does not decide what a network computes.
    again = _versioned(tmp_path, SECOND)
    again.save({"0": make_checkpoint(source="looked up")})
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == [FIRST, "latest"]
    assert again.resolve_load_version() == again.resolve_save_version() == FIRST
    _versioned(tmp_path, "later").save({"0": make_checkpoint(1)})
    assert again.load()["0"].digest() == checkpoint.digest()  # what it saved, not the newest


def test_fewer_seeds_are_a_new_version(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    _versioned(tmp_path, FIRST).save({"0": checkpoint, "1": make_checkpoint(1)})
    _versioned(tmp_path, SECOND).save({"0": checkpoint})
    assert list(_versioned(tmp_path, "later").load()) == ["0"]


def test_other_weights_become_a_file_of_their_own(tmp_path: Path) -> None:
    _versioned(tmp_path, FIRST).save({"0": make_checkpoint(0)})
    _versioned(tmp_path, SECOND).save({"0": make_checkpoint(1)})
    assert not _file(tmp_path, FIRST).samefile(_file(tmp_path, SECOND))


def test_a_damaged_old_version_does_not_stop_a_save(
    tmp_path: Path, checkpoint: NetworkCheckpoint
) -> None:
    _file(tmp_path, FIRST).parent.mkdir(parents=True)
    _file(tmp_path, FIRST).write_bytes(b"torn")
    dataset = _versioned(tmp_path, SECOND)
    dataset.save({"0": checkpoint})
    assert dataset.load()["0"].digest() == checkpoint.digest()


def test_where_links_are_impossible_a_copy_is_written(
    tmp_path: Path, checkpoint: NetworkCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    _versioned(tmp_path, FIRST).save({"0": checkpoint})
    _versioned(tmp_path, SECOND).save({"0": checkpoint, "1": make_checkpoint(1)})
    assert not _file(tmp_path, FIRST).samefile(_file(tmp_path, SECOND))
    assert _file(tmp_path, FIRST).read_bytes() == _file(tmp_path, SECOND).read_bytes()


def test_an_interrupted_save_leaves_no_version(
    tmp_path: Path, checkpoint: NetworkCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _versioned(tmp_path, FIRST).save({"0": checkpoint})
    assert not _versioned(tmp_path, SECOND).exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_version_is_never_overwritten(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    _versioned(tmp_path, FIRST).save({"0": checkpoint})
    with pytest.raises(DatasetError, match="must not exist if versioning is enabled"):
        _versioned(tmp_path, FIRST).save({"0": checkpoint})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net" / "0.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"\x00" * 50)
    with pytest.raises(DatasetError, match=r"0\.safetensors is not a readable"):
        NetworksDataset(filepath=path.parent.as_posix()).load()


def test_previews_the_header_without_reading_tensors(
    tmp_path: Path, checkpoint: NetworkCheckpoint
) -> None:
    dataset = NetworksDataset(filepath=f"{tmp_path}/net")
    dataset.save({"0": checkpoint})
    path = tmp_path / "net" / "0.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:header])
    table = dataset.preview()
    assert table["data"][:3] == [
        ["network", "fcn_resnet18"],
        ["data set", tmp_path.name],
        ["source", "a test"],
    ]
    assert ["values", "8 in 2 tensors"] in table["data"]
    assert ["classifier.weight", "2 x 3 x 1 x 1 F32"] in table["data"]
    assert "norm.num_batches_tracked" not in str(table)
    assert {len(row) for row in table["data"]} == {len(table["columns"])}
    # Kedro-Viz decides by the annotation how to show it.
    assert inspect.signature(dataset.preview).return_annotation == "TablePreview"


def test_the_preview_says_what_the_network_scored_if_the_scores_are_its_own(tmp_path: Path) -> None:
    trained = make_checkpoint()
    trained.header.provenance.update(seed="0", iteration="40")
    dataset = NetworksDataset(filepath=f"{tmp_path}/net")
    dataset.save({"0": trained})
    scores = MetricsDataset(filepath=f"{tmp_path}/scores", version=Version(None, FIRST))
    of_this = {"about": {"iteration": "40"}, "splits": {"val": {"miou": 0.5}}}
    scores.save({"0": of_this})
    assert ["mIoU val", "50.0 %"] in dataset.preview(scores=f"{tmp_path}/scores")["data"]
    scores = MetricsDataset(filepath=f"{tmp_path}/scores", version=Version(None, SECOND))
    scores.save({"0": of_this | {"about": {"iteration": "30"}}})
    assert "mIoU" not in str(dataset.preview(scores=f"{tmp_path}/scores"))
    assert "mIoU" not in str(dataset.preview(scores=f"{tmp_path}/none"))


def test_dtypes_survive(tmp_path: Path, checkpoint: NetworkCheckpoint) -> None:
    dataset = NetworksDataset(filepath=f"{tmp_path}/net")
    dataset.save({"0": checkpoint})
    assert dataset.load()["0"].tensors["norm.num_batches_tracked"].dtype == torch.int64


def test_every_seed_has_a_file_and_they_come_back_in_order(tmp_path: Path) -> None:
    seeds = {str(seed): make_checkpoint(seed) for seed in (10, 9, 2)}
    _versioned(tmp_path, FIRST).save(seeds)
    assert _file(tmp_path, FIRST).with_name("10.safetensors").is_file()
    loaded = _versioned(tmp_path, SECOND).load()
    assert list(loaded) == ["2", "9", "10"]
    assert {seed: one.digest() for seed, one in loaded.items()} == {
        seed: one.digest() for seed, one in seeds.items()
    }


def test_of_more_seeds_only_the_new_ones_are_written(tmp_path: Path) -> None:
    _versioned(tmp_path, FIRST).save({"0": make_checkpoint(0)})
    _versioned(tmp_path, SECOND).save({"0": make_checkpoint(0), "1": make_checkpoint(1)})
    assert _file(tmp_path, FIRST).samefile(_file(tmp_path, SECOND))
    assert list(_versioned(tmp_path, "later").load()) == ["0", "1"]


def test_no_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no seed"):
        _versioned(tmp_path, FIRST).save({})


def test_a_save_that_fails_at_the_second_seed_leaves_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = _versioned(tmp_path, FIRST)
    encode = dataset._encode

    def fail(data: NetworkCheckpoint) -> bytes:
        if data.header.provenance["source"] == "second":
            raise OSError("no")
        return encode(data)

    monkeypatch.setattr(dataset, "_encode", fail)
    with pytest.raises(DatasetError, match="no"):
        dataset.save({"0": make_checkpoint(0), "1": make_checkpoint(1, source="second")})
    assert not _versioned(tmp_path, SECOND).exists()


def test_a_run_reads_what_it_saved_though_a_later_run_was_faster(tmp_path: Path) -> None:
    mine = _versioned(tmp_path, FIRST)
    _versioned(tmp_path, SECOND).save({"0": make_checkpoint(1)})
    mine.save({"0": make_checkpoint(0)})
    assert mine.load()["0"].digest() == make_checkpoint(0).digest()
