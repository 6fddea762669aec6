"""Names as MLflow takes them."""

from __future__ import annotations

from itertools import product

from mlflow.utils.validation import _validate_metric, _validate_param, _validate_tag

from rdd_pipeline.tracking import TrackingWriter
from rdd_pipeline.tracking.records import clean_name
from tests.tracking.fakes import FakeClient, sent


def test_names_are_made_fit_for_mlflow(client: FakeClient, writer: TrackingWriter) -> None:
    writer.metrics("run", {"iou@50% (car)": 1.0})
    assert sent(writer)
    assert client.points() == [("iou_x40_50_x25_ _x28_car_x29_", 1.0, 0)]
    assert len(clean_name("x" * 300)) == 250


ORDINARY = [
    "val.iou.road",
    "aux/loss",
    "seed_1.val.miou",
    "Straße nass",
    "a_x",
    "_x2",
    "deep_xception41",
]
ODD = [
    *("road (wet)", "road [wet]", "road {wet}", "road _wet_", "road _x28_wet_x29_", "_x28_", "("),
    *("(x28_", "_x28(", "_x5f_x28_", "_(x28_", "__x28_", "/a", "a/", "a//b", "a/./b", "a/../b"),
    *(
        ".",
        "..",
        "../a",
        "a_x2f_b",
        "x=1,",
        "a:b",
        "😀",
        "_x1f600_",
        "é",
        "e\u0301",
        "a\tb",
        "a\nb",
    ),
    *("x" * 300, "x" * 299 + "y", "(" * 50, "(" * 49 + "["),
]


def test_every_name_gets_one_of_its_own_and_ordinary_ones_stay() -> None:
    assert [clean_name(name) for name in ORDINARY] == ORDINARY
    names = {*ORDINARY, *ODD}
    written = [clean_name(name) for name in names]
    assert len(set(written)) == len(names)
    for name in written:  # by MLflow's own rules
        _validate_metric(name, 0.0, 0, 0)
        _validate_param(name, "")
        _validate_tag(name, "")


def test_no_two_of_all_short_names_share_one() -> None:
    """All names of up to six characters over an alphabet in which escapes can be written."""
    names = ["".join(word) for n in range(1, 7) for word in product("_x28(", repeat=n)]
    assert len({clean_name(name) for name in names}) == len(names)
