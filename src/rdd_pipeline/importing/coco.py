"""COCO JSON: one or several files with `images`, `annotations`, `categories`.

Polygons are filled by the centers of pixels, the parts of an object together; run lengths, packed
or not, are taken as they are. COCO has no order of drawing: crowds come first, then the other
objects from the largest to the smallest, so that small ones stay visible.
https://cocodataset.org/#format-data
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.export import (
    Category,
    Draw,
    Export,
    Picture,
    Sizes,
    canvas_size,
    split_of,
    with_background,
)
from rdd_pipeline.importing.folder import Folder, stem
from rdd_pipeline.importing.shapes import Mask, coco_runs, corners, inside

_KEYS = {"images", "annotations", "categories"}


class _Object(NamedTuple):
    number: int
    crowd: bool
    shape: Any


def recognises(folder: Folder) -> bool:
    """A JSON file with COCO's keys; only the largest ones can be one, of many small files."""
    return any(_is_ours(_try(folder, file)) for file in _largest(folder)[:5])


def read(folder: Folder) -> Export:
    """Read every JSON file that is COCO's and has outlines.

    Raises:
        DataProblem: One of them is damaged, or there are no images.
    """
    contents = {
        file: content for file in folder.ending(".json") if (content := _ours(folder, file))
    }
    used = {
        file: {annotation.get("category_id") for annotation in content["annotations"]}
        for file, content in contents.items()
    }
    names, background = with_background(
        str(category["name"])
        for file, content in contents.items()
        for category in sorted(content["categories"], key=lambda category: int(category["id"]))
        # Roboflow puts a category above all others that no object has.
        if category["id"] in used[file]
    )
    pictures: dict[str, Picture] = {}
    missing: list[str] = []
    boxes = 0
    # A file of key points has the same images and outlines of one category.
    for file, content in sorted(contents.items(), key=lambda i: -len(i[1]["categories"])):
        ids = {c["id"]: names.index(str(c["name"])) for c in content["categories"]
               if str(c["name"]) in names}  # fmt: skip
        objects: dict[Any, list[_Object]] = defaultdict(list)
        for annotation in content["annotations"]:
            shape = annotation.get("segmentation")
            if not shape:
                boxes += 1
            elif annotation.get("category_id") not in ids:
                raise DataProblem(
                    f"{file} has an object of category {annotation.get('category_id')!r}, which it "
                    "does not name."
                )
            else:
                crowd = bool(annotation.get("iscrowd"))
                number = ids[annotation["category_id"]]
                objects[annotation.get("image_id")].append(_Object(number, crowd, shape))
        for row in content["images"]:
            image = folder.find_picture(str(row["file_name"]), file)
            if image is None:
                missing.append(str(row["file_name"]))
                continue
            declared = _size(row)
            split = split_of(PurePosixPath(file).with_suffix("").as_posix()) or split_of(image)
            draw = _draw(objects[row.get("id")], background, declared, f"{file} ({image})")
            pictures.setdefault(image, Picture(stem(image), image, draw, split, file))
    if not pictures:
        raise DataProblem(f"{', '.join(contents)}: none of the {len(missing)} images is here.")
    remarks = [f"{len(missing)} images are not here ({missing[0]})."] if missing else []
    remarks += [f"{boxes} objects have a box only and are left out."] if boxes else []
    return Export(
        "COCO", [Category(name) for name in names], list(pictures.values()), background,
        f"pixels outside of all objects are {names[background]}", remarks,
    )  # fmt: skip


def _largest(folder: Folder) -> list[str]:
    files = folder.ending(".json")
    return sorted(files, key=lambda file: -(folder.root / file).stat().st_size)


def _try(folder: Folder, file: str) -> Any:
    try:
        return folder.json(file)
    except DataProblem:
        return None


def _is_ours(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and content.keys() >= _KEYS
        and all(isinstance(content[key], list) for key in _KEYS)
        and any(isinstance(a, Mapping) and a.get("segmentation") for a in content["annotations"])
    )


def _ours(folder: Folder, file: str) -> Mapping[str, Any] | None:
    content = folder.json(file)
    if not _is_ours(content):
        return None
    for key, wanted in (("images", "file_name"), ("annotations", "image_id"), ("categories", "id")):
        for row in content[key]:
            if not isinstance(row, Mapping) or wanted not in row:
                raise DataProblem(f"{file}: an entry of {key} has no {wanted}.")
    if any("name" not in row or not isinstance(row["id"], int) for row in content["categories"]):
        raise DataProblem(f"{file}: a category needs a name and a number as its id.")
    found: Mapping[str, Any] = content
    return found


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = row.get("height"), row.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _draw(
    objects: Sequence[_Object], background: int, declared: tuple[int, int] | None, source: str
) -> Draw:
    def draw(sizes: Sizes) -> NDArray[np.uint8]:
        size = canvas_size(declared, sizes, source)
        mask = np.full(size, background, np.uint8)
        areas = [int(_pixels(o.shape, size, source).sum()) for o in objects]
        # Drawn anew for memory's sake: a crowded image has hundreds of objects.
        for n in sorted(range(len(objects)), key=lambda n: (not objects[n].crowd, -areas[n])):
            mask[_pixels(objects[n].shape, size, source)] = objects[n].number
        return mask

    return draw


def _pixels(shape: Any, size: tuple[int, int], source: str) -> Mask:
    if isinstance(shape, Mapping):
        return coco_runs(shape, size, source)
    mask = np.zeros(size, bool)
    if not isinstance(shape, list):
        raise DataProblem(f"{source} has an object that is neither polygons nor run lengths.")
    for part in shape:
        if not isinstance(part, list) or len(part) % 2:
            raise DataProblem(f"{source} has a polygon with an odd count of numbers.")
        mask |= inside(corners(list(zip(part[::2], part[1::2], strict=True)), source), size)
    return mask
