"""Networks of other code: outputs, classes, weights, and that no file has any code run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from rdd_pipeline.config import NetworkParams, TeacherParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.cost import count_macs, measure_cost
from rdd_pipeline.networks import (
    NetworkCheckpoint,
    Preprocessing,
    foreign,
    load_checkpoint,
    read_state_dict,
    save_checkpoint,
)
from rdd_pipeline.networks.checkpoint import import_teacher
from rdd_pipeline.networks.frozen import freeze
from rdd_pipeline.networks.probe import output_shapes
from tests.networks.modules import Plain

NAMES = ("road", "grass", "sky")
PLAIN = "tests.networks.modules:plain"
UNFINISHED = "tests.networks.modules:unfinished"
UNUSED = NetworkParams(name="deeplabv3_resnet101")
"""An environment always names one; a module takes its place."""
IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_permitted(monkeypatch):
    monkeypatch.setattr(foreign, "_permitted", {})


def teacher(module: str = PLAIN, **fields) -> NetworkCheckpoint:
    names = fields.pop("label_names", NAMES)
    return import_teacher(TeacherParams(network=UNUSED, module=module, **fields), names)


def outputs(checkpoint: NetworkCheckpoint, images=IMAGES):
    with torch.no_grad():
        return checkpoint.build()(images)


@pytest.mark.parametrize("gives", ["", "aux_logits", "feature stages", "object aux_logits feature"])
def test_what_a_module_returns_becomes_the_outputs_of_a_network(gives):
    checkpoint = teacher(arguments={"gives": gives})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = Plain(3, "aux_logits feature stages").eval()
    module.load_state_dict(checkpoint.tensors)
    with torch.no_grad():
        expected = module(IMAGES)
    found = outputs(checkpoint)
    assert_close(found.logits, expected["logits"])
    assert (found.aux_logits is not None) == ("aux_logits" in gives)
    if found.aux_logits is not None:  # RDD compares both heads at one size
        aux = torch.nn.functional.interpolate(
            expected["aux_logits"], size=(8, 12), mode="bilinear", align_corners=True
        )
        assert_close(found.aux_logits, aux)
    assert found.feature.shape == (2, 6 if "feature" in gives else 0, 8, 12)
    assert [stage.shape[1] for stage in found.stages] == ([4, 6] if "stages" in gives else [0, 0])


def test_names_of_classes_are_put_in_the_order_of_the_label_set_and_others_left_out():
    theirs = ("sky", "cow", "road", "grass")
    permuted = teacher(arguments={"gives": "aux_logits"}, classes=theirs)
    plain = teacher(arguments={"gives": "aux_logits"}, label_names=theirs)
    assert all(torch.equal(plain.tensors[key], value) for key, value in permuted.tensors.items())
    for mine, whole in zip(outputs(permuted)[:2], outputs(plain)[:2], strict=True):
        assert_close(mine, whole[:, [2, 3, 0]])
    numbers = teacher(arguments={"gives": "aux_logits", "num_classes": 4}, classes=(2, 3, 0))
    assert_close(outputs(numbers).logits, outputs(permuted).logits)
    digests = {permuted.digest(), plain.digest(), numbers.digest(), teacher().digest()}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": ("road", "sky")}, "teacher.classes lacks grass of the label set"),
        ({"classes": ("road", "sky", "grass", "sky")}, "names sky more than once"),
        ({"classes": (0, 1)}, "has 2 numbers, the label set 3 classes"),
        ({"classes": (0, 1, 7), "arguments": {"num_classes": 5}}, "channel 7, but .* 0 to 4"),
        ({"arguments": {"num_classes": 5}}, "gives logits of 5 classes, the label set has 3"),
        ({"arguments": {"depth": 5}}, "failed with TypeError: .*depth.* num_classes=3, depth=5"),
        ({"module": "tests.networks.modules:failing"}, "failed with OSError: the disk is gone. It"),
        ({"module": "tests.networks.modules:leaving"}, "failed with SystemExit: 3"),
        ({"module": UNFINISHED, "arguments": {"kind": "lazy"}}, "without values in weight, bias"),
        ({"module": UNFINISHED, "arguments": {"kind": "meta"}}, "without values in"),
        ({"module": UNFINISHED, "arguments": {"kind": "fed"}}, "preprocessing` .* in std.1: Input"),
        ({"module": "~nobody of that name/x.py:f"}, "nobody of that name/x.py does not exist"),
        ({"module": "tests.networks.modules:no_module"}, "returned str; expected an nn.Module"),
        ({"module": "tests.networks.modules:nothing"}, "has no function 'nothing'"),
        ({"module": "tests.networks.nowhere:plain"}, "cannot be imported .ModuleNotFoundError"),
        ({"module": "gone/teacher.py:plain"}, "file of teacher.module .*gone/teacher.py does not"),
        ({"weights": Path("gone.pth")}, "Weights file gone.pth does not exist"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        outputs(teacher(**fields))


def test_weights_of_16_bits_are_computed_with_in_32():
    logits = outputs(teacher("tests.networks.modules:of_16_bits")).logits
    assert logits.dtype == torch.float32
    assert_close(logits, outputs(teacher()).logits, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 3, 0, 4)])
def test_maps_of_fewer_images_or_without_positions_are_named(shape):
    network = teacher().build()
    network.module.forward = lambda _: torch.zeros(shape)
    with pytest.raises(UserError, match="for 2 images; expected maps"):
        network(IMAGES)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", r"returned dict; expected logits \(N, classes, h, w\)"),
        ("labels", r"gives `logits` as torch.int64 of the shape \(1, 2, 2\)"),
        ("whole", "gives `logits` as torch.int64"),
        ("one stage", "gives `stages` as list; expected a list of two or more maps"),
    ],
)
def test_outputs_of_another_kind_are_named(kind, message):
    found = teacher("tests.networks.modules:wrong", arguments={"kind": kind})
    with pytest.raises(UserError, match=message):
        output_shapes(found.build(), (32, 32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arguments": {"a": 1}, "module": None}, "arguments are of a `module`, but none is given"),
        ({"module": "package"}, "should match pattern"),
        ({"mean": (1.0, 2.0, 3.0)}, "mean and std belong together"),
        ({"mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2)}, "these look like 0 to 1"),
        ({"format": "cirkd_names"}, "which a `module` does not have"),
        ({"classes": ()}, "at least 1"),
    ],
)
def test_parameters_that_make_no_sense_together_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        TeacherParams(**{"network": UNUSED, "module": PLAIN, **fields})


@pytest.mark.parametrize("wrapped", ["", "model."])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_are_those_of_the_file(tmp_path, suffix, wrapped):
    module = Plain(3).half()
    tensors = {f"{wrapped}{name}": value for name, value in module.state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": tensors}, path)
    else:
        safetensors.torch.save_file(tensors, path)
    found = teacher(weights=path)
    module.float().eval()
    with torch.no_grad():
        assert_close(outputs(found).logits, module(IMAGES))
    assert found.header.provenance == {"module": PLAIN, "source": path.name}


def test_weights_of_another_network_are_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(Plain(5).state_dict(), path)
    with pytest.raises(UserError, match=r"weights.safetensors does not fit .*4 of another shape"):
        teacher(weights=path)
    broken = Plain(3)
    broken.classifier.weight.data[0] = torch.nan
    safetensors.torch.save_file(broken.state_dict(), path)
    with pytest.raises(UserError, match=r"NaN or infinite weights, in classifier\.weight"):
        teacher(weights=path)


def test_random_weights_are_the_same_every_time_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert teacher().digest() == teacher().digest()
    assert torch.equal(torch.get_rng_state(), before)


def test_preprocessing_is_what_was_said_else_the_module_s_own():
    assert teacher().header.preprocessing == Preprocessing.imagenet()
    half = TeacherParams(network=NetworkParams(name="x", preprocessing="half"), module=PLAIN)
    assert import_teacher(half, NAMES).header.preprocessing == Preprocessing.half()
    said = teacher(mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 3.0)).header.preprocessing
    assert said == Preprocessing(mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 3.0))


# ---- files


def test_a_checkpoint_brings_the_network_back(tmp_path):
    made = teacher(arguments={"gives": "feature"}, classes=("grass", "road", "sky"))
    path = tmp_path / "teacher.safetensors"
    save_checkpoint(made, path)
    found = load_checkpoint(path)
    assert found.digest() == made.digest()
    assert_close(outputs(found), outputs(made))


@pytest.mark.parametrize("reference", [PLAIN, "os:system", "builtins:exec"])
def test_a_checkpoint_does_not_have_code_run_that_the_user_has_not_named(tmp_path, reference):
    made = teacher()
    module = made.header.module.model_copy(update={"reference": reference})
    header = made.header.model_copy(update={"module": module})
    save_checkpoint(NetworkCheckpoint(made.tensors, header), tmp_path / "teacher.safetensors")
    foreign._permitted.clear()
    found = load_checkpoint(tmp_path / "teacher.safetensors")
    with pytest.raises(UserError, match=rf"A file is not believed.*teacher\.module={reference}"):
        found.build()
    foreign.permit(reference, {"gives": "aux_logits"})
    with pytest.raises(UserError, match=r"with the arguments {}; teacher.arguments are"):
        found.build()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_refused_as_weights(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "weights.pth"
    for write in (lambda: torch.save({"classifier.bias": Attack()}, path),
                  lambda: path.write_bytes(pickle.dumps(Attack(), protocol=4))):  # fmt: skip
        write()
        for read in (lambda: read_state_dict(path), lambda: teacher(weights=path)):
            with pytest.raises(UserError, match="would run code from the file"):
                read()
    assert not (tmp_path / "ran").exists()


FILE = '''"""A user's network."""
from dataclasses import dataclass
from torch import nn


@dataclass
class Sizes:
    width: int = 4


def make(num_classes):
    return nn.Conv2d(3, num_classes, 3, stride=Sizes().width // 2)
'''


def test_a_reference_may_lead_to_a_file_of_the_project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "inner").mkdir()
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path / "inner")
    found = teacher("mine.py:make")
    assert outputs(found).logits.shape == (2, 3, 15, 23)
    assert teacher(f"{tmp_path}/mine.py:make").tensors.keys() == found.tensors.keys()
    (tmp_path / "mine.py").write_text(FILE.replace("// 2", "// 4"))
    with pytest.raises(UserError, match=r"The file of mine\.py:make was changed since"):
        found.build()
    assert teacher("mine.py:make").digest() != found.digest()


# ---- what is known without running it on images


@pytest.mark.parametrize("blind", [False, True], ids=["", "needs values"])
def test_shapes_and_costs_are_those_of_a_run(blind):
    network = teacher(arguments={"gives": "aux_logits stages", "blind": blind}).build()
    shapes = output_shapes(network, (40, 24))
    assert shapes.logits.shape == (1, 3, 10, 6)
    assert shapes.logits.device.type == shapes.stages[0].device.type == "meta"
    convolutions = 20 * 12 * 4 * 27 + 10 * 6 * 6 * 36 + 10 * 6 * 3 * 6 + 20 * 12 * 3 * 4
    assert count_macs(network, (40, 24)) == convolutions
    assert measure_cost(network, (40, 24))["parameters"] == sum(
        p.numel() for p in network.parameters()
    )


def test_it_is_frozen_as_it_is():
    network = teacher().build()
    with torch.no_grad():
        before = network(IMAGES).logits
        assert torch.equal(freeze(network, torch.bfloat16)(IMAGES).logits, before)
    assert not any(p.requires_grad for p in network.parameters())
