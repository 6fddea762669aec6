"""Compare what has been trained: which results belong side by side, and their statistics."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Metrics = dict[str, Any]

NOT_SPLITS = ("about", "cost", "repeats")


def splits_of(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the splits that were evaluated."""
    return [
        name
        for name, value in metrics.items()
        if name not in NOT_SPLITS and isinstance(value, Mapping)
    ]


def flatten(results: Iterable[Metrics]) -> list[Metrics]:
    """Every training as a result of its own: `repeats` holds those with further seeds."""
    flat = []
    for result in results:
        flat.append({key: value for key, value in result.items() if key != "repeats"})
        flat += result.get("repeats", [])
    return flat


def comparable(results: Iterable[Metrics], key: str) -> list[Metrics]:
    """Students trained on the same data, with the same network and recipe as `key` stands for."""
    return [r for r in flatten(results) if r.get("about", {}).get("comparison") == key]


def latest_by_seed(results: Iterable[Metrics]) -> dict[tuple[str, str], Metrics]:
    """Newest result by (method, seed); `results` are in the order of their versions."""
    return {(r["about"]["method"], r["about"]["seed"]): r for r in results}


def compare(results: Iterable[Metrics]) -> list[dict[str, Any]]:
    """One row for each method and comparison: mean and spread over seeds, gain, cost.

    Args:
        results: Content of metrics files, oldest first; of equal (method, seed, comparison) the
            newest counts.

    Returns:
        Rows with ``method``, ``title``, ``network``, ``comparison``, ``data_digest``, ``seeds``,
        and for each split mean and sample standard deviation of the mIoU in percent
        (``SPLIT_miou``, ``SPLIT_miou_sd``; NaN with one seed), the mean gain over the student
        alone with the same seeds (``SPLIT_gain``), parameters, MACs and images/s of training.
        Data set by data set: teachers first, then students, those of the largest comparison before
        others, best first (by the last split).
    """
    groups: dict[tuple[str, str, str], dict[str, Metrics]] = {}
    for result in flatten(results):
        about = result["about"]
        # A teacher is not compared by recipe; its own work tells one from another.
        which = about["comparison"] or f"{about['network']}"
        key = (about["data_digest"], which, about["method"])
        groups.setdefault(key, {})[about["seed"]] = result
    rows = []
    for (data, comparison, method), by_seed in groups.items():
        alone = groups.get((data, comparison, "baseline"), {})
        any_result = next(reversed(by_seed.values()))
        row: dict[str, Any] = {
            "method": method,
            "title": any_result["about"]["title"],
            "network": any_result["about"]["network"],
            "seeds": ",".join(sorted(by_seed)),
        }
        for split in splits_of(any_result):
            values = {s: 100 * r[split]["miou"] for s, r in by_seed.items() if split in r}
            row[f"{split}_miou"] = statistics.fmean(values.values())
            row[f"{split}_miou_sd"] = (
                statistics.stdev(values.values()) if len(values) > 1 else math.nan
            )
            gains = [
                value - 100 * alone[seed][split]["miou"]
                for seed, value in values.items()
                if seed in alone and split in alone[seed]
            ]
            # The TFE stage ends early in the run: no student to be compared.
            comparable_gain = gains and method not in ("baseline", "teacher", "tfe")
            row[f"{split}_gain"] = statistics.fmean(gains) if comparable_gain else math.nan
        cost = any_result["cost"]
        row |= {
            "parameters": cost["parameters"],
            "macs": cost["macs"],
            "images_per_second": cost.get("images_per_second", math.nan),
            "comparison": comparison,
            "data_digest": data,
        }
        rows.append(row)
    sizes = Counter((row["data_digest"], row["comparison"]) for row in rows)

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        data, comparison = row["data_digest"], row["comparison"]
        score = row[[name for name in row if name.endswith("_miou")][-1]]
        return (
            data,
            row["method"] != "teacher",
            -sizes[data, comparison] if row["method"] != "teacher" else 0,
            comparison,
            -score if score == score else math.inf,
        )

    return sorted(rows, key=order)
