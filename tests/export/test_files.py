"""Exported files: what is in them, and what is said about them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rdd_pipeline.config import ExportParams, NetworkParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.predict import predict_labels
from rdd_pipeline.export import files
from rdd_pipeline.export.check import Labeled, compare
from rdd_pipeline.export.files import Exporter, require_all_passed
from rdd_pipeline.export.module import ExportedNetwork
from rdd_pipeline.export.onnx_file import OnnxProgram
from rdd_pipeline.export.program import Program, trace, write_program
from rdd_pipeline.files import from_checked_json
from rdd_pipeline.networks import NetworkCheckpoint, Preprocessing, network_from_params

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PARAMS = NetworkParams(name="fcn_test_efficientnet", width=8, output_stride=16)
NAMES = ("road", "sky", "tree")


def checkpoint(params: NetworkParams = PARAMS, **options) -> NetworkCheckpoint:
    torch.manual_seed(0)
    network = network_from_params(params, num_classes=len(NAMES))
    # Classes that differ by more than rounding.
    torch.nn.init.normal_(network.classifier.weight)
    return NetworkCheckpoint.from_network(network, params=params, label_names=NAMES, **options)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def exporter(params: ExportParams, network: NetworkCheckpoint | None = None) -> Exporter:
    network = network or checkpoint()
    samples = []
    for seed in range(2):
        image = picture(64, 80, seed)
        (label,) = predict_labels(
            network.build(), network.header.preprocessing, image[None], sizes=[(64, 80)]
        )
        samples.append(Labeled(image, label.to(torch.uint8)))
    return Exporter(
        network,
        params,
        samples=samples,
        ignore_index=255,
        calibration=[picture(64, 80, seed) for seed in range(3)],
        threads=1,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """All three formats of a network that wants BGR, with masks, in a folder."""
    folder = tmp_path_factory.mktemp("export")
    network = checkpoint(preprocessing=Preprocessing.caffe_bgr(), provenance={"method": "tse"})
    # A random network loses much in 8 bits.
    verdicts = exporter(ExportParams(int8_tolerance=100.0), network).write(folder, "tse_0")
    return folder, network, verdicts


def expected_mask(network: NetworkCheckpoint, image: Tensor) -> Tensor:
    """As the evaluation computes it."""
    size = (image.shape[-2], image.shape[-1])
    with torch.no_grad():
        (mask,) = predict_labels(
            network.build(), network.header.preprocessing, image[None], sizes=[size]
        )
    return mask.to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 80), (33, 47), (96, 32)])
def test_the_onnx_file_takes_bytes_of_any_size_and_gives_the_mask(exported, height, width):
    folder, network, _ = exported
    run = OnnxProgram(folder / "tse_0.onnx", threads=1)
    images = torch.stack([picture(height, width, seed) for seed in range(3)])
    (masks,) = run(images)
    assert masks.dtype == torch.uint8
    for image, mask in zip(images, masks, strict=True):
        assert (mask == expected_mask(network, image)).float().mean() > 0.999


def test_every_file_has_its_verdict_beside_it(exported):
    folder, network, verdicts = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        *("tse_0.int8.onnx", "tse_0.int8.onnx.json", "tse_0.onnx", "tse_0.onnx.json"),
        *("tse_0.pt2", "tse_0.pt2.json"),
    ]
    for verdict in verdicts.values():
        path = folder / f"{verdict['file']}.json"
        assert from_checked_json(path.read_bytes(), str(path)) == verdict
        assert verdict["network_digest"] == network.digest()
        assert [row["size"] for row in verdict["sizes"]] == [[64, 80], [49, 61], [32, 40]]
        assert verdict["miou_before"] == 1.0  # the labels are the network's own masks
        assert verdict["milliseconds"] > 0
    for kind in ("onnx", "pt2"):
        assert verdicts[kind]["equal_pixels"] >= 0.9999
        assert verdicts[kind]["largest_difference"] < 0.01  # of logits in the hundreds
        assert verdicts[kind]["passed"]
    int8 = verdicts["int8"]
    assert int8["passed"]
    assert int8["float_layers"] == []
    tensors = onnx.load(folder / "tse_0.int8.onnx").graph.initializer
    kinds = [t.data_type for t in tensors if len(t.dims) == 4 and t.name not in ("mean", "std")]
    assert kinds
    assert set(kinds) == {onnx.TensorProto.INT8}


def test_the_file_says_what_it_is(exported):
    folder, network, _ = exported
    for name in ("tse_0.onnx", "tse_0.int8.onnx"):
        model = onnx.load(folder / name)
        said = {entry.key: entry.value for entry in model.metadata_props}
        assert tuple(json.loads(said["label_names"])) == NAMES
        assert json.loads(said["preprocessing"])["channel_order"] == "bgr"
        assert json.loads(said["provenance"]) == {"method": "tse"}
        assert said["digest"] == network.digest()
        (image,), (mask,) = model.graph.input, model.graph.output
        dims = [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim]
        assert (image.name, dims) == ("image", ["batch", 3, "height", "width"])
        dims = [dim.dim_param or dim.dim_value for dim in mask.type.tensor_type.shape.dim]
        assert (mask.name, dims) == ("mask", ["batch", "height", "width"])


def test_no_weight_of_the_auxiliary_head_is_exported(exported):
    folder, network, _ = exported
    assert any(name.startswith("auxiliary.") for name in network.tensors)
    names = {tensor.name for tensor in onnx.load(folder / "tse_0.onnx").graph.initializer}
    assert any("classifier" in name for name in names)
    assert not any("auxiliary" in name for name in names)
    with zipfile.ZipFile(folder / "tse_0.pt2") as archive:
        assert all(b"auxiliary" not in archive.read(name) for name in archive.namelist())


def test_nothing_in_a_pt2_is_pickled(exported):
    with zipfile.ZipFile(exported[0] / "tse_0.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            # A pickle of torch is a zip; a bare one starts with its protocol.
            assert not zipfile.is_zipfile(io.BytesIO(content)), name
            assert not content.startswith((b"\x80\x02", b"\x80\x04")), name
        weights = [n for n in archive.namelist() if n.endswith("weights_config.json")]
        assert all(b'"use_pickle": true' not in archive.read(name) for name in weights)


@pytest.mark.parametrize(
    "output", [pytest.param("logits", marks=pytest.mark.slow), "probabilities"]
)
def test_scores_of_normalized_images_at_full_size(tmp_path, output):
    network = checkpoint()
    params = ExportParams(formats=("onnx",), preprocessing=False, output=output)
    verdict = exporter(params, network).write(tmp_path, "a")["onnx"]
    assert verdict["passed"]
    image = picture(33, 47)[None]
    (found,) = OnnxProgram(tmp_path / "a.onnx", threads=1)(
        network.header.preprocessing.normalize(image)
    )
    with torch.no_grad():
        expected = ExportedNetwork(network, output="logits")(image)
    expected = expected.softmax(dim=1) if output == "probabilities" else expected
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_stay_float_until_int8_is_good_enough(tmp_path, monkeypatch):
    losses = iter([5.0, 0.5, 0.5])
    monkeypatch.setattr(files, "points_lost", lambda found: next(losses))
    verdict = exporter(ExportParams(formats=("int8",))).write(tmp_path, "a")["int8"]
    assert len(verdict["float_layers"]) == 1
    graph = onnx.load(tmp_path / "a.int8.onnx").graph
    producers = {name: node.op_type for node in graph.node for name in node.output}
    weights = {
        node.name: producers.get(node.input[1]) for node in graph.node if node.op_type == "Conv"
    }
    (kept,) = verdict["float_layers"]
    assert weights.pop(kept) is None
    assert set(weights.values()) == {"DequantizeLinear"}


def test_a_file_that_deviates_is_found_and_refused(tmp_path):
    network = checkpoint()
    module = ExportedNetwork(network)
    image = picture(64, 80)
    samples = [Labeled(image, expected_mask(network, image))]

    def wrong(images):
        scores = module.scores(images)
        mask = scores.argmax(1)
        mask[:, :32] = (mask[:, :32] + 1) % 3
        return mask, scores + 0.25

    found = compare(module, wrong, samples, sizes=(), ignore_index=255)
    assert found["equal_pixels"] == 0.5
    assert found["largest_difference"] == pytest.approx(0.25, abs=1e-5)
    assert found["miou_before"] == 1.0
    assert found["miou_after"] < 0.6
    bad = {"format": "onnx", "file": "a.onnx", "tolerance": 0.9999, "passed": False, **found}
    with pytest.raises(UserError, match=r"a\.onnx finds torch's class for 50\.0000 % .* 99\.99 %"):
        require_all_passed({"onnx": bad})
    lossy = {**bad, "format": "int8", "points_lost": 3.0, "tolerance": 1.0}
    with pytest.raises(UserError, match=r"loses 3\.00 points of mIoU, allowed are 1 "):
        require_all_passed({"int8": lossy})
    require_all_passed({"onnx": {**bad, "passed": True}})


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is missing.*pip install"):
        exporter(ExportParams())


def test_a_network_that_torch_cannot_follow_ends_in_one_line(monkeypatch):
    module = ExportedNetwork(checkpoint())

    def by_content(image: Tensor) -> Tensor:
        return image if image.sum() > 0 else -image

    monkeypatch.setattr(module, "forward", by_content)
    with pytest.raises(UserError, match="torch cannot export fcn_test_efficientnet") as info:
        trace(module)
    assert len(str(info.value).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["pspnet_test_resnet", "fcn_test_vit", "deeplabv3_tf_efficientnet_lite0"]
)
def test_backbones_with_a_fixed_grid_or_same_padding_take_any_size(tmp_path: Path, name: str):
    network = checkpoint(NetworkParams(name=name, width=8, output_stride=16))
    verdicts = exporter(ExportParams(formats=("onnx", "pt2")), network).write(tmp_path, "a")
    for verdict in verdicts.values():
        assert verdict["equal_pixels"] >= 0.999  # random weights, random pixels: there are ties
    module = ExportedNetwork(network)
    write_program(trace(module), tmp_path / "b.pt2", {})
    image = torch.from_numpy(np.zeros((1, 3, 71, 53), np.uint8))
    with torch.no_grad():
        expected = module.scores(image)
        assert_close(Program(tmp_path / "b.pt2", module)(image)[1], expected, rtol=1e-4, atol=1e-4)
