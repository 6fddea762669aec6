from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from rdd_pipeline.config import NetworkParams, TeacherParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import (
    NetworkCheckpoint,
    Preprocessing,
    import_state_dict,
    import_teacher,
    load_checkpoint,
    network_from_params,
    save_checkpoint,
)

PARAMS = NetworkParams(name="fcn_lcnet_035", width=8, output_stride=16)
LABELS = ("road", "car", "sky")


def make(params=PARAMS, labels=LABELS, **options):
    torch.manual_seed(0)
    network = network_from_params(params, num_classes=len(labels))
    for index, module in enumerate(network.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.fill_(index)
            module.running_mean.normal_()
    options.setdefault("provenance", {"method": "tse"})
    return network, NetworkCheckpoint.from_network(
        network, params=params, label_names=labels, **options
    )


@pytest.fixture
def saved(tmp_path):
    network, checkpoint = make()
    path = tmp_path / "folder" / "student.safetensors"
    save_checkpoint(checkpoint, path)
    return network, checkpoint, path


def test_round_trip_is_bit_exact(saved):
    network, checkpoint, path = saved
    loaded = load_checkpoint(path)
    assert loaded.header == checkpoint.header
    assert loaded.digest() == checkpoint.digest()
    state = loaded.build().state_dict()
    for key, value in network.state_dict().items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)
    assert [entry.name for entry in path.parent.iterdir()] == ["student.safetensors"]


def test_built_network_evaluates_and_leaves_the_random_state_alone(saved):
    _, checkpoint, _ = saved
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert not checkpoint.build().training
    assert torch.equal(torch.rand(1), expected)


def test_build_never_asks_for_backbone_weights():
    _, checkpoint = make()
    params = PARAMS.model_copy(update={"pretrained": True})
    header = checkpoint.header.model_copy(update={"network": params})
    network = NetworkCheckpoint(checkpoint.tensors, header).build()
    assert all(
        torch.equal(value, checkpoint.tensors[key]) for key, value in network.state_dict().items()
    )


def test_checkpoint_is_a_copy(saved):
    network, checkpoint, _ = saved
    digest = checkpoint.digest()
    with torch.no_grad():
        network.classifier.weight.add_(1)
    assert checkpoint.digest() == digest


def test_equal_content_gives_equal_bytes_in_any_order_and_layout():
    _, checkpoint = make()
    turned = {
        key: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        for key, value in reversed(checkpoint.tensors.items())
    }
    other = NetworkCheckpoint(turned, checkpoint.header)
    assert other.to_bytes() == checkpoint.to_bytes()
    assert other.digest() == checkpoint.digest()
    again = NetworkCheckpoint.from_bytes(checkpoint.to_bytes())
    assert again.to_bytes() == checkpoint.to_bytes()


def test_digest_sees_weights_architecture_and_preprocessing_but_not_provenance():
    _, one = make()
    _, other = make(provenance={"method": "kd"})
    assert one.digest() == other.digest()
    changed = {**one.tensors, "classifier.bias": one.tensors["classifier.bias"] + 1}
    assert NetworkCheckpoint(changed, one.header).digest() != one.digest()
    for update in (
        {"preprocessing": Preprocessing.half()},
        {"label_names": ("a", "b", "c")},
        {"network": PARAMS.model_copy(update={"output_stride": 8})},
    ):
        header = one.header.model_copy(update=update)
        assert NetworkCheckpoint(one.tensors, header).digest() != one.digest()


def test_a_file_that_is_cut_inside_of_the_tensors_is_no_checkpoint(saved):
    _, checkpoint, path = saved
    assert load_checkpoint(path).header == checkpoint.header
    assert checkpoint.header.num_classes == 3
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 100)
    with pytest.raises(UserError, match=r"student\.safetensors is not a readable network"):
        load_checkpoint(path)


def test_a_flipped_bit_of_a_weight_is_noticed(saved):
    _, _, path = saved
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="its digest does not fit its weights"):
        load_checkpoint(path)


def test_a_file_of_before_digests_is_read(saved):
    _, checkpoint, path = saved
    header = json.dumps(checkpoint.header.model_dump(mode="json"))
    safetensors.torch.save_file(checkpoint.tensors, path, metadata={"rdd_pipeline": header})
    assert load_checkpoint(path).digest() == checkpoint.digest()


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x04" * 40, b"\xff" * 64])
def test_other_files_are_errors_that_name_the_file(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.safetensors is not a readable network"):
        load_checkpoint(path)


def test_missing_files_and_foreign_safetensors_are_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match=r"foreign.* without this project's header"):
        load_checkpoint(tmp_path / "foreign.safetensors")


def test_header_of_another_version_is_an_error(tmp_path):
    path = tmp_path / "later.safetensors"
    metadata = {"rdd_pipeline": json.dumps({"format": 2, "label_names": ["a"]})}
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata=metadata)
    with pytest.raises(UserError, match=r"header of .*later.* does not fit.*format.*network"):
        load_checkpoint(path)


def test_tensors_of_another_architecture_are_listed():
    _, checkpoint = make()
    header = checkpoint.header.model_copy(
        update={"network": PARAMS.model_copy(update={"auxiliary": False, "width": 16})}
    )
    with pytest.raises(UserError, match=r"unexpected: auxiliary.*of another shape: neck.conv"):
        NetworkCheckpoint(checkpoint.tensors, header).build()


def test_label_names_are_one_for_each_class():
    network, _ = make()
    with pytest.raises(UserError, match="has 3 classes, the label set 2 names"):
        NetworkCheckpoint.from_network(network, params=PARAMS, label_names=("a", "b"))


def teacher(path, params=PARAMS, kind="native"):
    return TeacherParams(network=params, weights=path, format=kind)


def test_native_teacher_brings_its_own_architecture_and_preprocessing(tmp_path):
    _, checkpoint = make(preprocessing=Preprocessing.half())
    path = tmp_path / "teacher.safetensors"
    save_checkpoint(checkpoint, path)
    other = NetworkParams(name="deeplabv3_resnet101")
    assert import_teacher(teacher(path, other), LABELS).digest() == checkpoint.digest()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_bare_state_dict_takes_the_architecture_from_the_parameters(tmp_path, suffix):
    _, checkpoint = make()
    path = tmp_path / f"teacher.{suffix}"
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(checkpoint.tensors, path)
    imported = import_teacher(teacher(path), LABELS)
    assert imported.digest() == checkpoint.digest()
    assert imported.header.provenance["source"] == path.name


def test_published_teacher_is_fed_as_its_authors_did(tmp_path, published_state_dict):
    path = tmp_path / "teacher.pth"
    torch.save(published_state_dict("pspnet_mobilenetv2"), path)
    params = NetworkParams(name="pspnet_mobilenetv2")
    labels = tuple(f"class {index}" for index in range(19))
    checkpoint = import_teacher(teacher(path, params, "cirkd_names"), labels)
    assert checkpoint.header.preprocessing == Preprocessing.caffe_bgr()
    checkpoint.build()
    told = params.model_copy(update={"preprocessing": "half"})
    checkpoint = import_teacher(teacher(path, told, "cirkd_names"), labels)
    assert checkpoint.header.preprocessing == Preprocessing.half()
    with pytest.raises(UserError, match=r"Teacher has 19 classes, the label set 3\. Choose"):
        import_teacher(teacher(path, params, "cirkd_names"), LABELS)


def test_other_classes_are_errors(saved):
    _, _, path = saved
    with pytest.raises(UserError, match=r"Teacher has 3 classes, the label set 2\."):
        import_teacher(teacher(path), LABELS[:2])
    with pytest.raises(UserError, match=r"Class 1 is 'car' for the teacher .* 'bus' in the label"):
        import_teacher(teacher(path), ("road", "bus", "sky"))


def test_state_dict_of_another_network_is_an_error():
    _, checkpoint = make()
    params = PARAMS.model_copy(update={"width": 16})
    with pytest.raises(UserError, match=r"x\.pth does not fit the network fcn_lcnet_035: .*neck"):
        import_state_dict(checkpoint.tensors, params=params, label_names=LABELS, source="x.pth")


def test_teacher_without_weights_cannot_be_imported():
    with pytest.raises(UserError, match="no `weights` to import"):
        import_teacher(teacher(None), LABELS)
