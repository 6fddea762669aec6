from __future__ import annotations

import math
import statistics

import pytest

from rdd_pipeline.evaluation.comparison import comparable, compare, latest_by_seed, splits_of


def _result(
    method: str, miou: float, *, seed: int = 0, comparison: str = "c", data: str = "d", **splits
) -> dict:
    return {
        "about": {
            "method": method,
            "title": method.upper(),
            "network": "net",
            "seed": str(seed),
            "comparison": "" if method == "teacher" else comparison,
            "data_digest": data,
        },
        "val": {"miou": miou},
        **{name: {"miou": value} for name, value in splits.items()},
        "cost": {"parameters": 10, "macs": 20, "images_per_second": 3.0},
    }


def _rows(*results: dict) -> dict[str, dict]:
    return {row["method"]: row for row in compare(results)}


def test_mean_and_spread_are_those_of_the_seeds():
    scores = [0.5, 0.6, 0.9]
    row = _rows(*(_result("kd", score, seed=i) for i, score in enumerate(scores)))["kd"]
    assert row["val_miou"] == pytest.approx(100 * statistics.mean(scores))
    assert row["val_miou_sd"] == pytest.approx(100 * statistics.stdev(scores))
    assert row["seeds"] == "0,1,2"


def test_one_seed_has_no_spread():
    assert math.isnan(_rows(_result("kd", 0.5))["kd"]["val_miou_sd"])


def test_the_gain_is_that_over_the_student_alone_with_the_same_seeds():
    rows = _rows(
        *(_result("baseline", 0.1 * (seed + 1), seed=seed) for seed in (0, 1, 2)),
        *(_result("kd", 0.5, seed=seed) for seed in (1, 2, 3)),
    )
    assert rows["kd"]["val_gain"] == pytest.approx(100 * (0.5 - 0.25))  # seeds 1 and 2
    assert math.isnan(rows["baseline"]["val_gain"])


def test_there_is_no_gain_without_the_student_alone_or_for_another_recipe():
    assert math.isnan(_rows(_result("kd", 0.5))["kd"]["val_gain"])
    other = _rows(_result("baseline", 0.1, comparison="x"), _result("kd", 0.5))
    assert math.isnan(other["kd"]["val_gain"])
    data = _rows(_result("baseline", 0.1, data="x"), _result("kd", 0.5))
    assert math.isnan(data["kd"]["val_gain"])


def test_of_the_same_work_the_newest_counts():
    row = _rows(_result("kd", 0.1), _result("kd", 0.7))["kd"]
    assert row["val_miou"] == pytest.approx(70)
    assert row["seeds"] == "0"


def test_other_recipes_are_rows_of_their_own():
    rows = compare([_result("kd", 0.1), _result("kd", 0.7, comparison="x")])
    assert sorted(row["val_miou"] for row in rows) == pytest.approx([10, 70])


def test_a_split_that_only_some_have_is_compared_among_those():
    rows = _rows(_result("baseline", 0.1), _result("kd", 0.5, test=0.4))
    assert rows["kd"]["test_miou"] == pytest.approx(40)
    assert math.isnan(rows["kd"]["test_gain"])
    assert "test_miou" not in rows["baseline"]


def test_teachers_come_first_then_the_largest_comparison_best_first():
    rows = compare(
        [
            _result("kd", 0.9, comparison="a"),
            _result("baseline", 0.1, comparison="b"),
            _result("kd", 0.3, comparison="b"),
            _result("tse", math.nan, comparison="b"),
            _result("teacher", 0.2),
        ]
    )
    assert [(row["method"], row["comparison"]) for row in rows] == [
        ("teacher", "net"),
        ("kd", "b"),
        ("baseline", "b"),
        ("tse", "b"),
        ("kd", "a"),
    ]


def test_cost_comes_from_the_newest_result_and_may_lack_a_speed():
    result = _result("teacher", 0.2)
    del result["cost"]["images_per_second"]
    (row,) = compare([result])
    assert (row["parameters"], row["macs"]) == (10, 20)
    assert math.isnan(row["images_per_second"])


def test_nothing_gives_no_rows():
    assert compare([]) == []


def test_splits_are_all_blocks_of_scores():
    assert splits_of({**_result("kd", 0.1, test=0.2), "version": "2026", "method": "kd"}) == [
        "val",
        "test",
    ]


def test_results_of_one_comparison_by_method_and_seed():
    old, new, other = _result("kd", 0.1), _result("kd", 0.2), _result("kd", 0.3, comparison="x")
    found = latest_by_seed(comparable([old, new, other, {}], "c"))
    assert found == {("kd", "0"): new}
