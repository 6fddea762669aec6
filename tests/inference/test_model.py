from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import rdd_pipeline
from rdd_pipeline.data.layouts.base import distinct_colors
from rdd_pipeline.errors import DataProblem, UserError
from rdd_pipeline.inference.model import AUTO_WINDOW, Model, window_for
from rdd_pipeline.networks import save_checkpoint
from tests.inference.conftest import COLORS, LABELS, checkpoint


@pytest.fixture(scope="module")
def model(file) -> Model:
    return rdd_pipeline.load(file, device="cpu")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    noise = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(noise, size=(50, 71), mode="bilinear")
    return (255 * smooth[0]).to(torch.uint8).permute(1, 2, 0).numpy()


def naive(model: Model, image: np.ndarray) -> torch.Tensor:
    """(C, H, W) logits, without the code under test."""
    network, fed = checkpoint().build(), model.preprocessing
    inputs = (torch.from_numpy(image).float() - torch.tensor(fed.mean)) / torch.tensor(fed.std)
    with torch.no_grad():
        logits = network(inputs.permute(2, 0, 1)[None]).logits
    return F.interpolate(logits, size=image.shape[:2], mode="bilinear", align_corners=True)[0]


def test_two_lines_give_the_mask_of_the_evaluated_network(model, image):
    expected = naive(model, image).argmax(0).numpy()
    mask = model(image)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, expected)
    assert len(np.unique(mask)) > 1
    assert model.label_names == LABELS
    assert model.provenance == {"seed": "0"}
    assert not model.network.training


def test_probabilities_and_confidence_have_the_size_of_the_image(model, image):
    found = model.predict(image, probabilities=True)
    expected = naive(model, image).softmax(0).numpy()
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.confidence, expected.max(0), rtol=1e-4)
    assert np.array_equal(found.mask, expected.argmax(0))
    assert model.predict(image).probabilities is None


def test_scales_and_flips_average_probabilities(model, image):
    both = model.predict(image, probabilities=True, flip=True).probabilities
    mirrored = model.predict(image[:, ::-1], probabilities=True, flip=True).probabilities
    np.testing.assert_allclose(both, mirrored[:, :, ::-1], atol=1e-4)
    scaled = model.predict(image, probabilities=True, scales=(0.5, 1.0, 2.0)).probabilities
    np.testing.assert_allclose(scaled.sum(0), 1, atol=1e-5)
    assert not np.allclose(scaled, both)


def test_a_window_as_large_as_the_image_is_the_image(model, image):
    whole = model.predict(image, probabilities=True, window=None)
    for window in (71, (50, 71), 1000, "auto"):
        found = model.predict(image, probabilities=True, window=window)
        assert np.array_equal(found.probabilities, whole.probabilities)


def test_what_else_may_be_wrong_is_one_line_too(model, file):
    with pytest.raises(UserError, match="precision is 'float16', expected auto"):
        rdd_pipeline.load(file, device="cpu", precision="float16")
    with pytest.raises(UserError, match="home directory"):
        rdd_pipeline.load("~nobody of that name/x")
    with pytest.raises(UserError, match="nobody"):
        model("~nobody of that name/x.png")
    with pytest.raises(UserError, match="holds no image"):
        model(np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"expected 0\.\.255"):
        model(torch.zeros(3, 4, 4, dtype=torch.bfloat16))


def test_only_large_images_get_a_window_by_themselves():
    assert window_for((1024, 2048), "auto") is None
    assert window_for((6000, 6000), "auto") == AUTO_WINDOW
    assert window_for((6000, 6000), None) is None
    assert window_for((5, 5), 3) == (3, 3)
    with pytest.raises(UserError, match="window is 0 x 0"):
        window_for((5, 5), 0)


@pytest.mark.parametrize(
    "given",
    [
        *({"overlap": value} for value in (1.0, math.nan)),
        *({"scales": value} for value in ((), (0.0,), (math.nan,), (math.inf,))),
        *({"window": value} for value in (1.5, "x", (1, 2, 3), (True, 2))),
    ],
)
def test_arguments_out_of_range_are_refused(model, image, given):
    with pytest.raises(UserError, match=next(iter(given))):
        model.predict(image, **given)


# ---- kinds of images


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image: np.ndarray) -> Image.Image:
    """Lies on its side, and EXIF says so."""
    picture = Image.fromarray(np.rot90(image).copy())
    picture.getexif()[0x0112] = 6
    return picture


def test_a_path_bytes_a_picture_an_array_and_a_tensor_are_the_same_image(model, image, tmp_path):
    picture = Image.fromarray(image)
    path = tmp_path / "a.png"
    picture.save(path)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    alpha = picture.copy()
    alpha.putalpha(Image.fromarray(image[..., 0]))
    mask = model(image)
    many = [
        *(path, str(path), path.read_bytes(), picture, picture.convert("RGBA"), alpha, tensor),
        *(np.asarray(alpha), image.astype(np.int64), image.astype(np.uint16) << 8, turned(image)),
    ]
    for one in many:
        assert np.array_equal(model(one), mask), type(one)
    assert all(np.array_equal(one, mask) for one in model(many))


def test_a_path_may_begin_at_home(model, image, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(image).save(tmp_path / "a.png")
    assert np.array_equal(model("~/a.png"), model(image))


def test_gray_of_8_and_16_bits_are_the_same_image(model, image):
    gray = image[..., 0]
    mask = model(np.stack([gray] * 3, axis=-1))
    wide = Image.fromarray(gray.astype(np.uint16) << 8)
    for one in (
        *(
            gray,
            gray[..., None],
            torch.from_numpy(gray.copy()),
            torch.from_numpy(gray.copy())[None],
        ),
        *(Image.fromarray(gray), wide, encoded(wide, "PNG"), Image.fromarray(gray).convert("LA")),
    ):
        assert np.array_equal(model(one), mask), one


def test_the_picture_of_the_caller_stays_as_it_is(model, image):
    picture = turned(image)
    model(picture)
    assert picture.size == (50, 71)


def test_batches_keep_their_kind(model, image):
    mask, tensor = model(image), torch.from_numpy(image).permute(2, 0, 1)
    for batch in (np.stack([image] * 2), torch.stack([tensor] * 2)):
        found = model(batch)
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, np.stack([mask] * 2))
    assert model([]) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (33, 1), (7, 5)])
def test_images_of_a_few_pixels(model, shape):
    tiny = np.full((*shape, 3), 90, np.uint8)
    assert model(tiny).shape == shape
    assert model.predict(tiny, scales=(0.25, 1.0), flip=True, window=3).mask.shape == shape


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((4, 4, 3)), "values 0.0..0.0 of type float64"),
        (np.full((4, 4), 300), "values 300..300"),
        (np.zeros((3, 5, 5), np.uint8), r"array of shape \(3, 5, 5\), expected \(H, W, 3\)"),
        (torch.zeros(5, 5, 3), r"tensor of shape \(5, 5, 3\), expected \(3, H, W\)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (7, "is a int, expected a path"),
        (b"GIF89a...", "the image cannot be decoded"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(model, bad, message):
    with pytest.raises(UserError, match=message) as error:
        model(bad)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(model, tmp_path):
    with pytest.raises(DataProblem, match=r"none\.png cannot be read"):
        model(tmp_path / "none.png")


# ---- pictures


def test_masks_are_shown_in_the_colors_of_the_classes(model, image):
    mask = model(image)
    shown = np.asarray(model.colored(mask))
    assert np.array_equal(shown, np.array(COLORS, np.uint8)[mask])
    over = np.asarray(model.overlay(image, mask, opacity=0.5)).astype(int)
    assert np.abs(over - (image.astype(int) + shown) / 2).max() <= 1
    assert np.asarray(model.colored(np.full((1, 1), 255, np.uint8))).tolist() == [[[0, 0, 0]]]
    with pytest.raises(UserError, match="mask has 50 x 71 pixels, the image 5 x 71"):
        model.overlay(image[:5], mask)
    with pytest.raises(UserError, match="float64"):
        model.colored(np.zeros((2, 2)))


def test_a_file_without_colors_gets_distinct_ones(tmp_path):
    save_checkpoint(checkpoint(colors=None), tmp_path / "old.safetensors")
    model = rdd_pipeline.load(tmp_path / "old.safetensors")
    assert model.colors == distinct_colors(4)[1:]


# ---- files


def entry(root: Path, version: str, *seeds: int) -> None:
    folder = root / "student_tse" / version / "student_tse"
    for seed in seeds:
        save_checkpoint(checkpoint(seed), folder / f"{seed}.safetensors")


def test_a_folder_of_the_catalog_gives_its_newest_version(tmp_path):
    entry(tmp_path, "2026-01-01T00.00.00.000Z", 7)
    entry(tmp_path, "2026-01-02T00.00.00.000Z", 10, 9)
    (tmp_path / "student_tse" / "2026-01-03T00.00.00.000Z" / "student_tse").mkdir(parents=True)
    folder = tmp_path / "student_tse"
    assert rdd_pipeline.load(folder).provenance["seed"] == "9"
    assert rdd_pipeline.load(folder, seed=10).provenance["seed"] == "10"
    old = folder / "2026-01-01T00.00.00.000Z"
    assert rdd_pipeline.load(old).provenance["seed"] == "7"
    assert rdd_pipeline.load(old / "student_tse").provenance["seed"] == "7"
    with pytest.raises(UserError, match="seeds 9, 10, none of 3"):
        rdd_pipeline.load(folder, seed=3)
    with pytest.raises(UserError, match="folder without networks"):
        rdd_pipeline.load(tmp_path)


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_what_is_no_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Trap()}, "pickle.safetensors")
    for path in ("pickle.safetensors", "none.safetensors"):
        with pytest.raises(UserError, match=path.partition(".")[0]) as error:
            rdd_pipeline.load(path)
        assert "\n" not in str(error.value)
    assert not Path("trapped").exists()


def test_the_package_itself_stays_cheap():
    code = "import rdd_pipeline, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = rdd_pipeline.lode  # type: ignore[attr-defined]
