"""Students under one teacher against one by one: ``python benchmarks/shared_teacher.py``.

Trains the same students (real trainings on generated scenes, an untrained teacher) in turns, each
by itself and all together (`trainer.share_teacher`), and compares their weights. Seconds are those
of the steps with waiting for images, without building networks, validation and checkpoints;
medians of the rounds. Prints a table and writes JSON with hardware, versions and commit.

On CUDA networks and sizes of the Cityscapes recipes, on a CPU those of `conf/scenes`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from rdd_pipeline.config import (
    MethodsParams,
    NetworkParams,
    RddParams,
    RecipeParams,
    SceneParams,
    TrainerParams,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import build_index
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params
from rdd_pipeline.scenes.write import write_scenes
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.preparation import prepare_job
from rdd_pipeline.training.shared import Student, train_together
from rdd_pipeline.training.training import Training
from step import RESULTS, machine

EIGHT = ("kd", "at", "fitnet", "ifvd", "cwd", "dist", "mgd", "tse")


def write_images(folder: Path, size: tuple[int, int]) -> Images:
    """Generated scenes that are somewhat larger than the crops."""
    height, width = (max(48, size[0] * 5 // 4), max(64, size[1] * 5 // 4))
    write_scenes(folder, SceneParams(train=16, val=1, test=1, height=height, width=width))
    layout = get_layout("scenes")
    return Images(folder, build_index(folder, layout).samples, layout.labels)


def random_teacher(name: str, width: int | None, images: Images) -> NetworkCheckpoint:
    """Its outputs are those of no use; the time they take is that of a trained one."""
    torch.manual_seed(0)
    params = NetworkParams(name=name, width=width, pretrained=False)
    network = network_from_params(params, num_classes=images.labels.num_classes)
    return NetworkCheckpoint.from_network(network, params=params, label_names=images.labels.names)


def trainings(
    options: argparse.Namespace, images: Images, teacher: NetworkCheckpoint, trainer: TrainerParams
) -> list[Training]:
    """One for each method, in its only stage."""
    recipe = RecipeParams(
        iterations=options.iterations,
        batch_size=options.batch,
        validate_every=options.iterations,
        augment={"crop": tuple(options.size)},
    )
    student = NetworkParams(name=options.student, width=options.widths[1], pretrained=False)
    jobs = (
        TrainingJob(
            method=method,
            network=student,
            recipe=recipe,
            rdd=RddParams(tfe_length=0.1, min_kept=0.05),
            methods=MethodsParams(),
        )
        for method in options.methods
    )
    return [Training(prepare_job(job, trainer), images, teacher) for job in jobs]


def main(words: list[str] | None = None) -> int:
    """Measure, compare, print, write."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--batch", type=int, default=16 if cuda else 8)
    size = [512, 1024] if cuda else [64, 96]
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=size)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1 if cuda else 3)
    parser.add_argument("--threads", type=int, default=None if cuda else 2)
    networks = ("deeplabv3_resnet101", "deeplabv3_resnet18")
    teacher, student = networks if cuda else ("pspnet_resnet10t", "pspnet_test_resnet")
    parser.add_argument("--teacher", default=teacher)
    parser.add_argument("--student", default=student)
    widths = [None, None] if cuda else [64, 32]  # None: the head's own
    parser.add_argument(
        "--widths", type=int, nargs=2, metavar=("TEACHER", "STUDENT"), default=widths
    )
    parser.add_argument("--methods", nargs="+", default=EIGHT)
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--deterministic", action="store_true", help="equal bits on CUDA, too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    trainer = TrainerParams(
        device=options.device,
        threads=options.threads,
        precision=options.precision,
        deterministic=options.deterministic,
        checkpoint_every=1e6,
        share_teacher=True,
    )
    seconds: dict[str, list[float]] = {name: [] for name in (*options.methods, "together")}
    memory = dict.fromkeys(seconds, 0)
    load, differing = [], set()
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder, "images"), tuple(options.size))
        teacher = random_teacher(options.teacher, options.widths[0], images)
        todo = trainings(options, images, teacher, trainer)
        for number in range(options.rounds):
            load.append(os.getloadavg()[0])
            alone = {}
            for training in todo:
                name = training.job.method
                alone[name] = result = train(
                    training.stored_in(Path(folder, f"alone{number}")), trainer
                )
                seconds[name].append(result.state.cost.seconds)
                memory[name] = max(memory[name], result.state.cost.peak_memory)
            kept = [training.stored_in(Path(folder, f"together{number}")) for training in todo]
            train_together([Student(training) for training in kept], trainer)
            shared = {training.job.method: train(training, trainer) for training in kept}
            costs = [result.state.cost for result in shared.values()]
            seconds["together"].append(sum(cost.seconds for cost in costs))
            memory["together"] = max(cost.peak_memory for cost in costs)
            differing |= {
                name for name in alone if alone[name].state.digest() != shared[name].state.digest()
            }
            load.append(os.getloadavg()[0])
    steps = {name: statistics.median(s) / options.iterations for name, s in seconds.items()}
    one_by_one = sum(steps[name] for name in options.methods)
    about = machine(torch.device(options.device))
    print(" · ".join(f"{name} {value}" for name, value in about.items()))
    height, width = options.size
    print(
        f"{options.teacher} to {options.student}, {height} x {width}, batch {options.batch}, "
        f"{todo[0].job.precision}; load of the machine {min(load):.1f} to {max(load):.1f}\n"
    )
    print("| students | ms an iteration | GiB |\n|---|---|---|")
    for name, step in [*steps.items(), ("one by one", one_by_one)]:
        gib = f"{memory[name] / 2**30:.2f}" if name in memory else ""
        print(f"| {name} | {1e3 * step:.1f} | {gib} |")
    print(
        f"\nTogether {100 * steps['together'] / one_by_one:.0f} % of one by one; weights "
        + (f"differ: {', '.join(sorted(differing))}." if differing else "are equal bit for bit.")
    )
    options.output.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "_" for c in str(about["device"])).strip("_").lower()
    file = options.output / f"shared_teacher_{name}_{height}x{width}.json"
    names = ("batch", "size", "iterations", "student", "teacher", "widths")
    chosen = {name: getattr(options, name) for name in names}
    result = {
        "machine": about,
        **chosen,
        "precision": todo[0].job.precision,
        "load": load,
        "seconds": seconds,
        "peak_memory": memory,
        "differing": sorted(differing),
    }
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nWritten to {file}.")
    must_be_equal = options.device == "cpu" or options.deterministic
    return 1 if differing and must_be_equal else 0


if __name__ == "__main__":
    sys.exit(main())
