"""labelme: a JSON file beside each image, with shapes in pixels.

Shapes are drawn in the order of the file, later ones over earlier ones, as labelme's own
converters do, which fill polygons with their outline. `__ignore__` is ignored, `_background_` is
the background. The copy of the image in the file (`imageData`) is not looked at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

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
from rdd_pipeline.importing.shapes import Mask, bitmap, corners, ellipse, filled, thick_line

LINE_WIDTH = 10
"""Pixels; labelme's own."""
_DRAWN = ("polygon", "rectangle", "circle", "line", "linestrip", "mask", "oriented_rectangle")


def recognises(folder: Folder) -> bool:
    """Whether one of the first JSON files is labelme's."""
    return any(_is_ours(_try(folder, file)) for file in folder.ending(".json")[:5])


def read(folder: Folder) -> Export:
    """Read every JSON file that is labelme's.

    Raises:
        DataProblem: One of them is damaged, or there are no images.
    """
    shapes: dict[str, list[Mapping[str, Any]]] = {}
    facts: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for file in folder.ending(".json"):
        content = folder.json(file)
        if not _is_ours(content):
            continue
        shapes[file] = [dict(shape) for shape in content["shapes"]]
        height, width = content.get("imageHeight"), content.get("imageWidth")
        known = isinstance(height, int) and isinstance(width, int)
        facts[file] = str(content["imagePath"]), (height, width) if known else None
    used = sorted({str(s.get("label")) for found in shapes.values() for s in found})
    names, background = with_background(name for name in used if not is_unlabeled(name))
    ids = {name: names.index(name) for name in names}
    ids |= {name: IGNORED for name in used if is_unlabeled(name)}
    kinds = Counter(
        str(s.get("shape_type")) for found in shapes.values() for s in found if not _is_drawn(s)
    )
    pictures, missing = [], []
    for file, found in shapes.items():
        path, declared = facts[file]
        image = folder.find_picture(path, file) or folder.by_stem.get(stem(file))
        if image is None:
            missing.append(file)
            continue
        draw = draw_objects(
            [s for s in found if _is_drawn(s)], _pixels, ids, "label", background, declared, file
        )
        pictures.append(Picture(stem(image), image, draw, split_of(file), file))
    if not pictures:
        raise DataProblem(f"None of the {len(shapes)} JSON files of labelme has its image.")
    remarks = [f"{len(missing)} files have no image ({missing[0]})."] if missing else []
    remarks += [f"{count} shapes of kind {kind} are left out." for kind, count in kinds.items()]
    return Export(
        "labelme", [Category(name) for name in names], pictures, background,
        f"pixels outside of all shapes are {names[background]}", remarks,
    )  # fmt: skip


def _try(folder: Folder, file: str) -> Any:
    try:
        return folder.json(file)
    except DataProblem:
        return None


def _is_ours(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and isinstance(content.get("shapes"), list)
        and isinstance(content.get("imagePath"), str)
        and all(isinstance(shape, Mapping) for shape in content["shapes"])
    )


def _is_drawn(shape: Mapping[str, Any]) -> bool:
    return shape.get("shape_type", "polygon") in _DRAWN


def _pixels(shape: Mapping[str, Any], size: tuple[int, int], source: str) -> Mask:
    kind = shape.get("shape_type", "polygon")
    points = corners(shape.get("points") or [], source)
    if kind == "mask":
        # Its corners are pixels, both inside.
        return bitmap(shape.get("mask"), points[0] if points else None, size, source, packed=False)
    if kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    if kind == "circle" and len(points) == 2:
        radius = math.dist(*points)
        return ellipse(points[0], (radius, radius), size)
    if kind in ("line", "linestrip"):
        return thick_line(points, size, LINE_WIDTH)
    return filled(points, size)
