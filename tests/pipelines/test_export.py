"""Which network is exported, and what is refused before anything is."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdd_pipeline.config import ExportParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import NetworkCheckpoint, save_checkpoint
from rdd_pipeline.pipelines.export.nodes import best_by_val, choose_network, export_network
from tests.pipelines.examples import CPU, STUDENT, checkpoint

VERSION = "2026-01-01T00.00.00.000Z"


def result(method: str, seed: str, miou: float | None, version: str = "a") -> dict:
    splits = {} if miou is None else {"val": {"miou": miou}}
    return {"about": {"method": method, "seed": seed}, "splits": splits, "version": version}


@pytest.fixture
def models(tmp_path) -> Path:
    """A student of two seeds, and a teacher."""
    folder = tmp_path / "models"
    for entry, seed in (("student_tse", 0), ("student_tse", 1), ("student_kd", 0), ("teacher", 0)):
        path = folder / entry / VERSION / entry / f"{seed}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(checkpoint(STUDENT, seed + 10 * (entry == "student_kd")), path)
    return folder


def chosen(images: Images, models: Path, *metrics, **params) -> tuple[str, NetworkCheckpoint]:
    ((name, network),) = choose_network(
        images, models, list(metrics), ExportParams(**params)
    ).items()
    return name, network


def test_the_first_seed_of_rdd_is_exported_unless_another_is_named(ingested, models):
    name, network = chosen(ingested, models)
    assert name == "tse_0"
    assert network.digest() == checkpoint(STUDENT, 0).digest()
    name, network = chosen(ingested, models, seed=1)
    assert name == "tse_1"
    assert network.digest() == checkpoint(STUDENT, 1).digest()
    assert chosen(ingested, models, method="teacher")[0] == "teacher_0"


def test_the_best_student_is_the_one_that_val_prefers(ingested, models):
    metrics = [
        result("teacher", "0", 0.9), result("tse", "0", 0.7, "old"), result("tse", "0", 0.4),
        result("tse", "1", 0.5), result("kd", "0", 0.6), result("cwd", "0", None),
    ]  # fmt: skip
    assert best_by_val(metrics) == ("kd", 0)
    assert best_by_val(metrics, seed=1) == ("tse", 1)
    assert chosen(ingested, models, *metrics, method="best")[0] == "kd_0"
    with pytest.raises(UserError, match="No student was evaluated on val"):
        best_by_val(metrics[:1])


def test_a_file_is_exported_by_its_name(ingested, models, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_checkpoint(checkpoint(STUDENT, 3), path)
    name, network = chosen(ingested, models, weights=path)
    assert (name, network.digest()) == ("mine", checkpoint(STUDENT, 3).digest())


def test_a_student_that_is_not_there_is_answered_with_those_that_are(ingested, models):
    with pytest.raises(UserError, match=r"no student_cwd in .*\(there is student_kd, student_tse"):
        chosen(ingested, models, method="cwd")
    with pytest.raises(UserError, match="holds networks of the seeds 0, 1, none of 7"):
        chosen(ingested, models, seed=7)


def test_a_network_of_other_classes_is_refused(ingested, models, tmp_path):
    other = NetworkCheckpoint(
        checkpoint(STUDENT).tensors,
        checkpoint(STUDENT).header.model_copy(
            update={"label_names": tuple(f"class {n}" for n in range(11))}
        ),
    )
    save_checkpoint(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"has the classes class 0, .* the data set Sky"):
        chosen(ingested, models, weights=tmp_path / "other.safetensors")


def test_a_split_without_images_is_refused_before_anything_is_exported(ingested, tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(UserError, match=r"no split 'trial' \(it has test, train, val\)"):
        export_network(
            {"a": checkpoint(STUDENT)}, ingested, tmp_path, ExportParams(check_split="trial"), CPU
        )
    assert list(tmp_path.glob("*.onnx")) == []
