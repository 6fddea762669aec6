"""CamVid at full size without Kedro: a teacher and students by several methods, speed and memory.

    python benchmarks/camvid.py --data CAMVID --output OUT [--teacher-weights FILE]
    python benchmarks/camvid.py ... --methods baseline kd cwd cirkd dist tse tse_cwd

360 x 360 crops, batch 16, DeepLabV3-ResNet-101 to DeepLabV3-ResNet-18, on the GPU if there is one.
Needs torch, torchvision, timm, pydantic, safetensors and rich only. Run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
from pathlib import Path
from typing import Any

import torch

from rdd_pipeline.data.labels import CAMVID
from rdd_pipeline.distillation.methods import COMPANIONS, METHODS, find_method
from rdd_pipeline.launching.__main__ import run_job_file


def job(arguments: argparse.Namespace, method: str, network: dict[str, Any]) -> dict[str, Any]:
    recipe = {
        "iterations": arguments.iterations,
        "batch_size": arguments.batch_size,
        "validate_every": max(arguments.iterations // 10, 1),
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4},
        "augment": {"crop": [arguments.crop, arguments.crop]},
    }
    return {
        "job": {
            "method": method,
            "seed": arguments.seed,
            "network": network,
            "labels": CAMVID.model_dump(mode="json"),
            "root": str(arguments.data.resolve()),
            "recipe": recipe,
            "rdd": {"warmup": 0.1, "min_kept": 0.1},
        },
        "trainer": {"log_every": 50},
        "layout": "camvid",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CamVid in the SegNet split")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crop", type=int, default=360)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", default="deeplabv3_resnet101")
    parser.add_argument(
        "--methods", nargs="+", default=["baseline", "tse"], choices=sorted(METHODS | COMPANIONS)
    )
    parser.add_argument("--student", default="deeplabv3_resnet18")
    parser.add_argument("--teacher-weights", type=Path, help="backbone weights in timm's names")
    parser.add_argument("--student-weights", type=Path, help="backbone weights in timm's names")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def network(name: str, weights: Path | None) -> dict[str, Any]:
        return {"name": name, "pretrained": str(weights.resolve()) if weights else False}

    teacher = arguments.output.resolve() / "teacher" / "network.safetensors"
    rows = []
    student = network(arguments.student, arguments.student_weights)
    for method, definition in (
        ("teacher", network(arguments.teacher, arguments.teacher_weights)),
        *((name, student) for name in arguments.methods),
    ):
        spec = job(arguments, method, definition)
        spec["output"] = str(arguments.output.resolve() / method)
        if find_method(method).needs_teacher:
            spec["teacher"] = str(teacher)
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"{method}.json"
        path.write_text(json.dumps(spec, indent=1))
        rows.append(run_job_file(path))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(f"{device}, torch {torch.__version__}, {arguments.iterations} iterations")
    print(f"{'method':10} {'val':>6} {'test':>6} {'images/s':>9} {'peak GiB':>9}")
    for row in rows:
        cost, scores = row["cost"], row["scores"]
        speed = cost["images"] / max(cost["seconds"], 1e-9)
        mious = " ".join(f"{100 * scores[split]['miou']:6.2f}" for split in ("val", "test"))
        print(f"{row['method']:10} {mious} {speed:9.1f} {cost['peak_memory'] / 2**30:9.2f}")


if __name__ == "__main__":
    main()
