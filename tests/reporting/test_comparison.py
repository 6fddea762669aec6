from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from scipy import stats

from rdd_pipeline.evaluation.confusion import METRICS
from rdd_pipeline.reporting.comparison import (
    comparable,
    compare,
    compare_classes,
    counted,
    holds_among_all,
    holm,
    latest_by_seed,
    metric_title,
    mixed_settings,
    notes_on,
    paired_interval,
    paired_p,
    seed_values,
    side_by_side,
    split_names,
    verdict,
)


def _result(
    method: str, miou: float, *, seed: int = 0, comparison: str = "c", data: str = "d", **splits
) -> dict:
    return {
        "about": {
            "method": method,
            "title": method.upper(),
            "network": "net",
            "seed": str(seed),
            "protocol_digest": "" if method == "teacher" else comparison,
            "data_digest": data,
        },
        "splits": {name: {"miou": value} for name, value in {"val": miou, **splits}.items()},
        "cost": {"parameters": 10, "macs": 20, "images_per_second": 3.0},
    }


def _rows(*results: dict) -> dict[str, dict]:
    return {row["method"]: row for row in compare(results)}


def test_mean_and_spread_are_those_of_the_seeds():
    scores = [0.5, 0.6, 0.9]
    row = _rows(*(_result("kd", score, seed=i) for i, score in enumerate(scores)))["kd"]
    assert row["val_score"] == pytest.approx(100 * statistics.mean(scores))
    assert row["val_sd"] == pytest.approx(100 * statistics.stdev(scores))
    assert row["seeds"] == "0,1,2"


def test_one_seed_has_no_spread():
    assert math.isnan(_rows(_result("kd", 0.5))["kd"]["val_sd"])


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
    assert row["val_score"] == pytest.approx(70)
    assert row["seeds"] == "0"


def test_other_recipes_are_rows_of_their_own():
    rows = compare([_result("kd", 0.1), _result("kd", 0.7, comparison="x")])
    assert sorted(row["val_score"] for row in rows) == pytest.approx([10, 70])


def test_a_split_that_only_some_have_is_compared_among_those():
    rows = _rows(_result("baseline", 0.1), _result("kd", 0.5, test=0.4))
    assert rows["kd"]["test_score"] == pytest.approx(40)
    assert math.isnan(rows["kd"]["test_gain"])
    assert "test_score" not in rows["baseline"]


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
    assert [(row["method"], row["protocol_digest"]) for row in rows] == [
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


@pytest.mark.parametrize(("metric", "title"), METRICS.items())
def test_any_metric_can_be_compared(metric, title):
    results = [_result("baseline", 0.1), _result("kd", 0.2), _result("kd", 0.4, seed=1)]
    for place, result in enumerate(results):
        result["splits"]["val"] = {"miou": 0.9, metric: 0.5 + 0.1 * place}
    rows = {row["method"]: row for row in compare(results, metric)}
    assert rows["kd"]["val_score"] == pytest.approx(65)
    assert rows["kd"]["val_gain"] == pytest.approx(10)
    assert metric_title(rows.values()) == title


def test_results_of_before_a_metric_was_there_have_none_of_it():
    old, new = _result("baseline", 0.1), _result("kd", 0.2)
    new["splits"]["val"]["boundary_miou"] = 0.3
    rows = {row["method"]: row for row in compare([old, new], "boundary_miou")}
    assert rows["kd"]["val_score"] == pytest.approx(30)
    assert math.isnan(rows["baseline"]["val_score"])
    assert math.isnan(rows["kd"]["val_gain"])


def test_nothing_gives_no_rows():
    assert compare([]) == []


def test_splits_are_those_that_any_seed_was_evaluated_on():
    rows = compare([_result("kd", 0.1), _result("kd", 0.3, seed=1, test=0.2)])
    assert split_names(rows) == ["val", "test"]
    assert rows[0]["val_score"] == pytest.approx(20)
    assert rows[0]["test_score"] == pytest.approx(20)


def test_results_of_one_comparison_by_method_and_seed():
    old, new, other = _result("kd", 0.1), _result("kd", 0.2), _result("kd", 0.3, comparison="x")
    found = latest_by_seed(comparable([old, new, other], "c"))
    assert found == {("kd", "0"): new}


# ---- seeds


def _of_seeds(method: str, scores: list[float], **more) -> list[dict]:
    return [_result(method, score, seed=seed, **more) for seed, score in enumerate(scores)]


def test_seeds_are_results_of_their_own():
    results = _of_seeds("kd", [0.5, 0.6, 0.7])
    found = latest_by_seed(comparable(results, "c"))
    assert list(found) == [("kd", "0"), ("kd", "1"), ("kd", "2")]
    assert counted(results) == results


def test_seeds_give_the_same_rows_whichever_was_trained_first():
    together = [*_of_seeds("baseline", [0.4, 0.5, 0.7]), *_of_seeds("kd", [0.5, 0.6, 0.6])]
    turned = [together[place] for place in (2, 0, 1, 4, 5, 3)]
    assert compare(together) == compare(turned)
    assert _rows(*together)["kd"]["seed_count"] == 3
    assert len(comparable(together, "c")) == 6


def test_cost_is_that_of_the_newest_even_when_a_seed_is_run_again():
    first, other, again = (_result("kd", 0.1, seed=seed) for seed in (0, 1, 0))
    again["cost"] = {"parameters": 99, "macs": 1}
    assert _rows(first, other, again)["kd"]["parameters"] == 99


def test_only_the_newest_of_a_seed_counts():
    old, other, new = _result("kd", 0.1), _result("kd", 0.2, seed=1), _result("kd", 0.3)
    assert counted([old, other, new]) == [new, other]
    assert len(counted(_of_seeds("kd", [0.5, 0.6]))) == 2


# ---- intervals


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_interval_is_that_of_the_paired_t_test(count):
    rng = np.random.default_rng(count)
    alone, other = 0.1 * rng.random(count) + 0.4, 0.1 * rng.random(count) + 0.42
    rows = _rows(
        *(_result("baseline", score, seed=seed) for seed, score in enumerate(alone)),
        *(_result("kd", score, seed=seed) for seed, score in enumerate(other)),
    )
    expected = stats.ttest_rel(100 * other, 100 * alone).confidence_interval(0.95)
    row = rows["kd"]
    assert row["val_gain_low"] == pytest.approx(expected.low)
    assert row["val_gain_high"] == pytest.approx(expected.high)
    assert row["val_gain_seeds"] == count


def test_the_interval_uses_the_common_seeds_only():
    rows = _rows(
        *(_result("baseline", score, seed=i) for i, score in enumerate([0.9, 0.5, 0.52, 0.56])),
        *(_result("kd", score, seed=i) for i, score in ((1, 0.55), (2, 0.56), (3, 0.58), (9, 0))),
    )
    expected = stats.ttest_rel([55, 56, 58], [50, 52, 56]).confidence_interval(0.95)
    assert rows["kd"]["val_gain_low"] == pytest.approx(expected.low)
    assert rows["kd"]["val_gain_seeds"] == 3


@pytest.mark.parametrize("differences", [[], [1.0], [1.0, math.nan]])
def test_there_is_no_interval_without_two_seeds(differences):
    assert all(map(math.isnan, paired_interval(differences)))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.50, 0.61, 0.70], "better"),
        ([0.30, 0.41, 0.50], "worse"),
        ([0.50, 0.49, 0.61], "open"),
        ([0.50], "single"),
        ([], ""),
    ],
)
def test_a_gain_counts_when_its_interval_lies_on_one_side_of_0(scores, expected):
    alone = [_result("baseline", score, seed=i) for i, score in enumerate([0.4, 0.5, 0.6])]
    rows = _rows(*alone, *(_result("kd", score, seed=i) for i, score in enumerate(scores)))
    row = rows["kd"] if scores else rows["baseline"]
    assert verdict(row, "val") == expected
    assert verdict(row, "later") == ""


def test_a_stage_on_the_way_has_no_gain():
    rows = _rows(_result("baseline", 0.4), _result("tfe", 0.1))
    assert math.isnan(rows["tfe"]["val_gain"])
    assert rows["tfe"]["val_gain_seeds"] == 0


def test_single_values_are_in_the_order_of_the_seeds():
    row = _rows(*(_result("kd", 0.01 * seed, seed=seed) for seed in (10, 9, 2)))["kd"]
    assert row["seeds"] == "2,9,10"
    assert seed_values(row, "val") == pytest.approx([2, 9, 10])
    assert seed_values(row, "later") == []
    assert seed_values({"val_values": 45.5}, "val") == [45.5]  # read from a file


# ---- cost


def test_speed_is_the_median_memory_the_largest_and_unknown_is_left_out():
    results = [_result("kd", 0.1, seed=seed) for seed in range(4)]
    for result, speed, memory in zip(results, (5.0, 0.0, 9.0, 100.0), (7, 0, 8, None), strict=True):
        result["cost"] |= {"images_per_second": speed, "peak_memory_bytes": memory}
    row = _rows(*results)["kd"]
    assert row["images_per_second"] == 9.0
    assert row["peak_memory_bytes"] == 8.0
    assert math.isnan(row["training_seconds"])


def test_a_result_without_cost_or_title_is_still_compared():
    result = _result("kd", 0.1)
    del result["cost"], result["about"]["title"]
    row = _rows(result)["kd"]
    assert row["title"] == "kd"
    assert all(math.isnan(row[name]) for name in ("parameters", "macs", "images_per_second"))


# ---- classes


def _scored(method: str, seed: int = 0, **iou) -> dict:
    result = _result(method, 0.5, seed=seed, test=0.5)
    result["splits"]["test"]["iou"] = iou
    return result


def test_classes_are_averaged_over_the_seeds_that_have_them():
    rows = compare_classes(
        [
            _scored("baseline", 0, Car=0.5, Pole=0.1, Sign=None),
            _scored("baseline", 1, Car=0.7, Pole=0.3, Sign=None),
            _scored("kd", 0, Car=0.8, Pole=None, Sign=None),
            _scored("kd", 1, Car=0.8, Pole=0.5, Sign=None),
            _scored("teacher", 0, Car=0.9, Pole=0.9, Sign=None),
        ]
    )
    assert [row["method"] for row in rows] == ["teacher", "baseline", "kd"]
    teacher, alone, kd = rows
    assert (kd["split"], kd["seeds"]) == ("test", "0,1")
    assert (kd["iou.Car"], kd["iou.Pole"]) == pytest.approx((80, 50))
    assert (kd["gain.Car"], kd["gain.Pole"]) == pytest.approx((20, 20))  # Pole: seed 1 only
    assert math.isnan(kd["iou.Sign"])
    for row in (teacher, alone):
        assert math.isnan(row["gain.Car"])


def test_classes_are_those_of_the_last_split_and_only_of_methods_that_have_it():
    old = _result("kd", 0.4)
    old["splits"]["val"]["iou"] = {"Car": 0.4}
    rows = compare_classes([old, _scored("baseline", Car=0.5)])
    assert [(row["method"], row["split"]) for row in rows] == [("baseline", "test")]
    assert compare_classes([]) == []
    assert compare_classes([_result("kd", 0.4)]) == []  # no scores by class


def test_rows_stand_side_by_side_with_the_teachers_of_their_data():
    rows = compare(
        [
            _result("kd", 0.3),
            _result("kd", 0.3, comparison="b"),
            _result("kd", 0.2, data="e", test=0.1),
            _result("teacher", 0.2),
            _result("teacher", 0.2, data="f"),
        ]
    )
    blocks = [
        [(row["method"], row["data_digest"]) for row in block] for block in side_by_side(rows)
    ]
    assert blocks == [
        [("teacher", "d"), ("kd", "d")],
        [("kd", "d")],
        [("kd", "e")],
        [("teacher", "f")],
    ]
    assert split_names(rows) == ["val", "test"]


# ---- what the digest of a comparison does not cover


def _job(seed: int, *, threshold: float = 0.3, precision: str = "float32") -> dict:
    return {
        "seed": seed,
        "root": f"folder{seed}",
        "rdd": {"threshold": threshold},
        "precision": precision,
    }


def _of(job: str, result: dict) -> dict:
    result["about"]["fingerprint"] = job
    return result


def test_seeds_with_other_parameters_are_named():
    results = [
        _of("a", _result("tse", 0.1, seed=0)),
        _of("b", _result("tse", 0.1, seed=1)),
        _of("gone", _result("tse", 0.1, seed=2)),
    ]
    assert mixed_settings(results, {"a": _job(0), "b": _job(1)}) == []
    assert mixed_settings(results, {}) == []
    assert mixed_settings(results, {"a": _job(0), "b": _job(1, threshold=0.7)}) == [
        "TSE: the seeds were not trained alike, rdd.threshold is 0.3 (seed 0) and 0.7 (seed 1)."
    ]


def test_methods_of_another_precision_are_named_but_may_have_parameters_of_their_own():
    results = [_of("a", _result("baseline", 0.1)), _of("b", _result("tse", 0.1))]
    assert mixed_settings(results, {"a": _job(0), "b": _job(0, threshold=0.7)}) == []
    assert mixed_settings(results, {"a": _job(0), "b": _job(0, precision="bfloat16")}) == [
        "The methods were not trained alike, precision is float32 (BASELINE) and bfloat16 (TSE)."
    ]


# ---- many methods at once


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        # Worked by hand: 4 x .01, 3 x .02, 2 x .03 = .06, 1 x .04, which may not fall below .06.
        ([0.01, 0.04, 0.03, 0.02], [0.04, 0.06, 0.06, 0.06]),
        ([0.005, 0.011, 0.02, 0.04, 0.13], [0.025, 0.044, 0.06, 0.08, 0.13]),
        ([0.6, 0.5], [1.0, 1.0]),
        ([0.03, math.nan], [0.03, math.nan]),
        ([], []),
    ],
)
def test_holms_correction_is_the_one_worked_by_hand(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected, nan_ok=True)


def test_holms_correction_equals_its_step_down_procedure():
    """Reject the smallest while p <= level / (number left), at any level."""
    rng = random.Random(0)
    for _ in range(50):
        p_values = [rng.random() ** 3 for _ in range(rng.randint(1, 8))]
        corrected = holm(p_values)
        for level in (0.01, 0.05, 0.2, 0.7):
            rejected, left = set(), len(p_values)
            for place in sorted(range(len(p_values)), key=p_values.__getitem__):
                if p_values[place] > level / left:
                    break
                rejected.add(place)
                left -= 1
            assert {i for i, p in enumerate(corrected) if p <= level} == rejected


def test_the_p_value_is_scipys_and_agrees_with_the_interval():
    rng = random.Random(1)
    for count in (2, 3, 8):
        for shift in (0.0, 0.5, 2.0):
            values = [rng.gauss(shift, 1.0) for _ in range(count)]
            expected = stats.ttest_1samp(values, 0.0).pvalue
            assert paired_p(values) == pytest.approx(expected, rel=1e-9)
            low, high = paired_interval(values)
            assert (paired_p(values) < 0.05) == (low > 0 or high < 0)
    assert math.isnan(paired_p([1.0]))
    assert paired_p([1.0, 1.0]) == 0.0
    assert paired_p([0.0, 0.0]) == 1.0


def test_rows_hold_the_p_values_of_all_methods_of_their_own_comparison():
    gains = {"kd": (0.10, 0.11, 0.10), "cwd": (0.01, 0.02, 0.015), "tse": (0.0, 0.05, -0.04)}
    alone = (0.4, 0.5, 0.6)
    results = [_result("baseline", alone[seed], seed=seed) for seed in range(3)]
    for method, differences in gains.items():
        results += [
            _result(method, alone[seed] + gain, seed=seed) for seed, gain in enumerate(differences)
        ]
    rows = _rows(*results)
    plain = {m: stats.ttest_1samp(gains[m], 0.0).pvalue for m in gains}
    for method, factor in (("kd", 3), ("cwd", 2), ("tse", 1)):
        row = rows[method]
        assert row["val_gain_p"] == pytest.approx(plain[method], rel=1e-6)
        assert row["val_gain_p_holm"] == pytest.approx(factor * plain[method], rel=1e-6)
    assert math.isnan(rows["baseline"]["val_gain_p_holm"])
    assert [holds_among_all(rows[m], "val") for m in gains] == [True, False, False]
    assert verdict(rows["cwd"], "val") == "better"
    fewer = _rows(*[r for r in results if r["about"]["method"] in ("baseline", "cwd")])
    assert holds_among_all(fewer["cwd"], "val")


# ---- notes


def test_notes_of_several_seeds_are_said_once():
    results = [_result("tse", 0.5, seed=seed) for seed in range(3)]
    for result in results[:2]:
        result["about"]["notes"] = ["nothing was chosen"]
    (note,) = [text for text in notes_on(results) if "chosen" in text]
    assert note.endswith("nothing was chosen (seed 0, seed 1)")
    assert notes_on([_result("kd", 0.5)]) == []
