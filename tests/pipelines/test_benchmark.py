"""What networks cost to run: one timing an architecture, and the figure over it."""

from __future__ import annotations

import pandas as pd
import pytest

from rdd_pipeline.config import BenchmarkParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.cost import measure_cost
from rdd_pipeline.export import speed
from rdd_pipeline.export.latency import measure_latency
from rdd_pipeline.networks import save_checkpoint
from rdd_pipeline.pipelines.benchmark import nodes
from rdd_pipeline.pipelines.benchmark.nodes import draw_pareto, measure_networks
from rdd_pipeline.reporting.pareto import front
from tests.pipelines.examples import STUDENT, TEACHER, checkpoint

VERSION = "2026-01-01T00.00.00.000Z"
PARAMS = BenchmarkParams(runtimes=("eager",), runs=3, warm_up=0, batch_size=2)


def result(method: str, seed: str, miou: float) -> dict:
    about = {"method": method, "seed": seed, "title": method.upper(), "network": "n"}
    return {"about": about, "splits": {"val": {"miou": 0.1}, "test": {"miou": miou}}}


METRICS = [
    result("teacher", "", 0.9), result("tse", "0", 0.3), result("tse", "0", 0.5),
    result("tse", "1", 0.8), result("kd", "0", 0.4),
]  # fmt: skip


@pytest.fixture
def models(tmp_path):
    for entry, params in (("teacher", TEACHER), ("student_tse", STUDENT), ("student_kd", STUDENT)):
        path = tmp_path / "models" / entry / VERSION / entry / "0.safetensors"
        path.parent.mkdir(parents=True)
        save_checkpoint(checkpoint(params), path)
    return tmp_path / "models"


def test_every_network_is_a_row_and_every_architecture_is_timed_once(ingested, models, monkeypatch):
    timed = []

    def counted(network, size, params):
        timed.append(network.header.network.name)
        yield from speed.measure_speed(network, size, params)

    monkeypatch.setattr(nodes, "measure_speed", counted)
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(speed, "_gpus", list)
    table = measure_networks(ingested, models, METRICS, PARAMS)
    assert sorted(timed) == sorted([STUDENT.name, TEACHER.name])
    assert dict(zip(table.method, table.miou, strict=True)) == {"kd": 40, "tse": 50, "teacher": 90}
    assert (table.latency > 0).all()
    assert (table.lower <= table.latency).all()
    assert (table.latency <= table.upper).all()
    assert (table.throughput > 0).all()
    cost = measure_cost(checkpoint(STUDENT).build(), ingested.input_size)
    (row,) = table[table.method == "tse"].to_dict("records")
    assert (row["parameters"], row["macs"]) == (cost["parameters"], cost["macs"])
    assert (row["runtime"], row["device"], row["threads"]) == ("eager", "cpu", 1)
    assert len(draw_pareto(table).axes) == 1


def test_what_does_not_work_here_is_left_out_and_named(ingested, models, monkeypatch, caplog):
    monkeypatch.setattr(speed, "_file", lambda *a: (_ for _ in ()).throw(RuntimeError("no onnx")))
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 1)
    params = PARAMS.model_copy(update={"runtimes": ("onnx", "eager")})
    table = measure_networks(ingested, models, METRICS[1:2], params)
    assert set(table.runtime) == {"eager"}
    assert "is not timed as onnx: no onnx" in caplog.text
    with pytest.raises(UserError, match="Nothing could be timed"):
        measure_networks(
            ingested, models, METRICS[1:2], params.model_copy(update={"runtimes": ("onnx",)})
        )


def test_without_a_network_the_command_that_trains_one_is_shown(ingested, tmp_path):
    with pytest.raises(UserError, match="kedro run --pipeline=distill_tse"):
        measure_networks(ingested, tmp_path, [], PARAMS)


def test_the_front_has_what_none_beats_in_both():
    points = [(3.0, 50.0), (1.0, 40.0), (2.0, 30.0), (4.0, 50.0), (1.0, 35.0)]
    assert front(points) == [(1.0, 40.0), (3.0, 50.0)]
    assert front([]) == []


def test_an_empty_table_is_an_empty_figure():
    assert draw_pareto(pd.DataFrame()).axes


def test_the_median_and_quartiles_are_those_of_the_timed_calls(monkeypatch):
    clock = iter([0.0, 0.0, 0.0, 0.001, 0.0, 0.0, 0.003, 0.0, 0.0, 0.002, 0.0, 0.0, 0.010])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    found = measure_latency(lambda: None, runs=3, warm_up=1)
    assert found.runs == 3
    assert found.lower <= found.median <= found.upper
