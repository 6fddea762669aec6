"""Supervisely: `meta.json`, and `DATASET/img/NAME.EXT` with `DATASET/ann/NAME.EXT.json`.

Objects are bitmaps (base64 of zlib of PNG, at an origin), polygons with holes, or rectangles, drawn
in the order of the file, later ones over earlier ones; corners are pixels and belong to the object.
https://docs.supervisely.com/data-organization/00_ann_format_navi
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from rdd_pipeline.data.labels import Color
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.export import (
    IGNORED,
    Category,
    Export,
    Picture,
    draw_objects,
    is_unlabeled,
    split_of,
    with_background,
)
from rdd_pipeline.importing.folder import Folder, stem
from rdd_pipeline.importing.shapes import Mask, bitmap, corners, filled

_DRAWN = ("bitmap", "polygon", "rectangle")


def recognises(folder: Folder) -> bool:
    """A meta.json with classes, and annotations in folders `ann`."""
    return bool(_annotations(folder)) and any(_classes(folder, f) for f in _metas(folder))


def read(folder: Folder) -> Export:
    """Read all projects of the folder.

    Raises:
        DataProblem: A file is damaged, or there are no images.
    """
    colors: dict[str, Color | None] = {}
    for meta in _metas(folder):
        colors |= _classes(folder, meta)
    pictures, missing = [], []
    kinds: Counter[str] = Counter()
    contents: dict[str, Mapping[str, Any]] = {}
    for file in _annotations(folder):
        content = folder.json(file)
        if not isinstance(content, Mapping) or not isinstance(content.get("objects"), list):
            raise DataProblem(f"{file} has no list `objects`.")
        contents[file] = content
    titles = [str(o.get("classTitle")) for c in contents.values() for o in c["objects"]]
    for title in titles:
        colors.setdefault(title, None)
    names, background = with_background(n for n in colors if not is_unlabeled(n))
    ids = {n: IGNORED if is_unlabeled(n) else names.index(n) for n in colors}
    for file, content in contents.items():
        image = _image(folder, file)
        if image is None:
            missing.append(file)
            continue
        drawn = [o for o in content["objects"] if o.get("geometryType") in _DRAWN]
        kinds.update(str(o.get("geometryType")) for o in content["objects"] if o not in drawn)
        size = content.get("size") or {}
        declared = (size["height"], size["width"]) if {"height", "width"} <= {*size} else None
        draw = draw_objects(drawn, _pixels, ids, "classTitle", background, declared, file)
        pictures.append(
            Picture(stem(image).replace("/img/", "/"), image, draw, split_of(file), file)
        )
    if not pictures:
        raise DataProblem(
            f"None of the {len(contents)} annotations of Supervisely has its image in `img`: "
            "download images and annotations together."
        )
    remarks = [f"{len(missing)} annotations have no image ({missing[0]})."] if missing else []
    remarks += [f"{count} objects of kind {kind} are left out." for kind, count in kinds.items()]
    return Export(
        "Supervisely", [Category(n, colors.get(n)) for n in names], pictures, background,
        f"pixels outside of all objects are {names[background]}", remarks,
    )  # fmt: skip


def _metas(folder: Folder) -> list[str]:
    return folder.named("meta.json")


def _annotations(folder: Folder) -> list[str]:
    return [f for f in folder.ending(".json") if PurePosixPath(f).parent.name == "ann"]


def _classes(folder: Folder, file: str) -> dict[str, Color | None]:
    content = folder.json(file)
    rows = content.get("classes") if isinstance(content, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(r, Mapping) and "title" in r for r in rows):
        return {}
    return {str(row["title"]): _color(row.get("color")) for row in rows}


def _color(text: Any) -> Color | None:
    if not isinstance(text, str) or not re.fullmatch("#[0-9a-fA-F]{6}", text):
        return None
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def _image(folder: Folder, file: str) -> str | None:
    """`ds/ann/a.jpg.json` -> `ds/img/a.jpg`; older projects leave the suffix out."""
    path = PurePosixPath(file)
    place = (path.parent.parent / "img" / path.stem).as_posix()
    found = folder.by_stem.get(stem(place))
    return found if found == place else folder.by_stem.get(place)


def _pixels(item: Mapping[str, Any], size: tuple[int, int], source: str) -> Mask:
    if item["geometryType"] == "bitmap":
        found = item.get("bitmap")
        if not isinstance(found, Mapping):
            raise DataProblem(f"{source} has a bitmap without data.")
        return bitmap(found.get("data"), found.get("origin"), size, source)
    points = item.get("points")
    if not isinstance(points, Mapping):
        raise DataProblem(f"{source} has a {item['geometryType']} without points.")
    outline = corners(points.get("exterior") or [], source)
    if item["geometryType"] == "rectangle" and len(outline) == 2:
        (x1, y1), (x2, y2) = outline
        outline = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    mask = filled(outline, size)
    for hole in points.get("interior") or []:
        mask &= ~filled(corners(hole, source), size)
    return mask
