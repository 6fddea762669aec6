"""Which split each picture is in: the tool's own, or made by seed, alike images together."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from rdd_pipeline.errors import DataProblem

_UPLOADED = re.compile(r"_(jpe?g|png|bmp|webp|tiff?)[._]rf[._]\w+$", re.IGNORECASE)
"""What Roboflow adds to a name, for each of the copies it makes of an image."""
_MOST_HELD_OUT = 0.45
"""Share of the images; groups that, left whole, take more from training are cut into stretches."""
_NUMBERED = re.compile(r"^(.*?)[ _.-]*(?:frame|img|image|f)?[ _.-]*\d+$", re.IGNORECASE)


class Entry(NamedTuple):
    """What decides the split of a picture."""

    name: str
    digest: str
    """Of its pixels."""
    split: str | None
    """The tool's own."""
    classes: frozenset[int]
    """Those that it has a pixel of."""


class Shares(NamedTuple):
    """Which part of the images becomes `val` and `test`, and what decides which ones."""

    val: float
    test: float
    seed: int
    grouped: bool
    """Whether images whose names differ in their last number only may be kept together."""


def split_pictures(
    entries: Sequence[Entry], shares: Shares, remarks: list[str]
) -> tuple[list[str | None], str]:
    """The split of each picture, and where it is from in words; None: it is left out.

    Pictures with equal pixels are in one split only. The tool's own splits are kept; one without
    `val` gets it from its training images.

    Raises:
        DataProblem: There are fewer than two different images.
    """
    if len({entry.digest for entry in entries}) < 2:
        raise DataProblem(f"{len(entries)} usable images, at least 2 different ones are needed.")
    own = {entry.split or "train" for entry in entries}
    if "train" not in own or len(own) == 1:
        made, units = _made(entries, shares)
        copies = len(entries) - len({entry.digest for entry in entries})
        if copies:
            remarks.append(f"{copies} images are copies of others and are in the same split.")
        how = f"made with seed {shares.seed}"
        if units:
            how += f", {units}; import_data.grouped=false: images one by one"
        return list(made), how
    splits = _without_copies(entries, remarks)
    how = "as they came"
    if "val" not in own:
        places = [n for n, split in enumerate(splits) if split == "train"]
        made, _ = _made([entries[n] for n in places], shares._replace(test=0.0))
        for place, split in zip(places, made, strict=True):
            splits[place] = split
        how = f"as they came, val made of train with seed {shares.seed}"
    return splits, how


def _without_copies(entries: Sequence[Entry], remarks: list[str]) -> list[str | None]:
    """The tool's splits; of equal images in several the one that is judged by is kept."""
    rank = {"test": 2, "val": 1}
    best: dict[str, str] = {}
    for entry in entries:
        split = entry.split or "train"
        if rank.get(split, 0) > rank.get(best.get(entry.digest, "train"), 0):
            best[entry.digest] = split
    splits: list[str | None] = []
    left: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        split = entry.split or "train"
        kept = best.get(entry.digest, split)
        splits.append(split if kept == split else None)
        left[split, kept] += kept != split
    remarks += [
        f"{count} images of {split} are also in {kept} and are left out of {split}."
        for (split, kept), count in sorted(left.items())
        if count
    ]
    return splits


def _made(entries: Sequence[Entry], shares: Shares) -> tuple[list[str], str]:
    """The splits, and in words of what they are made; empty: of single images."""
    groups = group_names([entry.name for entry in entries]) if shares.grouped else None
    if groups is not None:
        units = _units(dict(enumerate(groups)), entries)
        splits = _divided(units, len(entries), shares, entries)
        held_out = sum(split != "train" for split in splits) / len(entries)
        if held_out > max(_MOST_HELD_OUT, 1.5 * (shares.val + shares.test)):
            stretches, length = _stretches(groups, entries, shares)
            splits = _divided(_units(stretches, entries), len(entries), shares, entries)
            return splits, (
                f"stretches of {length} neighboring names, as {len(set(groups))} groups of one "
                "name are too few to stay whole: val and test resemble train"
            )
        if len(units) > 2 and _all_in_train(splits, entries):
            return splits, f"whole groups of one name ({len(set(groups))} of them)"
    single = _units({n: entry.digest for n, entry in enumerate(entries)}, entries)
    return _divided(single, len(entries), shares, entries), ""


def _stretches(
    groups: Sequence[str], entries: Sequence[Entry], shares: Shares
) -> tuple[dict[int, str], int]:
    """Pieces of each group in the order of its names, two of which fill the smaller split.

    Frames of a video resemble their neighbors: of a piece only the two ends have one elsewhere.

    Returns:
        The piece of each position, and how many images one has at most.
    """
    wanted = min(shares.val, shares.test or shares.val)
    length = max(1, round(wanted * len(entries)) // 2)
    ordered = sorted(range(len(entries)), key=lambda n: (groups[n], _natural(entries[n].name)))
    pieces: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for position in ordered:
        group = groups[position]
        pieces[position] = f"{seen[group] // length} {group}"
        seen[group] += 1
    return pieces, length


def _natural(name: str) -> list[tuple[int, str]]:
    """Key of an order in which 10 comes after 9."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def group_names(names: Sequence[str]) -> list[str] | None:
    """What each name has before its last number, where that tells frames of videos apart.

    Returns:
        None: There are fewer than three such groups, or most names are alone in theirs.
    """
    groups = []
    for name in names:
        base = _UPLOADED.sub("", name)
        numbered = _NUMBERED.match(base)
        groups.append(numbered[1] if numbered else base)
    count = len(set(groups))
    return groups if 3 <= count <= len(names) / 2 else None


def _units(groups: Mapping[int, str], entries: Sequence[Entry]) -> list[list[int]]:
    """Positions that stay together: those of one group, and of groups with equal images."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for position, group in groups.items():
        parent[root(f"g{group}")] = root(f"d{entries[position].digest}")
    units: dict[str, list[int]] = defaultdict(list)
    for position, group in groups.items():
        units[root(f"g{group}")].append(position)
    return list(units.values())


def _divided(
    units: Sequence[list[int]], total: int, shares: Shares, entries: Sequence[Entry]
) -> list[str]:
    """Units in an order that seed and contents decide: `val` of the first, `test` of the last."""

    def rank(unit: list[int]) -> bytes:
        first = min(entries[position].digest for position in unit)
        return blake2b(f"{shares.seed}\n{first}".encode(), digest_size=16).digest()

    order = sorted(units, key=rank)
    chosen: dict[int, str] = {}
    wanted = [("val", max(shares.val, 1e-9), order)]
    if shares.test > 0 and len(order) > 2:
        wanted.append(("test", shares.test, order[::-1]))
    for split, share, candidates in wanted:
        room = max(1, round(share * total))
        free = [unit for unit in candidates if unit[0] not in chosen]
        fitting: list[list[int]] = []
        for unit in free:
            if len(unit) <= room and len(fitting) < len(free) - 1:
                fitting.append(unit)
                room -= len(unit)
        for unit in fitting or [min(free, key=len)]:
            chosen |= dict.fromkeys(unit, split)
    splits = [chosen.get(position, "train") for position in range(total)]
    _learn_all_classes(splits, order, entries)
    return splits


def _learn_all_classes(
    splits: list[str], units: Sequence[list[int]], entries: Sequence[Entry]
) -> None:
    """Move units to `train` for classes that it would not show, as long as the others keep one."""
    for unit in units:
        split = splits[unit[0]]
        shown = {c for n, e in enumerate(entries) if splits[n] == "train" for c in e.classes}
        new = {c for position in unit for c in entries[position].classes} - shown
        others = sum(splits[u[0]] == split for u in units)
        if split != "train" and new and others > 1:
            for position in unit:
                splits[position] = "train"


def _all_in_train(splits: Sequence[str], entries: Sequence[Entry]) -> bool:
    shown = {c for n, e in enumerate(entries) if splits[n] == "train" for c in e.classes}
    return all(entry.classes <= shown for entry in entries)
