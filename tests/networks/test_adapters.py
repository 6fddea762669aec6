"""Networks of other libraries as teachers: their own outputs, and what lies before them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import adapters
from tests.networks.modules import MASK2FORMER, SEGFORMER, UPERNET

IMAGES = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
ODD = torch.randn(1, 3, 50, 70, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(module, images=IMAGES):
    with torch.no_grad():
        return module.eval()(images)


def upsampled(maps, size=(64, 96), corners=True):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=corners)


# ---- torchvision


def test_a_network_of_torchvision_has_its_auxiliary_head_and_maps():
    teacher = adapters.torchvision(4, name="deeplabv3_mobilenet_v3_large")
    found = run(teacher)
    whole = run(teacher.model)
    assert_close(upsampled(found["logits"], corners=False), whole["out"])
    assert_close(upsampled(found["aux_logits"], corners=False), whole["aux"])
    assert_close(teacher.model.classifier[-1](found["feature"]), found["logits"])
    assert [stage.shape[1] for stage in found["stages"]] == [40, 960]


def test_torchvision_networks_of_another_make_give_logits_only():
    teacher = adapters.torchvision(4, name="lraspp_mobilenet_v3_large")
    assert run(teacher).shape == (1, 4, 64, 96)
    with pytest.raises(UserError, match="torchvision has no network 'deeplab'"):
        adapters.torchvision(4, name="deeplab")


# ---- segmentation_models_pytorch


@pytest.mark.parametrize("arch", ["unet", "fpn", "segformer", "dpt"])
def test_a_network_of_smp_gives_its_logits_and_what_lies_before(arch):
    pytest.importorskip("segmentation_models_pytorch")
    encoder = "tu-test_vit" if arch == "dpt" else "tu-resnet10t"
    teacher = adapters.smp(4, arch=arch, encoder_name=encoder)
    found = run(teacher)
    assert_close(upsampled(found["logits"]), run(teacher.model))
    assert_close(found["feature"].shape[-2:], found["logits"].shape[-2:])
    assert len(found["stages"]) == 2
    assert run(teacher, ODD)["logits"].shape[:2] == (1, 4)


def test_a_folder_of_smp_brings_its_weights(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    saved = adapters.smp(4, arch="fpn", encoder_name="tu-resnet10t")
    saved.model.save_pretrained(tmp_path)
    found = adapters.smp(4, folder=str(tmp_path))
    assert_close(run(found)["logits"], run(saved)["logits"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either arch or folder of smp"),
        ({"arch": "unet", "folder": "x"}, "either arch or folder of smp"),
        ({"arch": "u-net"}, "segmentation_models_pytorch: .*[Uu]nexpected|.*u-net"),
        ({"folder": "gone"}, "gone is no model of segmentation_models_pytorch"),
    ],
)
def test_wrong_arguments_of_smp_are_named(arguments, message):
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(UserError, match=message):
        adapters.smp(4, **arguments)


# ---- transformers


def test_segformer_gives_its_logits_and_what_lies_before():
    pytest.importorskip("transformers")
    teacher = adapters.transformers(4, config=SEGFORMER)
    found = run(teacher)
    whole = teacher.model(pixel_values=IMAGES, output_hidden_states=True)
    assert_close(found["logits"], whole.logits)
    assert_close(found["stages"][1], whole.hidden_states[-1])
    assert_close(teacher.model.decode_head.classifier(found["feature"]), found["logits"])
    assert run(teacher, ODD)["logits"].shape[:2] == (1, 4)


def test_upernet_gives_logits_at_their_own_stride_and_those_of_its_auxiliary_head():
    pytest.importorskip("transformers")
    teacher = adapters.transformers(4, config=UPERNET)
    found = run(teacher)
    assert_close(upsampled(found["logits"], corners=False), run(teacher.model, IMAGES).logits)
    features = teacher.model.backbone(IMAGES).feature_maps
    assert_close(found["aux_logits"], teacher.model.auxiliary_head(features))
    assert found["logits"].shape[-2:] == (16, 24)


def test_networks_that_classify_masks_give_logarithms_of_probabilities():
    pytest.importorskip("transformers")
    teacher = adapters.transformers(4, config=MASK2FORMER)
    found = run(teacher)
    whole = run(teacher.model, IMAGES)
    classes = whole.class_queries_logits.softmax(-1)[0, :, :4]
    masks = whole.masks_queries_logits.sigmoid()[0]
    p = sum(c.view(-1, 1, 1) * m for c, m in zip(classes, masks, strict=True)) + 1e-6
    assert_close(found[0].exp(), p / p.sum(0))
    assert_close(found.exp().sum(1), torch.ones(1, *found.shape[2:]))


def test_eomt_is_fed_the_size_that_it_knows():
    pytest.importorskip("transformers")
    config = {
        "model_type": "eomt", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "mlp_ratio": 2, "image_size": 64, "patch_size": 16, "num_queries": 5, "num_blocks": 1,
        "num_upscale_blocks": 1,
    }  # fmt: skip
    teacher = adapters.transformers(4, config=config)
    square = upsampled(ODD, (64, 64))
    assert_close(run(teacher, ODD), run(teacher, square))


def test_a_folder_of_transformers_brings_weights_and_preprocessing(tmp_path):
    pytest.importorskip("transformers")
    saved = adapters.transformers(4, config=SEGFORMER)
    saved.model.save_pretrained(tmp_path)
    values = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    found = adapters.transformers(9, folder=str(tmp_path))
    assert_close(run(found)["logits"], run(saved)["logits"])
    assert found.preprocessing["mean"] == pytest.approx([127.5, 102.0, 76.5])
    assert found.preprocessing["std"] == pytest.approx([51.0] * 3)


def test_a_folder_that_would_run_code_is_refused(tmp_path):
    """Neither a pickle nor a Python file that comes with the weights is looked at."""
    pytest.importorskip("transformers")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "evil.Evil", "AutoModelForSemanticSegmentation": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights in other formats are not read"):
        adapters.transformers(4, folder=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match=r"trust_remote_code|model type"):
        adapters.transformers(4, folder=str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either folder or config of transformers"),
        ({"folder": "gone"}, "gone is no model of transformers"),
        ({"config": {"model_type": "bert"}}, "bert of transformers is no network for semantic"),
        ({"config": {"model_type": "oneformer"}}, "oneformer of transformers is no network for"),
    ],
)
def test_wrong_arguments_of_transformers_are_named(arguments, message):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=message):
        adapters.transformers(4, **arguments)


@pytest.mark.parametrize(
    ("make", "library"),
    [(adapters.smp, "segmentation_models_pytorch"), (adapters.transformers, "transformers")],
)
def test_a_library_that_is_not_there_is_one_line(monkeypatch, make, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library} is not installed: pip install 'rdd-pip"):
        make(4)
