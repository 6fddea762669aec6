"""Whole trainings on a GPU: repeatable, resumable, fed by processes, out of memory in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rdd_pipeline.config import AugmentParams, NetworkParams, TrainerParams
from rdd_pipeline.data.loading import Loader
from rdd_pipeline.errors import UserError
from rdd_pipeline.launching.__main__ import run_job_file
from rdd_pipeline.training.device import resolve_device, resolve_precision
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.state import TrainState
from rdd_pipeline.training.stopping import TrainingInterruptedError
from rdd_pipeline.training.store import RunStore
from rdd_pipeline.training.training import Training
from tests.equal import equal
from tests.training.test_methods import CNN, OPTIONS, TRANSFORMER

pytestmark = pytest.mark.gpu

SOURCE = Path(__file__).parents[2] / "src"
RECIPE = {"iterations": 6, "validate_every": 3, "augment": {"crop": (128, 128)}}
REPEATED = {
    "cnn": (CNN, ("baseline", "kd", "tse", "skd", "ifvd", "cirkdv2", "af_dcd", "bpkd", "tse_cwd")),
    "transformer": (TRANSFORMER, ("tse", "dsd", "mgd")),
}


def _trainer(device: torch.device, **changes: object) -> TrainerParams:
    return TrainerParams(
        **{
            "device": str(device),
            "workers": 0,
            "log_every": 1,
            "checkpoint_every": 1e-6,
            "deterministic": True,
            **changes,
        }
    )


def _job(make_job, method: str, network: NetworkParams, **fields):
    return make_job(
        method, network=network, recipe=RECIPE, rdd={"tfe_length": 3}, methods=OPTIONS, **fields
    )


def _assert_same_state(found: TrainState, expected: TrainState) -> None:
    for key in ("student", "objective", "optimizer", "adversary_optimizer"):
        assert equal(getattr(found, key), getattr(expected, key)), key


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "network"),
    [
        pytest.param(method, network, id=f"{method}-{kind}")
        for kind, (network, methods) in REPEATED.items()
        for method in methods
    ],
)
def test_stopped_and_resumed_it_ends_with_the_bits_of_one_run(
    method, network, precision, make_job, blocks, teacher, tmp_path, device
):
    """Under `trainer.deterministic`: so two trainings are equal, and a stop changes nothing."""
    job = _job(make_job, method, network, precision=precision)
    trainer = _trainer(device)
    whole = train(Training(job, blocks.images, teacher), trainer)
    assert len([row for row in whole.history if "loss" in row]) == 6

    training = Training(job, blocks.images, teacher).stored_in(tmp_path)
    stop = threading.Event()

    def stop_after_2(iteration, values):
        if iteration == 2:
            stop.set()

    with pytest.raises(TrainingInterruptedError, match="after iteration 2 of 6"):
        train(training, trainer, on_log=stop_after_2, stop=stop)
    resumed = train(training, trainer)
    assert resumed.trained == 4
    _assert_same_state(resumed.state, whole.state)


def test_without_it_the_training_is_the_same_but_for_rounding(make_job, blocks, teacher, device):
    job = _job(make_job, "tse", CNN)
    one, other = (
        train(Training(job, blocks.images, teacher), _trainer(device, deterministic=choice))
        for choice in (False, True)
    )
    losses = [[row["loss"] for row in r.history if "loss" in row] for r in (one, other)]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=0.02)


def test_the_gpu_trains_what_the_cpu_trains(make_job, blocks, teacher, cuda, monkeypatch):
    """The first losses, in full float32."""
    monkeypatch.setattr("rdd_pipeline.training.loop.set_up", lambda *_: None)
    network = CNN.model_copy(update={"dropout": 0.0})
    job = _job(make_job, "tse", network)
    losses = []
    for place in (cuda, torch.device("cpu")):
        result = train(Training(job, blocks.images, teacher), _trainer(place, deterministic=False))
        losses.append([row["loss"] for row in result.history if "loss" in row])
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=0.01)


def test_killed_it_goes_on_to_the_same_bits(
    write_job,
    make_job,
    blocks,
    teacher,
    tmp_path,
    device,
):
    """SIGKILL of a real process, then the same command (here: its function) again."""
    job = make_job(
        recipe={"iterations": 40, "validate_every": 20}, rdd={"tfe_length": 8}, precision="float32"
    )
    settings = {
        "device": str(device),
        "precision": "float32",
        "workers": 0,
        "log_every": 1,
        "checkpoint_every": 1e-6,
        "deterministic": True,
    }
    path = write_job(job, trainer=settings)
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "rdd_pipeline.launching", str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), *sys.path])},
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("work/*/state-*.ckpt")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        log.close()
    (folder,) = (tmp_path / "out").glob("work/*")
    reached = RunStore(folder.parent, folder.name).latest().iteration
    assert 1 <= reached < 40

    run_job_file(path)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result["scores"]) == {"val", "test"}
    expected = train(Training(job, blocks.images, teacher), TrainerParams(**settings))
    state = RunStore(folder.parent, folder.name).finished_state()
    assert state is not None
    _assert_same_state(state, expected.state)


def test_two_loader_processes_and_pinned_memory_change_no_pixel(blocks, device):
    def batches(workers: int, pin: bool) -> list[tuple[Tensor, Tensor]]:
        found = []
        for batch in blocks.images.split("train").training_batches(
            AugmentParams(crop=(32, 32)),
            seed=0,
            batch_size=4,
            iterations=range(1, 9),
            loader=Loader(workers=workers, pin_memory=pin),
        ):
            if pin:
                assert batch.images.is_pinned()
                assert batch.labels.is_pinned()
            images = batch.images.to(device, non_blocking=True)
            found.append((images, batch.labels.to(device, non_blocking=True)))
        return found

    found, expected = batches(2, device.type == "cuda"), batches(0, False)
    assert len(found) == 8
    assert equal(found, expected)


def test_a_training_fed_by_two_processes_is_the_same_training(make_job, blocks, teacher, device):
    job = _job(make_job, "tse", CNN)
    one, other = (
        train(Training(job, blocks.images, teacher), _trainer(device, workers=workers))
        for workers in (2, 0)
    )
    _assert_same_state(one.state, other.state)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_crop_that_does_not_fit_ends_in_one_line(precision, make_job, blocks, teacher, cuda):
    """In a gigabyte; afterwards there is room again."""
    index = cuda.index or 0
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / total, index)
    try:
        job = make_job(
            "tse",
            recipe={"iterations": 2, "batch_size": 16, "augment": {"crop": (2048, 2048)}},
            rdd={"tfe_length": 1},
            precision=precision,
        )
        with pytest.raises(UserError) as caught:
            train(Training(job, blocks.images, teacher), _trainer(cuda))
        assert str(caught.value) == (
            "tse: memory of cuda ran out in iteration 1 with recipe.batch_size=16, "
            f"recipe.augment.crop=[2048, 2048] and precision {precision}. Lower the batch size or "
            "the crop, or set trainer.precision=bfloat16, which starts the training anew; or share "
            "the batch among more GPUs (trainer.devices), which goes on with it."
        )
        caught = None  # its traceback holds tensors
        small = _job(make_job, "tse", CNN)
        assert train(Training(small, blocks.images, teacher), _trainer(cuda)).trained == 6
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def test_auto_is_this_gpu_in_bfloat16(cuda):
    assert resolve_device("auto").type == "cuda"
    native = torch.cuda.get_device_capability() >= (8, 0)
    assert resolve_precision("auto", cuda) == ("bfloat16" if native else "float32")


def test_a_gpu_that_is_not_there_is_refused(cuda):
    count = torch.cuda.device_count()
    with pytest.raises(UserError, match=rf"'cuda:{count}', but torch .* sees {count} CUDA"):
        resolve_device(f"cuda:{count}")
