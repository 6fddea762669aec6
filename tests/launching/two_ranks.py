"""Two ranks in two processes: ``python -m tests.launching.two_ranks FOLDER``.

A process of its own that forks after its imports: pytest's has threads, and spawned ranks would
import everything again.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from rdd_pipeline.config import EarlyStoppingParams
from rdd_pipeline.errors import NonFiniteLossError
from rdd_pipeline.losses.base import FunctionalLoss
from rdd_pipeline.networks import Preprocessing
from rdd_pipeline.training import build
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.stopping import TrainingInterruptedError
from rdd_pipeline.training.training import Training
from tests.training.conftest import CPU, remembered_shapes


@contextmanager
def float64(batch_norm: bool = True) -> Iterator[None]:
    """Train in double precision: what differs then is no rounding.

    Without batch norm, group norm is in its place, which looks at one image at a time.
    """
    before = build._to_device, Preprocessing.normalize, build.network_from_params
    to_device, normalize, network = before

    def make(*arguments, **options):
        student = network(*arguments, **options)
        if not batch_norm:
            _group_norm(student)
        return student

    build._to_device = lambda module, *others: to_device(module.double(), *others)
    Preprocessing.normalize = lambda self, images: normalize(self, images).double()
    build.network_from_params = make
    try:
        yield
    finally:
        build._to_device, Preprocessing.normalize, build.network_from_params = before


def _group_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            act = getattr(child, "act", nn.Identity())
            setattr(module, name, nn.Sequential(nn.GroupNorm(1, child.num_features), act))
        else:
            _group_norm(child)


def scenarios(rank, folder, job, same, images, teacher) -> dict:
    """Whatever a test wants to know: starting the processes takes longer than all of it."""

    def run(name: str, job, on_log=None, everywhere=True, **updates):
        training = Training(job, images, teacher)
        if name and (everywhere or rank == 1):  # without a store, the many jobs write nothing
            training = training.stored_in(folder / name)
        trainer = CPU.model_copy(update={"log_every": 1, **updates})
        try:
            result = train(training, trainer, group=dist.group.WORLD, on_log=on_log)
        except (NonFiniteLossError, TrainingInterruptedError) as error:
            return str(error)
        return result.state.to_dict(), result.network.tensors, result.trained

    found = {
        "whole": run("work", job),
        "again": run("work", job),
        "elsewhere": run("elsewhere", job, everywhere=False),
        "elsewhere, again": run("elsewhere", job, everywhere=False),
        "clocks": run("clocks", job, checkpoint_every=1e6 if rank else 1e-6),
    }
    never_enough = EarlyStoppingParams(patience=1, min_delta=100)
    early = {"early_stopping": never_enough, "validate_every": 1}
    early_job = job.model_copy(update={"recipe": job.recipe.model_copy(update=early)})
    found["early"] = run("", early_job)
    kd, calls = FunctionalLoss.forward, []

    def spoiled(*inputs):
        calls.append(1)
        return kd(*inputs) * (torch.nan if rank == 1 and len(calls) == 3 else 1)

    FunctionalLoss.forward = spoiled
    found["nan"] = run("nan", job)
    FunctionalLoss.forward = kd

    def signal_at_3(iteration, values):
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    found["signal"] = run("signal", job, signal_at_3)  # only rank 0 observes
    found["resumed"] = run("signal", job)
    found["same"] = {}
    for name, job in same.items():
        with float64(batch_norm="parts" not in name):
            found["same"][name] = run("", job)
    return found


def main(folder: Path) -> int:
    """Write ``result-RANK.pt``; returns 0 when both ranks came to their end."""
    arguments = torch.load(folder / "arguments.pt", weights_only=False)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os._exit(_rank(rank, folder, arguments))
    return max(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks)


def _rank(rank: int, folder: Path, arguments) -> int:
    torch.set_num_threads(1)
    build.output_shapes = remembered_shapes()
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
        )
        torch.save(scenarios(rank, folder, *arguments), folder / f"result-{rank}.pt")
        dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
