"""Objects as pixels, against other ways to compute the same."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.shapes import (
    bitmap,
    brush_runs,
    coco_runs,
    corners,
    ellipse,
    filled,
    inside,
)
from tests.importing.exports import brush, packed_runs, png, runs

SIZE = (23, 31)
RNG = np.random.default_rng(0)


def test_a_polygon_holds_the_pixels_whose_centers_are_in_it():
    centers = np.stack(np.meshgrid(np.arange(31) + 0.5, np.arange(23) + 0.5), -1).reshape(-1, 2)
    for _ in range(50):
        # Sorted by angle: the outline does not cross itself.
        angles = np.sort(RNG.uniform(0, 2 * np.pi, RNG.integers(3, 9)))
        radii = RNG.uniform(2, 25, len(angles))  # some of it is outside of the image
        points = np.stack([15 + radii * np.cos(angles), 11 + radii * np.sin(angles)], 1)
        wanted = Outline(points).contains_points(centers).reshape(SIZE)
        assert (inside([(x, y) for x, y in points], SIZE) == wanted).all()


def test_neighbors_that_share_an_edge_share_no_pixel_and_leave_none():
    for x in (10.0, 10.5, 10.25):
        left = inside([(0, 0), (x, 0), (x, 23), (0, 23)], SIZE)
        right = inside([(x, 0), (31, 0), (31, 23), (x, 23)], SIZE)
        assert not (left & right).any()
        assert (left | right).all()


def test_a_filled_polygon_has_its_corners():
    mask = filled([(2, 3), (6, 3), (6, 5), (2, 5)], SIZE)
    wanted = np.zeros(SIZE, bool)
    wanted[3:6, 2:7] = True
    assert (mask == wanted).all()
    assert filled([(4, 4)], SIZE).sum() == 1
    assert not filled([], SIZE).any()


def test_an_ellipse_has_about_its_area():
    assert ellipse((50, 40), (30, 20), (80, 100)).sum() == pytest.approx(np.pi * 600, rel=0.01)


def masks() -> list[Any]:
    found = [np.zeros(SIZE, bool), np.ones(SIZE, bool)]
    found += [RNG.random(SIZE) < share for share in (0.03, 0.5, 0.97)]
    block = np.zeros(SIZE, bool)
    block[5:20, 3:30] = True
    return [*found, block]


@pytest.mark.parametrize("mask", masks())
def test_run_lengths_are_read_back(mask):
    lengths = runs(mask)
    for counts in (lengths, packed_runs(lengths)):
        found = coco_runs({"counts": counts, "size": list(SIZE)}, SIZE, "x.json")
        assert (found == mask).all()
    assert (brush_runs(brush(mask), SIZE, "x.json") == mask).all()


def test_packed_run_lengths_by_hand():
    # By hand: runs 6 2 3 2 7; from the fourth on less the last but one: 6 2 3 0 4; plus 48.
    mask = np.zeros((5, 4), bool)
    mask[1:3, 1:3] = True
    assert (coco_runs({"counts": "62304", "size": [5, 4]}, (5, 4), "x") == mask).all()


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"counts": [10], "size": [100_000, 100_000]}, "100000 x 100000 pixels for an image of"),
        ({"counts": [10**12, 5], "size": [23, 31]}, "1,000,000,000,005 pixels for an image of 713"),
        ({"counts": [700, -20, 33], "size": [23, 31]}, "pixels for an image of"),
        ({"counts": [5], "size": [23, 31]}, "5 pixels for an image of 713"),
        ({"counts": "~~~", "size": [23, 31]}, "cannot be read"),
        ({"counts": "o" * 1000, "size": [23, 31]}, "cannot be read"),
        ({"counts": None, "size": [23, 31]}, "cannot be read"),
        ({"size": [23, 31]}, "cannot be read"),
        ([1, 2], "cannot be read"),
    ],
)
def test_run_lengths_that_claim_more_than_the_image_are_refused(rle, message):
    with pytest.raises(DataProblem, match=message):
        coco_runs(rle, SIZE, "x.json")


@pytest.mark.parametrize(
    "rle",
    [[], [300], [255] * 8, brush(np.ones((50, 50), bool)), brush(masks()[3])[:-40], "abc", None,
     [0] * 40],
)  # fmt: skip
def test_brush_strokes_that_do_not_fit_are_refused(rle):
    with pytest.raises(DataProblem, match="brush strokes that cannot be read"):
        brush_runs(rle, SIZE, "x.json")


def test_brush_strokes_that_go_on_behind_the_image_are_refused():
    bits = f"{713 * 4:032b}" + f"{7:05b}" + f"{15:04b}" * 4 + "1" + "00" + "1" * 16 + "1" * 8
    bits += "0" * (-len(bits) % 8)
    data = [int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)]
    with pytest.raises(DataProblem, match="more than 2,852 values"):
        brush_runs(data, SIZE, "x.json")


def encoded(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def test_a_bitmap_is_cut_at_the_edges_of_the_image():
    alpha = np.full((10, 12, 4), 255, np.uint8)
    for origin in ((-4, -3), (25, 18), (40, 2), (3, 5)):
        mask = bitmap(encoded(png(alpha)), list(origin), SIZE, "x.json")
        rows, columns = np.ogrid[:23, :31]
        x, y = origin
        wanted = (rows >= y) & (rows < y + 10) & (columns >= x) & (columns < x + 12)
        assert (mask == wanted).all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4)])
def test_what_is_not_empty_in_a_bitmap_counts(shape):
    pixels = np.zeros(shape, np.uint8)
    (pixels if len(shape) == 2 else pixels[..., 3])[2:4, 1:4] = 255
    assert bitmap(encoded(png(pixels)), [0, 0], SIZE, "x").sum() == 6


@pytest.mark.parametrize(
    ("data", "origin", "message"),
    [
        (encoded(b"\0" * 50_000_000), [0, 0], "unpacks to over"),
        (encoded(png(np.zeros((900, 900), np.uint8))), [0, 0], "900 x 900 pixels for an image"),
        (encoded(b"no picture"), [0, 0], "cannot be read"),
        ("%%%", [0, 0], "cannot be read"),
        (None, [0, 0], "cannot be read"),
        (encoded(png(np.zeros((9, 9), np.uint8))), None, "cannot be read"),
        (encoded(png(np.zeros((9, 9), np.uint8))), [1e400, 0], "cannot be read"),
    ],
)
def test_bitmaps_that_are_none_or_too_large_are_refused(data, origin, message):
    with pytest.raises(DataProblem, match=message):
        bitmap(data, origin, SIZE, "x.json")


@pytest.mark.parametrize(
    "points",
    [[[1e9, 2]], [[float("nan"), 2]], [[float("inf"), 2]], [[1, 2, 3]], ["ab"], [None], 7,
     [["a", "b"]]],
)  # fmt: skip
def test_corners_that_are_absurd_are_refused(points):
    with pytest.raises(DataProblem, match="polygon"):
        corners(points, "x.json")
