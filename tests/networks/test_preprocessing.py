from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.networks import Preprocessing

IMAGES = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.manual_seed(0))


def test_imagenet_equals_torchvision():
    from torchvision.transforms.v2 import functional

    unit = IMAGES.float() / 255
    expected = functional.normalize(unit, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert_close(Preprocessing.imagenet().normalize(IMAGES), expected, atol=1e-5, rtol=1e-5)


def test_published_is_bgr_minus_the_mean():
    image = IMAGES.numpy().astype(np.float32)[:, ::-1]
    mean = np.array([104.00698793, 116.66876762, 122.67891434], dtype=np.float32)
    expected = torch.from_numpy(image - mean[:, None, None])
    assert_close(Preprocessing.caffe_bgr().normalize(IMAGES), expected)


def test_half_spans_minus_one_to_one():
    ends = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert Preprocessing.half().normalize(ends).unique().tolist() == [-1.0, 1.0]


def test_floats_of_the_same_range_give_the_same():
    preprocessing = Preprocessing.imagenet()
    assert torch.equal(preprocessing.normalize(IMAGES), preprocessing.normalize(IMAGES.float()))


@pytest.mark.parametrize("name", ["imagenet", "half", "caffe_bgr"])
def test_the_mean_color_becomes_zero(name):
    preprocessing = getattr(Preprocessing, name)()
    image = torch.tensor(preprocessing.mean_rgb()).reshape(1, 3, 1, 1)
    assert_close(preprocessing.normalize(image), torch.zeros(1, 3, 1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"name": "fcn_lcnet_035"}, Preprocessing.imagenet()),
        ({"name": "fcn_tf_efficientnet_lite0"}, Preprocessing.imagenet()),
        ({"name": "fcn_tf_efficientnet_lite0", "pretrained": "x.pth"}, Preprocessing.half()),
        ({"name": "fcn_resnet18d.ra4_e3600_r224_in1k", "pretrained": True}, Preprocessing.half()),
        ({"name": "deeplabv3_mobilenetv2", "pretrained": "x.pth"}, Preprocessing.imagenet()),
        ({"name": "deeplabv3_resnet18", "preprocessing": "caffe_bgr"}, Preprocessing.caffe_bgr()),
        (
            {"name": "deeplabv3_mobilenetv2", "pretrained": "x.pth", "preprocessing": "half"},
            Preprocessing.half(),
        ),
    ],
)
def test_the_weights_decide_unless_told_otherwise(params, expected):
    assert Preprocessing.for_network(NetworkParams(**params)) == expected


def test_bad_values_are_errors():
    with pytest.raises(ValueError, match=r"shape \(3, 4, 5\), expected \(N, 3, H, W\)"):
        Preprocessing.half().normalize(IMAGES[0])
    with pytest.raises(ValidationError, match="greater than 0"):
        Preprocessing(mean=(0, 0, 0), std=(1, 0, 1))
