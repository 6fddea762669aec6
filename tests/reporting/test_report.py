from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from typing import Any

import pytest

from rdd_pipeline.reporting.comparison import Metrics, compare, compare_classes
from rdd_pipeline.reporting.report import (
    Picture,
    gain_text,
    mean_text,
    millions,
    number,
    render_report,
    size_text,
)

NAN = math.nan
VOID = {"meta", "img", "br", "link"}


class _Page(HTMLParser):
    """Tables, text and references of a page; tags that are not closed in order are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.references: list[str] = []
        self.classes: dict[str, str] = {}
        self.text = ""
        self._open: list[str] = []
        self._cell: str | None = None
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.references += [str(found[name]) for name in ("src", "href") if name in found]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._cell = ""
            self._class = found.get("class") or ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append(self._cell.strip())
            self.classes[self._cell.strip()] = self._class
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "script"):
            return
        self.text += data
        if self._cell is not None:
            self._cell += data


def _result(
    method: str, miou: float, *, seed: int = 0, title: str = "", comparison: str = "c"
) -> Metrics:
    return {
        "about": {
            "method": method,
            "title": title or method.upper(),
            "network": "net",
            "seed": str(seed),
            "protocol_digest": "" if method == "teacher" else comparison,
            "data_digest": "d",
            "fingerprint": f"{method}-{seed}",
        },
        "splits": {"val": {"miou": miou, "iou": {"Car": miou, "Pole": None}}},
        "cost": {
            "parameters": 519_000,
            "macs": 2_500_000_000,
            "trained_parameters": 600_000,
            "trained_macs": 3_000_000_000,
        },
        "version": "2026",
    }


def _page(*results: Metrics, jobs: Any = None, pictures: Any = ()) -> _Page:
    html = render_report(
        compare(results),
        compare_classes(results),
        results=results,
        jobs=jobs or {},
        pictures=pictures,
    )
    return _Page(html)


THREE = [
    *(_result("baseline", score, seed=i) for i, score in enumerate([0.4, 0.5, 0.6])),
    *(_result("kd", score, seed=i) for i, score in enumerate([0.5, 0.61, 0.7])),
    *(_result("tse", score, seed=i) for i, score in enumerate([0.3, 0.51, 0.7])),
    _result("teacher", 0.8),
]


def test_the_table_says_mean_spread_interval_and_verdict():
    page = _page(*THREE)
    head, *body = page.tables[0]
    assert head[:4] == ["method", "seeds", "val mIoU", "val − student alone"]
    rows = {line[0]: line for line in body}
    assert list(rows) == ["TEACHER · net", "KD", "TSE", "BASELINE"]
    assert rows["KD"][1:4] == ["3", "60.33* (10.02)", "+10.33 ± 1.43"]
    assert rows["TSE"][3].endswith("n.s.")
    assert rows["BASELINE"][3] == "–"
    assert rows["KD"][-4:] == ["–", "–", "0.52 M", "2.50 G"]
    assert head[-4:] == ["val boundary mIoU", "val ECE", "parameters", "MACs"]
    (training,) = (table for table in page.tables if "images/s" in table[0])
    assert training[2] == ["KD", "–", "–", "–", "0.60 M", "3.00 G"]
    assert "better" in page.classes["+10.33 ± 1.43"]
    assert "open" in page.classes[rows["TSE"][3]]


def test_what_a_network_takes_in_use_is_in_the_table_where_it_was_measured():
    results = [_result("teacher", 0.8), _result("kd", 0.5)]
    results[1]["splits"]["val"] |= {"boundary_miou": 0.25, "calibration_error": 0.1}
    ways = (("eager", 9.0), ("onnx", 3.0), ("int8", 1.0))
    speeds = [
        {
            "method": "kd",
            "network": "net",
            "runtime": r,
            "device": "cpu",
            "threads": 1,
            "latency": t,
        }
        for r, t in ways
    ]
    html = render_report(compare(results), [], results=results, jobs={}, pictures=[], speeds=speeds)
    head, teacher, kd = _Page(html).tables[0]
    assert head[-5:] == ["val boundary mIoU", "val ECE", "parameters", "MACs", "latency"]
    assert kd[-5:] == ["25.00", "10.00", "0.52 M", "2.50 G", "3.0 ms"]
    assert teacher[-1] == "–"
    assert "int8 on cpu, 1 thread: 1.0 ms" in html


def test_weights_on_the_way_are_no_method():
    page = _page(*THREE, _result("tfe", 0.4))
    assert "TFE" not in {line[0] for table in page.tables[:2] for line in table}
    assert "TFE" in {line[0] for line in _page(_result("tfe", 0.4)).tables[0]}


def test_classes_have_a_table_of_their_own_without_those_that_never_occur():
    page = _page(*THREE)
    assert page.tables[1][0] == ["method", "Car"]
    assert ["KD", "60.3"] in page.tables[1]


def test_differences_that_do_not_hold_among_all_methods_are_marked_and_stand_out_no_more():
    # A fourth of the same differences: clear by itself (p = .03), not as one of three (.06).
    weak = [_result("cwd", s, seed=i) for i, s in enumerate((0.41, 0.52, 0.615))]
    page = _page(*THREE, *weak)
    rows = {line[0]: line for line in page.tables[0][1:]}
    assert rows["CWD"][3] == "+1.50 ± 1.24 (n.s.)"
    assert page.classes["+1.50 ± 1.24 (n.s.)"] == "number open"
    assert page.classes["+10.33 ± 1.43"] == "number better"
    words = " ".join(page.text.split())
    assert "2 miss 0, 1 with all 3 counted (Holm)" in words
    for limit in ("one teacher taught all seeds", "chosen by their scores on val"):
        assert limit in words


def test_what_trainings_noted_and_which_classes_a_mean_lacks_stand_below_the_table():
    noted = _result("tse", 0.5)
    noted["about"]["notes"] = ["class <Pole> got no chosen pixels"]
    words = " ".join(_page(_result("baseline", 0.4), noted).text.split())
    assert "TSE: class <Pole> got no chosen pixels" in words
    assert "* val: the mean is over 1 of 2 classes; neither labels nor predictions have" in words


def test_nothing_is_fetched_from_elsewhere():
    page = _page(*THREE, pictures=[Picture("Bars", "what they show", b"<svg/>")])
    assert page.references == ["data:image/svg+xml;base64,PHN2Zy8+"]
    assert "what they show" in page.text


def test_names_cannot_inject_anything():
    evil = '<script>alert("x")</script>'
    html = render_report(
        compare([_result("kd", 0.5, title=evil)]),
        [],
        results=[_result("kd", 0.5, title=evil)],
        jobs={},
        pictures=[Picture(evil, evil, b"")],
    )
    assert "<script>alert" not in html
    assert html.count("<script>") == 1
    assert evil in _Page(html).text


def test_recipe_data_and_network_come_from_the_job():
    job = {
        "labels": {"name": "scenes"},
        "recipe": {"iterations": 500, "augment": {"crop": [96, 128]}},
        "network": {"name": "net"},
        "image_size": [240, 320],
        "precision": "bfloat16",
    }
    page = _page(*THREE, jobs={"kd-0": job})
    facts = dict(line for table in page.tables[2:4] for line in table)
    assert facts["data set"] == "scenes"
    assert facts["digest of images, labels and evaluation"] == "d"
    assert facts["image size"] == "240 x 320"
    assert facts["precision"] == "bfloat16"
    assert facts["seeds"] == "3 for each method (0, 1, 2)"
    assert facts["methods"] == "3"
    assert facts["recipe.augment.crop"] == "96, 128"
    assert dict(_page(*THREE).tables[2])["data set"] == "not recorded"


def test_results_that_were_not_trained_alike_are_warned_of():
    jobs = {"kd-0": {"rdd": {"mode": "or"}}, "kd-1": {"rdd": {"mode": "xor"}}}
    assert "KD: the seeds were not trained alike, rdd.mode is or" in _page(*THREE, jobs=jobs).text
    assert "not trained alike" not in _page(*THREE).text


def test_the_guide_speaks_of_the_seeds_that_are_there():
    one, three = _page(_result("baseline", 0.5), _result("kd", 0.6)), _page(*THREE)
    assert "there is one seed of everything here" in one.text
    assert "there are at most 3 here" in three.text
    assert "2 intervals of 95 %" in three.text
    assert "0.1 of them would be expected" in three.text
    assert "of 95 %: were no method" not in one.text


def test_it_says_how_to_get_the_same_again():
    page = _page(*THREE)
    for command in (
        "kedro run --pipeline=distill_baselines --params=seed=0,seeds=3",
        "kedro run --pipeline=distill_tse --params=seed=0,seeds=3",
        "kedro run --pipeline=evaluation",
    ):
        assert command in page.text
    apart = _page(
        *(_result("tse_cwd", 0.5, seed=seed) for seed in (0, 7)),
        _result("rdd_or", 0.5, seed=4),
    )
    for command in (
        "kedro run --pipeline=distill_rdd_plus --params=seed=7",
        "kedro run --pipeline=ablations --params=seed=4",
    ):
        assert command in apart.text
    old = _result("kd", 0.11)
    singles = _page(old, *THREE).tables[-1]
    assert singles[0] == ["method", "network", "seed", "val", "iteration", "fingerprint", "version"]
    assert ["KD", "net", "0", "50.00", "", "kd-0", "2026"] in singles
    assert not any("11.00" in line for line in singles)  # a newer one has taken its place


def test_commands_have_the_environment_and_parameters_of_their_training():
    own, other = _result("kd", 0.5), _result("cwd", 0.5)
    session = {"env": "fruit", "params": {"data.path": "/a b", "recipe.iterations": 5}}
    own["about"]["session"] = json.dumps(session)
    text = _page(own, other).text
    assert (
        "kedro run --pipeline=distill_baselines --env=fruit "
        "'--params=data.path=/a b,recipe.iterations=5,seed=0'"
    ) in text
    assert "kedro run --pipeline=distill_baselines --params=seed=0" in text


def test_every_comparison_has_a_block_and_an_imported_teacher_needs_no_seed():
    teacher = _result("teacher", 0.8)
    teacher["about"]["seed"] = ""
    page = _page(teacher, _result("kd", 0.5), _result("kd", 0.4, comparison="x"))
    assert "2 comparisons" in page.text
    assert "1. net" in page.text
    assert "2. net" in page.text
    alone = _page(teacher)
    assert "none" in dict(alone.tables[2])["seeds"]
    assert alone.text.count("kedro run") == 1


# ---- numbers as text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(1.005, 1), "1.0"),
        (number(NAN), "–"),
        (number(None), "–"),
        (size_text(1.2e9, "B"), "1.20 GB"),
        (size_text(1_500), "1.50 k"),
        (size_text(12.0), "12"),
        (size_text(NAN, "B"), "–"),
        (millions(518_900), "0.52 M"),
        (millions(NAN), "–"),
        (mean_text({"val_score": 50.0, "val_sd": NAN}, "val"), "50.00"),
        (mean_text({"val_score": 50.0, "val_sd": 0.5}, "val"), "50.00 (0.50)"),
        (mean_text({}, "val"), "–"),
        (gain_text({}, "val"), "–"),
        (gain_text({"val_gain": -1.0, "val_gain_low": NAN}, "val"), "-1.00"),
        (
            gain_text({"val_gain": 1.0, "val_gain_low": -0.5, "val_gain_high": 2.5}, "val"),
            "+1.00 ± 1.50 n.s.",
        ),
    ],
)
def test_numbers_as_text(text: str, expected: str):
    assert text == expected
