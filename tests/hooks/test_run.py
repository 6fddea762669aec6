"""Runs and children while Kedro runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from rdd_pipeline.hooks.run import OpenRun
from rdd_pipeline.tracking import Experiment, Sender, TrackingWriter
from rdd_pipeline.tracking.records import Record


class Remembering(Sender):
    """Talks to nobody and remembers the records."""

    def __init__(self) -> None:
        super().__init__("http://server")
        self.records: list[Record] = []

    def send(self, batch: Sequence[Record]) -> list[bool]:
        self.records.extend(batch)
        return [True] * len(batch)

    def names(self) -> dict[str, str]:
        return {record.run_id: record.key for record in self.records if record.kind == "run"}


def _open_run(tmp_path: Path, *namespaces: str) -> tuple[Remembering, OpenRun]:
    sender = Remembering()
    run = OpenRun(
        TrackingWriter(sender, tmp_path / "x.jsonl"),
        Experiment("0"),
        "whole",
        namespaces=Counter(namespaces),
        tags={},
        own_tags={},
    )
    return sender, run


def test_a_child_run_starts_with_its_first_node(tmp_path: Path) -> None:
    sender, run = _open_run(tmp_path, "kd", "cwd")
    assert run.of("kd") == run.of("kd") != run.id == run.of(None)
    run.close("FINISHED", timeout=5.0)
    assert sender.names() == {run.id: "whole", run.of("kd"): "kd"}


@pytest.mark.parametrize("namespaces", [("kd",), ("kd", "cwd")])
def test_each_of_several_seeds_has_a_run_with_equal_keys(tmp_path: Path, namespaces) -> None:
    sender, run = _open_run(tmp_path, *namespaces)
    run.params("kd", "train", {"recipe.iterations": "6", "seed": "0"})
    sink = run.sink("kd")
    for seed in ("0", "1"):
        sink(1, {"loss": 2.0}, seed, None)
        run.writer.metrics(run.of("kd", seed), {"val.miou": 0.5})
    run.close("FINISHED", timeout=5.0)
    for seed in ("0", "1"):
        own = [r for r in sender.records if r.run_id == run.of("kd", seed) and r.kind != "run"]
        assert {(r.kind, r.key): r.value for r in own} == {
            ("param", "recipe.iterations"): "6",
            ("param", "seed"): seed,
            ("metric", "loss"): 2.0,
            ("metric", "val.miou"): 0.5,
            ("status", "status"): "FINISHED",
        }
    assert sender.names()[run.of("kd", "1")] == "kd seed 1"


@pytest.mark.parametrize("end", ["FINISHED", "KILLED"])
def test_a_training_that_a_node_survives_ends_as_failed_with_its_reason(tmp_path, end) -> None:
    sender, run = _open_run(tmp_path, "kd", "cwd")
    for name in ("trial 1", "trial 2"):
        run.param_sink()({"rdd.threshold": "0.3"}, name)
    run.failed("loss is non-finite", "trial 2")
    run.close(end, timeout=5.0)
    statuses = {r.run_id: r.value for r in sender.records if r.kind == "status"}
    assert statuses == {run.id: end, run.of("trial 1"): "FINISHED", run.of("trial 2"): "FAILED"}
    tagged = [r.run_id for r in sender.records if (r.kind, r.key) == ("tag", "error")]
    assert tagged == [run.of("trial 2")]


def test_threads_that_start_together_make_one_child(tmp_path: Path) -> None:
    sender, run = _open_run(tmp_path, "kd", "cwd")
    threads = [threading.Thread(target=run.of, args=("kd",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.close("FINISHED", timeout=5.0)
    assert sorted(sender.names().values()) == ["kd", "whole"]
