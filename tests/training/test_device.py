from __future__ import annotations

import pytest
import torch

from rdd_pipeline.config import TrainerParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.training import device as module
from rdd_pipeline.training.device import (
    check_devices,
    memory_format,
    ran_out_of_memory,
    resolve_device,
    resolve_devices,
    resolve_precision,
    resolve_workers,
    set_up,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def gpus(monkeypatch):
    """Function that makes torch see so many GPUs."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)

    return pretend


def test_auto_takes_a_gpu_where_there_is_one(gpus):
    gpus(0)
    assert resolve_device("auto").type == "cpu"
    gpus(1)
    assert resolve_device("auto").type == "cuda"


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_that_is_not_there_is_refused(gpus, name, count):
    gpus(count)
    with pytest.raises(UserError, match=rf"'{name}', but torch .* sees {count} CUDA devices"):
        resolve_device(name)


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="'gpu'; expected auto, cpu, cuda or cuda:N"):
        resolve_device("gpu")


@pytest.fixture
def mac(monkeypatch):
    """Torch as it looks on a Mac; nothing here has run on one."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("mac")
def test_the_gpu_of_a_mac_is_used_when_it_is_asked_for(monkeypatch):
    assert resolve_device("auto").type == "cpu"
    device = resolve_device("mps")
    assert device.type == "mps"
    check_devices(TrainerParams(device="mps"))
    # /proc of another system says nothing about it.
    monkeypatch.setattr(module, "_cpu_has_bfloat16", lambda: True)
    assert resolve_precision("auto", device) == "float32"
    assert memory_format(TrainerParams(), device) == torch.contiguous_format
    assert resolve_devices(TrainerParams(device="mps", devices="auto"), 8) == 1
    with pytest.raises(UserError, match=r"trainer.devices is 2 .* single GPU"):
        resolve_devices(TrainerParams(device="mps", devices=2), 8)
    with pytest.raises(UserError, match=r"trainer.device is 'mps:1', but .* only one Apple GPU"):
        resolve_device("mps:1")


def test_a_mac_without_torchs_support_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"trainer.device is 'mps', but .* no Apple GPU"):
        resolve_device("mps")


@pytest.mark.parametrize("name", ["xpu", "meta", "hpu", "xla:0", "cuda:-1", "CPU", ""])
def test_devices_that_nothing_here_was_written_for_are_refused(name):
    with pytest.raises(UserError, match=f"^trainer.device is {name!r}; expected auto, cpu, cuda"):
        resolve_device(name)


def test_bfloat16_needs_autocast(monkeypatch):
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: kind != "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"trainer.precision is bfloat16.*trainer.device=mps"):
        check_devices(TrainerParams(device="mps", precision="bfloat16"))
    check_devices(TrainerParams(device="cpu", precision="bfloat16"))


def test_channels_come_last_where_they_are_asked_for():
    assert memory_format(TrainerParams(), CPU) == torch.channels_last
    assert memory_format(TrainerParams(), GPU) == torch.channels_last
    assert memory_format(TrainerParams(channels_last=False), CPU) == torch.contiguous_format


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_is_bfloat16_only_where_the_hardware_has_it(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    monkeypatch.setattr(module, "_cpu_has_bfloat16", lambda: native)
    for device in (CPU, GPU):
        assert resolve_precision("auto", device) == ("bfloat16" if native else "float32")
        assert resolve_precision("float32", device) == "float32"
        assert resolve_precision("bfloat16", device) == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "native"),
    [("avx2 avx512_bf16", True), ("amx_bf16", True), ("avx2 avx512f", False), (None, False)],
)
def test_a_cpu_says_what_it_has_among_its_flags(monkeypatch, tmp_path, flags, native):
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"flags : {flags}\n")
    monkeypatch.setattr(module, "Path", lambda _: info)
    assert module._cpu_has_bfloat16() == native


def test_auto_workers_leave_the_cores_to_a_training_on_the_cpu(monkeypatch):
    assert resolve_workers("auto", CPU) == 0
    assert resolve_workers(3, CPU) == 3
    assert 1 <= resolve_workers("auto", GPU) <= 8


def test_threads_are_set_when_they_are_given(monkeypatch):
    given = []
    monkeypatch.setattr(module.torch, "set_num_threads", given.append)
    set_up(TrainerParams(), CPU)
    set_up(TrainerParams(threads=3), CPU)
    assert given == [3]


@pytest.mark.parametrize(
    ("count", "params", "batch_size", "expected"),
    [
        (0, {}, 8, 1),
        (0, {"devices": "auto"}, 8, 1),
        (0, {"devices": 3}, 9, 3),
        (4, {}, 8, 1),
        (4, {"devices": "auto"}, 8, 4),
        (4, {"devices": "auto"}, 6, 3),  # four do not share it evenly
        (4, {"devices": "auto", "device": "cuda:2"}, 8, 1),
        (4, {"devices": 2, "device": "cuda"}, 8, 2),
        (4, {"devices": 8, "device": "cpu"}, 8, 8),
    ],
)
def test_so_many_processes_train_together(gpus, count, params, batch_size, expected):
    gpus(count)
    assert resolve_devices(TrainerParams(**params), batch_size) == expected


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"devices": 3}, "devices is 3, but torch .* sees 2 CUDA devices. Lower it"),
        ({"devices": 2, "device": "cuda:1"}, "devices is 2, but trainer.device names one GPU"),
    ],
)
def test_gpus_that_are_not_there_are_refused(gpus, params, message):
    gpus(2)
    with pytest.raises(UserError, match=message):
        resolve_devices(TrainerParams(**params), 8)


def test_processes_share_the_cores_for_their_loaders(monkeypatch):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resolve_workers("auto", GPU) == 3
    assert resolve_workers(5, GPU) == 5


def test_out_of_memory_is_known_on_the_cpu_too():
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(info.value)
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not ran_out_of_memory(RuntimeError("a bug"))
