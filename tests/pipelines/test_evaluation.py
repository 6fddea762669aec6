"""The evaluation pipeline over metrics files that were written by hand; nothing is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import rich
from kedro.io import Version
from matplotlib.figure import Figure
from mlflow import MlflowClient
from rich.console import Console

from rdd_pipeline.config import EvaluationParams
from rdd_pipeline.datasets import MetricsDataset
from rdd_pipeline.errors import UserError
from rdd_pipeline.pipelines.evaluation.nodes import (
    compare_by_class,
    compare_methods,
    draw_classes,
    draw_comparison,
    draw_cost,
    write_report,
)
from tests.kedro_project import Project, bootstrap
from tests.mlflow_store import new_store

DIGEST = "12e4567890123456"  # pandas would read it as a number


def _work(name: str) -> str:
    """A fingerprint."""
    return name.encode().hex().rjust(16, "0")[-16:]


def _result(
    method: str, miou: float, *, seed: str = "0", comparison: str = "c", title: str = ""
) -> dict[str, Any]:
    scores = {"miou": miou, "iou": {"Car": miou, "Pole": miou}}
    return {
        "about": {
            "method": method,
            "title": title or method.upper(),
            "network": f"net_{comparison}",
            "seed": seed,
            "protocol_digest": "" if method == "teacher" else comparison,
            "data_digest": DIGEST,
            "fingerprint": _work(f"{method}{seed}"),
        },
        "splits": {"val": scores, "test": scores},
        "cost": {"parameters": 519_000, "macs": 5, "images_per_second": 10.0},
    }


def _of_seeds(method: str, scores: list[float], **more: Any) -> list[dict[str, Any]]:
    return [_result(method, s, seed=str(i), **more) for i, s in enumerate(scores)]


RESULTS = [
    _result("teacher", 0.9),
    *_of_seeds("baseline", [0.40, 0.50, 0.60]),
    *_of_seeds("kd", [0.50, 0.61, 0.70]),
    *_of_seeds("tse", [0.30, 0.51, 0.70]),
    *_of_seeds("baseline", [0.40], comparison="x"),
]


def _again(table: pd.DataFrame) -> pd.DataFrame:
    """As the catalog reads it."""
    text = dict.fromkeys(("seeds", "protocol_digest", "data_digest"), str)
    return pd.read_csv(io.StringIO(table.to_csv(index=False)), dtype=text)


@pytest.fixture
def console(monkeypatch) -> io.StringIO:
    """What is printed on a terminal of 100 columns."""
    out = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=out, width=100))
    return out


def test_the_printed_table_fits_100_columns_and_explains_itself(console):
    long = _of_seeds("cwd", [0.5, 0.6], title="RDD + channel-wise KD")
    compare_methods([*RESULTS, *long], EvaluationParams())
    text = console.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in text
    (kd,) = (" ".join(line.split()) for line in lines if line.startswith(" KD "))
    assert kd == "KD 3 60.33 (10.02) 60.33 (10.02) +10.33 ± 1.43 10.0 –"
    (tse,) = (line for line in lines if line.startswith(" TSE "))
    assert "n.s." in tse
    assert any(line.startswith(" RDD + channel-wise KD ") for line in lines)
    assert "net_c, 0.52 M parameters" in text
    assert "net_x, 0.52 M parameters" in text
    words = " ".join(text.split())
    assert "half of its 95 % interval (paired t); n.s.: the interval covers 0" in words
    assert "val picks the checkpoint, test is reported" in words


def test_another_metric_is_compared_and_named(console, tmp_path):
    results = [_result("baseline", 0.3), _result("kd", 0.4)]
    for result, accuracy in zip(results, (0.80, 0.85), strict=True):
        for scores in result["splits"].values():
            scores["pixel_accuracy"] = accuracy
    table = compare_methods(results, EvaluationParams(metric="pixel_accuracy"))
    assert list(table["val_score"]) == pytest.approx([85, 80])
    assert "pixel accuracy in %: net_c" in console.getvalue()
    classes = compare_by_class(results)
    page = write_report(results, _again(table), _again(classes), tmp_path)
    assert "val pixel accuracy" in page
    assert "85.00" in page
    with pytest.raises(
        UserError, match=r"evaluation\.metric is 'iou'; expected one of miou, pixel_"
    ):
        compare_methods(results, EvaluationParams(metric="iou"))


def test_means_over_fewer_classes_and_notes_of_trainings_are_named_below_the_table(console):
    absent, noted = _result("kd", 0.5), _result("tse", 0.4)
    absent["splits"]["test"] = {"miou": 0.5, "iou": {"Car": 0.5, "Pole": None}}
    noted["about"]["notes"] = ["class [Pole] got no chosen pixels"]
    compare_methods([_result("baseline", 0.3), absent, noted], EvaluationParams())
    rows = {line.split()[0]: line for line in console.getvalue().splitlines() if line.split()}
    assert rows["KD"].split()[:4] == ["KD", "1", "50.00", "50.00*"]
    assert "*" not in rows["TSE"]
    words = " ".join(console.getvalue().split())
    assert "TSE: class [Pole] got no chosen pixels" in words
    assert (
        "* test (KD): the mean is over 1 of 2 classes; neither labels nor predictions have Pole."
        in words
    )
    assert "No interval covers another teacher" in words


@pytest.mark.parametrize(("width", "columns"), [(95, ["images/s"]), (82, []), (50, [])])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_cells(monkeypatch, width, columns):
    out = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=out, width=width))
    compare_methods(
        [*RESULTS, *_of_seeds("cwd", [0.5, 0.6], title="RDD + channel-wise KD")], EvaluationParams()
    )
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert [name for name in ("images/s", "memory") if name in text] == columns
    if width > 50:
        assert any(line.startswith(" RDD + channel-wise KD ") for line in text.splitlines())
        assert "+10.33 ± 1.43" in text


def test_old_metrics_without_cost_or_classes_are_compared_and_drawn(console, tmp_path):
    old = _result("kd", 0.5)
    del old["cost"], old["splits"]["val"]["iou"]
    table, classes = (
        _again(compare_methods([old], EvaluationParams())),
        _again(compare_by_class([old])),
    )
    for drawing in (draw_comparison(table), draw_classes(classes), draw_cost(table)):
        assert isinstance(drawing.draw(), Figure)
    assert "KD" in write_report([old], table, classes, tmp_path)


def test_the_report_names_seeds_with_other_parameters(console, tmp_path, caplog):
    for name, mode in (("tse0", "xor"), ("tse1", "or")):
        (tmp_path / _work(name)).mkdir()
        (tmp_path / _work(name) / "job.json").write_text(json.dumps({"rdd": {"mode": mode}}))
    table, classes = (
        _again(compare_methods(RESULTS, EvaluationParams())),
        _again(compare_by_class(RESULTS)),
    )
    page = write_report(RESULTS, table, classes, tmp_path)
    expected = "TSE: the seeds were not trained alike, rdd.mode is xor (seed 0) and or (seed 1)"
    assert expected in page
    assert expected in caplog.text
    assert page.count("data:image/svg+xml;base64,") == 4
    # Text that looks like a number is still the same text after the table was in a file.
    assert f"<td>{DIGEST}</td>" in page


def test_nothing_trained_is_said_with_what_to_do():
    with pytest.raises(UserError, match=r"Nothing has been trained .* --pipeline=distill_tse"):
        compare_methods([], EvaluationParams())


def test_the_comparison_survives_its_csv_file_and_is_drawn(tmp_path, capsys):
    results = [
        _result("teacher", 0.9),
        *(_result("baseline", 0.5 + 0.1 * s, seed=str(s)) for s in range(2)),
        *(_result("tse", 0.6 + 0.1 * s, seed=str(s)) for s in range(2)),
    ]
    table = compare_methods(results, EvaluationParams())
    assert "60.00" not in capsys.readouterr().err
    table.to_csv(tmp_path / "t.csv", index=False)
    again = pd.read_csv(tmp_path / "t.csv")
    assert list(again["method"]) == ["teacher", "tse", "baseline"]
    drawing = draw_comparison(again)
    assert isinstance(drawing.draw(), Figure)
    assert draw_comparison(again.copy()).digest({}) == drawing.digest({})
    again.loc[1, "test_score"] += 0.01
    assert draw_comparison(again).digest({}) != drawing.digest({})


# ---- through Kedro


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    bootstrap()
    return Project(tmp_path / "project")


def _save(project: Project, results: list[dict[str, Any]]) -> None:
    for number, result in enumerate(results):
        folder = project.folder / "data/07_model_output/test/metrics" / result["about"]["method"]
        version = f"2026-01-01T00.00.{number:02d}.000Z"
        MetricsDataset(filepath=str(folder), version=Version(None, version)).save(
            {result["about"]["seed"]: result}
        )


def test_metrics_that_cannot_be_believed_are_left_out_with_a_warning(project, caplog):
    _save(project, [_result("tse", 0.5), _result("kd", 0.4)])
    folder = project.folder / "data/07_model_output/test/metrics"
    (changed,) = folder.glob("kd/2*/kd/0.json")
    changed.write_text(changed.read_text().replace("0.4", "0.9"))
    for version in ("2025-01-01T00.00.00.000Z", "2025-01-02T00.00.00.000Z"):
        old = folder / "cwd.json" / version / "cwd.json"
        old.parent.mkdir(parents=True)
        old.write_text(json.dumps({"about": {"method": "cwd"}, "val": {"miou": 0.5}}))
    project.run("evaluation")
    table = pd.read_csv(project.newest("08_reporting/test/comparison.csv"))
    assert list(table["method"]) == ["tse"]
    assert f"{changed} was changed: its digest does not fit" in caplog.text
    assert "2 metrics files of an older rdd_pipeline, of cwd, are left out." in caplog.text
    for path in folder.glob("tse/*/tse/0.json"):
        path.unlink()
    with pytest.raises(UserError, match="Nothing has been trained"):
        project.run("evaluation")


def test_the_pipeline_makes_tables_figures_and_a_report_and_mlflow_has_them(project):
    _save(project, RESULTS)
    project.run("evaluation")
    names = {"comparison.csv", "comparison_classes.csv", "comparison.html"}
    names |= {"comparison.png", "comparison_classes.png", "comparison_cost.png", "calibration.png"}
    for name in names:
        assert project.newest(f"08_reporting/test/{name}").stat().st_size > 0
    table = pd.read_csv(project.newest("08_reporting/test/comparison.csv"))
    assert len(table) == 5
    assert table.set_index("method").loc["tse", "seeds"] == "0,1,2"
    page = project.newest("08_reporting/test/comparison.html").read_text()
    assert "2 comparisons" in page
    client = MlflowClient()
    experiment = next(e for e in client.search_experiments() if e.name != "Default")
    (run,) = client.search_runs([experiment.experiment_id])
    files = {Path(f.path).name for f in client.list_artifacts(run.info.run_id, "comparison")}
    assert files == names


def test_the_pipeline_says_what_to_do_when_nothing_has_been_trained(project):
    with pytest.raises(
        UserError, match=r"--pipeline=distill_tse .*or .*--pipeline=distill_baselines"
    ):
        project.run("evaluation")
