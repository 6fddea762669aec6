"""Pairs of images and mask files whose classes are only known from what the masks hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import ImageColor

from rdd_pipeline.data.labels import Color, Lookup, hex_of, make_color_lookup, make_lookup
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.export import (
    BACKGROUND,
    IGNORED,
    Category,
    Export,
    Picture,
    check_count,
    is_background,
    is_unlabeled,
)
from rdd_pipeline.importing.masks import Values, draw_bytes, survey
from rdd_pipeline.importing.names import Names
from rdd_pipeline.importing.work import in_threads

OBJECT = "object"
_SOFT = 0.005
"""Share of all pixels below which one of many values is no class but a soft edge."""
_FEW = 24
"""So many values may all be classes, however rare."""
_MOST_SOFT = 0.1
"""Share of all pixels that soft edges have at most."""
_MOST_COLORS = 100_000
"""Of all masks together."""
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)

Value = TypeVar("Value")


class Pair(NamedTuple):
    """An image and the encoded mask that belongs to it."""

    name: str
    image: str | Callable[[], bytes]
    mask: Callable[[], bytes]
    split: str | None
    source: str


def export_of(tool: str, pairs: Sequence[Pair], names: Names, remarks: list[str]) -> Export:
    """Look at all masks, and decide which classes there are.

    Raises:
        DataProblem: A mask cannot be read, or what they hold cannot be classes.
    """
    tally = _Tally()
    looks = in_threads(lambda p: survey(p.mask(), Path(p.source)), pairs, "Looking at masks")
    for pair, values in zip(pairs, looks, strict=True):
        tally.add(values, pair.source)
    if names.file:
        remarks.append(f"Names of the classes are those of {names.file}.")
    found = _of_colors if tally.colored else _of_values
    categories, lookup, unlabeled = found(tally, names, remarks)
    check_count(len(categories))
    if len(categories) < 2:
        held = categories[0].name if categories else "nothing"
        raise DataProblem(f"All masks hold one class only ({held}): there is nothing to learn.")
    pictures = [
        Picture(pair.name, pair.image, draw_bytes(pair.mask, pair.source, lookup), pair.split,
                pair.source)
        for pair in pairs
    ]  # fmt: skip
    background = next((n for n, c in enumerate(categories) if is_background(c.name)), None)
    return Export(
        tool, categories, pictures, background, unlabeled, remarks, named=bool(names.file)
    )


class _Tally:
    """What all masks together hold."""

    def __init__(self) -> None:
        self.indices: Counter[int] = Counter()
        self.colors: Counter[Color] = Counter()
        """Those of palettes, too, and of gray."""
        self.palette: dict[int, Color] = {}
        self.colored = False
        """Whether one of them holds colors, not numbers."""

    def add(self, values: Values, source: str) -> None:
        """Count one mask more.

        Raises:
            DataProblem: There are too many colors for masks.
        """
        if values.indices is not None:
            self.indices.update(values.indices)
            self.palette = {**values.palette, **self.palette}
            for value, count in values.indices.items():
                self.colors[values.palette.get(value, (value, value, value))] += count
            return
        self.colored = True
        self.colors.update(values.colors or {})
        if values.colors is None or len(self.colors) > _MOST_COLORS:
            raise DataProblem(
                f"{source} holds thousands of colors, so it is no mask, or was saved with soft "
                "edges or loss: export masks as PNG without smoothing."
            )


# ---- numbers


def _of_values(
    tally: _Tally, names: Names, remarks: list[str]
) -> tuple[list[Category], Lookup, str]:
    counts, palette = tally.indices, tally.palette
    if names.colors and palette:  # the table is of colors, and so is the palette
        names = names._replace(
            values={v: names.colors[c] for v, c in palette.items() if c in names.colors}
        )
    called = _names_of_values(counts, names)
    soft = [] if names.values else _rare(counts)
    classes = {v: n for v, n in called.items() if v not in soft and not is_unlabeled(n)}
    ignored = [v for v in (*counts, IGNORED) if v not in classes]
    categories: dict[str, Category] = {}
    ids: dict[int, int] = {}
    for value, name in sorted(classes.items()):
        categories.setdefault(name, Category(name, palette.get(value)))
        ids[value] = list(categories).index(name)
    _say_soft(soft, counts, remarks)
    lookup = make_lookup(ids, ignored=tuple({*ignored}), ignore_index=IGNORED)
    shown = sorted({*ignored} & {*counts} - {*soft})
    unlabeled = f"{', '.join(map(str, shown))} is ignored" if shown else ""
    zero = next((n for v, n in classes.items() if v == 0), None)
    return list(categories.values()), lookup, unlabeled or (f"0 is {zero}" if zero else "")


def _names_of_values(counts: Mapping[int, int], names: Names) -> dict[int, str]:
    """A name for each value that is a class or called unlabeled."""
    if names.values:
        known = dict(names.values)
        if {*counts} <= {0, 255} and {*known} == {0, 1}:
            return {0: known[0], 255: known[1]}
        unknown = [v for v in counts if v not in known and v != IGNORED]
        return known | {v: BACKGROUND if v == 0 else f"class_{v}" for v in unknown}
    if {*counts} <= {0, 255} and 255 in counts:
        return {0: BACKGROUND, 255: OBJECT}
    classes = sorted(v for v in counts if v != IGNORED)
    if len(classes) == 2 and classes[0] == 0:
        return {0: BACKGROUND, classes[1]: OBJECT}
    return {v: BACKGROUND if v == 0 else f"class_{v}" for v in classes}


# ---- colors


def _of_colors(
    tally: _Tally, names: Names, remarks: list[str]
) -> tuple[list[Category], Lookup, str]:
    counts = tally.colors
    if all(red == green == blue for red, green, blue in counts) and not names.colors:
        return _of_gray_colors(counts, names, remarks)
    called = {c: names.colors[c] for c in counts if c in names.colors}
    rare = [c for c in _rare(counts, few=0 if called else _FEW) if c not in called]
    for color in counts:
        if color not in called and color not in rare:
            called[color] = _name_of(color, [c for c in counts if c not in rare])
    if len(called) > 255:
        raise DataProblem(
            f"The masks hold {len(called):,} colors, so they are no class masks (instances, or "
            "saved with soft edges)."
        )
    _say_soft(rare, counts, remarks)
    categories: dict[str, Category] = {}
    ids: dict[Color, int] = {}
    # The table's order if there is one; else black first, then the most frequent.
    order = [c for c in names.colors if c in called] if names.colors else []
    order += sorted((c for c in called if c not in order), key=lambda c: (c != _BLACK, -counts[c]))
    left = [color for color in order if is_unlabeled(called[color])]
    for color in order:
        if color not in left:
            categories.setdefault(called[color], Category(called[color], color))
            ids[color] = list(categories).index(called[color])
    lookup = make_color_lookup(ids, ignored=(*left, *rare), ignore_index=IGNORED)
    unlabeled = ", ".join(called[color] for color in left)
    black = called.get(_BLACK)
    text = f"{unlabeled} is ignored" if unlabeled else f"black is {black}" if black else ""
    return list(categories.values()), lookup, text


def _of_gray_colors(
    counts: Mapping[Color, int], names: Names, remarks: list[str]
) -> tuple[list[Category], Lookup, str]:
    """Numbers that were saved as gray with three channels."""
    tally = _Tally()
    tally.add(Values({color[0]: count for color, count in counts.items()}, None, {}), "")
    categories, lookup, unlabeled = _of_values(tally, names, remarks)
    ids = {(v, v, v): n for v, n in enumerate(lookup) if isinstance(n, int) and n >= 0}
    ignored = tuple(color for color, n in ids.items() if n == IGNORED)
    classes = {color: n for color, n in ids.items() if n != IGNORED}
    return categories, make_color_lookup(classes, ignored=ignored, ignore_index=IGNORED), unlabeled


def _name_of(color: Color, classes: Sequence[Color]) -> str:
    if color == _BLACK:
        return BACKGROUND
    if color == _WHITE and {*classes} == {_BLACK, _WHITE}:
        return OBJECT
    return _CSS.get(color) or hex_of(color)


_CSS: dict[Color, str] = {}
for _name, _value in ImageColor.colormap.items():
    _rgb = ImageColor.getrgb(_value)
    _CSS.setdefault((_rgb[0], _rgb[1], _rgb[2]), _name)


# ---- soft edges


def _rare(counts: Mapping[Value, int], few: int = _FEW) -> list[Value]:
    """Of many values those that are rare, if all of them together are little."""
    total = sum(counts.values())
    rare = [value for value, count in counts.items() if count < _SOFT * total]
    together = sum(counts[value] for value in rare)
    if len(counts) <= few or together > _MOST_SOFT * total or len(counts) - len(rare) < 2:
        return []
    return rare


def _say_soft(soft: Sequence[Value], counts: Mapping[Value, int], remarks: list[str]) -> None:
    if soft:
        share = sum(counts[value] for value in soft) / sum(counts.values())
        remarks.append(
            f"{len(soft)} rare values of the masks ({share:.1%} of the pixels, soft edges) are "
            "ignored."
        )
