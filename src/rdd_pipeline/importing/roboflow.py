"""Roboflow, Semantic Segmentation Masks: `SPLIT/NAME.jpg`, `SPLIT/NAME_mask.png`, `_classes.csv`.

The table has the columns `Pixel Value` and `Class`; masks are gray.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.export import (
    Export,
    Picture,
    check_count,
    is_background,
    split_of,
)
from rdd_pipeline.importing.folder import Folder, stem
from rdd_pipeline.importing.masks import draw_file, said_ignored, table_of_values

TABLE = "_classes.csv"
_MASK = "_mask.png"


def recognises(folder: Folder) -> bool:
    """The table beside masks; Roboflow writes a table of that name for other tasks, too."""
    homes = {PurePosixPath(table).parent for table in folder.named(TABLE)}
    return any(f.endswith(_MASK) and PurePosixPath(f).parent in homes for f in folder.pictures)


def read(folder: Folder) -> Export:
    """Read the tables, which have to agree, and pair images and masks.

    Raises:
        DataProblem: A table is damaged or says something else than another one.
    """
    values: dict[int, str] = {}
    for table in folder.named(TABLE):
        for value, name in _rows(folder, table).items():
            if values.setdefault(value, name) != name:
                raise DataProblem(f"{table} calls {value} {name!r}, another one {values[value]!r}.")
    categories, lookup, left = table_of_values(values)
    check_count(len(categories))
    images = {stem(f): f for f in folder.pictures if not f.endswith(_MASK)}
    masks = {f.removesuffix(_MASK): f for f in folder.pictures if f.endswith(_MASK)}
    pictures = [
        Picture(name, image, draw_file(folder, masks[name], lookup), split_of(image), masks[name])
        for name, image in images.items()
        if name in masks
    ]
    alone = [images[name] for name in images if name not in masks]
    alone += [masks[name] for name in masks if name not in images]
    remarks = [f"{len(alone)} files have no partner ({alone[0]})."] if alone else []
    background = next((n for n, c in enumerate(categories) if is_background(c.name)), None)
    return Export(
        "Roboflow", categories, pictures, background, said_ignored(left) or "0 is a class", remarks
    )


def _rows(folder: Folder, table: str) -> dict[int, str]:
    rows = folder.rows(table)[1:]
    try:
        found = {int(row[0]): row[1] for row in rows}
    except (ValueError, IndexError) as error:
        raise DataProblem(f"{table} is no table of pixel values and classes.") from error
    if not found or not all(0 <= value <= 255 for value in found) or not all(found.values()):
        raise DataProblem(f"{table} is no table of pixel values 0..255 and classes.")
    return found
