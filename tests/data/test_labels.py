from __future__ import annotations

import pytest

from rdd_pipeline.data.labels import FORBIDDEN, LabelSet, make_color_lookup, make_lookup
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.data.layouts.scenes import SCENES


def test_camvid_has_eleven_classes_and_ignores_the_twelfth_value():
    assert CAMVID.num_classes == 11
    assert CAMVID.names[0] == "Sky"
    assert CAMVID.names[10] == "Bicyclist"
    assert CAMVID.lookup[:12] == (*range(11), 255)
    assert set(CAMVID.lookup[12:]) == {FORBIDDEN}


def test_scenes_have_camvids_classes():
    assert SCENES.names == CAMVID.names
    assert SCENES.lookup == CAMVID.lookup
    assert SCENES.name == "scenes"


def test_survives_json():
    assert LabelSet.model_validate_json(CAMVID.model_dump_json()) == CAMVID


def test_make_lookup_forbids_what_is_not_named():
    lookup = make_lookup({7: 0, 8: 1}, ignored=(0, 9))
    assert lookup[7:10] == (0, 1, 255)
    assert lookup[0] == 255
    assert lookup.count(FORBIDDEN) == 252


LOOKUP = make_lookup({0: 0, 1: 1})
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": (), "colors": ()}, "0 classes"),
        ({"names": ("a", "a")}, "names a class twice"),
        ({"colors": (RED,)}, "2 classes but 1 colors"),
        ({"class_weights": (1.0,)}, "2 classes but 1 class weights"),
        ({"lookup": LOOKUP[:-1]}, "256 entries"),
        ({"lookup": make_lookup({0: 0, 1: 2})}, r"\[2\]"),
        ({"class_weights": (1.0, -1.0)}, "greater than 0"),
    ],
)
def test_refuses_parts_that_do_not_fit(change: dict[str, object], message: str):
    parts: dict[str, object] = {"name": "two", "names": ("a", "b"), "colors": (RED, BLUE)}
    with pytest.raises(ValueError, match=message):
        LabelSet.model_validate(parts | {"lookup": LOOKUP} | change)


def test_mask_values_are_the_first_of_each_class():
    assert SCENES.mask_values == tuple(range(11))
    several = LabelSet(
        name="a", names=("x", "y"), colors=(RED, BLUE), lookup=make_lookup({9: 1, 4: 0, 5: 0})
    )
    assert several.mask_values == (4, 9)
    lookup = make_color_lookup({BLUE: 1, RED: 0, (9, 9, 9): 1}, ignored=((0, 0, 0),))
    assert several.model_copy(update={"lookup": lookup}).mask_values == (RED, BLUE)
