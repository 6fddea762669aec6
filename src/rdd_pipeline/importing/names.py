"""Tables of class names that people put beside their masks: text, CSV or JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from rdd_pipeline.data.labels import Color
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.folder import Folder

_WORDS = r"(classes|class|labels|label|names|codes|categories|palette|colors|colours)"
_TABLE = re.compile(
    rf"_?({_WORDS}|id2label|class_?(dict|names?|list|map|colou?rs?|palette|definitions)"
    r"|label_?(names?|map|list|colou?rs?|classes)|color_?(map|table))\.(txt|csv|json|names)",
    re.IGNORECASE,
)
_NAME = {"name", "class", "label", "classname", "labelname", "category", "title"}
_VALUE = {"id", "value", "pixelvalue", "index", "labelid", "classid", "pngindex", "trainid"}


class Names(NamedTuple):
    """What a table says; one of the two is empty, or both are."""

    values: dict[int, str]
    colors: dict[Color, str]
    file: str = ""


def find_names(folder: Folder) -> Names:
    """The first table of class names that is understood."""
    tables = [f for f in folder.files if _TABLE.fullmatch(PurePosixPath(f).name)]
    for file in sorted(tables, key=lambda f: (f.count("/"), f)):
        try:
            rows = _rows(folder, file)
        except DataProblem:
            continue
        if rows:
            values = {value: name for name, value, _ in rows if value is not None}
            colors = {color: name for name, _, color in rows if color is not None}
            if not values and not colors:
                values = {number: name for number, (name, _, _) in enumerate(rows)}
            return Names(values, colors, file)
    return Names({}, {})


Row = tuple[str, int | None, Color | None]


def _rows(folder: Folder, file: str) -> list[Row]:
    if file.lower().endswith(".json"):
        return _of_json(folder.json(file))
    if file.lower().endswith(".csv"):
        return _of_csv(folder.rows(file))
    lines = [line.strip() for line in folder.text(file).splitlines()]
    return [_of_line(line) for line in lines if line and not line.startswith("#")]


def _of_line(line: str) -> Row:
    """`name`, `7 name`, `name 7`, `1 2 3 name`, `name: 1 2 3`, `name #rrggbb`."""
    parts = [part for part in re.split(r"[\s,;:=\t]+", line) if part]
    numbers = [int(part) for part in parts if part.isdecimal()]
    hexes = [c for part in parts if (c := _color(part)) is not None]
    name = " ".join(p for p in parts if not p.isdecimal() and _color(p) is None)
    if hexes:
        return name or line, None, hexes[0]
    if len(numbers) == 3 and max(numbers) <= 255:
        return name or line, None, (numbers[0], numbers[1], numbers[2])
    first = parts[0].isdecimal() or parts[-1].isdecimal()
    if len(numbers) == 1 and first and name and numbers[0] <= 255:
        return name, numbers[0], None
    return line, None, None


def _of_csv(rows: Sequence[Sequence[str]]) -> list[Row]:
    head = [re.sub("[^a-z]", "", cell.lower()) for cell in rows[0]] if rows else []
    name = next((n for n, cell in enumerate(head) if cell in _NAME), None)
    if name is None:
        return [_of_line(" ".join(row)) for row in rows]
    value = next((n for n, cell in enumerate(head) if cell in _VALUE), None)
    rgb = [next((n for n, c in enumerate(head) if c in (k, k[0])), None) for k in
           ("red", "green", "blue")]  # fmt: skip
    color = next((n for n, c in enumerate(head) if c in ("color", "colour", "hex", "rgb")), None)
    found: list[Row] = []
    try:
        for row in rows[1:]:
            number = int(row[value]) if value is not None else None
            if None not in rgb:
                shade = _color([int(row[n]) for n in rgb if n is not None])
            else:
                shade = _color(row[color]) if color is not None else None
            found.append((row[name], number, shade))
    except (ValueError, IndexError) as error:
        raise DataProblem("no table") from error
    return found


def _of_json(content: Any) -> list[Row]:
    if isinstance(content, Mapping):
        for key in ("id2label", "classes", "labels", "names", "categories"):
            if isinstance(content.get(key), Mapping | list):
                return _of_json(content[key])
        return [row for key, value in content.items() if (row := _of_item(key, value)) is not None]
    if not isinstance(content, list):
        return []
    found: list[Row] = []
    for item in content:
        if isinstance(item, str):
            found.append((item, None, None))
        elif isinstance(item, Mapping):
            plain = {re.sub("[^a-z]", "", str(key).lower()): v for key, v in item.items()}
            name = next(
                (plain[key] for key in sorted(_NAME) if isinstance(plain.get(key), str)), ""
            )
            number = next((plain[k] for k in sorted(_VALUE) if isinstance(plain.get(k), int)), None)
            if name:
                found.append((name, number, _color(plain.get("color"))))
    return found


def _of_item(key: str, value: Any) -> Row | None:
    if isinstance(value, str) and key.isdecimal():
        return value, int(key), None
    if isinstance(value, int) and not isinstance(value, bool):
        return key, value, None
    color = _color(value)
    return (key, None, color) if color is not None else None


def _color(value: Any) -> Color | None:
    if isinstance(value, str):
        found = re.fullmatch("#([0-9a-fA-F]{6})([0-9a-fA-F]{2})?", value)
        value = list(bytes.fromhex(found[1])) if found else None
    if not isinstance(value, list | tuple) or len(value) not in (3, 4):
        return None
    if not all(type(part) is int and 0 <= part <= 255 for part in value[:3]):
        return None
    return value[0], value[1], value[2]
