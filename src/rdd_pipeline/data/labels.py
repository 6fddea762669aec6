"""Label sets: class names, colors and what each raw mask value means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, PositiveFloat, model_validator

from rdd_pipeline.config import Params
from rdd_pipeline.errors import printable

Color = tuple[int, int, int]
ColorRow = tuple[int, int, int, int]
"""Red, green, blue and the train id of pixels of this color."""
Lookup = tuple[int, ...] | tuple[ColorRow, ...]
"""See `LabelSet.lookup`."""

LONGEST_NAME = 200
"""Characters of a class's name."""
FORBIDDEN = -1
"""Entry of `LabelSet.lookup` for a raw value that may not occur in a mask."""


def make_lookup(
    train_ids: Mapping[int, int], *, ignored: tuple[int, ...] = (), ignore_index: int = 255
) -> tuple[int, ...]:
    """The 256 entries of `LabelSet.lookup` from raw value -> train id and the ignored raw values.

    Every raw value named in neither may not occur in a mask.
    """
    table = [FORBIDDEN] * 256
    for raw in ignored:
        table[raw] = ignore_index
    for raw, train_id in train_ids.items():
        table[raw] = train_id
    return tuple(table)


def make_color_lookup(
    train_ids: Mapping[Color, int], *, ignored: tuple[Color, ...] = (), ignore_index: int = 255
) -> tuple[ColorRow, ...]:
    """`LabelSet.lookup` for masks that are colored: color -> train id, and the ignored colors."""
    rows = dict.fromkeys(ignored, ignore_index) | dict(train_ids)
    return tuple((*color, train_id) for color, train_id in rows.items())


def hex_of(color: tuple[int, int, int]) -> str:
    """A color as pages and figures name it, ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*color)


class LabelSet(Params):
    """The classes of a data set and how its masks encode them."""

    name: str
    names: tuple[str, ...] = Field(description="Class names in the order of their train ids.")
    colors: tuple[Color, ...] = Field(description="RGB of each class in figures, 0..255.")
    ignore_index: int = Field(255, ge=0, le=255, description="Train id of unlabeled pixels.")
    class_weights: tuple[PositiveFloat, ...] | None = Field(
        None, description="The data set's usual weight of each class in the task loss."
    )
    lookup: Lookup = Field(
        description="Train id of each raw mask value 0..255; -1: the value may not occur. For "
        "colored masks instead rows of red, green, blue and train id; others may not occur."
    )

    @property
    def num_classes(self) -> int:
        """Number of classes, ignored pixels not counted."""
        return len(self.names)

    @property
    def mask_values(self) -> tuple[int, ...] | tuple[Color, ...]:
        """What masks hold for each class: its lowest value, or its first color."""
        if isinstance(self.lookup[0], tuple):
            rows = [row for row in self.lookup if isinstance(row, tuple)]
            firsts = {row[3]: (row[0], row[1], row[2]) for row in reversed(rows)}
            return tuple(firsts[train_id] for train_id in range(self.num_classes))
        return tuple(self.lookup.index(train_id) for train_id in range(self.num_classes))

    def meaning(self) -> dict[str, Any]:
        """What decides which class a pixel of a mask is, to be digested.

        Without the label set's name, the colors of figures and the weights of the task loss.
        """
        return {
            "names": self.names,
            "ignore_index": self.ignore_index,
            # Entries of values stand in the order of the values, rows of colors in any.
            "lookup": sorted(self.lookup) if isinstance(self.lookup[0], tuple) else self.lookup,
        }

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        count = len(self.names)
        for name in (self.name, *self.names):
            if not 0 < len(name) <= LONGEST_NAME or printable(name) != name:
                shown = printable(name[:40]) + "..." * (len(name) > 40)
                raise ValueError(
                    f"The name '{shown}' of a class or label set has {len(name)} characters, "
                    f"expected 1 to {LONGEST_NAME} without control characters."
                )
        if not 0 < count <= self.ignore_index:
            raise ValueError(
                f"Label set '{self.name}' has {count} classes; 2 to {self.ignore_index} fit below "
                f"ignore_index ({self.ignore_index})."
            )
        if count == 1:
            raise ValueError(
                f"Label set '{self.name}' has one class only ('{self.names[0]}'), so every network "
                "is right everywhere. Add a second one, such as `background` with the mask value "
                "of all the rest (often 0), which then must not be ignored."
            )
        if len(set(self.names)) != count:
            raise ValueError(f"Label set '{self.name}' names a class twice: {self.names}.")
        if len(self.colors) != count:
            raise ValueError(
                f"Label set '{self.name}' has {count} classes but {len(self.colors)} colors."
            )
        if self.class_weights is not None and len(self.class_weights) != count:
            raise ValueError(
                f"Label set '{self.name}' has {count} classes but "
                f"{len(self.class_weights)} class weights."
            )
        allowed = {FORBIDDEN, self.ignore_index, *range(count)}
        rows = tuple(row for row in self.lookup if isinstance(row, tuple))
        if rows:
            self._colors_fit(rows)
            return self
        values = [value for value in self.lookup if isinstance(value, int)]
        if len(values) != 256 or not allowed.issuperset(values):
            raise ValueError(
                f"Label set '{self.name}': lookup needs 256 entries, each a train id 0.."
                f"{count - 1}, {self.ignore_index} (ignored) or -1 (may not occur); found "
                f"{len(values)} entries with {sorted(set(values) - allowed)[:5]}."
            )
        return self

    def _colors_fit(self, rows: tuple[ColorRow, ...]) -> None:
        colors: list[Color] = [(red, green, blue) for red, green, blue, _ in rows]
        twice = next((color for color in colors if colors.count(color) > 1), None)
        if twice is not None:
            raise ValueError(
                f"Label set '{self.name}': color {twice} of the masks means two things."
            )
        if any(not 0 <= value <= 255 for color in colors for value in color):
            raise ValueError(f"Label set '{self.name}': colors of masks are 0..255 each.")
        wrong = {row[3] for row in rows} - {self.ignore_index, *range(self.num_classes)}
        if wrong:
            raise ValueError(
                f"Label set '{self.name}': colors of masks have train ids {sorted(wrong)}, "
                f"expected 0..{self.num_classes - 1} or {self.ignore_index}."
            )
