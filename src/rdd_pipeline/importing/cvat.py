"""CVAT: Segmentation mask 1.1 and CamVid 1.0.

Segmentation mask 1.1 is Pascal VOC's layout with a table of colors, `labelmap.txt`, whose lines are
`label:red,green,blue:parts:actions`; images are in `JPEGImages` where they were exported.
CamVid 1.0 has `label_colors.txt` with lines `red green blue label` and folders `SUBSET`,
`SUBSETannot`. Masks hold these colors or, with one channel, line numbers; black is the background
if not said.
https://docs.cvat.ai/docs/dataset_management/formats/
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from rdd_pipeline.data.labels import Color, make_lookup
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.export import (
    BACKGROUND,
    IGNORED,
    Export,
    Picture,
    check_count,
    is_background,
    is_unlabeled,
    split_of,
)
from rdd_pipeline.importing.folder import Folder, stem
from rdd_pipeline.importing.masks import draw_bytes, said_ignored, table_of_colors

TABLES = ("labelmap.txt", "label_colors.txt")
_BLACK = (0, 0, 0)
_IMAGES = "import_data.source holds masks and no images: export from CVAT with `Save images`."


def recognises(folder: Folder) -> bool:
    """A table of colors of CVAT, and masks where they belong."""
    return any(_masks(folder, table) for table in folder.named(*TABLES))


def read(folder: Folder) -> Export:
    """Read all tables of the folder; they have to agree.

    Raises:
        DataProblem: A table is damaged, or there are no images.
    """
    tables = [table for table in folder.named(*TABLES) if _masks(folder, table)]
    rows = list(dict.fromkeys(row for table in tables for row in _rows(folder, table)))
    if not any(color == _BLACK for _, color in rows):
        rows.insert(0, (BACKGROUND, _BLACK))
    categories, lookup, left = table_of_colors(rows)
    check_count(len(categories))
    names = [category.name for category in categories]
    gray = make_lookup(
        {n: names.index(name) for n, (name, _) in enumerate(rows) if not is_unlabeled(name)},
        ignored=tuple(n for n, (name, _) in enumerate(rows) if is_unlabeled(name)),
        ignore_index=IGNORED,
    )
    pictures, missing = [], []
    for table in tables:
        home = PurePosixPath(table).parent
        splits = _lists(folder, home)
        for mask in _masks(folder, table):
            name = stem(mask)
            image = _image(folder, name)
            if image is None:
                missing.append(mask)
                continue
            short = re.sub("^.*SegmentationClass/", "", name)
            split = splits.get(short) or split_of(PurePosixPath(image).parent.as_posix())
            draw = draw_bytes(lambda mask=mask: folder.bytes(mask), mask, lookup, gray)  # type: ignore[misc]
            pictures.append(Picture(stem(image), image, draw, split, mask))
    if not pictures:
        raise DataProblem(_IMAGES)
    remarks = [f"{len(missing)} masks have no image ({missing[0]})."] if missing else []
    kind = "Segmentation mask 1.1" if tables[0].endswith(TABLES[0]) else "CamVid 1.0"
    background = next((n for n, c in enumerate(categories) if is_background(c.name)), None)
    return Export(
        f"CVAT ({kind})",
        categories,
        pictures,
        background,
        said_ignored(left) or "black is a class",
        remarks,
    )


def _rows(folder: Folder, table: str) -> list[tuple[str, Color]]:
    rows = []
    for number, line in enumerate(folder.text(table).splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if table.endswith(TABLES[0]):
            found = re.fullmatch(r"(.+?)\s*:\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*(:.*)?", text)
            name, parts = (found[1], found.groups()[1:4]) if found else ("", ())
        else:
            found = re.fullmatch(r"(\d+)\s+(\d+)\s+(\d+)\s+(.+)", text)
            name, parts = (found[4].strip(), found.groups()[:3]) if found else ("", ())
        color = tuple(int(part) for part in parts)
        if len(color) != 3 or max(color) > 255:
            raise DataProblem(
                f"Line {number} of {table} is {text[:60]!r}, expected a label and a color."
            )
        rows.append((name, (color[0], color[1], color[2])))
    twice = next((c for n, c in rows for m, d in rows if c == d and n != m), None)
    if twice is not None:
        raise DataProblem(f"{table} gives the color {twice} to two labels.")
    if not rows:
        raise DataProblem(f"{table} names no label.")
    return rows


def _masks(folder: Folder, table: str) -> list[str]:
    home = PurePosixPath(table).parent.as_posix()
    start = "" if home == "." else f"{home}/"
    if table.endswith(TABLES[0]):
        wanted = re.compile(re.escape(start) + r"SegmentationClass/.+\.png")
    else:
        wanted = re.compile(re.escape(start) + r"[^/]*annot/.+\.png")
    return [file for file in folder.pictures if wanted.fullmatch(file)]


def _image(folder: Folder, name: str) -> str | None:
    """The image of a mask, both without suffix."""
    place = re.sub("SegmentationClass/", "JPEGImages/", name)
    if place == name:
        place = re.sub("annot/", "/", name, count=1)
    return folder.by_stem.get(place) if place != name else None


def _lists(folder: Folder, home: PurePosixPath) -> dict[str, str]:
    """Name -> split, of the lists of VOC's layout; `default.txt` says none."""
    found: dict[str, str] = {}
    for file in folder.ending(".txt"):
        if PurePosixPath(file).parent != home / "ImageSets" / "Segmentation":
            continue
        split = split_of(PurePosixPath(file).stem)
        for line in folder.text(file).splitlines() if split else ():
            found[line.strip().strip('"')] = str(split)
    return found
