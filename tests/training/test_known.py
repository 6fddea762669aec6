"""What is remembered of networks is asked again whenever anything about it may have changed."""

from __future__ import annotations

import pytest

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.training.known import is_known, told_by
from rdd_pipeline.training.preparation import check_names

NETWORK = NetworkParams(name="fcn_test_resnet", output_stride=16, width=8)


class Measured:
    """Counts how often it was asked."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        return {"times": self.times}


@pytest.fixture
def measure(tmp_path):
    measured = Measured()
    path = tmp_path / "weights.pth"
    path.write_bytes(b"one")
    network = NETWORK.model_copy(update={"pretrained": path})
    assert told_by(network, tmp_path / "work", ["all else"], measured) == {"times": 1}
    return measured


def _ask(tmp_path, measure, decides=("all else",), **changes):
    network = NETWORK.model_copy(update={"pretrained": tmp_path / "weights.pth"} | changes)
    return told_by(network, tmp_path / "work", list(decides), measure)


def test_the_same_is_asked_once_wherever_the_weights_lie(tmp_path, measure):
    assert _ask(tmp_path, measure) == {"times": 1}
    moved = tmp_path / "moved.pth"
    moved.write_bytes(b"one")
    assert _ask(tmp_path, measure, pretrained=moved) == {"times": 1}


@pytest.mark.parametrize("changed", ["decides", "network", "weights", "gone", "code", "damage"])
def test_every_ingredient_decides(tmp_path, measure, monkeypatch, changed):
    asked = {}
    if changed == "decides":
        asked["decides"] = ["else"]
    elif changed == "network":
        asked["width"] = 16
    elif changed == "weights":
        (tmp_path / "weights.pth").write_bytes(b"two")
    elif changed == "gone":
        (tmp_path / "weights.pth").unlink()
    elif changed == "code":
        monkeypatch.setattr("rdd_pipeline.training.known.code_digest", lambda: "another version")
    else:
        (answer,) = (tmp_path / "work").glob("*/network-*.json")
        answer.write_bytes(answer.read_bytes().replace(b"1", b"2"))
    assert _ask(tmp_path, measure, **asked) == {"times": 2}


def test_what_timm_is_to_download_is_asked_for_each_time(tmp_path, measure):
    for times in (2, 3):
        assert _ask(tmp_path, measure, pretrained=True) == {"times": times}


def test_a_fault_is_not_remembered(tmp_path):
    def refuse():
        raise UserError("It does not fit.")

    for _ in range(2):
        with pytest.raises(UserError, match="does not fit"):
            told_by(NETWORK, tmp_path, [], refuse)
    assert not is_known(NETWORK, tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_known_networks_are_not_tried_again(tmp_path, monkeypatch):
    told_by(NETWORK, tmp_path, [], dict)
    monkeypatch.setattr("rdd_pipeline.training.preparation.network_from_params", None)
    check_names([NETWORK, NETWORK.model_copy(update={"pretrained": True})], tmp_path)
    with pytest.raises(TypeError):  # builds it
        check_names([NETWORK.model_copy(update={"name": "fcn_resnet18"})], tmp_path)
