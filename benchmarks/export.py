"""Whether exported files compute what the network does: CamVid test images at three sizes.

    python benchmarks/export.py --data CAMVID --output OUT --weights FOLDER --images 20

Each network is trained briefly (logits of random weights are nearly tied), exported as ONNX,
torch.export program and int8 ONNX, and compared with torch on test images: at their own size, at
three quarters of it made odd, at half of it in pairs; with `--part 2/4`, on the second quarter of
them. FOLDER holds BACKBONE.safetensors in timm's names; what is not there starts from random
weights. A line of OUT/rows.jsonl for each file; `--table` prints them as Markdown. Needs the extra
`export`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

NETWORKS = [
    *("pspnet_mobilenetv2", "deeplabv3_mobilenetv2", "pspnet_resnet18", "deeplabv3_resnet18"),
    *("fcn_vit_tiny_patch16_224", "deeplabv3_resnet101"),
]


def fitted(name: str, images: Any, a: argparse.Namespace) -> Any:
    """A checkpoint of the network after a short training on random crops."""
    import torch
    import torch.nn.functional as F

    from rdd_pipeline.config import AugmentParams, NetworkParams
    from rdd_pipeline.networks import NetworkCheckpoint, Preprocessing, network_from_params
    from rdd_pipeline.networks.network import PAPER_NETWORKS
    from rdd_pipeline.networks.resizing import bilinear

    backbone = PAPER_NETWORKS[name].backbone if name in PAPER_NETWORKS else name.split("_", 1)[1]
    weights = a.weights / f"{backbone}.safetensors" if a.weights else None
    params = NetworkParams(name=name, pretrained=weights if weights and weights.exists() else False)
    torch.manual_seed(0)
    network = network_from_params(params, num_classes=images.labels.num_classes)
    preprocessing = Preprocessing.for_network(params)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    batches = images.split("train").training_batches(
        AugmentParams(crop=(a.crop, a.crop), scale_min=0.5, scale_max=1.0),
        seed=0,
        batch_size=4,
        iterations=range(1, a.iterations + 1),
    )
    for batch in batches:
        output = network(preprocessing.normalize(batch.images))
        labels = batch.labels.long()
        loss = F.cross_entropy(bilinear(output.logits, labels.shape[-2:]), labels, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return NetworkCheckpoint.from_network(
        network, params=params, label_names=images.labels.names, preprocessing=preprocessing
    )


def read_images(a: argparse.Namespace) -> Any:
    from rdd_pipeline.data.images import Images
    from rdd_pipeline.data.index import build_index
    from rdd_pipeline.data.layouts import get_layout, raise_problems
    from rdd_pipeline.data.layouts.camvid import CAMVID

    index = build_index(a.data, get_layout("camvid", a.data))
    raise_problems(a.data, index.problems)
    return Images(a.data, tuple(index.samples), CAMVID)


def run(a: argparse.Namespace) -> None:
    import torch

    from rdd_pipeline.config import ExportParams
    from rdd_pipeline.export.check import Labeled
    from rdd_pipeline.export.files import Exporter

    torch.set_num_threads(a.threads)
    images = read_images(a)
    a.output.mkdir(parents=True, exist_ok=True)

    def some(split: str, count: int) -> list[Any]:
        samples = images.split(split).samples
        return list(samples[:: max(len(samples) // count, 1)][:count])

    part, parts = a.part
    samples = [Labeled(*images.read(s)) for s in some("test", a.images)[part - 1 :: parts]]
    calibration = [images.read(sample)[0] for sample in some("train", a.calibration)]
    for name in a.networks:
        began = time.monotonic()
        checkpoint = fitted(name, images, a)
        trained = time.monotonic() - began
        params = ExportParams(formats=tuple(a.formats))
        exporter = Exporter(
            checkpoint,
            params,
            samples=samples,
            ignore_index=255,
            calibration=calibration,
            threads=a.threads,
        )
        for verdict in exporter.write(a.output, name).values():
            seconds = time.monotonic() - began - trained
            row = {**verdict, "trained_seconds": trained, "export_seconds": seconds}
            row["part"] = f"{part}/{parts}"
            with (a.output / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def table(output: Path) -> None:
    """Newest row of each file."""
    rows = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    newest = {(row["file"], row["part"]): row for row in rows}
    print(
        "| network | file | images | as in torch, % at own, odd, half size | largest difference "
        "| mIoU before, after | MB | ms (torch) | layers in float |\n" + "|---" * 9 + "|"
    )
    for row in newest.values():
        equal = ", ".join(f"{100 * size['equal_pixels']:.4f}" for size in row["sizes"])
        print(
            f"| {row['network']} | {row['format']} | {row['sizes'][0]['images']} ({row['part']}) | "
            f"{equal} | {row['largest_difference']:.1e} | "
            f"{100 * row['miou_before']:.2f}, {100 * row['miou_after']:.2f} | "
            f"{row['megabytes']:.1f} | {row['milliseconds']:.0f} "
            f"({row['torch_milliseconds']:.0f}) | {len(row.get('float_layers', []))} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--formats", nargs="+", default=["onnx", "pt2", "int8"])
    parser.add_argument("--images", type=int, default=20, help="test images")
    parser.add_argument(
        "--part",
        metavar="K/N",
        default=(1, 1),
        type=lambda text: tuple(map(int, text.split("/"))),
        help="every N-th of these images from the K-th on",
    )
    parser.add_argument("--calibration", type=int, default=8, help="training images for int8")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    a = parser.parse_args()
    table(a.output) if a.table else run(a)


if __name__ == "__main__":
    main()
