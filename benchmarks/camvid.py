"""What the methods are worth on CamVid: a teacher and students by several methods and seeds.

    python benchmarks/camvid.py --data CAMVID --output OUT --weights FOLDER --limit-s 540
    python benchmarks/camvid.py --output OUT --table

360 x 360 crops, batch 16, from ImageNet weights (FOLDER holds BACKBONE.safetensors in timm's names;
without it all starts from scratch). Trainings run side by side, each a process of its own. What is
finished is a line of OUT/rows.jsonl; no training starts that would not end in time by what the
others took, and what is stopped at the limit goes on from its checkpoint with the same command.
`--table` prints mean, spread and the paired gain over the student alone, as Markdown.

Needs torch, torchvision, timm, pydantic, safetensors and rich; the table scipy, too.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

VARIANTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # name: (title, method, settings of RDD, settings of the methods); the first six matter most
    "alone": ("student alone", "baseline", {}, {}),
    "kd": ("KD", "kd", {}, {}),
    "rdd": ("RDD", "tse", {}, {}),
    "ohem": ("OHEM + KD", "tse", {"mode": "ohem"}, {}),
    "cwd": ("CWD", "cwd", {}, {}),
    "rdd_cwd": ("RDD + CWD", "tse_cwd", {}, {}),
    "rdd_or": ("RDD, pixels hard for either", "tse", {"mode": "or"}, {}),
    "no_tfe": ("RDD without TFE", "tse", {"tfe_length": 0}, {}),
    "kd_half": ("KD, weight 0.5", "kd", {}, {"kd": 0.5}),
    "kd_twice": ("KD, weight 2", "kd", {}, {"kd": 2.0}),
    "weak_kd": ("KD, weak teacher", "kd", {}, {}),
    "weak_rdd": ("RDD, weak teacher", "tse", {}, {}),
}
ITERATIONS = {"teacher": 2400, "weak_teacher": 300}
TEACHERS = {"teacher": "teacher", "weak_teacher": "weak teacher"}
CORE = list(VARIANTS)[:6]


class Task(NamedTuple):
    """One training."""

    variant: str
    seed: int

    @property
    def key(self) -> str:
        """Name of its folder."""
        return f"{self.variant}_{self.seed}"

    @property
    def teacher(self) -> Task | None:
        """What has to be finished first."""
        if self.variant in ("alone", *TEACHERS):
            return None
        return Task("weak_teacher" if self.variant.startswith("weak_") else "teacher", 0)


TEACHER = Task("teacher", 0)


def tasks_of(a: argparse.Namespace) -> list[Task]:
    """Students in order of worth: all core methods of a seed, and so on; each teacher before."""
    students = [Task(v, s) for s in a.seeds for v in a.methods if v in CORE]
    students += [Task(v, s) for s in a.seeds for v in a.methods if v not in CORE]
    tasks = [TEACHER]
    for task in students:
        if task.teacher is not None and task.teacher not in tasks:
            tasks.append(task.teacher)
        tasks.append(task)
    return tasks


def prepare(a: argparse.Namespace) -> Path:
    """Index and packs of the images, made once; returns the file of the index."""
    from rdd_pipeline.data.index import build_index, of_split, to_rows
    from rdd_pipeline.data.layouts import get_layout, raise_problems
    from rdd_pipeline.data.layouts.camvid import CAMVID
    from rdd_pipeline.data.packed import write_pack
    from rdd_pipeline.data.sources import FileSource

    path = a.output / "index.csv"
    if not path.exists():
        index = build_index(a.data, get_layout("camvid", a.data))
        raise_problems(a.data, index.problems)
        for split in ("train", "val", "test"):
            samples = of_split(index.samples, split)
            write_pack(FileSource(samples, a.data, lookup=CAMVID.lookup), a.output / "packs")
        rows = to_rows(index.samples)
        with path.with_suffix(".tmp").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        path.with_suffix(".tmp").replace(path)
    return path


def job(task: Task, a: argparse.Namespace, index: Path) -> dict[str, Any]:
    """What `run_job_file` reads."""
    from rdd_pipeline.data.layouts.camvid import CAMVID

    is_teacher = task.variant in TEACHERS
    _, method, rdd, methods = VARIANTS.get(task.variant, ("", "teacher", {}, {}))
    iterations = max(4, round(a.scale * ITERATIONS.get(task.variant, 1000)))
    name = a.teacher if is_teacher else a.student
    weights = a.weights / f"{name.split('_', 1)[1]}.safetensors" if a.weights else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, (cores or 1) // a.side_by_side)
    return {
        "labels": CAMVID.model_dump(mode="json"),
        "root": str(a.data),
        "packs": str(a.output / "packs"),
        "job": {
            "method": method,
            "seed": task.seed,
            "network": {
                "name": name,
                "pretrained": str(weights) if weights else False,
                "preprocessing": "half" if weights else "auto",
                "output_stride": 16,
                "width": 128 if is_teacher else 64,
            },
            "recipe": {
                "iterations": iterations,
                "batch_size": a.batch_size,
                "validate_every": math.ceil(iterations / (3 if is_teacher else 4)),
                "class_weights": False,  # CamVid has none
                "optimizer": {"name": "adamw", "lr": 0.001, "weight_decay": 0.01},
                "augment": {"crop": [a.crop, a.crop]},
            },
            # As in conf/camvid/published.
            "rdd": {"tfe_length": 0.1, "mode": "xor", "threshold": 0.7, "min_kept": 0.193, **rdd},
            "methods": {"kd": 1.0, **methods},
        },
        "trainer": {
            "device": a.device,
            "workers": 0 if a.device == "cpu" else min(6, max(1, share - 1)),
            "threads": share if a.device == "cpu" else 1,
            "log_every": 25,
            "checkpoint_every": 30.0,
        },
        "index": str(index),
        "teacher": str(a.output / task.teacher.key / "network.safetensors")
        if task.teacher
        else None,
        "output": str(a.output / task.key),
    }


def run_job(path: Path) -> int:
    """In a process of its own: train, and note how long all took and waited for images."""
    began = time.monotonic()
    import torch

    from rdd_pipeline.data.images import Images
    from rdd_pipeline.launching import __main__ as command

    notes = path.with_name("facts.json")
    before = json.loads(notes.read_text()) if notes.exists() else {"waited": 0.0, "seconds": 0.0}
    waited, load = before["waited"], Images.training_batches

    def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        nonlocal waited
        batches = iter(load(*args, **kwargs))
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    Images.training_batches = timed  # type: ignore[method-assign]
    sys.argv = [sys.argv[0], str(path)]
    status = command.main()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    seconds = before["seconds"] + time.monotonic() - began
    facts = {"waited": waited, "seconds": seconds, "device": device, "torch": torch.__version__}
    notes.write_text(json.dumps(facts))
    return status


def start(task: Task, a: argparse.Namespace, index: Path) -> subprocess.Popen[bytes]:
    """A process for a training; what it prints goes to its log."""
    folder = a.output / task.key
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job(task, a, index), indent=1))
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-W", "ignore", __file__, "--job", str(folder / "job.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def row_of(task: Task, a: argparse.Namespace) -> dict[str, Any]:
    """A finished training."""
    folder = a.output / task.key
    result, facts, spec = (
        json.loads((folder / name).read_text())
        for name in ("result.json", "facts.json", "job.json")
    )
    cost, scores = result["cost"], result["scores"]
    return {
        **task._asdict(),
        "val": 100 * scores["val"]["miou"],
        "test": 100 * scores["test"]["miou"],
        "iou": scores["test"]["iou"],
        "images_per_second": round(cost["images"] / max(cost["seconds"], 1e-9), 1),
        "waiting": round(facts["waited"] / max(cost["seconds"], 1e-9), 3),
        "seconds": round(facts["seconds"], 1),
        "peak_gib": round(cost["peak_memory"] / 2**30, 2),
        "side_by_side": a.side_by_side,
        "device": facts["device"],
        "torch": facts["torch"],
        "iterations": result["iterations"],
        **{name: spec["job"][name] for name in ("method", "rdd", "methods")},
        "fingerprint": result["fingerprint"],
    }


def measure(a: argparse.Namespace) -> bool:
    """Train what is not there yet until the time is over; returns whether nothing failed."""
    deadline = time.monotonic() + a.limit_s - min(15.0, a.limit_s / 20)  # to stop what runs
    a.output.mkdir(parents=True, exist_ok=True)
    index = prepare(a)
    rows = rows_of(a.output)
    done = {Task(row["variant"], row["seed"]) for row in rows}
    waiting = [task for task in tasks_of(a) if task not in done]
    running: dict[Task, subprocess.Popen[bytes]] = {}
    failed: list[str] = []

    def may_start(task: Task) -> bool:
        if task == TEACHER:
            return True
        if task.teacher is not None and task.teacher not in done:
            return False
        if TEACHER not in done and len(running) > a.beside_teacher:
            return False
        took = [row["seconds"] for row in rows if row["variant"] not in TEACHERS]
        begun = (a.output / task.key / "work").exists()
        return begun or not took or time.monotonic() + max(took) < deadline

    while time.monotonic() < deadline:
        for task in list(waiting):
            if len(running) < a.side_by_side and may_start(task):
                waiting.remove(task)
                running[task] = start(task, a, index)
        if not running:
            break
        time.sleep(0.2)
        for task, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[task]
            if process.returncode:
                failed.append(task.key)
                tail = (a.output / task.key / "log").read_text(errors="replace")[-600:]
                print(f"{task.key} FAILED ({process.returncode})\n{tail}", flush=True)
                waiting = [other for other in waiting if other.teacher != task]
                continue
            row = row_of(task, a)
            rows.append(row)
            done.add(task)
            with (a.output / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{task.key:12} val {row['val']:5.2f} test {row['test']:5.2f} "
                f"{row['images_per_second']:6.1f} images/s, {100 * row['waiting']:3.0f} % waiting, "
                f"{row['seconds']:5.0f} s, {row['peak_gib']:.1f} GiB",
                flush=True,
            )
    for process in running.values():
        process.terminate()  # saves its state
    for process in running.values():
        try:
            process.wait(max(1.0, deadline + 12 - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    stopped = ", ".join(task.key for task in running)
    print(f"done: {len(done)}, stopped: {stopped or 'none'}, not begun: {len(waiting)}", flush=True)
    return not failed


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Rows that are finished."""
    file = output / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(a: argparse.Namespace) -> str:
    """Markdown: a line for each method."""
    from rdd_pipeline.reporting.comparison import paired_interval

    rows = {(row["variant"], row["seed"]): row for row in rows_of(a.output)}
    hardware = sorted({f"{row['device']}, torch {row['torch']}" for row in rows.values()})
    lines = [
        f"{'; '.join(hardware)}; mIoU in %: mean ± standard deviation over n seeds; gain over the "
        "student alone of the same seeds with its 95 % interval (paired t)",
        "",
        "| | n | val | test | gain (val) | gain (test) | images/s | waiting for data |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in (*TEACHERS, *VARIANTS):
        found = {seed: row for (name, seed), row in rows.items() if name == variant}
        if not found:
            continue
        gains = ["", ""]
        if variant not in ("alone", *TEACHERS):
            pairs = [(row, rows.get(("alone", seed))) for seed, row in found.items()]
            gains = [_gain([r[p] - b[p] for r, b in pairs if b], paired_interval) for p in SPLITS]
        cells = [
            VARIANTS[variant][0] if variant in VARIANTS else TEACHERS[variant],
            str(len(found)),
            *(_mean([row[split] for row in found.values()]) for split in SPLITS),
            *gains,
            f"{statistics.fmean(row['images_per_second'] for row in found.values()):.0f}",
            f"{100 * statistics.fmean(row['waiting'] for row in found.values()):.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SPLITS = ("val", "test")


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _gain(differences: list[float], interval: Any) -> str:
    if not differences:
        return ""
    low, high = interval(differences)
    bounds = f" [{low:+.1f}, {high:+.1f}]" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):+.1f}{bounds}"


def main() -> int:
    if sys.argv[1:2] == ["--job"]:
        return run_job(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print what there is")
    parser.add_argument("--data", type=Path, help="CamVid in the SegNet split")
    parser.add_argument("--weights", type=Path, help="folder with BACKBONE.safetensors")
    parser.add_argument("--limit-s", type=float, default=1e9, help="seconds this call may take")
    parser.add_argument("--side-by-side", type=int, default=4, help="trainings at a time")
    parser.add_argument(
        "--beside-teacher", type=int, default=1, help="of them, while the teacher is trained"
    )
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="of the iterations: 2400, 1000")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crop", type=int, default=360)
    parser.add_argument("--teacher", default="deeplabv3_tf_efficientnet_lite2")
    parser.add_argument("--student", default="deeplabv3_mobilenetv2_100")
    parser.add_argument("--device", default="auto")
    a = parser.parse_args()
    a.output = a.output.resolve()
    if a.table:
        print(table(a))
        return 0
    if a.data is None:
        parser.error("--data is missing: the folder with train/, trainannot/ and so on.")
    a.data, a.weights = a.data.resolve(), a.weights.resolve() if a.weights else None
    if a.device == "auto":
        import torch

        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    return 0 if measure(a) else 1


if __name__ == "__main__":
    sys.exit(main())
