"""What a served network takes, and what it says of the rest."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from numpy.testing import assert_array_equal
from PIL import Image

import rdd_pipeline
from rdd_pipeline.serving.loader import ServedNetwork, _load_pyfunc
from tests.serving.conftest import make_network

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)


def encoded(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


FILES = [encoded(image) for image in IMAGES]
TEXTS = [base64.b64encode(file).decode() for file in FILES]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_network(tmp_path_factory.mktemp("served") / "0.safetensors")


@pytest.fixture(scope="module")
def served(path) -> ServedNetwork:
    return _load_pyfunc(str(path))


@pytest.fixture(scope="module")
def expected(path) -> np.ndarray:
    model = rdd_pipeline.load(path)
    return np.stack([model(image) for image in IMAGES])


@pytest.mark.parametrize(
    "given",
    [
        IMAGES,
        IMAGES.astype(np.int64),  # what JSON makes of an array
        FILES,
        TEXTS,
        np.array(TEXTS),
        np.array(FILES, dtype=object),
        pd.DataFrame({"image": FILES}),
        pd.DataFrame({"image": TEXTS}),
        {"image": TEXTS},
        {"image": np.array(TEXTS)},
        {"image": IMAGES},
    ],
    ids=[
        *("array", "integers", "bytes", "base64", "array of base64", "array of bytes"),
        *("table of bytes", "table of base64", "mapping", "mapping of array", "images by name"),
    ],
)
def test_arrays_and_encoded_images_give_the_masks_of_the_network(served, expected, given):
    assert_array_equal(np.stack(served.predict(given)), expected)


def test_encoded_images_may_differ_in_size(served):
    masks = served.predict([FILES[0], encoded(IMAGES[1][:33, :20])])
    assert [mask.shape for mask in masks] == [(40, 56), (33, 20)]
    assert served.predict(TEXTS[0])[0].shape == (40, 56)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (IMAGES[0], r"array of shape \(40, 56, 3\), expected images as an array \(N, H, W, 3\)"),
        (IMAGES[..., :2], r"shape \(2, 40, 56, 2\) and type uint8, expected"),
        (IMAGES[:0], r"shape \(0, 40, 56, 3\)"),
        (IMAGES.astype(np.int64) + 300, r"expected 0\.\.255"),
        (IMAGES / 255, r"of type float64, expected 0\.\.255"),
        ([], "The input is empty"),
        (["no base64!"], "Image 1 is no base64"),
        ([TEXTS[0], base64.b64encode(b"text").decode()], "cannot be decoded|no image|not"),
        ([FILES[0], 3], "Image 2 is int, expected"),
        (pd.DataFrame({"photo": FILES}), r"has the columns \['photo'\], expected"),
        (None, "The input is no list"),
    ],
)
def test_what_is_no_image_is_a_bad_request_with_a_reason(served, given, reason):
    with pytest.raises(MlflowException, match=reason) as info:
        served.predict(given)
    assert info.value.get_http_status_code() == 400
