"""Label Studio: its JSON, JSON-MIN, and brush labels as PNG.

JSON: a list of tasks with `data` (where the image is) and `annotations`, whose `result` has brush
strokes as run lengths, polygons, rectangles and ellipses in percent of the image. They are drawn in
the order of the file, later ones over earlier ones. PNG: a file for each stroke,
`task-N-annotation-M-by-U-TAG-CLASS-K.png`; they have no order, so the largest come first, and no
image: that is the JSON's, or the one image with the task's number in its name.
https://labelstud.io/guide/export
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.data.reading import decode_mask_bytes
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.export import (
    IGNORED,
    Category,
    Draw,
    Export,
    Picture,
    Sizes,
    canvas_size,
    is_unlabeled,
    split_of,
    with_background,
)
from rdd_pipeline.importing.folder import Folder, stem
from rdd_pipeline.importing.shapes import Mask, brush_runs, corners, ellipse, inside

_PNG = re.compile(r"task-(\d+)-annotation-(\d+)-by-([^-]*)-([^-]+)-(.+)-(\d+)\.png")
_KEYS = ("brushlabels", "polygonlabels", "rectanglelabels", "ellipselabels", "labels")
_UPLOAD = re.compile("[0-9a-f]{8}-(.+)")


class _Task(NamedTuple):
    number: Any
    places: list[str]
    results: Sequence[Mapping[str, Any]]
    """Shapes with a label, in order."""


def recognises(folder: Folder) -> bool:
    """PNG files of that name, or a JSON file with such tasks."""
    if any(_PNG.fullmatch(f.rpartition("/")[2]) for f in folder.pictures):
        return True
    return any(any(task.results for task in _try(folder, f)) for f in folder.ending(".json")[:5])


def read(folder: Folder) -> Export:
    """Read the JSON files, or the PNG files where those hold no shapes.

    Raises:
        DataProblem: One of them is damaged, or there are no images.
    """
    tasks = {(f, n): t for f in folder.ending(".json") for n, t in enumerate(_tasks(folder, f))}
    if any(task.results for task in tasks.values()):
        return _of_json(folder, tasks)
    return _of_png(folder, list(tasks.items()))


def _of_json(folder: Folder, tasks: Mapping[tuple[str, int], _Task]) -> Export:
    labels = sorted({_label(r) for task in tasks.values() for r in task.results})
    names, background = with_background(name for name in labels if not is_unlabeled(name))
    ids = {n: IGNORED if is_unlabeled(n) else names.index(n) for n in labels}
    pictures, missing = [], []
    empty = 0
    for (file, number), task in tasks.items():
        if not task.results:
            empty += 1
            continue
        image = _find(folder, task, file)
        if image is None:
            missing.append(task.places[0] if task.places else f"task {task.number}")
            continue
        source = f"{file} (task {task.number if task.number is not None else number})"
        draw = _draw_results(task.results, ids, background, source)
        pictures.append(Picture(stem(image), image, draw, split_of(image), source))
    if not pictures:
        raise DataProblem(
            f"None of the {len(missing)} images of Label Studio's tasks is here ({missing[0]}): "
            "put them into the folder, too."
        )
    remarks = [f"{len(missing)} images are not here ({missing[0]})."] if missing else []
    remarks += [f"{empty} tasks without a shape are left out."] if empty else []
    return Export(
        "Label Studio (JSON)", [Category(name) for name in names], pictures, background,
        f"pixels outside of all shapes are {names[background]}", remarks,
    )  # fmt: skip


def _of_png(folder: Folder, tasks: Sequence[tuple[tuple[str, int], _Task]]) -> Export:
    strokes: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for file in folder.pictures:
        found = _PNG.fullmatch(file.rpartition("/")[2])
        if found:
            strokes[int(found[1])].append((file, found[5]))
    named = {t.number: _find(folder, t, file) for (file, _), t in tasks if t.number is not None}
    numbered = _by_number(folder)
    labels = sorted({label for found in strokes.values() for _, label in found})
    names, background = with_background(name for name in labels if not is_unlabeled(name))
    ids = {n: IGNORED if is_unlabeled(n) else names.index(n) for n in labels}
    pictures, missing = [], []
    for number, files in sorted(strokes.items()):
        image = named.get(number) or numbered.get(number)
        if image is None:
            missing.append(number)
            continue
        draw = _draw_files(folder, [(file, ids[label]) for file, label in files], background)
        pictures.append(Picture(stem(image), image, draw, split_of(image), files[0][0]))
    if not pictures:
        raise DataProblem(
            "Label Studio's PNG files do not say their images: put the export as JSON beside them, "
            f"or call the image of task {missing[0]} `{missing[0]}.jpg`."
        )
    remarks = [f"Of {len(missing)} tasks the image is not known ({missing[0]})."] if missing else []
    return Export(
        "Label Studio (PNG)", [Category(name) for name in names], pictures, background,
        f"pixels outside of all strokes are {names[background]}", remarks,
    )  # fmt: skip


# ---- tasks


def _try(folder: Folder, file: str) -> list[_Task]:
    try:
        return _tasks(folder, file)
    except DataProblem:
        return []


def _tasks(folder: Folder, file: str) -> list[_Task]:
    content = folder.json(file)
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, Mapping) for row in rows):
        return []
    return [task for row in rows if (task := _task(row)) is not None]


def _task(row: Mapping[str, Any]) -> _Task | None:
    annotations = row.get("annotations", row.get("completions"))
    if isinstance(row.get("data"), Mapping) and isinstance(annotations, list):
        places = [v for v in row["data"].values() if isinstance(v, str)]
        places += [row["file_upload"]] if isinstance(row.get("file_upload"), str) else []
        good = [a for a in annotations if isinstance(a, Mapping) and not a.get("was_cancelled")]
        results = good[-1].get("result") if good else []
        shapes = [
            {**r["value"], **{k: r.get(k) for k in ("original_width", "original_height",
                                                    "image_rotation")}}
            for r in results or []
            if isinstance(r, Mapping) and isinstance(r.get("value"), Mapping)
        ]  # fmt: skip
        return _Task(row.get("id"), places, [s for s in shapes if _label(s)])
    if "annotation_id" in row or "annotator" in row:  # JSON-MIN
        shapes = [
            dict(item)
            for value in row.values()
            if isinstance(value, list)
            for item in value
            if isinstance(item, Mapping) and _label(item)
        ]
        return _Task(row.get("id"), [v for v in row.values() if isinstance(v, str)], shapes)
    return None


def _label(shape: Mapping[str, Any]) -> str:
    """The first label of a shape that can be drawn; empty: it has none."""
    if not any(key in shape for key in ("rle", "points", "radiusX", "width")):
        return ""
    for key in _KEYS:
        if isinstance(shape.get(key), list) and shape[key]:
            return str(shape[key][0])
    return ""


def _find(folder: Folder, task: _Task, beside: str) -> str | None:
    for name in _names(task.places):
        found = folder.find_picture(f"/{name}", beside)  # only by how the path ends
        if found is not None:
            return found
    return None


def _names(places: Sequence[str]) -> Iterator[str]:
    """What an image may be called, of addresses, paths and uploads with their random prefix."""
    for place in places:
        address = urlsplit(place)
        path = unquote(parse_qs(address.query).get("d", [address.path])[0])
        yield path.lstrip("/")
        short = _UPLOAD.fullmatch(PurePosixPath(path).name)
        if short:
            yield short[1]


def _by_number(folder: Folder) -> dict[int, str]:
    """Images by the only number of their names, if it is no other's."""
    found: dict[int, list[str]] = defaultdict(list)
    for file in folder.pictures:
        name = PurePosixPath(file)
        numbers = re.findall(r"\d+", name.stem)
        if len(numbers) == 1 and not _PNG.fullmatch(name.name):
            found[int(numbers[0])].append(file)
    return {number: files[0] for number, files in found.items() if len(files) == 1}


# ---- drawing


def _draw_results(
    shapes: Sequence[Mapping[str, Any]], ids: Mapping[str, int], background: int, source: str
) -> Draw:
    def draw(sizes: Sizes) -> NDArray[np.uint8]:
        first = shapes[0]
        height, width = first.get("original_height"), first.get("original_width")
        known = isinstance(height, int) and isinstance(width, int)
        size = canvas_size((height, width) if known else None, sizes, source)  # type: ignore[arg-type]
        mask = np.full(size, background, np.uint8)
        for shape in shapes:
            if shape.get("image_rotation"):
                raise DataProblem(
                    f"{source} was labeled on an image that was turned in Label Studio."
                )
            mask[_pixels(shape, size, source)] = ids[_label(shape)]
        return mask

    return draw


def _pixels(shape: Mapping[str, Any], size: tuple[int, int], source: str) -> Mask:
    if "rle" in shape:
        return brush_runs(shape["rle"], size, source)
    percent = size[1] / 100, size[0] / 100
    if "points" in shape:
        return inside(corners(shape["points"], source, scale=percent), size)
    if shape.get("rotation"):
        raise DataProblem(f"{source} has a rectangle or ellipse that is turned: draw a polygon.")
    try:
        if "radiusX" in shape:
            ((x, y), radii) = corners(
                [(shape["x"], shape["y"]), (shape["radiusX"], shape["radiusY"])],
                source,
                scale=percent,
            )
            return ellipse((x, y), radii, size)
        x, y = shape["x"], shape["y"]
        right, low = x + shape["width"], y + shape["height"]
    except (KeyError, TypeError) as error:
        raise DataProblem(f"{source} has a shape without its numbers.") from error
    box = [(x, y), (right, y), (right, low), (x, low)]
    return inside(corners(box, source, scale=percent), size)


def _draw_files(folder: Folder, files: Sequence[tuple[str, int]], background: int) -> Draw:
    def draw(sizes: Sizes) -> NDArray[np.uint8]:
        size = sizes.upright
        strokes: list[tuple[int, int, Callable[[], Mask]]] = []
        mask = np.full(size, background, np.uint8)
        for file, number in files:

            def pixels(file: str = file) -> Mask:
                return decode_mask_bytes(folder.bytes(file), Path(file)) > 0

            found = pixels()
            canvas_size((found.shape[0], found.shape[1]), Sizes(size, size), file)
            strokes.append((int(found.sum()), number, pixels))
        for _, number, again in sorted(strokes, key=lambda stroke: -stroke[0]):
            mask[again()] = number
        return mask

    return draw
