"""Pictures of MLflow's pages for docs/mlflow.md: ``python docs/screens.py http://127.0.0.1:5000``.

Needs ``make ui`` with runs of the experiment ``rdd_test`` (seeds=2, `distill_tse` and CWD), and
chromium.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from mlflow import MlflowClient

PICTURES = Path(__file__).parent / "pictures"
COMPARED = ("baseline seed 0", "cwd seed 0", "tse seed 0")


def pages(address: str) -> dict[str, str]:
    """Address of each page by the name of its picture."""
    client = MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("rdd_test").experiment_id
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment])}
    chosen = quote(json.dumps([runs[name] for name in COMPARED]))
    there = f"experiments={quote(json.dumps([experiment]))}&workflowType=machine_learning"
    return {
        "mlflow_runs": f"{address}/#/experiments/{experiment}?workflowType=machine_learning",
        "mlflow_compare": f"{address}/#/compare-runs?runs={chosen}&{there}",
    }


def main(address: str) -> None:
    """Take all pictures."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("There is no chromium here; the pictures stay as they are.")
    for name, page in pages(address).items():
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,800"]
        picture = f"--screenshot={PICTURES / name}.png"
        command = [browser, *options, "--virtual-time-budget=20000", picture, page]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main(sys.argv[1])
