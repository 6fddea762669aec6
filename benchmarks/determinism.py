"""What `trainer.deterministic` costs, and whether it keeps its word.

    python benchmarks/determinism.py [--devices 2] [--methods baseline kd tse cirkd]
    python benchmarks/determinism.py --small      # two CPU cores, a minute

Each method is trained twice without and twice with it, in turns, on generated scenes: images/s and
peak memory of both, and whether the two runs ended with the same weights bit for bit. With several
devices each training is launched as `kedro run` would (NCCL on CUDA, gloo on CPU). On CPU all runs
repeat anyway, and the cost is nothing. Exit status 1 if a run with it was not repeated.

Needs torch, torchvision, timm, pydantic, safetensors and rich only.
"""

from __future__ import annotations

import argparse
import logging
import platform
import tempfile
from pathlib import Path
from typing import NamedTuple

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
from rdd_pipeline.distillation.methods import METHODS, RDD_PLUS
from rdd_pipeline.launching.launch import train
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params
from rdd_pipeline.scenes.write import write_scenes
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.preparation import prepare_job
from rdd_pipeline.training.training import Training


class Setting(NamedTuple):
    teacher: str
    student: str
    width: int | None
    height: int
    batch_size: int
    iterations: int


FULL = Setting("deeplabv3_resnet101", "deeplabv3_resnet18", None, 512, 16, 200)
SMALL = Setting("deeplabv3_test_efficientnet", "fcn_test_efficientnet", 8, 64, 4, 20)


class Run(NamedTuple):
    images_per_second: float
    peak_bytes: int
    digest: str


class Bench:
    """Scenes and a teacher, which need not have learned anything."""

    def __init__(self, folder: Path, setting: Setting, devices: int) -> None:
        self.folder, self.setting, self.devices = folder, setting, devices
        self.root = folder / "scenes"
        size = {"height": setting.height, "width": 3 * setting.height // 2}
        write_scenes(self.root, SceneParams(train=64, val=2, test=1, **size))
        layout = get_layout("camvid", self.root)
        self.images = Images(self.root, build_index(self.root, layout).samples, CAMVID)
        network = self._network(setting.teacher)
        torch.manual_seed(0)
        self.teacher = NetworkCheckpoint.from_network(
            network_from_params(network, num_classes=CAMVID.num_classes),
            params=network,
            label_names=CAMVID.names,
        )

    def _network(self, name: str) -> NetworkParams:
        if self.setting.width is None:
            return NetworkParams(name=name)
        return NetworkParams(name=name, width=self.setting.width, output_stride=16)

    def run(self, method: str, deterministic: bool, number: int) -> Run:
        setting = self.setting
        trainer = TrainerParams(devices=self.devices, deterministic=deterministic)
        job = TrainingJob(
            method=method,
            network=self._network(setting.student),
            recipe=RecipeParams(
                iterations=setting.iterations,
                batch_size=setting.batch_size,
                optimizer=OptimizerParams(lr=0.01),
                augment=AugmentParams(crop=(setting.height, setting.height)),
                validate_every=setting.iterations,
                keep="last",
            ),
            rdd=RddParams(tfe_length=0.3, min_kept=0.1),
        )
        job = prepare_job(job, trainer)
        place = self.folder / f"{method}-{deterministic}-{number}"
        result = train(Training(job, self.images, self.teacher).stored_in(place), trainer)
        cost = result.state.cost
        return Run(
            cost.images / max(cost.seconds, 1e-9),
            cost.peak_memory,
            result.network.digest(),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--small", action="store_true", help="tiny networks and images")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["baseline", "kd", "tse", "cirkd", "ifvd"],
        choices=sorted(METHODS | RDD_PLUS),
        metavar="METHOD",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    setting = SMALL if arguments.small else FULL
    if arguments.iterations:
        setting = setting._replace(iterations=arguments.iterations)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(f"{arguments.devices} x {name or 'CPU'}, torch {torch.__version__}")
    print(f"{'method':10} {'images/s':>17} {'slower':>7} {'peak GiB':>13} {'same weights':>14}")
    broken = False
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), setting, arguments.devices)
        for method in arguments.methods:
            runs: dict[bool, list[Run]] = {False: [], True: []}
            for number in range(2):
                for deterministic in runs:
                    runs[deterministic].append(bench.run(method, deterministic, number))
            speed, peak, same = [], [], []
            for pair in runs.values():
                speed.append(max(run.images_per_second for run in pair))
                peak.append(max(run.peak_bytes for run in pair) / 2**30)
                same.append("yes" if pair[0].digest == pair[1].digest else "no")
            broken |= same[1] == "no"
            print(
                f"{method:10} {speed[0]:7.1f} > {speed[1]:7.1f} {1 - speed[1] / speed[0]:7.0%} "
                f"{peak[0]:5.2f} > {peak[1]:5.2f} {same[0]:>5} > {same[1]:>6}",
                flush=True,
            )
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
