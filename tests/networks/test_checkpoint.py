from __future__ import annotations

import json
import resource

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
    read_state_dict,
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
    with pytest.raises(
        UserError, match=r"was changed since .* its digest does not fit its weights\. Copy it"
    ):
        load_checkpoint(path)


def test_every_changed_byte_is_noticed(tmp_path):
    _, checkpoint = make()
    kept = ("classifier.weight", "classifier.bias")
    data = NetworkCheckpoint({k: checkpoint.tensors[k] for k in kept}, checkpoint.header).to_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        with pytest.raises(UserError, match=r"^x\.safetensors|^The header of x\.safetensors"):
            NetworkCheckpoint.from_bytes(bytes(changed), source="x.safetensors")


def test_a_file_of_before_digests_is_read_with_one_note(saved, caplog):
    caplog.set_level("INFO")
    _, checkpoint, path = saved
    header = json.dumps(checkpoint.header.model_dump(mode="json"))
    safetensors.torch.save_file(checkpoint.tensors, path, metadata={"rdd_pipeline": header})
    for _ in range(2):
        assert load_checkpoint(path).digest() == checkpoint.digest()
    (note,) = caplog.messages
    assert "student.safetensors has no digest of its weights" in note


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_wherever_they_come_in(tmp_path, value):
    _, checkpoint = make()
    weight = checkpoint.tensors["classifier.weight"].clone()
    weight[1, 2] = value
    tensors = {**checkpoint.tensors, "classifier.weight": weight}
    match = r"holds NaN or infinite weights, in classifier\.weight\..*choose other weights"
    with pytest.raises(UserError, match=match):
        NetworkCheckpoint.from_bytes(NetworkCheckpoint(tensors, checkpoint.header).to_bytes())
    path = tmp_path / "teacher.pth"
    torch.save(tensors, path)
    with pytest.raises(UserError, match=rf"teacher\.pth {match}"):
        import_teacher(teacher(path), LABELS)


def test_a_number_that_the_network_cannot_hold_is_refused_too():
    _, checkpoint = make()
    tensors = {**checkpoint.tensors, "classifier.bias": torch.tensor([0, 1e300, 0]).double()}
    with pytest.raises(
        UserError, match=r"x\.pth holds NaN or infinite weights, in classifier\.bias"
    ):
        import_state_dict(tensors, params=PARAMS, label_names=LABELS, source="x.pth")


def _with_header(path, checkpoint, **changes):
    header = {**checkpoint.header.model_dump(mode="json"), **changes}
    metadata = {"rdd_pipeline": json.dumps(header)}
    safetensors.torch.save_file(checkpoint.tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "changes",
    [{"network": {"name": "fcn_lcnet_035", "width": 60_000}}, {"label_names": ["x"] * 200_000}],
)
def test_what_a_header_asks_for_is_compared_before_memory_is_taken(tmp_path, changes):
    _, checkpoint = make()
    path = tmp_path / "bomb.safetensors"
    _with_header(path, checkpoint, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (
        load_checkpoint,
        lambda path: NetworkCheckpoint.from_bytes(path.read_bytes()).build(),
    ):
        with pytest.raises(UserError, match="does not hold the weights of fcn_lcnet_035"):
            load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    "header", [b"[" * 10**6, b'{"__metadata__":{"rdd_pipeline":"' + b"[" * 10**6 + b'"}}', b"[]"]
)
@pytest.mark.parametrize("load", [load_checkpoint, read_state_dict])
def test_a_header_of_endless_nesting_is_one_line(tmp_path, header, load):
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(
        UserError, match=r"^\S*bomb\.safetensors (is not a readable|holds no tensors)"
    ):
        load(path)


@pytest.mark.parametrize("content", ["[]", '"text"', "{", "null"])
def test_a_header_that_is_no_object_is_one_line(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    metadata = {"rdd_pipeline": content}
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata=metadata)
    with pytest.raises(UserError, match="its header is no JSON object"):
        load_checkpoint(path)


def test_lengths_beyond_the_file_are_not_read(tmp_path):
    path = tmp_path / "bomb.safetensors"
    for claimed in (2**24 + 1, 10**6, 2**63, 2**64 - 1):
        path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
        with pytest.raises(UserError, match="no safetensors file"):
            load_checkpoint(path)
    table = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    path.write_bytes(len(table).to_bytes(8, "little") + table)
    with pytest.raises(UserError, match="its header speaks of 4000000000086"):
        load_checkpoint(path)


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


def test_colors_and_mask_values_travel_and_change_no_digest():
    _, plain = make()
    shown = {"colors": ((1, 2, 3), (4, 5, 6), (7, 8, 9)), "mask_values": (7, 8, 23)}
    described = NetworkCheckpoint(
        plain.tensors, plain.header.model_copy(update=shown | {"image_size": (30, 40)})
    )
    assert described.digest() == plain.digest()
    read = NetworkCheckpoint.from_bytes(described.to_bytes()).header
    assert (read.colors, read.mask_values) == (shown["colors"], shown["mask_values"])
    assert read.image_size == (30, 40)
    assert b"colors" not in plain.to_bytes()  # files of earlier versions stay as they are
    for name in shown:
        with pytest.raises(ValueError, match=f"2 {name} for 3 classes"):
            type(read).model_validate(plain.header.model_dump() | {name: shown[name][:2]})
