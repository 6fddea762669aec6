"""Pictures of MLflow's pages for docs/mlflow.md: ``python docs/screens.py http://127.0.0.1:5000``.

Needs ``make ui`` with runs of the experiment ``rdd_scenes`` (seeds=2, `distill_tse` and KD), and
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
from PIL import Image

PICTURES = Path(__file__).parent / "pictures"
SHOWN = 0.744
"""Of the window; MLflow opens a panel on the right at the first visit, which is cut off."""
SIZES = {"mlflow_runs": (1900, 560), "mlflow_compare": (1900, 1300)}
COMPARED = ("baseline seed 0", "kd seed 0", "tse seed 0")


def pages(address: str) -> dict[str, str]:
    """Address of each page by the name of its picture."""
    client = MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("rdd_scenes").experiment_id
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
        width, height = SIZES[name]
        window = f"--window-size={round(width / SHOWN)},{height}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", window]
        picture = f"--screenshot={PICTURES / name}.png"
        command = [browser, *options, "--virtual-time-budget=20000", picture, page]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(PICTURES / f"{name}.png") as taken:
            taken.crop((0, 0, width, height)).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
