"""Warnings about files that were read without a problem and may still mean something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rdd_pipeline.data.labels import Color
from rdd_pipeline.data.layouts.base import Pair, some_of
from rdd_pipeline.data.scan_cache import Facts

_TURNS_BACK = (2, 3, 4)
"""EXIF orientations that keep height and width."""
_UNUSED_BITS = 2
"""Upper bits that no 16-bit image uses: three quarters of the levels, and the brightness."""


def remarks(
    looked_at: Sequence[tuple[Pair, Facts]], bits: int, palette: Mapping[int, Color] | None
) -> list[str]:
    """One line for each kind of doubt, with a count and the first names.

    Args:
        looked_at: All pairs that nothing is wrong with.
        bits: How many bits 16-bit gray images are read with.
        palette: Colors that mask values should have in palettes; None: nothing is known.
    """
    return [*_turned(looked_at), *_palettes(looked_at, palette or {}), *_dark(looked_at, bits)]


def _turned(looked_at: Sequence[tuple[Pair, Facts]]) -> list[str]:
    turned = [
        pair.image
        for pair, facts in looked_at
        if facts.image.orientation in _TURNS_BACK
        or (facts.image.orientation > max(_TURNS_BACK) and facts.height == facts.width)
    ]
    if not turned:
        return []
    return [
        f"{_count(turned, 'image')} with an EXIF rotation that the sizes cannot check "
        f"({some_of(turned)}): images are turned upright, so masks have to be drawn on the upright "
        "image. If they were drawn on the stored pixels, save the images again without EXIF data."
    ]


def _palettes(looked_at: Sequence[tuple[Pair, Facts]], table: Mapping[int, Color]) -> list[str]:
    """Masks whose colors contradict each other's, and those that contradict the table's."""
    counts: dict[int, Counter[int]] = {}
    for _, facts in looked_at:
        for value, color in facts.palette.items():
            counts.setdefault(value, Counter())[color] += 1
    usual = {value: colors.most_common(1)[0][0] for value, colors in counts.items()}
    named = {value: red << 16 | green << 8 | blue for value, (red, green, blue) in table.items()}
    of_others, of_table = _other_colors(looked_at, usual), _other_colors(looked_at, named)
    lines = []
    if of_table:
        lines.append(_palette_line(looked_at, of_table, named, "the table of labels"))
    if of_others.keys() - of_table.keys():
        lines.append(_palette_line(looked_at, of_others, usual, "most of these masks"))
    return lines


def _other_colors(
    looked_at: Sequence[tuple[Pair, Facts]], expected: Mapping[int, int]
) -> dict[str, tuple[int, int]]:
    """Mask -> the first value that has another color than expected, and its color."""
    other: dict[str, tuple[int, int]] = {}
    for pair, facts in looked_at:
        for value, color in facts.palette.items():
            if expected.get(value, color) != color:
                other.setdefault(pair.mask, (value, color))
    return other


def _palette_line(
    looked_at: Sequence[tuple[Pair, Facts]],
    other: Mapping[str, tuple[int, int]],
    expected: Mapping[int, int],
    where: str,
) -> str:
    masks = [pair.mask for pair, facts in looked_at if facts.palette]
    first, (value, color) = next(iter(other.items()))
    return (
        f"{len(other)} of {_count(masks, 'palette mask')} show a value in another color than "
        f"{where} ({some_of(other)}; in {first} {value} is {_rgb(color)}, expected "
        f"{_rgb(expected[value])}). The values count, not the colors: masks saved again may have "
        "theirs in another order. If the colors are right, `encoding: color` in labels.yaml reads "
        "those."
    )


def _dark(looked_at: Sequence[tuple[Pair, Facts]], bits: int) -> list[str]:
    lines = []
    gray = {pair.image: facts.image.gray_top for pair, facts in looked_at}
    gray = {image: top for image, top in gray.items() if top >= 0}
    used = max(8, max(gray.values(), default=0).bit_length())
    if gray and used <= bits - _UNUSED_BITS:
        lines.append(
            f"{_count(gray, '16-bit gray image')} ({some_of(gray)}) hold no value above "
            f"{max(gray.values())}: read with {bits} bits they are dark and keep at most "
            f"{1 << max(0, used - bits + 8)} of their {1 << used} levels. If that is their white, "
            f"set data.bits={used}."
        )
    color = {pair.image: facts.image.color_top for pair, facts in looked_at}
    color = {image: top for image, top in color.items() if top >= 0}
    if color and max(color.values()) < 1 << 8 - _UNUSED_BITS:
        lines.append(
            f"{_count(color, '16-bit color image')} ({some_of(color)}) hold no value above "
            f"{(max(color.values()) << 8) + 255}: only the upper bytes are read, so they are dark "
            f"and keep at most {max(color.values()) + 1} levels. Convert them to 8 bits a channel."
        )
    return lines


def _count(things: Sequence[object] | Mapping[str, object], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _rgb(color: int) -> str:
    return f"({color >> 16}, {color >> 8 & 255}, {color & 255})"
