"""The same images by every method: of the networks that were scored, where all is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from rdd_pipeline.config import EvaluationParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.evaluation.predict import evaluation_mode, predict_labels
from rdd_pipeline.evaluation.scoring import score_splits
from rdd_pipeline.networks import NetworkCheckpoint, save_checkpoint
from rdd_pipeline.pipelines.evaluation.examples import show_examples
from rdd_pipeline.pipelines.method_nodes import data_digest, store_of
from rdd_pipeline.reporting.comparison import compare, compare_classes
from rdd_pipeline.reporting.gallery import Gallery
from rdd_pipeline.reporting.report import render_report
from rdd_pipeline.reporting.thumbnails import class_map, mistakes
from tests.pipelines.examples import CPU, STUDENT, change, checkpoint

HOW = EvaluationParams(splits=("train",), figure_images=2)


class Trained:
    """Networks of three methods as runs leave them, and their metrics."""

    def __init__(self, images: Images, folder: Path) -> None:
        self.images, self.models, self.work = images, folder / "models", folder / "work"
        self.networks = {
            "teacher": checkpoint(),
            **{m: checkpoint(STUDENT, seed=n) for n, m in enumerate(("tse", "baseline", "kd"))},
        }
        self.metrics = [self._left(method, n) for method, n in self.networks.items()]

    def _left(self, method: str, network: NetworkCheckpoint) -> dict[str, Any]:
        entry = "teacher" if method == "teacher" else f"student_{method}"
        save_checkpoint(network, self.models / entry / "2026-01-01" / entry / "0.safetensors")
        about = {
            "method": method,
            "title": f"<{method}>",
            "network": network.header.network.name,
            "seed": "0",
            "fingerprint": store_of(network, self.work).fingerprint,
            "protocol_digest": "" if method == "teacher" else "protocol",
            "data_digest": data_digest(self.images, HOW),
        }
        splits = score_splits(network, self.images, HOW, device=torch.device("cpu"))
        return {"about": about, "splits": splits, "cost": {}}

    def show(self, images: Images | None, how: EvaluationParams = HOW) -> dict[str, Gallery]:
        table = pd.DataFrame(compare(self.metrics))
        return show_examples(self.metrics, table, images, self.models, self.work, how, CPU)


@pytest.fixture
def trained(ingested, tmp_path) -> Trained:
    return Trained(ingested, tmp_path)


def test_every_method_is_shown_with_what_its_network_predicts(trained):
    (gallery,) = trained.show(trained.images).values()
    assert [len(shown.cards) for shown in gallery.shown] == [4, 4]
    assert gallery.rule.startswith("train images at evenly spaced quantiles of mIoU(<tse>) - ")
    assert gallery.lacking == []
    samples = {sample.name: sample for sample in trained.images.split("train").samples}
    network = trained.networks["kd"]
    for shown in gallery.shown:
        image, label = trained.images.read(samples[shown.name])
        model = network.build()
        with evaluation_mode(model):
            (expected,) = predict_labels(
                model, network.header.preprocessing, image[None], sizes=[tuple(label.shape)],
                **HOW.prediction(),
            )  # fmt: skip
        (card,) = (card for card in shown.cards if card.title == "<kd>")
        assert card.prediction == class_map(expected, trained.images.labels)
        assert card.mistakes == mistakes(expected, label, 255)
        wrong = 100 * ((expected != label) & (label != 255)).sum() / (label != 255).sum()
        assert card.text.endswith(f", {wrong:.1f} % wrong")


def test_the_page_shows_them_and_escapes_names(trained):
    page = render_report(
        compare(trained.metrics),
        compare_classes(trained.metrics),
        results=trained.metrics,
        jobs={},
        pictures=(),
        galleries=trained.show(trained.images),
    )
    assert page.count('alt="prediction of &lt;kd&gt;"') == page.count("its wrong pixels") // 4 == 2
    assert "<kd>" not in page


def test_what_was_predicted_is_looked_up_and_what_is_gone_is_named(trained):
    before = trained.show(trained.images)
    for file in trained.models.rglob("*.safetensors"):
        file.unlink()
    assert trained.show(trained.images) == before
    (gallery,) = trained.show(trained.images, change(HOW, figure_images=1)).values()
    assert sorted(gallery.lacking) == ["<baseline>", "<kd>", "<teacher>", "<tse>"]


def test_a_network_that_was_trained_anew_does_not_stand_for_the_one_that_was_scored(trained):
    file = trained.models / "student_kd/2026-02-02/student_kd/0.safetensors"
    save_checkpoint(checkpoint(STUDENT, seed=9), file)
    (gallery,) = trained.show(trained.images).values()
    assert gallery.lacking == []
    (trained.models / "student_kd/2026-01-01/student_kd/0.safetensors").unlink()
    (gallery,) = trained.show(trained.images, change(HOW, figure_images=1)).values()
    assert gallery.lacking == ["<kd>"]


def test_without_the_images_that_were_scored_the_page_goes_without(trained, caplog):
    assert trained.show(None) == {}
    assert trained.show(trained.images.split("val")) == {}
    assert trained.show(trained.images, change(HOW, figure_images=0)) == {}
    for path in (trained.images.root / "train").iterdir():
        path.unlink()
    assert trained.show(trained.images) == {}
    assert "goes without pictures of single images" in caplog.text
