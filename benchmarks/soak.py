"""A process of a training is killed at a random moment, again and again; nothing may change.

    python benchmarks/soak.py [--kills 20] [--seed 0]

A short job on generated images is trained by two processes (gloo, CPU), once undisturbed; then as
often as asked for while one of the two, drawn at random, gets SIGKILL at a random moment of the
training. The weights must be those of the undisturbed run, bit for bit. Exit status 1 if they are
not.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

from rdd_pipeline.config import (
    AugmentParams,
    NetworkParams,
    OptimizerParams,
    RddParams,
    RecipeParams,
    SceneParams,
    TrainerParams,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import build_index
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.launching.launch import train
from rdd_pipeline.networks import NetworkCheckpoint, build_network
from rdd_pipeline.scenes.write import write_scenes
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.training import Training

NETWORK = NetworkParams(name="fcn_test_efficientnet", width=8, output_stride=16)
TRAINER = TrainerParams(
    device="cpu", devices=2, threads=1, log_every=1, checkpoint_every=0.2, max_restarts=3
)


class Soak:
    """The job, and what an undisturbed run of it ends with."""

    def __init__(self, folder: Path, iterations: int) -> None:
        self.folder = folder
        root = folder / "scenes"
        write_scenes(root, SceneParams(train=8, val=2, test=1, height=48, width=64))
        self.images = Images(root, build_index(root, get_layout("camvid", root)).samples, CAMVID)
        torch.manual_seed(0)
        self.teacher = NetworkCheckpoint.from_network(
            build_network("fcn_test_efficientnet", num_classes=11, width=8, output_stride=16),
            params=NETWORK,
            label_names=CAMVID.names,
        )
        self.job = TrainingJob(
            method="tse_cirkd",
            network=NETWORK,
            recipe=RecipeParams(
                iterations=iterations,
                batch_size=4,
                optimizer=OptimizerParams(lr=0.01),
                augment=AugmentParams(crop=(48, 64)),
                validate_every=iterations // 3,
                keep="last",
            ),
            rdd=RddParams(tfe_length=0.3, min_kept=0.1),
            methods={
                "options": {"tse_cirkd": {"cirkd_memory": {"pixel_slots": 50, "region_slots": 20}}}
            },
        )
        self.fingerprint = Training(self.job, self.images, self.teacher).fingerprint

    def run(self, name: str, kill: tuple[int, float] | None = None) -> tuple[str, float, bool]:
        """Train; returns the weights' digest, seconds, and whether a process was killed.

        `kill`: which process, and after which share of the undisturbed run's seconds of training.
        """
        begun, killed, over = time.monotonic(), threading.Event(), threading.Event()

        def disturb(rank: int, seconds: float) -> None:
            workers = _workers()
            if not over.wait(seconds) and len(workers) == 2:
                os.kill(workers[rank], signal.SIGKILL)
                killed.set()

        first = threading.Event()

        def on_log(iteration: int, values: object) -> None:
            if kill is not None and not first.is_set():
                first.set()
                threading.Thread(target=disturb, args=kill, daemon=True).start()

        result = train(
            Training(self.job, self.images, self.teacher).stored_in(self.folder / name),
            TRAINER,
            on_log=on_log,
        )
        over.set()
        return result.network.digest(), time.monotonic() - begun, killed.is_set()


def _workers() -> list[int]:
    """Training processes of this one: below its fork server, with threads of gloo."""
    return sorted(pid for pid in _below(os.getpid()) if _has_gloo(pid))


def _below(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *_below(child)]
    return found


def _has_gloo(pid: int) -> bool:
    try:
        names = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/comm")]
    except OSError:
        return False
    return any("gloo" in name for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides who and when")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), arguments.iterations)
        soak.run("warm-up")  # starts the fork server
        expected, usual, _ = soak.run("undisturbed")
        print(f"undisturbed: {usual:.1f} s, {expected[:16]}", flush=True)
        same, extra, done = 0, [], 0
        while done < arguments.kills:
            rank, seconds = draw.randrange(2), draw.uniform(0, 0.8 * usual)
            digest, taken, killed = soak.run(f"{done}-{seconds}", (rank, seconds))
            if not killed:
                print(f"    process {rank} after {seconds:.2f} s: too late, drawn again")
                continue
            done += 1
            same += digest == expected
            extra.append(taken - usual)
            end = "same" if digest == expected else f"OTHER {digest[:16]}"
            print(
                f"{done:3} process {rank} killed {seconds:.2f} s after step 1: {taken:.1f} s {end}",
                flush=True,
            )
    print(f"{same} of {done} ended with the same weights;", end=" ")
    print(f"a kill cost {statistics.median(extra):.1f} s (median), {max(extra):.1f} s at most")
    return int(same < done)


if __name__ == "__main__":
    raise SystemExit(main())
