"""What is logged reaches the sink of its context."""

from __future__ import annotations

import threading
import time

from rdd_pipeline import tracking
from rdd_pipeline.tracking import TrackingWriter
from tests.tracking.fakes import FakeClient, sent


def test_logging_without_a_sink_does_nothing() -> None:
    tracking.log_metrics(1, {"loss": 1.0})


def test_logged_points_reach_the_run(client: FakeClient, writer: TrackingWriter) -> None:
    tracking.set_metric_sink(
        lambda step, values, seed, method: writer.metrics("run", values, step=step)
    )
    for step in (1, 2):
        tracking.log_metrics(step, {"loss": 1.0 / step, "lr": 0.02})
    tracking.set_metric_sink(None)
    tracking.log_metrics(3, {"loss": 9.0})
    assert sent(writer)
    assert client.points() == [("loss", 1.0, 1), ("lr", 0.02, 1), ("loss", 0.5, 2), ("lr", 0.02, 2)]


def test_sinks_belong_to_a_thread(client: FakeClient, writer: TrackingWriter) -> None:
    def train(run_id: str) -> None:
        tracking.set_metric_sink(
            lambda step, values, seed, method: writer.metrics(run_id, values, step=step)
        )
        time.sleep(0.01)
        tracking.log_metrics(1, {"loss": float(len(run_id))})

    threads = [threading.Thread(target=train, args=(run_id,)) for run_id in ("a", "bb")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracking.log_metrics(1, {"loss": 0.0})
    assert sent(writer)
    assert client.points("a") == [("loss", 1.0, 1)]
    assert client.points("bb") == [("loss", 2.0, 1)]


def test_files_go_to_the_sink_of_their_context(tmp_path) -> None:
    seen: list[object] = []
    tracking.log_file(tmp_path, "profile")
    tracking.set_file_sink(lambda *what: seen.append(what))
    tracking.log_file(tmp_path, "profile", seed="3")
    tracking.set_file_sink(None)
    tracking.log_file(tmp_path, "profile")
    assert seen == [(tmp_path, "profile", "3")]
