"""Pictures inside HTML pages: small, exact where colors mean something, the same every time."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image

from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.reporting.thumbnails import BOX, WRONG, class_map, mistakes, photograph


def decoded(uri: str) -> Image.Image:
    head, _, content = uri.partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert head == f"data:image/{str(picture.format).lower()};base64"
    return picture


def test_a_photograph_fits_its_box_in_its_own_proportions_and_in_few_bytes():
    noise = torch.randint(0, 256, (3, 720, 960), generator=torch.manual_seed(0)).byte()
    assert decoded(photograph(noise)).size == BOX
    assert decoded(photograph(noise[:, :, :180])).size == (37, 150)
    assert len(photograph(noise)) < 24_000  # of what compresses worst
    assert photograph(noise) == photograph(noise.clone())
    small = torch.full((3, 5, 7), 90, dtype=torch.uint8)
    assert decoded(photograph(small)).size == (7, 5)
    assert abs(np.asarray(decoded(photograph(small))).astype(int) - 90).max() <= 1


def test_maps_keep_the_colors_of_their_classes():
    label = torch.arange(11).repeat_interleave(40).repeat(300, 1).byte()
    label[:20] = CAMVID.ignore_index
    picture = decoded(class_map(label, CAMVID))
    assert picture.size[0] == BOX[0]
    assert set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3))) == {
        *CAMVID.colors, (255, 255, 255),
    }  # fmt: skip
    assert len(class_map(label, CAMVID)) < 4000


def test_mistakes_are_colored_right_pixels_are_clear_and_ignored_ones_white():
    label = torch.tensor([[0, 1, 2], [255, 255, 4]]).byte()
    prediction = torch.tensor([[0, 3, 2], [1, 255, 5]])
    pixels = np.asarray(decoded(mistakes(prediction, label, 255)).convert("RGBA"))
    clear, white, wrong = 0, (255, 255, 255, 255), (*WRONG, 255)
    assert pixels[0, 0, 3] == pixels[0, 2, 3] == clear
    assert tuple(pixels[0, 1]) == tuple(pixels[1, 2]) == wrong
    assert tuple(pixels[1, 0]) == tuple(pixels[1, 1]) == white
