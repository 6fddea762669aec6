"""What stands in a generated street: each function paints one object on a canvas.

Positions are in meters, see `scene_canvas.Camera`. Colors overlap between classes on purpose:
shape, texture and place have to decide, as in a real street.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import pairwise

import numpy as np

from rdd_pipeline.scenes.canvas import RGB, Canvas, Paint, Point


class Raw(IntEnum):
    """Mask values, CamVid's."""

    SKY = 0
    BUILDING = 1
    POLE = 2
    ROAD = 3
    PAVEMENT = 4
    TREE = 5
    SIGN = 6
    FENCE = 7
    CAR = 8
    PEDESTRIAN = 9
    BICYCLIST = 10
    VOID = 11


GROUND = (Raw.ROAD, Raw.PAVEMENT)

Random = np.random.Generator


def uniform(rng: Random, low: float, high: float) -> float:
    """One number between `low` and `high`."""
    return low + (high - low) * rng.random()


def chance(rng: Random, probability: float) -> bool:
    """True with that probability."""
    return rng.random() < probability


def pick(rng: Random, choices: Sequence[RGB]) -> RGB:
    """One of the choices."""
    return choices[int(rng.random() * len(choices))]


def gray(value: float, warmth: float = 0.0) -> RGB:
    """A gray, a little red (warmth > 0) or blue (warmth < 0)."""
    return (value * (1 + warmth), value, value * (1 - warmth))


def vary(rng: Random, color: RGB, amount: float) -> RGB:
    """A color near `color`: brightness and hue vary by about `amount`."""
    light = 1 + amount * (2 * rng.random() - 1)
    r, g, b = (c * light * (1 + 0.5 * amount * (2 * rng.random() - 1)) for c in color)
    return (r, g, b)


def shade(color: RGB, factor: float) -> RGB:
    """The color under `factor` times the light."""
    return (color[0] * factor, color[1] * factor, color[2] * factor)


WALLS: tuple[RGB, ...] = (
    (0.55, 0.33, 0.25), (0.62, 0.52, 0.40), (0.70, 0.67, 0.60), (0.45, 0.43, 0.41),
    (0.75, 0.70, 0.55), (0.36, 0.27, 0.23), (0.58, 0.60, 0.62), (0.80, 0.78, 0.74),
    (0.50, 0.40, 0.33), (0.42, 0.46, 0.44),
)  # fmt: skip
CLOTHES: tuple[RGB, ...] = (
    (0.10, 0.10, 0.13), (0.18, 0.22, 0.35), (0.45, 0.12, 0.12), (0.60, 0.58, 0.55),
    (0.30, 0.28, 0.22), (0.15, 0.30, 0.22), (0.70, 0.65, 0.30), (0.38, 0.38, 0.42),
    (0.80, 0.80, 0.80), (0.55, 0.30, 0.15),
)  # fmt: skip
PAINTWORK: tuple[RGB, ...] = (
    (0.10, 0.10, 0.11), (0.62, 0.63, 0.65), (0.80, 0.80, 0.80), (0.35, 0.36, 0.38),
    (0.45, 0.08, 0.08), (0.10, 0.15, 0.35), (0.12, 0.25, 0.18), (0.55, 0.50, 0.40),
)  # fmt: skip
LEAVES: tuple[RGB, ...] = (
    (0.16, 0.27, 0.08), (0.22, 0.32, 0.11), (0.12, 0.21, 0.09), (0.28, 0.34, 0.11),
    (0.20, 0.29, 0.10), (0.34, 0.30, 0.11), (0.36, 0.26, 0.11),
)  # fmt: skip
SKIN: tuple[RGB, ...] = ((0.70, 0.52, 0.42), (0.45, 0.30, 0.22), (0.60, 0.45, 0.36))
GLASS: RGB = (0.13, 0.15, 0.18)


def facade(
    canvas: Canvas,
    rng: Random,
    place: Callable[[float, float], tuple[float, float]],
    length: float,
    height: float,
    depth: float,
    wall: RGB,
    *,
    windows: bool,
) -> None:
    """One wall of a building with windows; `place(s)` maps 0..length along it to (X, Z)."""
    project = canvas.camera.project

    def corner(along: float, up: float) -> Point:
        x, z = place(along, 0.0)
        return project(x, up, z)

    def panel(left: float, right: float, low: float, high: float, number: int) -> None:
        quad = [corner(left, low), corner(right, low), corner(right, high), corner(left, high)]
        canvas.polygon(quad, number)

    courses = canvas.camera.pixels(0.3, depth)
    stripes = (0.08, 0.0, 1 / courses) if courses > 3 and chance(rng, 0.5) else (0.0, 0.0, 0.0)
    paint = Paint(wall, Raw.BUILDING, depth, 0.05, 0.07, stripes)
    wall_number = canvas.paint(paint)
    # A bend of the road bends long walls: paint them in pieces.
    pieces = max(1, math.ceil(length / 8))
    for piece in range(pieces):
        panel(length * piece / pieces, length * (piece + 1) / pieces, 0, height, wall_number)
    if not windows or canvas.camera.pixels(1.4, depth) < 3:
        return
    storey = uniform(rng, 2.7, 3.6)
    spacing = uniform(rng, 1.8, 3.5)
    width, tall = spacing * uniform(rng, 0.35, 0.65), storey * uniform(rng, 0.4, 0.65)
    frame = canvas.paint(Paint(vary(rng, shade(wall, 1.25), 0.3), Raw.BUILDING, depth))
    panes = [
        canvas.paint(Paint(color, Raw.BUILDING, depth, 0.05, 0.15))
        for color in (
            vary(rng, GLASS, 0.5),
            vary(rng, (0.30, 0.34, 0.38), 0.4),
            vary(rng, (0.55, 0.60, 0.66), 0.3),
        )
    ]
    bright = rng.random()
    shop = chance(rng, 0.4)
    for floor in range(int(height / storey)):
        low = floor * storey + storey * 0.3
        if floor == 0 and shop:
            _shop(canvas, rng, panel, length, storey, depth)
            continue
        for column in range(int(length / spacing)):
            left = (column + 0.5) * spacing - width / 2
            panel(left - 0.12, left + width + 0.12, low - 0.12, low + tall + 0.12, frame)
            pane = panes[int(rng.random() * (2 if rng.random() > bright else 3))]
            panel(left, left + width, low, low + tall, pane)


def _shop(
    canvas: Canvas,
    rng: Random,
    panel: Callable[[float, float, float, float, int], None],
    length: float,
    storey: float,
    depth: float,
) -> None:
    """Shop windows and their boards on the ground floor."""
    start = 0.4
    while start < length - 2:
        width = min(uniform(rng, 2.5, 5), length - start - 0.3)
        glass = canvas.paint(Paint(vary(rng, GLASS, 0.6), Raw.BUILDING, depth, 0.1, 0.3))
        board = (rng.random() * 0.8, rng.random() * 0.6, rng.random() * 0.7)
        panel(start, start + width, 0.4, storey * 0.75, glass)
        sign = canvas.paint(Paint(board, Raw.BUILDING, depth, 0.15, 0.1))
        panel(start, start + width, storey * 0.78, storey * 0.98, sign)
        start += width + 0.5


def building(
    canvas: Canvas,
    rng: Random,
    side: int,
    x: float,
    near: float,
    far: float,
    height: float,
    sun_side: float,
) -> None:
    """A house whose front runs along the street at X = side * x, from `near` to `far`."""
    canvas.new_object()
    wall = vary(rng, pick(rng, WALLS), 0.25)
    front_light = 1.0 if side != sun_side else 0.72
    if chance(rng, 0.04):  # Unlabeled, as some far structures are in CamVid.
        number = canvas.paint(Paint(shade(wall, front_light), Raw.VOID, near))
        canvas.polygon(_box(canvas, side * x, side * (x + 8), 0, height, near), number)
        return
    depth = (max(near, 3.0) * max(far, 3.0)) ** 0.5
    end = shade(wall, 0.9)
    if chance(rng, 0.35):  # Gable roof, its end towards us.
        roof = canvas.paint(Paint(vary(rng, (0.30, 0.22, 0.20), 0.4), Raw.BUILDING, near))
        middle = side * (x + 4)
        canvas.polygon(
            [
                canvas.camera.project(side * x, height, near),
                canvas.camera.project(middle, height + 3, near),
                canvas.camera.project(middle, height + 3, far),
                canvas.camera.project(side * x, height, far),
            ],
            roof,
        )
        gable = canvas.paint(Paint(end, Raw.BUILDING, near, 0.05, 0.07))
        canvas.polygon(
            [
                canvas.camera.project(side * x, height, near),
                canvas.camera.project(middle, height + 3, near),
                canvas.camera.project(side * (x + 8), height, near),
            ],
            gable,
        )
    facade(
        canvas, rng, lambda s, _: (side * (x + s), near), 8.0, height, near, end,
        windows=chance(rng, 0.5),
    )  # fmt: skip
    facade(
        canvas, rng, lambda s, _: (side * x, near + s), far - near, height, depth,
        shade(wall, front_light), windows=True,
    )  # fmt: skip


def _box(
    canvas: Canvas, left: float, right: float, low: float, high: float, z: float
) -> list[Point]:
    """A rectangle facing the camera."""
    project = canvas.camera.project
    return [
        project(left, low, z), project(right, low, z),
        project(right, high, z), project(left, high, z),
    ]  # fmt: skip


def foliage(
    canvas: Canvas,
    rng: Random,
    center: tuple[float, float, float],
    radius: tuple[float, float],
    color: RGB,
    *,
    density: float = 1.0,
    label: Raw = Raw.TREE,
) -> None:
    """Leaves: many blobs, lighter towards the top, irregular at the border."""
    x, y, z = center
    size, tall = canvas.camera.pixels(radius[0], z), canvas.camera.pixels(radius[1], z)
    column, row = canvas.camera.project(x, y, z)
    if not -2 * size < column < canvas.width + 2 * size:
        return
    count = math.ceil(min(5 + size * 1.6, 110) * density)
    paints = [
        canvas.paint(Paint(vary(rng, shade(color, light), 0.2), label, z, 0.22, 0.15))
        for light in (0.55, 0.75, 0.95, 1.15, 1.4)
    ]
    along = rng.normal(0, 0.42, (count, 2)).clip(-1, 1).tolist()
    # Large crowns get finer leaves.
    sizes = (rng.uniform(0.12, 0.36, count) * min(1, (40 / max(size, 1)) ** 0.4)).tolist()
    for (dx, dy), blob, light in zip(along, sizes, rng.random(count).tolist(), strict=True):
        level = int(min(max((dy + 1) / 2 * 3 + light * 2.2 - 0.3, 0), 4))
        place = (column + dx * size, row - dy * tall)
        canvas.ellipse(place, size * blob * 1.1, size * blob * 0.9, paints[level])


def tree(canvas: Canvas, rng: Random, x: float, z: float, leaves: RGB) -> None:
    """A trunk with a crown, in one of five trees only branches."""
    canvas.new_object()
    trunk_height, radius = uniform(rng, 1.8, 3.6), uniform(rng, 1.3, 3.2)
    bark = vary(rng, (0.27, 0.23, 0.20), 0.5)
    number = canvas.paint(Paint(bark, Raw.TREE, z, 0.12, 0.1))
    width = uniform(rng, 0.18, 0.5)
    lean = uniform(rng, -0.25, 0.25)
    project, pixels = canvas.camera.project, canvas.camera.pixels
    foot, top = project(x, 0, z), project(x + lean, trunk_height + radius * 0.6, z)
    canvas.line([foot, top], pixels(width, z), number)
    crown = (x + lean, trunk_height + radius * 0.8, z)
    canvas.round_shadow(x, z, radius * 0.9, radius * 0.9, 0.8)
    if chance(rng, 0.2):
        for angle in rng.uniform(-1.2, 1.2, 12):
            length = uniform(rng, 0.6, 1.4) * radius
            start = project(x + lean, trunk_height + rng.random() * radius * 0.6, z)
            tip = (start[0] + pixels(length * math.sin(angle), z),
                   start[1] - pixels(length * math.cos(angle), z))  # fmt: skip
            canvas.line([start, tip], max(pixels(width / 3, z), 1), number)
        foliage(canvas, rng, crown, (radius, radius), shade(bark, 1.3), density=0.35)
    else:
        foliage(canvas, rng, crown, (radius, radius * uniform(rng, 0.8, 1.2)), leaves)


def pole(canvas: Canvas, rng: Random, x: float, z: float, side: int) -> None:
    """A lamp post or a bare post; lamps hang over the road."""
    canvas.new_object()
    color = vary(rng, gray(uniform(rng, 0.2, 0.55), uniform(rng, -0.05, 0.15)), 0.2)
    number = canvas.paint(Paint(color, Raw.POLE, z, 0.04, 0.05))
    height = uniform(rng, 3.5, 8.5)
    width = canvas.camera.pixels(uniform(rng, 0.16, 0.34), z)
    if width < 0.6:
        return
    project = canvas.camera.project
    top = project(x, height, z)
    canvas.line([project(x, 0, z), top], width, number)
    if chance(rng, 0.6):
        arm = x - side * uniform(rng, 0.6, 2.2)
        end = project(arm, height + 0.3, z)
        canvas.line([top, end], max(width * 0.6, 1), number)
        canvas.ellipse(end, canvas.camera.pixels(0.4, z), canvas.camera.pixels(0.12, z), number)


def sign(canvas: Canvas, rng: Random, x: float, z: float) -> None:
    """A traffic sign or a traffic light on its post."""
    canvas.new_object()
    project, pixels = canvas.camera.project, canvas.camera.pixels
    post = canvas.paint(Paint(gray(uniform(rng, 0.25, 0.5)), Raw.POLE, z))
    height = uniform(rng, 2.0, 3.0)
    if pixels(0.6, z) < 3:
        return
    canvas.line([project(x, 0, z), project(x, height, z)], pixels(0.12, z), post)
    size = uniform(rng, 0.35, 0.6)
    center, radius = project(x, height + size * 0.6, z), pixels(size, z)
    column, row = center
    kind = rng.random()

    def add(color: RGB) -> int:
        return canvas.paint(Paint(vary(rng, color, 0.2), Raw.SIGN, z, 0.03, 0.03))

    if kind < 0.3:  # Traffic light.
        box = add((0.06, 0.06, 0.07))
        canvas.polygon(_square(column, row, radius * 0.5, radius * 1.3), box)
        colors: tuple[RGB, ...] = ((0.9, 0.1, 0.1), (0.9, 0.6, 0.1), (0.1, 0.8, 0.4))
        lit = int(rng.random() * 3)
        for place, color in enumerate(colors):
            lamp = add(color if place == lit else shade(color, 0.2))
            canvas.ellipse(
                (column, row + (place - 1) * radius * 0.8), radius * 0.3, radius * 0.3, lamp
            )
    elif kind < 0.55:  # Prohibition: a disk with a red rim.
        canvas.ellipse(center, radius, radius, add((0.75, 0.08, 0.08)))
        inner = add((0.9, 0.9, 0.9))
        canvas.ellipse(center, radius * 0.65, radius * 0.65, inner)
    elif kind < 0.7:  # Warning: a triangle.
        outer, inner = add((0.75, 0.08, 0.08)), add((0.9, 0.9, 0.85))
        for number, part in ((outer, 1.15), (inner, 0.65)):
            canvas.polygon(
                [
                    (column, row - radius * part),
                    (column + radius * part, row + radius * part * 0.8),
                    (column - radius * part, row + radius * part * 0.8),
                ],
                number,
            )
    elif kind < 0.85:  # Blue or green: obligation or direction.
        color = pick(rng, ((0.08, 0.2, 0.6), (0.05, 0.35, 0.2), (0.1, 0.1, 0.1)))
        number = add(color)
        wide = uniform(rng, 0.8, 2.4)
        canvas.polygon(_square(column, row, radius * wide, radius), number)
        text = add((0.85, 0.85, 0.85))
        canvas.line([(column - radius * wide * 0.6, row), (column + radius * wide * 0.6, row)],
                    max(radius * 0.25, 1), text)  # fmt: skip
    else:  # The back of a sign: gray, as its post and many walls.
        number = add(gray(uniform(rng, 0.3, 0.6)))
        if chance(rng, 0.5):
            canvas.ellipse(center, radius, radius, number)
        else:
            canvas.polygon(_square(column, row, radius, radius), number)


def _square(column: float, row: float, half_width: float, half_height: float) -> list[Point]:
    return [
        (column - half_width, row - half_height), (column + half_width, row - half_height),
        (column + half_width, row + half_height), (column - half_width, row + half_height),
    ]  # fmt: skip


def fence(canvas: Canvas, rng: Random, x: float, near: float, far: float) -> None:
    """A wall, boards or railings along the street at X = x."""
    canvas.new_object()
    height = uniform(rng, 1.0, 2.4)
    depth = (max(near, 2.5) * far) ** 0.5
    kind = rng.random()
    project = canvas.camera.project
    if kind < 0.35:  # Garden wall, of what houses are made of.
        color = vary(rng, pick(rng, WALLS), 0.3)
    elif kind < 0.65:  # Boards.
        color = vary(rng, (0.36, 0.27, 0.18), 0.5)
    else:  # Railings or wire: mostly what is behind shows.
        color = vary(rng, (0.36, 0.36, 0.32), 0.4)
    base = canvas.paint(Paint(color, Raw.FENCE, depth, 0.06, 0.1))
    pieces = max(1, math.ceil((far - near) / 4))
    marks = [near + (far - near) * step / pieces for step in range(pieces + 1)]
    for start, stop in pairwise(marks):
        canvas.polygon(
            [
                project(x, 0, start), project(x, 0, stop),
                project(x, height, stop), project(x, height, start),
            ],
            base,
        )  # fmt: skip
    if kind < 0.35:
        cap = canvas.paint(Paint(shade(color, 1.2), Raw.FENCE, depth))
        canvas.line([project(x, height, near), project(x, height, far)], 2, cap)
        return
    bar = canvas.paint(Paint(shade(color, 0.55 if kind < 0.8 else 1.5), Raw.FENCE, depth, 0.05))
    step = uniform(rng, 0.2, 0.5) if kind > 0.65 else uniform(rng, 0.3, 0.8)
    z = near
    while z < far:
        if canvas.camera.pixels(step, z) * abs(x) / z > 2.5:
            canvas.line([project(x, 0, z), project(x, height, z)], 1, bar)
        z += step
    for up in (0.15, height):
        canvas.line([project(x, up, near), project(x, up, far)], 1, bar)


def car(canvas: Canvas, rng: Random, x: float, z: float, *, side_view: bool, back: bool) -> None:
    """A car or a van, seen from behind, from the front or from the side, centered at X = x."""
    canvas.new_object()
    color = vary(rng, pick(rng, PAINTWORK), 0.25)
    van = chance(rng, 0.18)
    width, length = (1.75, uniform(rng, 3.8, 4.7)) if not van else (1.95, uniform(rng, 4.8, 6.5))
    waist, roof = (0.92, 1.45) if not van else (1.3, uniform(rng, 2.1, 2.7))
    canvas.round_shadow(x, z + (0 if side_view else length / 2),
                        (length if side_view else width) * 0.55,
                        width * 0.5 if side_view else length * 0.55)  # fmt: skip
    if side_view:
        _car_side(canvas, rng, x, z, length, waist, roof, color, van)
    else:
        _car_end(canvas, rng, x, z, width, length, waist, roof, color, back)


def _car_paints(canvas: Canvas, rng: Random, color: RGB, z: float) -> tuple[int, int, int, int]:
    body = canvas.paint(Paint(color, Raw.CAR, z, 0.03, 0.12))
    flank = canvas.paint(Paint(shade(color, uniform(rng, 0.55, 0.85)), Raw.CAR, z, 0.03, 0.12))
    glass = canvas.paint(Paint(vary(rng, (0.16, 0.18, 0.21), 0.6), Raw.CAR, z, 0.04, 0.3))
    tire = canvas.paint(Paint((0.05, 0.05, 0.05), Raw.CAR, z, 0.05))
    return body, flank, glass, tire


def _car_end(
    canvas: Canvas, rng: Random, x: float, z: float, width: float, length: float,
    waist: float, roof: float, color: RGB, back: bool,
) -> None:  # fmt: skip
    body, flank, glass, tire = _car_paints(canvas, rng, color, z)
    project = canvas.camera.project
    half, far = width / 2, z + length
    inner = -half if x > 0 else half  # The flank we see is the one towards the road's middle.
    edge = x + inner
    # Flank: body, cabin, windows, wheels.
    canvas.polygon([project(edge, 0.3, z), project(edge, 0.3, far),
                    project(edge, waist, far), project(edge, waist, z)], flank)  # fmt: skip
    cabin = x + inner * 0.88
    c0, c1 = z + 0.25, z + length * 0.72
    canvas.polygon([project(cabin, waist, c0 - 0.2), project(cabin, waist, c1 + 0.4),
                    project(cabin, roof, c1), project(cabin, roof, c0 + 0.2)], flank)  # fmt: skip
    canvas.polygon([project(cabin, waist, c0 + 0.2), project(cabin, waist, c1 + 0.1),
                    project(cabin, roof - 0.1, c1 - 0.1), project(cabin, roof - 0.1, c0 + 0.4)],
                   glass)  # fmt: skip
    for wheel_z in (z + length * 0.2, z + length * 0.8):
        radius = canvas.camera.pixels(0.32, wheel_z)
        squeeze = min(1.0, abs(edge) / wheel_z + 0.15)
        canvas.ellipse(project(edge, 0.3, wheel_z), radius * squeeze, radius, tire)
    # The end towards us.
    for sign_x in (-1, 1):
        canvas.polygon(_box(canvas, x + sign_x * half * 0.9, x + sign_x * half * 0.6, 0, 0.4, z),
                       tire)  # fmt: skip
    canvas.polygon(_box(canvas, x - half, x + half, 0.25, waist, z), body)
    canvas.polygon([project(x - half, waist, z), project(x + half, waist, z),
                    project(x + half * 0.82, roof, z + 0.3),
                    project(x - half * 0.82, roof, z + 0.3)], body)  # fmt: skip
    canvas.polygon([project(x - half * 0.86, waist + 0.04, z),
                    project(x + half * 0.86, waist + 0.04, z),
                    project(x + half * 0.72, roof - 0.08, z + 0.25),
                    project(x - half * 0.72, roof - 0.08, z + 0.25)], glass)  # fmt: skip
    if canvas.camera.pixels(0.3, z) < 1.5:
        return
    lamp_color: RGB = (0.65, 0.06, 0.05) if back else (0.85, 0.85, 0.8)
    lamp = canvas.paint(Paint(vary(rng, lamp_color, 0.3), Raw.CAR, z))
    for sign_x in (-1, 1):
        low, high = waist - 0.3, waist - 0.1
        left, right = sorted((x + sign_x * half * 0.95, x + sign_x * half * 0.65))
        canvas.polygon(_box(canvas, left, right, low, high, z), lamp)
    plate = canvas.paint(Paint((0.75, 0.7, 0.4) if back else (0.8, 0.8, 0.8), Raw.CAR, z))
    canvas.polygon(_box(canvas, x - 0.26, x + 0.26, 0.45, 0.57, z), plate)
    bumper = canvas.paint(Paint(shade(color, 0.4), Raw.CAR, z))
    canvas.polygon(_box(canvas, x - half, x + half, 0.25, 0.38, z), bumper)


def _car_side(
    canvas: Canvas, rng: Random, x: float, z: float, length: float, waist: float, roof: float,
    color: RGB, van: bool,
) -> None:  # fmt: skip
    body, _, glass, tire = _car_paints(canvas, rng, color, z)
    project = canvas.camera.project
    turn = 1 if chance(rng, 0.5) else -1

    def at(along: float, up: float) -> Point:
        return project(x + turn * along * length / 2, up, z)

    canvas.polygon([at(-1, 0.3), at(1, 0.3), at(1, waist * 0.8), at(0.9, waist), at(-1, waist)],
                   body)  # fmt: skip
    rear = -0.98 if van else -0.85
    canvas.polygon([at(rear, waist), at(0.55, waist), at(0.25, roof), at(rear * 0.75, roof)], body)
    canvas.polygon([at(rear * 0.85, waist), at(-0.12, waist), at(-0.12, roof - 0.1),
                    at(rear * 0.72, roof - 0.1)], glass)  # fmt: skip
    canvas.polygon([at(-0.05, waist), at(0.45, waist), at(0.22, roof - 0.1),
                    at(-0.05, roof - 0.1)], glass)  # fmt: skip
    for along in (-0.62, 0.62):
        radius = canvas.camera.pixels(0.33, z)
        canvas.ellipse(at(along, 0.33), radius, radius, tire)


def pedestrian(canvas: Canvas, rng: Random, x: float, z: float) -> None:
    """A person on foot."""
    canvas.new_object()
    canvas.round_shadow(x, z, 0.35, 0.25, 0.7)
    _person(canvas, rng, x, 0.0, z, uniform(rng, 1.5, 1.9), Raw.PEDESTRIAN, legs=True)


def _person(
    canvas: Canvas, rng: Random, x: float, base: float, z: float, height: float, label: Raw,
    *, legs: bool, lean: float = 0.0,
) -> None:  # fmt: skip
    project, pixels = canvas.camera.project, canvas.camera.pixels

    def add(color: RGB) -> int:
        return canvas.paint(Paint(vary(rng, color, 0.3), label, z, 0.06, 0.1))

    trousers, coat, skin = add(pick(rng, CLOTHES)), add(pick(rng, CLOTHES)), add(pick(rng, SKIN))
    hip, shoulder = base + height * 0.48, base + height * 0.82
    stride = uniform(rng, 0.03, 0.3)
    if legs:
        for foot in (-stride, stride):
            canvas.line([project(x, hip, z), project(x + foot, base, z)], pixels(0.17, z),
                        trousers)  # fmt: skip
    wide = height * uniform(rng, 0.11, 0.15)
    low = base + height * (0.3 if legs and chance(rng, 0.25) else 0.45)
    canvas.polygon(
        [
            project(x - wide * 0.8, low, z), project(x + wide * 0.8, low, z),
            project(x + wide + lean, shoulder, z), project(x - wide + lean, shoulder, z),
        ],
        coat,
    )  # fmt: skip
    for arm in (-1, 1):
        hand = project(x + arm * wide * 1.3 + lean * 2.2, hip + 0.1, z)
        canvas.line([project(x + arm * wide + lean, shoulder - 0.05, z), hand], pixels(0.1, z),
                    coat)  # fmt: skip
    head = project(x + lean * 1.4, base + height * 0.92, z)
    canvas.ellipse(head, pixels(height * 0.058, z), pixels(height * 0.075, z), skin)
    hair = add((0.12, 0.09, 0.07))
    canvas.ellipse((head[0], head[1] - pixels(height * 0.035, z)), pixels(height * 0.058, z),
                   pixels(height * 0.045, z), hair)  # fmt: skip
    if chance(rng, 0.3):
        bag = project(x + wide * 1.2, base + height * 0.5, z)
        canvas.ellipse(bag, pixels(0.14, z), pixels(0.18, z), add(pick(rng, CLOTHES)))


def bicyclist(canvas: Canvas, rng: Random, x: float, z: float) -> None:
    """Someone on a bicycle, from the side or from behind; now and then a parked bicycle."""
    canvas.new_object()
    project, pixels = canvas.camera.project, canvas.camera.pixels
    frame = canvas.paint(Paint(vary(rng, pick(rng, PAINTWORK), 0.4), Raw.BICYCLIST, z))
    tire = canvas.paint(Paint((0.07, 0.07, 0.07), Raw.BICYCLIST, z))
    radius, line = pixels(0.34, z), max(pixels(0.07, z), 1.2)
    canvas.round_shadow(x, z, 0.5, 0.3, 0.7)
    parked = chance(rng, 0.15)
    if chance(rng, 0.45):  # From behind or the front.
        canvas.ellipse(project(x, 0.34, z), max(radius * 0.18, 1), radius, tire)
        canvas.line([project(x - 0.25, 1.0, z), project(x + 0.25, 1.0, z)], line, frame)
        if not parked:
            trousers = canvas.paint(Paint(pick(rng, CLOTHES), Raw.BICYCLIST, z, 0.06))
            for leg in (-0.14, 0.14):
                canvas.line([project(x + leg * 0.7, 0.95, z), project(x + leg, 0.25, z)],
                            pixels(0.15, z), trousers)  # fmt: skip
            _person(canvas, rng, x, 0.25, z, 1.55, Raw.BICYCLIST, legs=False)
        return
    turn = 1 if chance(rng, 0.5) else -1
    for hub in (-0.52, 0.52):
        canvas.ring(project(x + hub, 0.34, z), radius, radius, line, tire)
    saddle, pedal = (x - turn * 0.2, 0.95), (x, 0.3)
    bars, front, rear = (x + turn * 0.4, 1.0), (x + turn * 0.52, 0.34), (x - turn * 0.52, 0.34)
    for a, b in ((saddle, pedal), (pedal, bars), (saddle, rear), (bars, front), (rear, pedal)):
        canvas.line([project(*a, z), project(*b, z)], line, frame)
    if not parked:
        trousers = canvas.paint(Paint(pick(rng, CLOTHES), Raw.BICYCLIST, z, 0.06))
        knee = (x + turn * 0.15, 0.65)
        for a, b in ((saddle, knee), (knee, pedal)):
            canvas.line([project(*a, z), project(*b, z)], pixels(0.17, z), trousers)
        _person(canvas, rng, saddle[0], 0.25, z, 1.55, Raw.BICYCLIST, legs=False,
                lean=turn * 0.18)  # fmt: skip


def clutter(canvas: Canvas, rng: Random, x: float, z: float) -> None:
    """A bin, a box or a cart: things CamVid leaves unlabeled."""
    canvas.new_object()
    color = vary(rng, pick(rng, (*CLOTHES, *PAINTWORK)), 0.3)
    number = canvas.paint(Paint(color, Raw.VOID, z, 0.06, 0.1))
    half, height = uniform(rng, 0.25, 0.7), uniform(rng, 0.6, 1.4)
    canvas.round_shadow(x, z, half, 0.4, 0.8)
    canvas.polygon(_box(canvas, x - half, x + half, 0, height, z), number)
    top = canvas.paint(Paint(shade(color, 1.4), Raw.VOID, z))
    canvas.polygon(_box(canvas, x - half, x + half, height * 0.85, height, z), top)
