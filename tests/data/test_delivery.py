"""Loader processes that stop, die or find no room: one line, never a hang, never a traceback."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rdd_pipeline.config import AugmentParams, RecipeParams, TrainerParams
from rdd_pipeline.data import delivery, loading
from rdd_pipeline.data.delivery import (
    LoaderFailedError,
    Started,
    _next,
    check_shared_memory,
    share,
    started_here,
)
from rdd_pipeline.data.loading import Batch, Loader, _load, crop_bytes
from rdd_pipeline.errors import DataProblem, UserError
from rdd_pipeline.training.preparation import check_trainer

MB = 2**20


@dataclass(frozen=True)
class Faulty:
    """Batch 1 is fine, batch 2 does what the fault says, in the loader process."""

    fault: str

    def __call__(self, number: int) -> Batch:
        if number == 2:
            match self.fault:
                case "hang":
                    time.sleep(600)
                case "exit":
                    os._exit(3)
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "full":
                    torch.Tensor.share_memory_ = _no_room  # type: ignore[method-assign]
                case "data":
                    raise DataProblem("image 7 is broken")
        return Batch(number, torch.full((2, 3, 4, 4), number), torch.zeros(2, 4, 4))


def _no_room(self: torch.Tensor) -> None:
    raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(delivery, "LOOK_EVERY", 1.0)
    monkeypatch.setattr(loading, "LOOK_EVERY", 1.0)


def _ends_in_one_line(fault: str, kind: type[UserError], message: str, pin_memory: bool) -> None:
    before, hook = set(multiprocessing.active_children()), threading.excepthook
    batches = _load(
        Faulty(fault),
        [1, 2, 3],
        Loader(
            workers=1,
            pin_memory=pin_memory,
            timeout=3.0 if fault in ("hang", "stopped") else 100.0,
        ),
    )
    start = time.monotonic()
    with pytest.raises(kind, match=message) as info:
        list(batches)
    assert type(info.value) is kind
    assert len(str(info.value).splitlines()) == 1
    assert time.monotonic() - start < 45
    assert threading.excepthook is hook
    # The traceback is still held: nothing waits for its collection.
    gc.collect()
    for process in set(multiprocessing.active_children()) - before:
        process.join(20)
        assert not process.is_alive()


FAULTS = [
    (
        "hang",
        LoaderFailedError,
        r"No batch came .* for 3 s \(trainer.timeout\).* trainer.workers=0",
    ),
    (
        "stopped",
        LoaderFailedError,
        r"No batch came .* for 3 s \(trainer.timeout\).* trainer.workers=0",
    ),
    ("exit", LoaderFailedError, r"A loader process died \(status 3\).* trainer.workers=0"),
    ("killed", LoaderFailedError, r"A loader process died \(SIGKILL\).* trainer.workers=0"),
    (
        "full",
        UserError,
        r"does not fit the shared memory .*No space left.*--shm-size=1g.*workers=0",
    ),
    ("data", DataProblem, "^image 7 is broken$"),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        # Who does not even answer signals is the harder case of who hangs.
        pytest.param(*case, id=case[0], marks=pytest.mark.slow if case[0] == "hang" else [])
        for case in FAULTS
    ],
)
def test_a_fault_of_a_loader_process_ends_in_one_line(fault, kind, message, capfd):
    _ends_in_one_line(fault, kind, message, pin_memory=False)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", [pytest.param("hang", marks=pytest.mark.slow), "stopped"])
def test_who_is_asked_to_stop_does_not_wait_for_a_batch(fault):
    """A signal comes while the training waits for ten minutes at most."""
    stop = threading.Event()
    batches = _load(Faulty(fault), [1, 2, 3], Loader(workers=1, timeout=600.0, stop=stop))
    threading.Timer(5.0, stop.set).start()
    start = time.monotonic()
    # A stopped process may keep the memory of the first batch, too.
    assert [batch.iteration for batch in batches] in ([1], [])
    assert 5 <= time.monotonic() - start < 45


@pytest.mark.gpu
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("fault", "kind", "message"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_the_same_with_page_locked_memory(fault, kind, message, capfd):
    _ends_in_one_line(fault, kind, message, pin_memory=True)
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture
def free(monkeypatch):
    """Function that sets how much shared memory is free; None: no limit is known."""

    def set_free(count: int | None) -> None:
        monkeypatch.setattr(delivery, "_free_bytes", lambda _: count)

    return set_free


def test_batches_on_their_way_have_to_fit(free):
    # Two processes have two each ready, the training one: five.
    free(5 * 8 * MB)
    check_shared_memory(2, 8 * MB)
    free(5 * 8 * MB - 1)
    with pytest.raises(UserError, match=r"40.0 MiB .*--shm-size=1g, or --ipc=host.*workers=0"):
        check_shared_memory(2, 8 * MB)
    with pytest.raises(UserError, match="2 trainings at once"):
        check_shared_memory(1, 8 * MB, trainings=2)
    check_shared_memory(0, 8 * MB)
    free(None)
    check_shared_memory(2, 8 * MB)


def test_the_advice_grows_with_the_batches(free):
    free(64 * MB)
    with pytest.raises(UserError, match="--shm-size=5g"):
        check_shared_memory(8, 128 * MB)


def test_it_is_found_before_anything_is_read(free):
    recipe = RecipeParams(batch_size=4, augment=AugmentParams(crop=(512, 1024)))
    assert crop_bytes(recipe.augment, 4) == 4 * (3 + 1) * 512 * 1024
    free(8 * MB)
    with pytest.raises(UserError, match=r"trainer\.workers: 2"):
        check_trainer(TrainerParams(device="cpu", workers=2), [recipe])
    check_trainer(TrainerParams(device="cpu", workers="auto"), [recipe])
    check_trainer(TrainerParams(device="cpu", workers=2), [])


def test_where_there_is_no_such_folder_nothing_is_refused(tmp_path: Path):
    assert delivery._free_bytes(tmp_path / "nowhere") is None
    status = os.statvfs(tmp_path)
    free = delivery._free_bytes(tmp_path)
    assert free is not None
    assert abs(free - status.f_bavail * status.f_frsize) < 2**30


def test_too_many_open_files_are_told_from_a_full_memory(monkeypatch):
    def refuse(self: torch.Tensor) -> None:
        raise RuntimeError("unable to open shared memory object: Too many open files (24)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(UserError, match=r"Too many files .*ulimit -n"):
        share(Batch(1, torch.zeros(1), torch.zeros(1)))


@pytest.mark.usefixtures("quick")
def test_a_lost_fork_server_is_one_line():
    with pytest.raises(LoaderFailedError, match="loader processes come from died"), started_here():
        raise EOFError
    with pytest.raises(LoaderFailedError, match=r"trainer\.workers=0"):
        _next(_Lost(), Started(), 60.0, threading.Event())


class _Lost:
    def __iter__(self):
        return self

    def __next__(self):
        raise EOFError
