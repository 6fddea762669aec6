"""Pictures and tables of single images, of networks with random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from rdd_pipeline.config import EvaluationParams
from rdd_pipeline.evaluation import suspects
from rdd_pipeline.evaluation.scoring import score_splits
from rdd_pipeline.pipelines import example_nodes
from rdd_pipeline.pipelines.example_nodes import (
    draw_side_by_side,
    find_label_errors,
    rank_images,
)
from tests.pipelines.examples import CPU, STUDENT, checkpoint

ALL = EvaluationParams(splits=("val", "train"), figure_images=2)


def _metrics(network, images, title: str) -> dict:
    splits = score_splits(network, images, ALL, device=torch.device("cpu"))
    about = {"title": title, "network": network.header.network.name, "seed": "0", "iteration": 1}
    return {"0": {"about": about, "splits": splits}}


@pytest.fixture
def student():
    return checkpoint(STUDENT, seed=1)


def test_images_are_ranked_with_their_files_and_drawn(ingested, teacher, student):
    alone = checkpoint(STUDENT, seed=2)
    ours, other = _metrics(student, ingested, "RDD"), _metrics(alone, ingested, "student alone")
    table, worst = rank_images(
        ingested, {"0": student}, _metrics(teacher, ingested, "T"), other, ours, ALL, CPU
    )
    assert len(table) == 4
    assert table["student"].is_monotonic_increasing
    row = table[(table["split"] == "train") & (table["name"] == "1")].iloc[0]
    assert row["mask"] == "trainannot/1.png"
    scores = dict(map(tuple, ours["0"]["splits"]["train"]["images"]))
    assert row["student"] == pytest.approx(100 * scores["1"], abs=1e-3)
    assert row["gain"] == pytest.approx(row["student"] - row["student_alone"], abs=1e-3)
    beside = draw_side_by_side(
        ingested, {"0": teacher}, {"0": alone}, {"0": student}, other, ours, ALL, CPU
    )
    for drawing in (worst, beside):
        assert isinstance(drawing.draw(), Figure)
    assert worst.digest("") != beside.digest("")


def test_suspects_of_the_training_images_are_found_once(
    ingested, teacher, student, tmp_path, monkeypatch
):
    monkeypatch.setattr(suspects, "LEAST", 0.0)  # random weights are sure of nothing
    arguments = (ingested, {"0": teacher}, {"0": teacher}, ALL, CPU, tmp_path)
    table, drawing = find_label_errors(*arguments)
    assert table["score"].is_monotonic_decreasing
    assert list(table["rank"]) == list(range(1, len(table) + 1))
    assert len(table)
    assert isinstance(drawing.draw(), Figure)
    for row in table.itertuples():
        _, label = ingested.read(
            next(s for s in ingested.samples if (s.split, s.name) == ("train", row.name))
        )
        box = label[row.top : row.top + row.height, row.left : row.left + row.width]
        assert int((box == ingested.labels.names.index(row.label)).sum()) >= row.pixels
        assert row.score <= row.pixels + 1e-3
    monkeypatch.setattr(example_nodes, "_search", None)
    again, _ = find_label_errors(*arguments)
    assert again.equals(table)
    with pytest.raises(TypeError):  # would be searched
        find_label_errors(ingested, {"0": teacher}, {"0": student}, ALL, CPU, tmp_path)


def test_without_training_images_there_is_no_suspect(ingested, teacher, tmp_path):
    images = replace(ingested, samples=tuple(s for s in ingested.samples if s.split == "val"))
    table, drawing = find_label_errors(images, {"0": teacher}, {"0": teacher}, ALL, CPU, tmp_path)
    assert table.empty
    assert "rank" in table.columns
    assert isinstance(drawing.draw(), Figure)
