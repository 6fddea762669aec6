"""The table that every pipeline which trains ends with."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import rich
from rich.console import Console
from scipy import stats

from rdd_pipeline.commands import Session, remember_session
from rdd_pipeline.config import (
    EvaluationParams,
)
from rdd_pipeline.data.labels import make_lookup
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.distillation.methods import find_method
from rdd_pipeline.pipelines.evaluation.nodes import compare_methods
from rdd_pipeline.pipelines.method_nodes import (
    protocol_digest,
    score_network,
)
from rdd_pipeline.pipelines.summary_nodes import make_summarize_node
from tests.pipelines.examples import (
    CPU,
    plan,
)


def _metrics(method: str, miou: float, *, seed: str = "0", comparison: str = "c") -> dict:
    return {
        "about": {
            "method": method,
            "title": method.upper(),
            "network": f"net of {method}",
            "seed": seed,
            "protocol_digest": comparison,
            "data_digest": "d",
        },
        "splits": {"val": {"miou": miou}},
        "cost": {"parameters": 1_234_567, "macs": 5, "images_per_second": 10.0},
    }


TEACHER_METRICS = {"0": _metrics("teacher", 0.5, comparison="")}


def test_the_table_shows_the_student_alone_only_of_the_same_recipe_and_seed(tmp_path, capsys):
    summarize = make_summarize_node("distill_tse")
    teacher, student = TEACHER_METRICS, _metrics("tse", 0.4)
    others = [
        _metrics("baseline", 0.1, seed="1"),
        _metrics("baseline", 0.2, comparison="other"),
    ]
    text = summarize(teacher, [*others, student], tmp_path, {"0": student})
    assert "BASELINE" not in text
    assert "train the student alone" in capsys.readouterr().out
    text = summarize(teacher, [*others, _metrics("baseline", 0.3)], tmp_path, {"0": student})
    assert text.splitlines() == [
        "| network |  | parameters | val | vs. alone (val) |",
        "|---|---|---|---|---|",
        "| TEACHER | net of teacher | 1.23 M | 50.0 | – |",
        "| BASELINE | net of baseline | 1.23 M | 30.0 | – |",
        "| student by TSE | net of tse | 1.23 M | 40.0 | +10.0 |",
        "",
        "One seed: a difference may be chance, whichever way it points.",
    ]


def test_the_table_shows_everything_trained_alike_with_all_seeds_and_the_paired_interval(tmp_path):
    def of_seeds(method: str, *scores: float, **more: str) -> dict[str, dict]:
        return {str(i): _metrics(method, s, seed=str(i), **more) for i, s in enumerate(scores)}

    alone, student = of_seeds("baseline", 0.3, 0.4, 0.5), of_seeds("tse", 0.31, 0.44, 0.53)
    student["0"]["about"]["notes"] = ["class pole got no chosen pixels"]
    trained = [
        *of_seeds("cwd", 0.35, 0.45, 0.55).values(),
        *of_seeds("kd", 0.35, 0.45).values(),  # lacks a seed
        *of_seeds("at", 0.35, 0.45, 0.55, comparison="other").values(),
        *of_seeds("tfe", 0.2, 0.2, 0.2).values(),  # weights on the way
        *alone.values(),
    ]
    summarize = make_summarize_node("distill_tse")
    text = summarize(TEACHER_METRICS, trained, tmp_path, alone, student)
    rows = {line.split(" | ")[0]: line.split(" | ")[3:] for line in text.splitlines()}
    differences = np.array([1.0, 4.0, 3.0])
    half = stats.t.interval(0.95, 2, scale=stats.sem(differences))[1]
    assert [name for name in rows if name.startswith("| ")][1:] == [
        "| TEACHER",
        "| BASELINE",
        "| student by CWD",
        "| student by TSE",
    ]
    assert rows["| student by TSE"] == [
        "42.7 (11.1)",
        f"{differences.mean():+.1f} ± {half:.1f} n.s. |",
    ]
    assert rows["| student by CWD"] == ["45.0 (10.0)", "+5.0 ± 0.0 |"]
    assert "TSE: class pole got no chosen pixels (seed 0)" in text


@pytest.mark.parametrize(("width", "shown"), [(100, True), (60, False)])
def test_the_table_keeps_its_cells_whole_in_a_narrow_terminal(tmp_path, monkeypatch, width, shown):
    out = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=out, width=width))
    metrics = [_metrics("baseline", 0.3), _metrics("tse", 0.4)]
    metrics[1]["about"]["title"] = "RDD variant OR"
    by_seed = [{"0": result} for result in metrics]
    make_summarize_node("distill_tse")(TEACHER_METRICS, [], tmp_path, *by_seed)
    table = out.getvalue().partition("One seed")[0]
    (line,) = [line for line in table.splitlines() if "RDD variant OR" in line]
    assert ("net of tse" in line) is shown
    assert " ".join(line.replace("net of tse", "").split()).startswith("student by RDD variant OR")
    assert line.split()[-2:] == ["40.0", "+10.0"]
    assert "…" not in out.getvalue()


@pytest.mark.parametrize(
    ("pipeline", "trained", "commands"),
    [
        ("train_teacher", [], ["--pipeline=distill_tse"]),
        ("distill_tfe", ["tfe"], ["--pipeline=distill_tse"]),
        (
            "distill_tse",
            ["baseline", "tse"],
            ["=predict --params=predict.images=FOLDER", "params=seeds=3", "=distill_baselines"],
        ),
        (
            "distill_baselines",
            ["baseline", "kd"],
            ["images=FOLDER,predict.method=kd", "=distill_tse", "--pipeline=evaluation"],
        ),
        (
            "distill_rdd_plus",
            ["tse_cwd"],
            [
                "FOLDER,predict.method=tse_cwd",
                *("=distill_baselines --to-outputs=metrics_baseline", "=distill_tse"),
                "=evaluation",
            ],
        ),
        (
            "ablations",
            ["baseline", "rdd_or"],
            ["predict.method=rdd_or", "--pipeline=distill_tse", "=evaluation"],
        ),
    ],
)
def test_every_pipeline_ends_with_its_table_and_a_next_step(
    tmp_path, capsys, pipeline, trained, commands
):
    metrics = [_metrics(method, 0.4) for method in trained]
    everything = [*TEACHER_METRICS.values(), *metrics]
    by_seed = [{"0": result} for result in metrics]
    text = make_summarize_node(pipeline)(TEACHER_METRICS, everything, tmp_path, *by_seed)
    assert text.count("| net of ") == 1 + len(trained)
    printed = [line for line in capsys.readouterr().out.splitlines() if ": kedro run" in line]
    assert len(printed) == len(commands)
    for line, command in zip(printed, commands, strict=True):
        assert command in line


def test_what_did_not_pay_is_said_and_the_best_on_val_is_what_to_use(tmp_path, capsys):
    def scored(method: str, val: float, test: float) -> dict:
        found = _metrics(method, val)
        return found | {"splits": {"val": {"miou": val}, "test": {"miou": test}}}

    alone, student = scored("baseline", 0.41, 0.3), scored("tse", 0.4, 0.28)
    summarize = make_summarize_node("distill_tse")
    text = summarize(TEACHER_METRICS, [], tmp_path, {"0": alone}, {"0": student})
    assert "\nWorse than the student alone on test: student by TSE (-2.0).\n" in text
    hint = "To predict with the BASELINE, the best on val: kedro run --pipeline=predict "
    assert f"{hint}--params=predict.images=FOLDER,predict.method=baseline" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    better = scored("tse", 0.41, 0.3)
    text = summarize(TEACHER_METRICS, [], tmp_path, {"0": alone}, {"0": better})
    assert "Worse" not in text
    assert "To predict with the student by TSE" in capsys.readouterr().out


def test_the_hint_is_a_command_of_this_session_in_one_line(tmp_path, capsys):
    student = _metrics("tse", 0.4)
    folder = "/data/a folder of a long name/" + "x" * 80
    remember_session(Session("fruit", {"data": {"path": folder}, "seeds": 1}))
    try:
        make_summarize_node("distill_tse")(TEACHER_METRICS, [student], tmp_path, {"0": student})
    finally:
        remember_session(Session())
    command = (
        "kedro run --pipeline=distill_baselines --env=fruit "
        f"'--params=data.path={folder},seeds=1' --to-outputs=metrics_baseline"
    )
    assert command in capsys.readouterr().out


def test_students_scored_with_other_labels_are_not_compared(ingested, teacher, tmp_path):
    """The same masks, once with class 10 and once with it ignored: two blocks, no gain."""
    ignored = make_lookup({raw: raw for raw in range(10)}, ignored=(10, 11))
    scored = {}
    for method, labels in (
        ("baseline", CAMVID),
        ("tse", CAMVID.model_copy(update={"lookup": ignored})),
        ("kd", CAMVID),
    ):
        relabeled = replace(ingested, labels=labels)
        digest = protocol_digest(plan("baseline", relabeled)["0"], relabeled)
        scored[method] = score_network(
            teacher,
            relabeled,
            EvaluationParams(),
            CPU,
            tmp_path / "work",
            {"method": method, "title": find_method(method).title, "protocol_digest": digest},
        )
    rows = compare_methods(list(scored.values()), EvaluationParams()).set_index("method")
    assert rows.loc["baseline", "protocol_digest"] == rows.loc["kd", "protocol_digest"]
    assert rows.loc["baseline", "protocol_digest"] != rows.loc["tse", "protocol_digest"]
    assert rows.loc["kd", "val_gain"] == 0.0
    assert math.isnan(rows.loc["tse", "val_gain"])
    everything = list(scored.values())
    text = make_summarize_node("distill_tse")(
        {"0": _metrics("teacher", 0.5, comparison="")}, everything, tmp_path, {"0": scored["tse"]}
    )
    assert "student alone" not in text
    assert "student by RDD" in text
