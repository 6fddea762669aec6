"""Compare what has been trained: which results belong side by side, and their statistics."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rdd_pipeline.distillation.methods import STAGES
from rdd_pipeline.evaluation.confusion import METRICS

Metrics = dict[str, Any]
"""Of one network: ``about`` (texts), ``cost`` (numbers), ``splits`` (scores by split)."""

Row = dict[str, Any]

NOT_TRAINED = ("seed", "root", "packs", "labels.name", "labels.colors", "evaluation.")
"""Beginnings of the names of what is in a job and makes no two repeats of it unlike."""

CONFIDENCE = 0.95
"""Of the intervals of differences."""


def comparable(results: Iterable[Metrics], key: str) -> list[Metrics]:
    """Students trained on the same data, with the same network and recipe as `key` stands for."""
    return [result for result in results if result["about"]["protocol_digest"] == key]


def latest_by_seed(results: Iterable[Metrics]) -> dict[tuple[str, str], Metrics]:
    """Newest result by (method, seed); `results` are in the order of their versions."""
    return {(r["about"]["method"], r["about"]["seed"]): r for r in results}


def compare(results: Iterable[Metrics], metric: str = "miou") -> list[Row]:
    """One row for each method and comparison: mean and spread over seeds, gain, cost.

    Args:
        results: Content of metrics files, oldest first; of equal (method, seed, comparison) the
            newest counts.
        metric: Key of `evaluation.confusion.METRICS`.

    Returns:
        Rows with ``metric``, ``method``, ``title``, ``network``, ``seeds`` (joined by commas),
        ``seed_count``, ``protocol_digest``, ``data_digest``, and for each split, in percent:
        mean (``SPLIT_score``), sample standard deviation (``SPLIT_sd``; NaN with one seed),
        the single values in the order of ``seeds`` (``SPLIT_values``, joined by spaces), the mean
        gain over the student alone with the same seeds (``SPLIT_gain``), how many seeds that are
        (``SPLIT_gain_seeds``), the bounds of its 95 % interval (``SPLIT_gain_low``,
        ``SPLIT_gain_high``), the p-value that belongs to it (``SPLIT_gain_p``) and that corrected
        for all methods of the comparison by Holm (``SPLIT_gain_p_holm``; NaN with fewer than two).
        How many classes there are (``SPLIT_classes``) and the fewest that a mean is over
        (``SPLIT_classes_in_mean``): those that occur in labels or predictions. Means of
        ``SPLIT_boundary_miou`` and ``SPLIT_calibration_error`` over the seeds that have them.
        Cost: ``parameters`` and ``macs`` of the network as it is used, ``trained_parameters`` and
        ``trained_macs`` with its auxiliary head, ``images_per_second`` and ``training_seconds``
        (medians over the seeds) and ``peak_memory_bytes`` (largest); NaN where unknown.
        Data set by data set: teachers first, then students, those of the largest comparison before
        others, best first (by the last split).
    """
    return _ordered(_rows(_groups(results), metric))


def compare_classes(results: Iterable[Metrics]) -> list[Row]:
    """One row for each method and comparison: IoU of every class on the last split.

    Returns:
        Rows with ``method``, ``title``, ``network``, ``seeds``, ``split``, then for each class in
        percent ``iou.CLASS``, the mean over the seeds in which the class occurs (NaN: in none),
        and ``gain.CLASS``, its mean difference to the student alone with the same seeds; then
        ``protocol_digest`` and ``data_digest``. In the order of `compare`; a method that was not
        evaluated on the last split of its data set is left out.
    """
    groups = _groups(results)
    splits: dict[str, list[str]] = {}
    for (data, _, _), by_seed in groups.items():
        named = (list(result["splits"]) for result in by_seed.values())
        splits[data] = max(splits.get(data, []), *named, key=len)
    rows = []
    for (data, comparison, method), by_seed in groups.items():
        split = splits[data][-1] if splits[data] else ""
        scores = {seed: _class_scores(result, split) for seed, result in by_seed.items()}
        alone = {
            seed: _class_scores(result, split)
            for seed, result in groups.get((data, comparison, "baseline"), {}).items()
            if has_gain(method)
        }
        names = list(dict.fromkeys(name for found in scores.values() for name in found))
        if not names:
            continue
        newest = next(reversed(by_seed.values()))
        row: Row = {
            "method": method,
            "title": newest["about"].get("title", method),
            "network": newest["about"]["network"],
            "seeds": ",".join(sorted((s for s in scores if scores[s]), key=seed_order)),
            "split": split,
        }
        for name in names:
            values = {
                seed: found[name]
                for seed, found in scores.items()
                if math.isfinite(found.get(name, math.nan))
            }
            gains = [
                value - alone[seed][name]
                for seed, value in values.items()
                if math.isfinite(alone.get(seed, {}).get(name, math.nan))
            ]
            row[f"iou.{name}"] = statistics.fmean(values.values()) if values else math.nan
            row[f"gain.{name}"] = statistics.fmean(gains) if gains else math.nan
        rows.append(row | {"protocol_digest": comparison, "data_digest": data})
    places = {_key(row): place for place, row in enumerate(_ordered(_rows(groups, "miou")))}
    return sorted(rows, key=lambda row: places[_key(row)])


def headline(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """What stands in the rows of `compare` in a few numbers, by method, in [0, 1], not percent.

    ``METRIC_SPLIT``, and where there are several seeds ``METRIC_SPLIT_sd``; of methods that are
    measured against the student alone ``gain_SPLIT`` and the bounds of its 95 % interval,
    ``gain_SPLIT_low`` and ``gain_SPLIT_high``. A method that was compared in several ways has the
    numbers of its first row, which is that of the largest comparison.
    """
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        names: dict[str, str] = {}
        for split in split_names([row]):
            score = f"{row['metric']}_{split}"
            names |= {f"{split}_score": score, f"{split}_sd": f"{score}_sd"}
            names |= {f"{split}_gain{end}": f"gain_{split}{end}" for end in ("", "_low", "_high")}
        numbers = {name: row[key] / 100 for key, name in names.items() if math.isfinite(row[key])}
        found.setdefault(row["method"], numbers)
    return found


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Bounds of the 95 % confidence interval of the mean of paired differences.

    Student's t with n - 1 degrees of freedom: it takes the differences to be independent and
    about normal. (NaN, NaN) with fewer than two.
    """
    count = len(differences)
    if count < 2 or not all(map(math.isfinite, differences)):
        return math.nan, math.nan
    # Here and not above: training imports this module's neighbors and must not need scipy.
    from scipy.special import stdtrit

    middle = statistics.fmean(differences)
    quantile = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2))
    half = quantile * statistics.stdev(differences) / math.sqrt(count)
    return middle - half, middle + half


def paired_p(differences: Sequence[float]) -> float:
    """P-value (two-sided) of the paired t-test that `paired_interval` is the interval of.

    Below 1 - `CONFIDENCE` exactly when the interval misses 0. NaN with fewer than two.
    """
    count = len(differences)
    if count < 2 or not all(map(math.isfinite, differences)):
        return math.nan
    from scipy.special import stdtr  # see `paired_interval`

    middle, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return 1.0 if middle == 0 else 0.0
    return 2 * float(stdtr(count - 1, -abs(middle) / (spread / math.sqrt(count))))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979), in the same order; NaN is not counted.

    The share of experiments in which any of them falls below a level by chance is at most that
    level, however they depend on each other.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if math.isfinite(p))
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[place] = largest
    return corrected


def has_gain(method: str) -> bool:
    """Whether a method is measured against the student alone."""
    return method not in ("baseline", "teacher", *STAGES)


def verdict(row: Mapping[str, Any], split: str) -> str:
    """What the interval of the gain allows to say.

    Returns:
        ``better`` or ``worse`` when the 95 % interval lies on one side of 0, ``open`` when it
        covers 0, ``single`` for one common seed, ``""`` where nothing is compared.
    """
    gain = float(row.get(f"{split}_gain", math.nan))
    low, high = (float(row.get(f"{split}_gain_{end}", math.nan)) for end in ("low", "high"))
    if not math.isfinite(gain):
        return ""
    if not math.isfinite(low):
        return "single"
    return "better" if low > 0 else "worse" if high < 0 else "open"


def holds_among_all(row: Mapping[str, Any], split: str) -> bool:
    """Whether `verdict` stays ``better`` or ``worse`` with all methods counted."""
    p = float(row.get(f"{split}_gain_p_holm", math.nan))
    return verdict(row, split) in ("better", "worse") and p < 1 - CONFIDENCE


def fewer_classes(row: Mapping[str, Any], split: str) -> bool:
    """Whether a mean IoU of the row is over fewer classes than there are."""
    counted, every = (row.get(f"{split}_{name}") for name in ("classes_in_mean", "classes"))
    return counted is not None and every is not None and counted < every


def notes_on(results: Iterable[Metrics]) -> list[str]:
    """Sentences that belong below a table of these results.

    That is what the trainings noted (``about.notes``), and which classes a mean marked with an
    asterisk leaves out.
    """
    results = list(results)
    several = len({str(result["about"].get("seed", "")) for result in results}) > 1
    sentences: dict[str, list[str]] = {}
    without: dict[tuple[str, tuple[str, ...], int], dict[str, None]] = {}
    for result in results:
        about = result["about"]
        title = str(about.get("title", about["method"]))
        seed = f", seed {about['seed']}" if several and about.get("seed") else ""
        for note in about.get("notes") or ():
            sentences.setdefault(f"{title}: {note}", []).append(seed.removeprefix(", "))
        for split, found in result["splits"].items():
            scores = found.get("iou") or {}
            absent = tuple(name for name, value in scores.items() if value is None)
            if absent:
                without.setdefault((split, absent, len(scores)), {})[title] = None
    notes = [
        text + (f" ({', '.join(seeds)})" if any(seeds) else "") for text, seeds in sentences.items()
    ]
    titles = {str(r["about"].get("title", r["about"]["method"])) for r in results}
    for (split, absent, count), owners in without.items():
        who = "" if set(owners) == titles else f" ({'; '.join(owners)})"
        notes.append(
            f"* {split}{who}: the mean is over {count - len(absent)} of {count} classes; neither "
            f"labels nor predictions have {', '.join(absent)}."
        )
    return notes


def metric_title(rows: Iterable[Mapping[str, Any]]) -> str:
    """What the rows of `compare` are about, in words."""
    return METRICS[next((str(row["metric"]) for row in rows if "metric" in row), "miou")]


def seed_values(row: Mapping[str, Any], split: str) -> list[float]:
    """The metric of every seed in percent, in the order of ``seeds``; NaN where there is none."""
    # A table read from its file holds a number where there is one seed, NaN where there is none.
    return [float(value) for value in str(row.get(f"{split}_values", "")).split()]


def split_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Splits that any row of `compare` was evaluated on."""
    # A table read from its file has every column in every row: only values tell.
    columns = dict.fromkeys(
        name
        for row in rows
        for name, value in row.items()
        if name.endswith("_score") and math.isfinite(value)
    )
    return [name.removesuffix("_score") for name in columns]


def side_by_side(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows that belong together; the teachers of a data set stand above its first group."""
    groups: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    teachers: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] == "teacher":
            teachers.setdefault(row["data_digest"], []).append(row)
        else:
            groups.setdefault((row["data_digest"], row["protocol_digest"]), []).append(row)
    blocks = []
    for (data, _), members in groups.items():
        blocks.append([*teachers.pop(data, []), *members])
    return [*blocks, *teachers.values()]


def finished(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows without weights on the way (the TFE stage), unless there is no other student."""
    kept = [row for row in rows if row["method"] not in STAGES]
    return kept if any(row["method"] != "teacher" for row in kept) else list(rows)


def place(row: Mapping[str, Any]) -> str:
    """Device and threads of a row of the pipeline `benchmark`, in words."""
    if row["device"] != "cpu":
        return str(row["device"])
    count = int(row["threads"])
    return f"cpu, {count} thread{'s' if count > 1 else ''}"


def counted(results: Iterable[Metrics]) -> list[Metrics]:
    """The results that the tables are made of: of equal method, seed and comparison the newest."""
    return [
        by_seed[seed]
        for by_seed in _groups(results).values()
        for seed in sorted(by_seed, key=seed_order)
    ]


def mixed_settings(results: Iterable[Metrics], jobs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on results that share a row or a block though they were not trained alike.

    The comparison's digest covers data, evaluation, network, recipe and precision. Not covered: the
    parameters of the methods themselves. Seeds that differ in those are no repeats of each other.

    Args:
        results: Content of metrics files, oldest first.
        jobs: Job (content of ``job.json``) by fingerprint; results without one are not checked.
    """
    sentences = []
    blocks: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for (data, comparison, method), by_seed in _groups(results).items():
        known = {}
        for seed in sorted(by_seed, key=seed_order):
            job = jobs.get(by_seed[seed]["about"].get("fingerprint", ""))
            if job is not None:
                known[f"seed {seed}"] = flat(job)
        newest = next(reversed(by_seed.values()))
        title = newest["about"].get("title", method)
        sentences += [
            f"{title}: the seeds were not trained alike, {difference}."
            for difference in _differences(known, lambda name: not name.startswith(NOT_TRAINED))
        ]
        if known and method != "teacher":
            blocks.setdefault((data, comparison), {})[title] = next(iter(known.values()))
    for members in blocks.values():
        sentences += [
            f"The methods were not trained alike, {difference}."
            for difference in _differences(members, lambda name: name == "precision")
        ]
    return sentences


def seed_order(seed: str) -> tuple[bool, int, str]:
    """Seed 10 after seed 9; an imported network has none."""
    return (not seed.isdigit(), int(seed) if seed.isdigit() else 0, seed)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one with dotted names."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            found |= flat(item, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = item
    return found


# ---- parts

_Groups = dict[tuple[str, str, str], dict[str, Metrics]]


def _groups(results: Iterable[Metrics]) -> _Groups:
    """Results by (data, comparison, method), then by seed, the newest last."""
    groups: _Groups = {}
    for result in results:
        about = result["about"]
        # A teacher is not compared by recipe; its own work tells one from another.
        which = about["protocol_digest"] or f"{about['network']}"
        by_seed = groups.setdefault((about["data_digest"], which, about["method"]), {})
        by_seed.pop(str(about["seed"]), None)  # so that the newest is the last one
        by_seed[str(about["seed"])] = result
    return groups


def _rows(groups: _Groups, metric: str) -> list[Row]:
    rows = []
    for (data, comparison, method), by_seed in groups.items():
        alone = groups.get((data, comparison, "baseline"), {}) if has_gain(method) else {}
        newest = next(reversed(by_seed.values()))
        seeds = sorted(by_seed, key=seed_order)
        row: Row = {
            "metric": metric,
            "method": method,
            "title": newest["about"].get("title", method),
            "network": newest["about"]["network"],
            "seeds": ",".join(seeds),
            "seed_count": len(seeds),
        }
        for split in dict.fromkeys(name for r in by_seed.values() for name in r["splits"]):
            found = {s: by_seed[s]["splits"][split] for s in seeds if split in by_seed[s]["splits"]}
            values = {seed: _percent(scores.get(metric)) for seed, scores in found.items()}
            gains = [
                value - _percent(alone[seed]["splits"][split].get(metric))
                for seed, value in values.items()
                if seed in alone and split in alone[seed]["splits"]
            ]
            row[f"{split}_score"] = statistics.fmean(values.values())
            row[f"{split}_sd"] = _deviation(list(values.values()))
            row[f"{split}_values"] = " ".join(f"{values.get(s, math.nan):.6g}" for s in seeds)
            row[f"{split}_gain"] = statistics.fmean(gains) if gains else math.nan
            row[f"{split}_gain_low"], row[f"{split}_gain_high"] = paired_interval(gains)
            row[f"{split}_gain_p"] = paired_p(gains)
            row[f"{split}_gain_p_holm"] = math.nan
            row[f"{split}_gain_seeds"] = len(gains)
            for name in ("boundary_miou", "calibration_error"):
                # Results of before these were counted have none.
                known = [scores[name] for scores in found.values() if name in scores]
                row[f"{split}_{name}"] = _percent(statistics.fmean(known)) if known else math.nan
            classes = [scores["iou"] for scores in found.values() if scores.get("iou")]
            if classes:
                row[f"{split}_classes"] = max(map(len, classes))
                row[f"{split}_classes_in_mean"] = min(
                    sum(value is not None for value in scores.values()) for scores in classes
                )
        costs = [result.get("cost") or {} for result in by_seed.values()]
        row |= {
            "parameters": costs[-1].get("parameters", math.nan),
            "macs": costs[-1].get("macs", math.nan),
            "trained_parameters": costs[-1].get("trained_parameters", math.nan),
            "trained_macs": costs[-1].get("trained_macs", math.nan),
            # The median: one run beside other work must not decide.
            "images_per_second": _median(_known(costs, "images_per_second")),
            "training_seconds": _median(_known(costs, "training_seconds")),
            "peak_memory_bytes": max(_known(costs, "peak_memory_bytes"), default=math.nan),
            "protocol_digest": comparison,
            "data_digest": data,
        }
        rows.append(row)
    _correct(rows)
    return rows


def _correct(rows: Sequence[Row]) -> None:
    """Put the corrected p-values into the rows, comparison by comparison."""
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        for split in split_names([row]):
            key = row["data_digest"], row["protocol_digest"], split
            families.setdefault(key, []).append(row)
    for (*_, split), members in families.items():
        corrected = holm([row[f"{split}_gain_p"] for row in members])
        for row, p in zip(members, corrected, strict=True):
            row[f"{split}_gain_p_holm"] = p


def _ordered(rows: list[Row]) -> list[Row]:
    sizes = Counter((row["data_digest"], row["protocol_digest"]) for row in rows)

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        data, comparison = row["data_digest"], row["protocol_digest"]
        score = next(
            (row[name] for name in reversed(list(row)) if name.endswith("_score")), math.nan
        )
        return (
            data,
            row["method"] != "teacher",
            -sizes[data, comparison] if row["method"] != "teacher" else 0,
            comparison,
            -score if score == score else math.inf,
        )

    return sorted(rows, key=order)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["data_digest"], row["protocol_digest"], row["method"]


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def _known(costs: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """Values that were measured: 0 and None stand for unknown."""
    return [float(cost[name]) for cost in costs if cost.get(name)]


def _class_scores(result: Metrics, split: str) -> dict[str, float]:
    """IoU by class in percent, NaN for a class that does not occur."""
    scores = result["splits"].get(split, {}).get("iou", {})
    return {name: _percent(value) for name, value in scores.items()}


def _differences(
    known: Mapping[str, Mapping[str, Any]], counts: Callable[[str], bool]
) -> list[str]:
    """Values that are not the same in all of `known`, in words."""
    names = sorted({name for values in known.values() for name in values if counts(name)})
    found = []
    for name in names:
        owners: dict[str, list[str]] = {}
        for owner, values in known.items():
            owners.setdefault(str(values.get(name)), []).append(owner)
        if len(owners) > 1:
            parts = (f"{value} ({', '.join(who)})" for value, who in owners.items())
            found.append(f"{name} is {' and '.join(parts)}")
    return found


def spread(scores: Sequence[float], count: int) -> list[int]:
    """Positions of `count` scores at evenly spaced quantiles, (2i + 1) / 2n, lowest first.

    NaN is left out. A rule that favors nobody: of three one lies in the lowest third, one is the
    median, one lies in the highest third.
    """
    order = sorted((i for i, s in enumerate(scores) if not math.isnan(s)), key=lambda i: scores[i])
    count = min(count, len(order))
    return [order[(2 * n + 1) * len(order) // (2 * count)] for n in range(count)]
