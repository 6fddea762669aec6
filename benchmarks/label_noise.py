"""What distillation, and which pixels RDD chooses, are worth under wrong training labels.

    python benchmarks/label_noise.py --output OUT --seconds 1200
    python benchmarks/label_noise.py --output OUT --table

Generated scenes whose training labels are wrong at a share of the pixels (`--noise`), a teacher
trained on them for some iterations (`--teachers`), and under each of them students by several
methods (`--methods`) and seeds; val and test are right. Trainings run side by side, `--workers` of
them with one thread each. What is finished when the time is over is kept in OUT/rows.jsonl, and
the same command goes on from there. `--table` prints mean, spread and the paired difference to the
student alone, as Markdown.

Needs torch, torchvision, timm, pydantic, safetensors and rich; the table scipy, too.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing as mp
import os
import platform
import queue
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name in the table: (title, method, settings of RDD)
    "alone": ("student alone", "baseline", {}),
    "kd": ("KD", "kd", {}),
    "cwd": ("CWD", "cwd", {}),
    **{
        f"{name}{suffix}": (f"{title}{more}", method, settings)
        for name, title, settings in (
            ("ohem", "OHEM + KD", {"mode": "ohem"}),
            ("or", "RDD variant OR", {"mode": "or"}),
            ("xor", "RDD", {"mode": "xor"}),
            ("floor", "RDD, class floor 20 %", {"mode": "xor", "class_floor": 0.2}),
            ("xor2", "RDD, threshold 0.2", {"mode": "xor", "threshold": 0.2}),
            ("xor3", "RDD, threshold 0.3", {"mode": "xor", "threshold": 0.3}),
            ("xor5", "RDD, threshold 0.5", {"mode": "xor", "threshold": 0.5}),
            ("floor3", "RDD, 0.3, class floor 20 %", {"threshold": 0.3, "class_floor": 0.2}),
        )
        for suffix, more, method in (("", "", "tse"), ("_cwd", " + CWD", "tse_cwd"))
    },
}


class Task(NamedTuple):
    """One training; `variant` is "teacher" for teachers, whose `teacher` is their own length."""

    noise: float
    teacher: int
    variant: str
    seed: int

    @property
    def key(self) -> str:
        """Name of its row."""
        return f"{self.noise:g}/{self.teacher}/{self.variant}/{self.seed}"


def tasks_of(a: argparse.Namespace) -> list[Task]:
    """Teachers first, then students in order of worth: all methods of the first seed, and so on."""
    teachers = [Task(n, t, "teacher", 0) for t in sorted(a.teachers)[::-1] for n in a.noise]
    students = [
        Task(n, 0 if v == "alone" else t, v, s)
        for s in a.seeds
        for n in a.noise
        for v in a.methods
        for t in (a.teachers if v != "alone" else a.teachers[:1])
    ]
    return teachers + students


def recipe(a: argparse.Namespace, iterations: int, lr: float, warmup: int) -> dict[str, Any]:
    return {
        "iterations": iterations,
        "batch_size": 8,
        "validate_every": max(1, iterations // a.validations),
        "class_weights": a.class_weights,
        "optimizer": {"name": "adamw", "lr": lr, "weight_decay": 0.01, "warmup": warmup},
        "augment": {"crop": a.crop, "scale_min": 0.75, "scale_max": 1.5},
    }


def run(task: Task, a: argparse.Namespace, device: str) -> dict[str, Any]:
    """Train and score; returns a row."""
    from rdd_pipeline.config import EvaluationParams, TrainerParams
    from rdd_pipeline.data.images import Images
    from rdd_pipeline.data.layouts.scenes import SCENES
    from rdd_pipeline.evaluation.scoring import score_splits
    from rdd_pipeline.networks import load_checkpoint, save_checkpoint
    from rdd_pipeline.training.device import resolve_device
    from rdd_pipeline.training.job import TrainingJob
    from rdd_pipeline.training.loop import train
    from rdd_pipeline.training.training import Training

    root = a.output / f"scenes_{task.noise:g}"
    images = Images(root, tuple(_samples(root)), SCENES)
    is_teacher = task.variant == "teacher"
    _, method, rdd = VARIANTS.get(task.variant, ("", "teacher", {}))
    job = TrainingJob(
        method=method,
        seed=task.seed,
        network={"name": "pspnet_resnet10t", "width": 64}
        if is_teacher
        else {"name": "pspnet_test_resnet", "width": 32},
        recipe=recipe(a, task.teacher, 0.003, 30)
        if is_teacher
        else recipe(a, a.iterations, 0.004, 20),
        rdd={"tfe_length": a.warmup, "min_kept": a.min_kept, **rdd},
        methods={"kd": a.kd},
        precision=a.precision,
    )
    file = a.output / f"teacher_{task.noise:g}_{task.teacher}.safetensors"
    trainer = TrainerParams(device=device, workers=0, log_every=40)
    teacher = None if is_teacher or task.variant == "alone" else load_checkpoint(file)
    began = time.monotonic()
    result = train(Training(job, images, teacher), trainer)
    seconds = time.monotonic() - began
    if is_teacher:
        save_checkpoint(result.network, file)
    scores = score_splits(
        result.network,
        images,
        EvaluationParams(),
        device=resolve_device(device),
    )
    shares = [row for row in result.history if "chosen" in row or "hard_teacher" in row]
    return {
        **task._asdict(),
        "val": 100 * scores["val"]["miou"],
        "test": 100 * scores["test"]["miou"],
        "iou": scores["test"]["iou"],
        "seconds": round(seconds, 1),
        "device": device,
        **{
            name: round(statistics.fmean(row[name] for row in shares[len(shares) // 2 :]), 4)
            for name in ("hard_student", "hard_teacher", "chosen")
            if shares and name in shares[-1]
        },
    }


def _samples(root: Path) -> list[Any]:
    from rdd_pipeline.data.index import build_index
    from rdd_pipeline.data.layouts import get_layout

    if root not in _KNOWN:
        _KNOWN[root] = list(build_index(root, get_layout("scenes", root)).samples)
    return _KNOWN[root]


_KNOWN: dict[Path, list[Any]] = {}


def work(a: argparse.Namespace, device: str, inbox: Any, outbox: Any) -> None:
    """A process that trains what it is sent."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    os.environ["COLUMNS"] = "1"
    import rich

    rich.get_console().quiet = True
    parent = mp.parent_process()
    while parent is not None and parent.is_alive():  # it may have been ended
        try:
            task = inbox.get(timeout=1.0)
        except queue.Empty:
            continue
        try:
            outbox.put((task, run(task, a, device), None))
        except Exception as error:  # the other trainings go on
            outbox.put((task, None, repr(error)))


def measure(a: argparse.Namespace) -> None:
    """Train all that is not there yet, until the time is over."""
    from rdd_pipeline.config import SceneParams
    from rdd_pipeline.scenes.write import write_scenes

    deadline = time.monotonic() + a.seconds
    a.output = a.output.resolve()
    a.output.mkdir(parents=True, exist_ok=True)
    rows_file = a.output / "rows.jsonl"
    done = {_task(row).key for row in rows_of(a.output)}
    todo = [task for task in tasks_of(a) if task.key not in done]
    context = mp.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    processes = [
        context.Process(target=work, args=(a, device, inbox, outbox), daemon=True)
        for device in (a.devices * a.workers)[: a.workers]
    ]
    for process in processes:
        process.start()
    for noise in a.noise:
        scenes = SceneParams(train=a.train_images, label_noise=noise)
        write_scenes(a.output / f"scenes_{noise:g}", scenes)
    waiting, running = list(todo), 0
    while (waiting or running) and time.monotonic() < deadline:
        ready = [
            task
            for task in waiting
            if task.variant in ("teacher", "alone")
            or f"{task.noise:g}/{task.teacher}/teacher/0" in done
        ]
        for task in ready[: max(0, a.workers - running)]:
            waiting.remove(task)
            inbox.put(task)
            running += 1
        try:
            task, row, error = outbox.get(timeout=1.0)
        except queue.Empty:
            continue
        running -= 1
        if row is None:
            print(task.key, "FAILED", error, flush=True)
            continue
        done.add(task.key)
        with rows_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        text = f"{row['val']:5.2f} {row['test']:5.2f}"
        print(f"{task.key:28} {text}  {row['seconds']:6.1f} s  {row['device']}", flush=True)
    print(f"not done: {len(waiting) + running}", flush=True)
    for process in processes:
        process.kill()


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Rows that are finished."""
    file = output / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _task(row: dict[str, Any]) -> Task:
    return Task(row["noise"], row["teacher"], row["variant"], row["seed"])


def table(a: argparse.Namespace) -> str:
    """Markdown: one table for each noise, teachers side by side."""
    from rdd_pipeline.reporting.comparison import paired_interval

    rows = [row for row in rows_of(a.output) if row["noise"] in a.noise]
    seeds = [s for s in a.seeds if any(row["seed"] == s for row in rows)]
    lines = [f"seeds {', '.join(map(str, seeds))}; mean (standard deviation), val / test"]
    for noise in a.noise:
        of = {_task(row).key: row for row in rows}
        lines += ["", f"label noise {100 * noise:g} %", ""]
        heads = [f"teacher of {t}: val / test | vs. alone (test)" for t in a.teachers]
        lines += ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * (2 * len(a.teachers))]
        cells = []
        for t in a.teachers:
            teacher = of.get(f"{noise:g}/{t}/teacher/0")
            cells += [f"{teacher['val']:.1f} / {teacher['test']:.1f}" if teacher else "", ""]
        lines.append("| teacher | " + " | ".join(cells) + " |")
        alone = {s: of.get(f"{noise:g}/0/alone/{s}") for s in seeds}
        for variant in a.methods:
            cells = []
            for t in a.teachers:
                key = f"{noise:g}/{0 if variant == 'alone' else t}/{variant}"
                found = {s: of[f"{key}/{s}"] for s in seeds if f"{key}/{s}" in of}
                if not found:
                    cells += ["", ""]
                    continue
                cells.append(
                    " / ".join(_mean([r[p] for r in found.values()]) for p in ("val", "test"))
                )
                gains = [r["test"] - alone[s]["test"] for s, r in found.items() if alone[s]]
                low, high = paired_interval(gains)
                half = f" ± {(high - low) / 2:.1f}" if len(gains) > 1 else ""
                cells.append(f"{statistics.fmean(gains):+.1f}{half}" if variant != "alone" else "")
            lines.append(f"| {VARIANTS[variant][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="time limit")
    parser.add_argument("--table", action="store_true", help="print what there is")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.16])
    parser.add_argument("--teachers", type=int, nargs="+", default=[320, 1200], help="iterations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--iterations", type=int, default=320, help="of a student")
    parser.add_argument("--validations", type=int, default=2)
    parser.add_argument("--train-images", type=int, default=240)
    parser.add_argument("--crop", type=int, nargs=2, default=[64, 96])
    parser.add_argument("--kd", type=float, default=1.0)
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--min-kept", type=float, default=0.05)
    parser.add_argument("--class-weights", action="store_true")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side")
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="taken in turns by workers")
    arguments = parser.parse_args()
    if not arguments.table:
        print(platform.processor() or platform.machine(), platform.python_version(), flush=True)
        measure(arguments)
    else:
        print(table(arguments))


if __name__ == "__main__":
    main()
