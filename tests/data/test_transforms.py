from __future__ import annotations

import colorsys
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from rdd_pipeline.config import AugmentParams
from rdd_pipeline.data.transforms import (
    ColorPlan,
    CropPlan,
    apply_colors,
    apply_crop,
    as_scale,
    draw_colors,
    draw_plan,
    scale_grid,
    scaled_length,
    source_window,
)
from rdd_pipeline.errors import DataProblem

SCALES = [Fraction(n, 10) for n in range(5, 21)]
PAD = (10.4, 20.0, 30.6)


def picture(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise over large shapes: what resizing errors show in most."""
    rng = np.random.default_rng(height * width)
    rough = rng.integers(0, 256, (3, height, width))
    large = np.kron(rng.integers(0, 256, (3, height // 5 + 1, width // 5 + 1)), np.ones((1, 5, 5)))
    image = torch.from_numpy((rough + large[:, :height, :width]) // 2).to(torch.uint8)
    mask = torch.from_numpy(rng.integers(0, 19, (height, width), dtype=np.uint8))
    return image, mask


def nearest_loop(mask: torch.Tensor, scale: Fraction) -> torch.Tensor:
    """Each scaled pixel's center, in exact arithmetic, one by one."""
    height, width = (scaled_length(side, scale) for side in mask.shape)
    rows = [int((row + Fraction(1, 2)) / scale) for row in range(height)]
    columns = [int((column + Fraction(1, 2)) / scale) for column in range(width)]
    return mask[rows][:, columns]


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_equals_resizing_the_whole_image_then_cropping(scale: Fraction):
    image, mask = picture(100, 140)
    whole = TF.resize(
        image, [scaled_length(100, scale), scaled_length(140, scale)],
        interpolation=InterpolationMode.BILINEAR, antialias=True,
    )  # fmt: skip
    whole_mask = nearest_loop(mask, scale)
    for top, left in ((0, 0), (7, 13), (whole.shape[1] - 32, whole.shape[2] - 48)):
        plan = CropPlan(scale, top, left, 32, 48, flip=False)
        crop, labels = apply_crop(image, mask, plan, pad_color=PAD)
        difference = (crop.int() - whole[:, top : top + 32, left : left + 48].int()).abs()
        assert difference.max() <= 2
        assert torch.equal(labels, whole_mask[top : top + 32, left : left + 48])


@pytest.mark.parametrize("size", [(97, 131), (61, 83), (50, 375)])
@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(7, 10), Fraction(13, 10), Fraction(2)])
def test_equals_scaling_by_the_same_factor_at_sizes_it_does_not_divide(
    size: tuple[int, int], scale: Fraction
):
    image, mask = picture(*size)
    factor = float(scale) * (1 + 1e-9)
    whole = F.interpolate(
        image[None], scale_factor=factor, mode="bilinear", antialias=True,
        recompute_scale_factor=False,
    )[0]  # fmt: skip
    rows, columns = whole.shape[1:]
    crop_size = (min(24, rows), min(40, columns))
    plan = CropPlan(scale, rows - crop_size[0], columns - crop_size[1], *crop_size, flip=False)
    crop, labels = apply_crop(image, mask, plan, pad_color=PAD)
    want = whole[:, plan.top :, plan.left :].int()
    assert (crop.int() - want).abs().max() <= 2
    assert torch.equal(labels, nearest_loop(mask, scale)[plan.top :, plan.left :])


def test_labels_equal_torchs_nearest_exact_away_from_ties():
    _, mask = picture(90, 120)
    scale = Fraction(4, 3)  # Centers never fall between two source pixels.
    plan = CropPlan(scale, 11, 5, 60, 60, flip=False)
    _, labels = apply_crop(picture(90, 120)[0], mask, plan, pad_color=PAD)
    whole = F.interpolate(mask[None, None], size=(120, 160), mode="nearest-exact")[0, 0]
    assert torch.equal(labels, whole[11:71, 5:65])


def test_reads_only_the_source_window():
    image, mask = picture(100, 140)
    plan = CropPlan(Fraction(2), 60, 80, 32, 48, flip=False)
    rows, columns = source_window(plan, 100, 140)
    assert (rows.stop - rows.start) <= 32 // 2 + 8
    assert (columns.stop - columns.start) <= 48 // 2 + 8
    crop, labels = apply_crop(image, mask, plan, pad_color=PAD)
    outside = torch.ones(100, 140, dtype=torch.bool)
    outside[rows, columns] = False
    image[:, outside], mask[outside] = 0, 99
    again, labels_again = apply_crop(image, mask, plan, pad_color=PAD)
    assert torch.equal(again, crop)
    assert torch.equal(labels_again, labels)


def test_scale_one_copies_pixels():
    image, mask = picture(20, 30)
    crop, labels = apply_crop(
        image, mask, CropPlan(Fraction(1), 3, 4, 10, 12, flip=False), pad_color=PAD
    )
    assert torch.equal(crop, image[:, 3:13, 4:16])
    assert torch.equal(labels, mask[3:13, 4:16])


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(1), Fraction(3, 2)], ids=str)
def test_pads_at_the_bottom_and_the_right(scale: Fraction):
    image, mask = picture(20, 30)
    height, width = scaled_length(20, scale), scaled_length(30, scale)
    plan = CropPlan(scale, 0, 0, height + 5, width + 3, flip=False)
    crop, labels = apply_crop(image, mask, plan, pad_color=PAD, ignore_index=254)
    assert crop.shape == (3, height + 5, width + 3)
    assert (labels[height:] == 254).all()
    assert (labels[:, width:] == 254).all()
    assert (labels[:height, :width] < 19).all()
    assert crop[:, -1, 0].tolist() == [10, 20, 31]
    assert crop[:, 0, -1].tolist() == [10, 20, 31]


def test_flip_mirrors_image_labels_and_padding():
    image, mask = picture(20, 30)
    plain = CropPlan(Fraction(7, 10), 0, 0, 24, 28, flip=False)
    crop, labels = apply_crop(image, mask, plain, pad_color=PAD)
    flipped, flipped_labels = apply_crop(image, mask, plain._replace(flip=True), pad_color=PAD)
    assert torch.equal(flipped, crop.flip(-1))
    assert torch.equal(flipped_labels, labels.flip(-1))


def test_memory_layout_does_not_matter():
    image, mask = picture(40, 50)
    plan = CropPlan(Fraction(13, 10), 5, 6, 30, 30, flip=False)
    last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(
        apply_crop(image, mask, plan, pad_color=PAD)[0],
        apply_crop(last, mask, plan, pad_color=PAD)[0],
    )


def test_scale_grid_includes_both_ends():
    assert [float(s) for s in scale_grid(0.5, 2.0, 0.1)] == [n / 10 for n in range(5, 21)]
    assert scale_grid(1.0, 1.0, 0.1) == (Fraction(1),)
    assert scale_grid(0.75, 1.5, 0.25) == (
        Fraction(3, 4), Fraction(1), Fraction(5, 4), Fraction(3, 2),
    )  # fmt: skip


def test_continuous_scales_are_within_one_percent():
    for value in np.random.default_rng(0).uniform(0.5, 2.0, 200):
        assert abs(as_scale(value) / Fraction(value) - 1) < 0.05 / value
        assert as_scale(value).denominator <= 20
    assert as_scale(0.001) > 0


AUGMENT = AugmentParams(crop=(16, 24))


def test_plans_cover_scales_positions_and_flips_evenly():
    plans = [draw_plan(np.random.default_rng(seed), 20, 30, AUGMENT) for seed in range(3000)]
    counts = {scale: sum(plan.scale == scale for plan in plans) for scale in SCALES}
    assert len(counts) == 16
    assert all(130 < count < 250 for count in counts.values())
    assert 1400 < sum(plan.flip for plan in plans) < 1600
    double = [plan for plan in plans if plan.scale == 2]
    assert {plan.top for plan in double} == set(range(40 - 16 + 1))
    assert max(plan.left for plan in double) == 60 - 24
    assert all(plan.top == plan.left == 0 for plan in plans if plan.scale == Fraction(1, 2))


def test_flip_probability_zero_and_one():
    for probability in (0.0, 1.0):
        augment = AugmentParams(crop=(8, 8), flip=probability)
        flips = {draw_plan(np.random.default_rng(s), 20, 30, augment).flip for s in range(50)}
        assert flips == {bool(probability)}


def test_an_image_that_scales_to_nothing_is_refused():
    augment = AugmentParams(crop=(8, 8), scale_min=0.5, scale_max=0.5)
    with pytest.raises(DataProblem, match=r"5 x 1 pixels .*scale 0\.5.*scale_min"):
        draw_plan(np.random.default_rng(0), 1, 5, augment)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 200)])
def test_tiny_images_give_full_crops(size: tuple[int, int]):
    image, mask = picture(*size)
    augment = AugmentParams(crop=(16, 24), scale_min=1.0, scale_max=2.0)
    for seed in range(20):
        plan = draw_plan(np.random.default_rng(seed), *size, augment)
        crop, labels = apply_crop(image, mask, plan, pad_color=PAD)
        assert crop.shape == (3, 16, 24)
        assert labels.shape == (16, 24)


# ---- colors

SAME = ColorPlan(1.0, 1.0, 1.0, 0.0, contrast_first=True)


def by_hand(pixel: np.ndarray, gray: float, plan: ColorPlan) -> np.ndarray:
    """One pixel in floating point; `gray`: the image's mean."""

    def mix(values: np.ndarray, other: float, factor: float) -> np.ndarray:
        return np.clip(factor * values + (1 - factor) * other, 0, 255)

    def contrast(values: np.ndarray) -> np.ndarray:
        return mix(values, gray, plan.contrast)

    def rest(values: np.ndarray) -> np.ndarray:
        values = mix(values, values @ [0.2989, 0.587, 0.114], plan.saturation)
        hue, saturation, value = colorsys.rgb_to_hsv(*(values / 255))
        return 255 * np.array(colorsys.hsv_to_rgb((hue + plan.hue) % 1, saturation, value))

    values = np.clip(pixel * plan.brightness, 0, 255)
    return rest(contrast(values)) if plan.contrast_first else contrast(rest(values))


@pytest.mark.parametrize(
    "plan",
    [
        SAME,
        SAME._replace(brightness=1.1),
        SAME._replace(saturation=0.6),
        SAME._replace(hue=-0.04),
        ColorPlan(0.9, 1.0, 1.4, 0.05, contrast_first=True),
    ],
)
def test_colors_change_as_in_a_loop_over_pixels(plan: ColorPlan):
    image, _ = picture(5, 7)
    got = apply_colors(image, plan)
    assert got.dtype == torch.uint8
    for row in range(5):
        for column in range(7):
            want = by_hand(image[:, row, column].numpy().astype(float), 0.0, plan)
            assert np.abs(got[:, row, column].numpy() - want).max() <= 2.5


@pytest.mark.parametrize("first", [True, False])
def test_contrast_is_about_the_mean_gray_before_or_after_the_rest(first: bool):
    image, _ = picture(5, 7)
    plan = SAME._replace(contrast=0.5, hue=0.3, contrast_first=first)
    turned = image if first else apply_colors(image, SAME._replace(hue=0.3))
    gray = (turned.double().permute(1, 2, 0).numpy() @ [0.2989, 0.587, 0.114]).mean()
    got = apply_colors(image, plan)
    for row in range(5):
        want = by_hand(image[:, row, 3].numpy().astype(float), gray, plan)
        assert np.abs(got[:, row, 3].numpy() - want).max() <= 2.5


def test_color_plans_stay_in_their_ranges_and_half_of_each_does_nothing():
    plans = [draw_colors(np.random.default_rng(seed), 0.5) for seed in range(2000)]
    for number, (middle, reach) in enumerate([(1, 0.0625), (1, 0.25), (1, 0.25), (0, 0.025)]):
        values = np.array([plan[number] for plan in plans])
        assert 900 < (values == middle).sum() < 1100
        assert reach * 0.9 < np.abs(values - middle).max() <= reach
    assert 900 < sum(plan.contrast_first for plan in plans) < 1100
    assert draw_colors(np.random.default_rng(0), 0.0)[:4] == (1, 1, 1, 0)


def test_colors_touch_neither_labels_nor_padding():
    image, mask = picture(20, 30)
    plan = CropPlan(Fraction(1), 0, 0, 25, 33, flip=True)
    colors = ColorPlan(1.1, 0.6, 1.3, 0.05, contrast_first=True)
    plain, labels = apply_crop(image, mask, plan, pad_color=PAD)
    changed, labels_again = apply_crop(image, mask, plan, pad_color=PAD, colors=colors)
    assert torch.equal(labels, labels_again)
    assert torch.equal(changed[:, 20:], plain[:, 20:])
    assert torch.equal(changed[:, :, :3], plain[:, :, :3])
    assert torch.equal(changed[:, :20, 3:].flip(-1), apply_colors(image, colors))


def test_without_color_changes_the_parameters_look_as_they_always_did():
    """They are part of the fingerprint of work that was done before there were any."""
    assert "photometric" not in AugmentParams().model_dump(mode="json")
    on = AugmentParams(photometric=0.5)
    assert on.model_dump(mode="json")["photometric"] == 0.5
    assert AugmentParams.model_validate_json(on.model_dump_json()) == on
