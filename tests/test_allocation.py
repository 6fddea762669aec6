"""Memory of steps on a CPU stays with the process while it trains."""

import resource
import subprocess
import sys

import pytest
import torch

from rdd_pipeline.allocation import _glibc, freed_memory_kept

glibc = pytest.mark.skipif(_glibc() is None, reason="no glibc")

STEPS = """
import resource, sys
import torch
from rdd_pipeline.allocation import freed_memory_kept

MB = 1 << 20

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def cleared_pages(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        maps = [torch.ones(40 * MB // 4) for _ in range(4)]
        del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

begin = resident()
outside = cleared_pages(4)
with freed_memory_kept(sys.argv[1]):
    with freed_memory_kept(sys.argv[1]):
        cleared_pages(6)
    inside = cleared_pages(4)
    held = resident() - begin
print(outside, inside, held // MB, (resident() - begin) // MB)
"""


def _steps(device_type: str) -> list[int]:
    command = [sys.executable, "-c", STEPS, device_type]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@glibc
def test_steps_on_a_cpu_do_not_wait_for_cleared_pages():
    outside, inside, held, afterwards = _steps("cpu")
    pages = 4 * 4 * 40 * 2**20 // resource.getpagesize()
    assert outside > 0.5 * pages
    assert inside < 0.02 * pages
    assert held > 100  # a new one of the same size does not always fit where one was
    assert afterwards < 20


@glibc
def test_other_devices_leave_the_process_as_it_is():
    outside, inside, *_ = _steps("cuda")
    assert inside > 0.5 * outside


@pytest.mark.parametrize("there", [True, False])
def test_numbers_stay(monkeypatch, there):
    if not there:
        monkeypatch.setattr("rdd_pipeline.allocation._glibc", lambda: None)
    x, weight = torch.randn(2, 8, 33, 17), torch.randn(8, 8, 3, 3)
    expected = torch.conv2d(x, weight)
    with freed_memory_kept():
        assert torch.equal(torch.conv2d(x, weight), expected)


def test_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _glibc() is None
