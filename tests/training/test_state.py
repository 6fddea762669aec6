from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.training.state import (
    MAGIC,
    Best,
    Cost,
    DamagedStateError,
    TrainState,
    digest,
    dumps,
    loads,
)
from tests.equal import equal

VECTORS = Path(__file__).parents[1] / "vectors"


def _state(iteration: int = 3) -> dict:
    return {
        "iteration": iteration,
        "student": {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)},
        "optimizer": {
            "state": {0: {"momentum": torch.ones(2, dtype=torch.float64)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "nesterov": False}],
        },
        "objective": {},
        "best": None,
        "history": [{"iteration": 1, "loss": 0.5}],
    }


# ---- one file


def test_loads_gives_back_what_dumps_was_given():
    state = _state()
    assert equal(loads(dumps(state)), state)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_tensor_types_and_empty_tensors_survive(dtype):
    state = {"full": torch.ones(3, dtype=dtype), "empty": torch.zeros(0, 2, dtype=dtype)}
    assert equal(loads(dumps(state)), state)


def test_a_view_does_not_carry_its_whole_storage_into_the_file():
    large = torch.zeros(100_000)
    assert len(dumps({"view": large[:4]})) < 5_000


def test_tensors_of_a_state_in_memory_do_not_follow_later_changes():
    tensor = torch.zeros(2)
    data = dumps({"x": tensor})
    tensor.add_(1)
    assert_close(loads(data)["x"], torch.zeros(2))


def test_every_truncation_is_noticed():
    data = dumps({"x": torch.arange(4)})
    for length in range(len(data)):
        with pytest.raises(DamagedStateError):
            loads(data[:length])
    with pytest.raises(DamagedStateError):
        loads(data + b"\0")


def test_every_changed_byte_is_noticed():
    data = dumps({"x": torch.arange(4)})
    for position in range(len(data)):
        torn = bytearray(data)
        torn[position] ^= 1 << (position % 8)
        with pytest.raises(DamagedStateError, match=r"not a training state|damaged"):
            loads(bytes(torn))


def test_the_message_names_the_file_and_says_what_to_do():
    with pytest.raises(DamagedStateError, match=r"(?s)a\.ckpt is damaged.*Delete it.*older state"):
        loads(dumps(_state())[:-1], source="a.ckpt")


class _Trap:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "the code was run"))


def _sealed(payload: bytes) -> bytes:
    """A file with any payload and the digest that belongs to it."""
    return MAGIC + hashlib.sha256(payload).digest() + payload


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickled_object_is_refused_and_not_run(tmp_path, form):
    trap = tmp_path / "trap"
    buffer = io.BytesIO()
    if form == "pickle":
        pickle.dump(_Trap(trap), buffer)
    else:
        zipped = form == "zip"
        torch.save({"x": _Trap(trap)}, buffer, _use_new_zipfile_serialization=zipped)
    payload = buffer.getvalue()

    with pytest.raises(DamagedStateError, match="other than tensors and plain values") as error:
        loads(_sealed(payload))
    assert not trap.exists()
    assert "nothing in it was run. Delete it; training goes on" in str(error.value)
    # torch's own advice is how to run it all the same:
    assert "weights_only" not in str(error.value)
    # The trap itself works:
    if form == "pickle":
        pickle.loads(payload)
    else:
        torch.load(io.BytesIO(payload), weights_only=False)
    assert trap.exists()


class _Other:
    """Harmless, but no plain value."""


def test_the_message_says_what_was_found_in_the_file():
    buffer = io.BytesIO()
    torch.save({"x": _Other()}, buffer)
    with pytest.raises(DamagedStateError, match=r"a\.ckpt holds .* \(it names [\w.]+\._Other\)"):
        loads(_sealed(buffer.getvalue()), source="a.ckpt")


@pytest.mark.parametrize("payload", [b"", b"x", b"PK\x03\x04"])
def test_a_payload_that_torch_cannot_read_is_refused(payload):
    with pytest.raises(DamagedStateError, match="other than tensors and plain values"):
        loads(_sealed(payload))


def test_content_other_than_a_dict_is_refused():
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    payload = buffer.getvalue()
    with pytest.raises(DamagedStateError, match="holds a list, expected a dict"):
        loads(MAGIC + hashlib.sha256(payload).digest() + payload)


# ---- digest


def test_digest_is_the_same_in_every_process():
    # From another process; also pins the format: fingerprints of work on disk depend on it.
    assert digest(_state()) == "0ac544bccc4fc5741ca11cb27377065b"


def test_digest_does_not_depend_on_the_order_of_a_dict_or_its_class():
    state = _state()
    turned = OrderedDict(reversed(state.items()))
    assert digest(turned) == digest(state)


def test_digest_does_not_depend_on_the_memory_layout():
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert digest(tensor.to(memory_format=torch.channels_last)) == digest(tensor)
    assert digest(tensor.transpose(2, 3)) != digest(tensor)


@pytest.mark.parametrize(
    "other",
    [
        torch.arange(6),  # values of another type
        torch.arange(6.0).reshape(2, 3),  # another shape
        torch.arange(6.0).double(),
        torch.arange(6.0) + torch.tensor([0, 0, 0, 0, 0, 5e-7]),  # one bit of one value
        torch.tensor([-0.0, 1, 2, 3, 4, 5]),
        list(range(6)),
        None,
    ],
)
def test_digest_notices_type_shape_and_values(other):
    assert digest({"x": other}) != digest({"x": torch.arange(6.0)})


def test_digest_tells_names_types_and_nesting_apart():
    values = [
        {"a": 1},
        {"b": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {1: 1},
        {"1": 1},
        {"a": [1]},
        {"a": [[1]]},
        {"a": [1, None]},
        {},
        [],
        [[], []],
        [[[]]],
    ]
    assert len({digest(value) for value in values}) == len(values)


def test_digest_of_what_was_read_is_that_of_what_was_written():
    state = _state()
    assert digest(loads(dumps(state))) == digest(state)


# ---- the state of a training


def _sevenths(*shape: int) -> torch.Tensor:
    return torch.arange(float(math.prod(shape))).reshape(shape) / 7


def test_a_state_that_an_earlier_version_wrote_is_read():
    """Written at commit ecd0d2f by `WorkFolder.save` from a dict of these values."""
    path = VECTORS / "state_of_ecd0d2f.ckpt"
    state = TrainState.from_bytes(path.read_bytes(), source=str(path))
    steps = {"steps": torch.tensor(7)}
    expected = TrainState(
        iteration=6,
        student={"weight": _sevenths(2, 3), **steps},
        objective={"terms.0.queue": _sevenths(4)},
        optimizer={
            "state": {0: {"momentum_buffer": _sevenths(2, 3) + 1}},
            "param_groups": [{"lr": 0.05, "momentum": 0.9, "params": [0]}],
        },
        best=Best(0.5, 4, {"weight": _sevenths(2, 3) - 1, "steps": torch.tensor(4)}),
        history=[
            {"iteration": 2, "lr": 0.05, "loss": 1.5},
            {"iteration": 4, "val.miou": 0.5, "val.pixel_accuracy": 0.75},
        ],
        cost=Cost(images=12, seconds=1.25, peak_memory=1024),
        fingerprint="0123456789abcdef",
    )
    assert equal(state.to_dict(), expected.to_dict())
    # What `state_digest` said of it there; fingerprints of TSE stages depend on it.
    assert state.digest() == "f141748088252d9fe483b545a96929cf"
    # What is written today, an earlier version reads as well.
    assert equal(loads(state.to_bytes()), loads(path.read_bytes()))


def test_a_state_without_one_of_its_parts_is_refused():
    values = TrainState().to_dict()
    del values["student"], values["best"]
    with pytest.raises(DamagedStateError, match=r"a.ckpt holds no student, best. Delete it"):
        TrainState.from_bytes(dumps(values), source="a.ckpt")


def test_curves_and_clocks_are_not_in_the_digest_of_a_state():
    state = TrainState(iteration=3)
    other = replace(state, history=[{"loss": 1.0}], cost=Cost(3, 1.0), fingerprint="other")
    assert other.digest() == state.digest()
    assert replace(state, iteration=4).digest() != state.digest()
