"""MLflow's own page of a comparison, in a browser."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
from mlflow import MlflowClient

from rdd_pipeline.tracking import Experiment, Sender, TrackingWriter
from tests.mlflow_store import new_store

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def _wait_for(address: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@pytest.mark.shows
@pytest.mark.timeout(600)
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_the_comparison_of_two_methods_shows_their_names_and_scores(tmp_path: Path) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    client = MlflowClient(tracking_uri=uri)
    writer = TrackingWriter(Sender(uri, client), tmp_path / "x.jsonl")
    for method, score in (("baseline", 0.4321), ("cwd", 0.5432)):
        run_id = writer.start(f"{method} seed 0", Experiment("rdd_scenes"), {"method": method})
        writer.params(run_id, {"method": method})
        writer.metrics(run_id, {"miou_test": score})
        writer.status(run_id, "FINISHED")
    assert writer.close(60.0) == 0
    experiment = client.get_experiment_by_name("rdd_scenes").experiment_id
    runs = quote(json.dumps([run.info.run_id for run in client.search_runs([experiment])]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", uri, "--workers", "1"]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *store, *place],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(address, 120.0)
        there = f"experiments={quote(json.dumps([experiment]))}&workflowType=machine_learning"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,3000"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        page = subprocess.run(
            [
                *(str(BROWSER), *options, profile, "--virtual-time-budget=20000", "--dump-dom"),
                f"{address}/#/compare-runs?runs={runs}&{there}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
    finally:
        server.terminate()
        server.wait(30)
    for text in ("Comparing 2 Runs", "baseline seed 0", "cwd seed 0", "miou_test"):
        assert text in page, text
    for score in ("0.432", "0.543"):
        assert score in page, score
