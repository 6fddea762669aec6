"""Writing a data set of the layout `folders`: images, index masks, lists of the splits, labels."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdd_pipeline.data.formats import open_picture
from rdd_pipeline.data.labels import LONGEST_NAME, Color, hex_of
from rdd_pipeline.data.layouts.base import IMAGE_SUFFIXES, distinct_colors
from rdd_pipeline.data.layouts.folders import folders_layout
from rdd_pipeline.data.reading import inspect_image
from rdd_pipeline.errors import DataProblem, printable
from rdd_pipeline.files import content_digest
from rdd_pipeline.importing.export import IGNORED, MALFORMED, Export, Picture, Sizes
from rdd_pipeline.importing.folder import Folder
from rdd_pipeline.importing.splits import Entry, Shares, split_pictures
from rdd_pipeline.importing.work import in_threads

_RARE = 0.02
"""Share of the pixels below which a class gets a weight, and so all."""
_WEIGHTS = (0.5, 4.0)
_SHOWN = 10


@dataclass(frozen=True)
class Choices:
    """What the user decides.

    Attributes:
        name: Of the data set.
        link: Images are links to the source instead of copies.
        ignore_background: Pixels that nobody labeled count for nothing.
        skip: Leave out pictures that something is wrong with.
        names: Of the classes, in order; empty: the export's.
        shares: Of the splits.
    """

    name: str
    link: bool
    ignore_background: bool
    skip: bool
    names: tuple[str, ...]
    shares: Shares


class Written(NamedTuple):
    """What a data set has become, for people and for the choice of networks."""

    tool: str
    classes: dict[str, float]
    """Share of the labeled pixels."""
    ignored: float
    """Share of all pixels."""
    splits: dict[str, int]
    """Images by split."""
    how_split: str
    sizes: list[tuple[tuple[int, int], int]]
    """((height, width), images), the most frequent first."""
    weighted: bool
    unlabeled: str
    remarks: list[str]


class _Drawn(NamedTuple):
    digest: str
    size: tuple[int, int]
    file: str
    counts: dict[int, int]
    """Pixels of each value."""


def write_data(export: Export, folder: Folder, place: Path, choices: Choices) -> Written:
    """Write an export into an empty folder.

    Raises:
        DataProblem: Pictures cannot be used, or what is left cannot be learned from.
    """
    names = file_names([picture.name for picture in export.pictures])
    for sub in ("images", "masks", "splits"):
        (place / sub).mkdir()
    colors = _colors(export)
    work = partial(_write_picture, folder, place, colors, choices.link)
    drawn: list[_Drawn | DataProblem] = list(
        in_threads(work, list(zip(export.pictures, names, strict=True)), "Importing")
    )
    remarks = list(export.remarks)
    if not export.named and not choices.names:
        remarks.append(
            "The masks say no names: import_data.classes=NAME/NAME/... gives them in this order "
            "(again with import_data.overwrite=true), or labels.yaml."
        )
    problems = [d for d in drawn if isinstance(d, DataProblem)]
    if problems and (not choices.skip or len(problems) == len(drawn)):
        raise DataProblem(_all_of(problems, len(drawn)))
    if problems:
        remarks.append(f"{len(problems)} pictures are left out ({problems[0]})")
    good = [n for n, d in enumerate(drawn) if isinstance(d, _Drawn)]
    found = [d for d in drawn if isinstance(d, _Drawn)]
    entries = [
        Entry(export.pictures[n].name, d.digest, export.pictures[n].split,
              frozenset(d.counts.keys() - {IGNORED}))
        for n, d in zip(good, found, strict=True)
    ]  # fmt: skip
    splits, how = split_pictures(entries, choices.shares, remarks)
    kept = [(names[n], d, s) for n, d, s in zip(good, found, splits, strict=True) if s is not None]
    for n, d, split in zip(good, found, splits, strict=True):
        if split is None:
            (place / "images" / d.file).unlink()
            (place / "masks" / f"{names[n]}.png").unlink()
    counted = Counter(split for _, _, split in kept)
    for split in counted:
        lines = [name for name, _, s in kept if s == split]
        (place / "splits" / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    counts = np.zeros(256, np.int64)
    for _, d, _ in kept:
        counts[list(d.counts)] += list(d.counts.values())
    classes, weighted = _write_labels(export, choices, colors, counts, place, remarks)
    order = [split for split in ("train", "val", "test") if counted[split]]
    return Written(
        export.tool,
        classes,
        1.0 - int(counts[_values(export, choices, counts)].sum()) / int(counts.sum()),
        {split: counted[split] for split in [*order, *sorted({*counted} - {*order})]},
        how,
        Counter(d.size for _, d, _ in kept).most_common(),
        weighted,
        _unlabeled(export, choices),
        remarks,
    )


def file_names(names: Sequence[str]) -> list[str]:
    """A file name without suffix for each picture: short if that is unique, safe anywhere."""
    short = [_safe(PurePosixPath(name).name) for name in names]
    counts = Counter(name.lower() for name in short)
    found: list[str] = []
    taken: set[str] = set()
    for name, brief in zip(names, short, strict=True):
        chosen = brief if counts[brief.lower()] == 1 else _safe(name.replace("/", "_"))
        number = 1
        unique = chosen
        while unique.lower() in taken:
            number += 1
            unique = f"{chosen}_{number}"
        taken.add(unique.lower())
        found.append(unique)
    return found


def _safe(name: str) -> str:
    text = re.sub(r"[^\w.-]+", "_", name).strip("._-")[:150] or "image"
    # `photo.jpg` as a name without suffix would be taken for one with it.
    return re.sub(r"\.(\w{3,5})$", r"_\1", text) if text.lower().endswith(IMAGE_SUFFIXES) else text


def _all_of(problems: Sequence[DataProblem], total: int) -> str:
    lines = [f"  - {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  ... and {len(problems) - _SHOWN} more.")
    head = f"{len(problems)} of {total} pictures cannot be used; nothing was written."
    cure = "" if len(problems) == total else " import_data.skip_bad=true leaves them out."
    return "\n".join([head + cure, *lines])


# ---- one picture


def _write_picture(
    folder: Folder,
    place: Path,
    colors: Sequence[Color],
    link: bool,
    item: tuple[Picture, str],
) -> _Drawn | DataProblem:
    picture, name = item
    try:
        return _written(folder, place, colors, link, picture, name)
    except DataProblem as problem:
        return problem
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        return DataProblem(f"{picture.source} has an entry of another form ({reason}).")


def _written(
    folder: Folder, place: Path, colors: Sequence[Color], link: bool, picture: Picture, name: str
) -> _Drawn:
    source = picture.image if isinstance(picture.image, str) else picture.source
    data = folder.bytes(source) if isinstance(picture.image, str) else picture.image()
    pixels, facts = inspect_image(data, Path(source))
    height, width = int(pixels.shape[1]), int(pixels.shape[2])
    turned = facts.orientation >= 5
    sizes = Sizes((height, width), (width, height) if turned else (height, width))
    mask = picture.draw(sizes)
    if mask.shape != sizes.upright and turned and mask.shape == sizes.stored:
        mask = _upright(mask, facts.orientation)
    if mask.shape != sizes.upright:
        raise DataProblem(
            f"{picture.source} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {source} "
            f"has {width} x {height}."
        )
    file = name + _suffix(source if isinstance(picture.image, str) else "", data)
    target = place / "images" / file
    if link and isinstance(picture.image, str):
        target.symlink_to(os.path.realpath(folder.root / source))
    else:
        target.write_bytes(data)
    (place / "masks" / f"{name}.png").write_bytes(_png(mask, colors))
    digest = content_digest(pixels.permute(1, 2, 0).numpy().tobytes() + f"{height}".encode())
    counts = np.bincount(mask.ravel(), minlength=256)
    held = {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    return _Drawn(digest, sizes.upright, file, held)


def _upright(mask: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn a mask as EXIF says its image is turned."""
    turns: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
        5: lambda m: m.T,
        6: lambda m: np.rot90(m, -1),
        7: lambda m: np.rot90(m, 2).T,
        8: lambda m: np.rot90(m),
    }
    return np.ascontiguousarray(turns[orientation](mask))


def _suffix(file: str, data: bytes) -> str:
    suffix = PurePosixPath(file).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return suffix
    with open_picture(data, Path(file), "its mask") as picture:
        kind = (picture.format or "png").lower()
    return {"jpeg": ".jpg", "mpo": ".jpg", "tiff": ".tif"}.get(kind, f".{kind}")


def _png(mask: NDArray[np.uint8], colors: Sequence[Color]) -> bytes:
    picture = Image.fromarray(mask)
    palette = [channel for color in colors for channel in color]
    picture.putpalette(palette)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=False)
    return file.getvalue()


# ---- labels.yaml


def _colors(export: Export) -> list[Color]:
    """256 colors of the palette: those of the tool, else distinct ones; ignored is white."""
    defaults = distinct_colors(256)
    # Black is the first of them: background's, if there is one.
    rest = iter(defaults[1:])
    found: list[Color] = []
    for number, category in enumerate(export.categories):
        default = defaults[0] if number == export.background else next(rest)
        found.append(category.color or default)
    return [*found, *[(224, 224, 192)] * (256 - len(found))]


def _values(export: Export, choices: Choices, counts: NDArray[np.int64]) -> list[int]:
    """Mask values of the classes that are left: with a pixel, and not ignored."""
    return [
        value
        for value in range(len(export.categories))
        if counts[value] and not (choices.ignore_background and value == export.background)
    ]


def _write_labels(
    export: Export,
    choices: Choices,
    colors: Sequence[Color],
    counts: NDArray[np.int64],
    place: Path,
    remarks: list[str],
) -> tuple[dict[str, float], bool]:
    values = _values(export, choices, counts)
    empty = [c.name for n, c in enumerate(export.categories) if not counts[n]]
    if empty:
        remarks.append(f"Without a pixel and left out: {', '.join(map(printable, empty[:5]))}"
                       f"{f' and {len(empty) - 5} more' if len(empty) > 5 else ''}.")  # fmt: skip
    if len(values) < 2:
        held = ", ".join(export.categories[v].name for v in values) or "none"
        raise DataProblem(
            f"Only one class has pixels ({printable(held)}), at least two are needed"
            + ("; import_data.unlabeled=background adds one." if choices.ignore_background else ".")
        )
    names = [printable(export.categories[v].name)[:LONGEST_NAME] for v in values]
    if choices.names:
        if len(choices.names) != len(values):
            raise DataProblem(
                f"import_data.classes has {len(choices.names)} names, the masks hold "
                f"{len(values)} classes ({', '.join(names)})."
            )
        names = list(choices.names)
    labeled = int(sum(counts[v] for v in values))
    shares = [int(counts[v]) / labeled for v in values]
    weights = _class_weights(shares)
    rows = []
    for value, name, weight in zip(values, names, weights or shares, strict=True):
        color = hex_of(colors[value])
        extra = f", weight: {weight:.2f}" if weights else ""
        text = json.dumps(name, ensure_ascii=False)
        rows.append(f"  - {{name: {text}, value: {value}, color: '{color}'{extra}}}")
    ignored = [v for v in range(len(export.categories)) if v not in values]
    text = "\n".join(
        [
            f"# {export.tool}, by import_data. The masks hold the values, 255 is unlabeled.",
            f"name: {json.dumps(choices.name)}",
            "classes:",
            *rows,
            f"ignore: {[*ignored, IGNORED]}",
            "images: images",
            "masks: masks",
            "lists: splits/SPLIT.txt",
        ]
    )
    (place / "labels.yaml").write_text(f"{text}\n", encoding="utf-8")
    folders_layout(place)  # what ingestion would refuse is refused here
    return dict(zip(names, shares, strict=True)), weights is not None


def _class_weights(shares: Sequence[float]) -> list[float] | None:
    """Square root of the middle share over the class's own, within bounds; None: none is rare."""
    if min(shares) >= _RARE:
        return None
    middle = float(np.median(shares))
    low, high = _WEIGHTS
    return [min(high, max(low, (middle / share) ** 0.5)) for share in shares]


def _unlabeled(export: Export, choices: Choices) -> str:
    if export.background is None:
        return export.unlabeled
    name = export.categories[export.background].name
    if choices.ignore_background:
        return f"pixels of {name} are ignored (import_data.unlabeled=background: a class)"
    more = f"{export.unlabeled} " if export.unlabeled else f"{name} is a class "
    return more + "(import_data.unlabeled=ignore: they count for nothing)"


def written_from(facts: dict[str, Any]) -> Written:
    """Inverse of `_asdict` by way of JSON."""
    sizes = [((int(h), int(w)), int(n)) for (h, w), n in facts["sizes"]]
    return Written(**{**facts, "sizes": sizes})
