from __future__ import annotations

import os

import pytest
import safetensors.torch
import torch

from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import read_state_dict


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_nesting_and_prefixes_are_removed(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": {"module.a": torch.ones(2)}, "epoch": 3}, path)
    assert torch.equal(read_state_dict(path)["a"], torch.ones(2))


def test_a_pickle_with_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Harmful()}, "weights.pth")
    with pytest.raises(UserError, match="would run code from the file"):
        read_state_dict(tmp_path / "weights.pth")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><html>Log in</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"\x89PNG" * 30, "no known format"),
        (b"\x80\x04garbage", "not read|not a readable"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, message):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_state_dict(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_truncated_files_are_errors(tmp_path, suffix, kept):
    path = tmp_path / f"weights.{suffix}"
    tensors = {"a": torch.randn(64, 64)}
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(tensors, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match="weights"):
        read_state_dict(path)


def test_missing_files_folders_and_files_without_tensors_are_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_state_dict(tmp_path / "nothing.pth")
    with pytest.raises(UserError, match="is a folder"):
        read_state_dict(tmp_path)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        read_state_dict(tmp_path / "empty.pth")
