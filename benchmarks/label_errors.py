"""How many of the regions that `label_errors` ranks first are wrong labels? On scenes it is known.

    kedro run
    python benchmarks/label_errors.py [--data data] [--dataset scenes] [--json FILE]

The generated scenes of the default environment have wrong labels in training (`label_noise`), and
can be drawn again without them. A region counts as found where most of its pixels are wrong.
Several rules are compared: both networks (what the pipeline does), each of them alone, and both,
ranked by the mean instead of the sum of the margins. A ranking at random is right as often as
labels are wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rdd_pipeline.data.images import Images
from rdd_pipeline.datasets import ImagesDataset
from rdd_pipeline.evaluation.predict import evaluation_mode, score_bands
from rdd_pipeline.evaluation.suspects import Suspect, find_suspects, opinion
from rdd_pipeline.inference.files import find_network
from rdd_pipeline.networks import load_checkpoint
from rdd_pipeline.scenes.street import render_scene

FIRST = (20, 50, 100, 200, 500)
RULES: dict[str, tuple[int, int, Callable[[Suspect], float]]] = {
    "both networks, sum": (0, 1, lambda suspect: suspect.score),
    "teacher alone, sum": (0, 0, lambda suspect: suspect.score),
    "student alone, sum": (1, 1, lambda suspect: suspect.score),
    "both networks, mean": (0, 1, lambda suspect: suspect.score / suspect.mask.sum()),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--student", default="student_tse")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folders = {n: arguments.data / n / arguments.dataset for n in ("02_intermediate", "06_models")}
    images = ImagesDataset(filepath=str(folders["02_intermediate"] / "images")).load()
    networks = [
        load_checkpoint(find_network(folders["06_models"] / name))
        for name in ("teacher", arguments.student)
    ]
    results = measure(images.split("train"), networks)
    print(f"{100 * results['wrong']:.1f} % of the labeled pixels are wrong")
    print("| rule | " + " | ".join(f"first {n}" for n in FIRST) + " | wrong pixels in them |")
    for rule in RULES:
        found = results[rule]
        shares = (f"{100 * found[f'first {n}']:.0f}" for n in FIRST)
        print(f"| {rule} | " + " | ".join(shares) + f" | {100 * found['recall']:.0f} % |")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def measure(images: Images, networks: list) -> dict:
    """Precision of each rule among the first regions, and the share of wrong pixels in the 500."""
    ignored, lookup = images.labels.ignore_index, np.array(images.labels.lookup)
    marker = json.loads((images.root / "scenes.json").read_text())
    models = [network.build() for network in networks]
    ranked: dict[str, list] = {rule: [] for rule in RULES}
    wrong_pixels = labeled_pixels = 0
    with evaluation_mode(models[0]), evaluation_mode(models[1]):
        for batch in images.evaluation_batches(1):
            label, sample = batch.labels[0], images.samples[batch.indices[0]]
            number = int(sample.name.rsplit("_", 1)[1])
            scene = render_scene(marker["seed"], "train", number, *marker["size"])
            truth = lookup[scene[1]]
            known = (label.numpy() != ignored) & (truth != ignored)
            wrong = known & (label.numpy() != truth)
            wrong_pixels += int(wrong.sum())
            labeled_pixels += int(known.sum())
            opinions = [
                opinion(
                    next(
                        score_bands(
                            model, network.header.preprocessing, batch.images, sizes=[label.shape]
                        )
                    ),
                    label,
                    ignored,
                )
                for model, network in zip(models, networks, strict=True)
            ]
            for rule, (first, second, score) in RULES.items():
                for suspect in find_suspects(label, opinions[first], opinions[second]):
                    rows, columns = np.nonzero(suspect.mask)
                    place = rows + suspect.top, columns + suspect.left
                    hits, all_known = int(wrong[place].sum()), int(known[place].sum())
                    right = bool(all_known) and hits > all_known / 2
                    ranked[rule].append((score(suspect), right, hits))
    results: dict = {"wrong": wrong_pixels / labeled_pixels, "images": len(images.samples)}
    for rule, regions in ranked.items():
        regions.sort(key=lambda region: -region[0])
        results[rule] = {
            f"first {n}": sum(right for _, right, _ in regions[:n]) / max(len(regions[:n]), 1)
            for n in FIRST
        }
        results[rule] |= {
            "regions": len(regions),
            "recall": sum(hits for *_, hits in regions[: FIRST[-1]]) / max(wrong_pixels, 1),
        }
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
