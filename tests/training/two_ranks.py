"""Two ranks in two processes: ``python -m tests.training.two_ranks FOLDER``.

A process of its own that forks after its imports: pytest's has threads, and spawned ranks would
import everything again.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from rdd_pipeline.distillation.terms import KnowledgeDistillation
from rdd_pipeline.errors import NonFiniteLossError
from rdd_pipeline.training.checkpoints import WorkFolder
from rdd_pipeline.training.loop import TrainingInterruptedError, job_fingerprint, train

from .conftest import CPU


def scenarios(rank, folder, job, first_step, samples, teacher) -> dict:
    """Whatever a test wants to know: starting the processes takes longer than all of it."""

    def run(name: str, job, observe=None):
        work = WorkFolder(folder / name, job_fingerprint(job, samples, teacher, None))
        trainer = CPU.model_copy(update={"log_every": 1})
        try:
            result = train(
                job,
                samples,
                trainer=trainer,
                teacher=teacher,
                work=work,
                group=dist.group.WORLD,
                observe=observe,
            )
        except (NonFiniteLossError, TrainingInterruptedError) as error:
            return str(error)
        return result.state, result.network.tensors, result.trained

    found = {
        "whole": run("work", job),
        "again": run("work", job),
        "first step": run("first", first_step),
    }
    forward, calls = KnowledgeDistillation.forward, []

    def spoiled(self, *inputs):
        calls.append(1)
        return forward(self, *inputs) * (torch.nan if rank == 1 and len(calls) == 3 else 1)

    KnowledgeDistillation.forward = spoiled
    found["nan"] = run("nan", job)
    KnowledgeDistillation.forward = forward

    def signal_at_3(iteration, values):
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    found["signal"] = run("signal", job, signal_at_3)  # only rank 0 observes
    found["resumed"] = run("signal", job)
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
